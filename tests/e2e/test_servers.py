"""Servers other than web servers: a real PostgreSQL, and mail servers, which send first.

Rules: a port that is declared opaque causes no wait. An undeclared port works as well, after the
detection timeout if the server sends first."""

from __future__ import annotations

import pytest

from lab.process import Completed
from tests.e2e import database
from tests.e2e.conftest import Laboratory
from tests.e2e.database import POSTGRES, postgres
from tests.e2e.stage import MAIL, Pair, client, counted, eventually, exchange_raw, prepare, serve

pytestmark = [pytest.mark.lab, pytest.mark.real]

UNDECLARED = 15432
UNDECLARED_MAIL, PLAIN_MAIL = 2526, 25
# Seconds, configured below. A client that sends first has to do so earlier, even on a busy machine.
DETECTION = 6.0
HELLO = 3.0  # inbound.hello_timeout
PATIENCE = 15.0


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        timeouts = {"detect_timeout": f"{DETECTION:g}s"}
        ports = {
            POSTGRES: "opaque",
            UNDECLARED: "detect",
            MAIL: "opaque",
            UNDECLARED_MAIL: "detect",
            PLAIN_MAIL: "opaque",
        }
        pair = prepare(
            laboratory.lab,
            ports,
            web={"outbound": timeouts},
            shop={"inbound": {**timeouts, "hello_timeout": f"{HELLO:g}s"}},
        )
        pair.cluster.pod("stranger")
        await postgres(pair.shop)
        for port in (MAIL, UNDECLARED_MAIL, PLAIN_MAIL):
            await serve(pair.shop, "mail", str(port), port=port, name=f"mail-{port}")
        await pair.mesh.start()
        # The undeclared port leads to the same database.
        document = pair.mesh.document()
        next(port for port in document["services"][0]["ports"] if port["port"] == UNDECLARED)[
            "target_port"
        ] = POSTGRES
        pair.near.write_directory(document)
        await eventually(
            lambda: counted(pair.near, "isthmus_directory_reloads_total", result="ok"),
            "the directory is loaded",
        )
        return pair

    return laboratory.run(build)


async def psql(
    pair: Pair,
    sql: str,
    *,
    host: str = "shop",
    port: int = POSTGRES,
    sslmode: str = "prefer",
    stdin: bytes = b"",
) -> Completed:
    return await database.psql(pair.web, host, sql, port=port, sslmode=sslmode, stdin=stdin)


@pytest.mark.parametrize("sslmode", ["disable", "prefer"])
@pytest.mark.parametrize("port", [POSTGRES, UNDECLARED])
async def test_psql_talks_to_a_postgresql_server(pair: Pair, port: int, sslmode: str) -> None:
    before = await waited(pair)
    done = await psql(pair, "select 6 * 7, inet_server_port()", port=port, sslmode=sslmode)
    assert done.text == f"42|{POSTGRES}\n", done.stderr.decode()
    assert await waited(pair) == before  # the client sends first


@pytest.mark.parametrize("version", [4, 6])
async def test_psql_over_both_address_families(pair: Pair, version: int) -> None:
    done = await psql(pair, "select family(inet_client_addr())", host=pair.service.address(version))
    assert done.text.strip().isdigit(), done.stderr.decode()


async def test_psql_copies_a_large_table_in_and_out(pair: Pair) -> None:
    rows = b"".join(b"%d\t%s\n" % (number, b"x" * (number % 200)) for number in range(100_000))
    script = (
        b"create table t (n int, text text);\n\\copy t from stdin\n"
        + rows
        + b"\\.\nselect count(*), sum(length(text)) from t;\n\\copy (select * from t order by n) to"
        b" stdout\n"
    )
    done = await psql(pair, "", stdin=script)
    assert done.ok, done.stderr.decode()
    first, _, copied = done.stdout.partition(b"\n")
    assert first == b"100000|%d" % sum(number % 200 for number in range(100_000))
    assert copied == rows


async def test_an_error_of_the_database_is_the_clients_and_a_wrong_password_is_refused(
    pair: Pair,
) -> None:
    failed = await psql(pair, "select 1/0")
    assert failed.returncode == 1
    assert b"division by zero" in failed.stderr
    target = f"host=shop port={POSTGRES} user=tester dbname=postgres"
    refused = await pair.web.run(["psql", target, "-c", "select 1"], env={"PGPASSWORD": "wrong"})
    assert b"password authentication failed" in refused.stderr


async def test_the_database_was_reached_by_mutual_tls_only(pair: Pair) -> None:
    await psql(pair, "select 1")

    def lines() -> list[dict[str, object]]:
        return [
            line
            for line in pair.far.logged()
            if str(line.get("destination", "")).endswith(f":{POSTGRES}")
        ]

    await eventually(lines, "connections to the database in the log")
    assert {(line.get("protocol"), line.get("tls")) for line in lines()} == {
        ("isthmus-tcp-confirmed", "TLSv1.3")
    }
    assert {line.get("identity") for line in lines()} == {str(pair.near.identity)}


async def waited(pair: Pair) -> float:
    """How often a proxy has waited for a client's first bytes until the timeout."""
    return sum(
        [
            await counted(sidecar, "isthmus_detections_total", result="silent")
            for sidecar in pair.both
        ]
    )


async def test_the_first_bytes_of_a_server_arrive_at_once_on_a_declared_port(pair: Pair) -> None:
    before = await waited(pair)
    seen = await client(pair.web, "mail", "shop", str(MAIL), "tangerine")
    assert seen["refused"] == 0
    assert await waited(pair) == before


async def test_the_first_bytes_of_a_server_arrive_after_the_detection_timeout_on_an_undeclared_port(
    pair: Pair,
) -> None:
    seen = await client(pair.web, "mail", "shop", str(UNDECLARED_MAIL), "tangerine")
    assert seen["refused"] == 0
    assert DETECTION - 0.1 < seen["greeting_seconds"] < DETECTION + PATIENCE
    assert await counted(pair.near, "isthmus_detections_total", result="silent") >= 1


async def test_a_client_without_a_sidecar_gets_the_first_bytes_of_a_server_too(pair: Pair) -> None:
    """Its connection is not TLS. On a declared port the proxy knows that after a moment, on an
    undeclared one after the timeout."""
    stranger = pair.cluster.pods["stranger"]
    declared = await client(stranger, "mail", pair.shop.ipv4, str(PLAIN_MAIL), "tangerine")
    undeclared = await client(stranger, "mail", pair.shop.ipv4, str(UNDECLARED_MAIL), "tangerine")
    assert (declared["refused"], undeclared["refused"]) == (0, 0)
    assert declared["greeting_seconds"] > HELLO - 0.1
    assert undeclared["greeting_seconds"] > DETECTION - 0.1
    assert declared["greeting_seconds"] < undeclared["greeting_seconds"]


async def test_a_client_that_vanishes_does_no_harm(pair: Pair) -> None:
    for port in (MAIL, UNDECLARED_MAIL):
        received = await exchange_raw(pair.web, pair.service.ipv4, port, b"", end=True)
        assert received == b"" or received.startswith(b"220")
    assert (await client(pair.web, "mail", "shop", str(MAIL), "tangerine"))["refused"] == 0
