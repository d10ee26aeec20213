"""Two clusters joined by their gateways: names, protocols, access and identities.

Rules: ordinary programs in ordinary pods, which know only a name. The servers report who they are
and what they got. The log of each proxy shows which peers it has verified. Splits and failures have
their own files."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
import trio

from lab.capture import Capture
from lab.clusters import Clusters
from lab.pod import Pod
from lab.sidecar import Authority
from tests.e2e.clusters import (
    GATEWAY,
    GRPC,
    HTTP,
    MAIL,
    ask,
    clusters,
    header,
    member,
    resolved,
    web_server,
)
from tests.e2e.conftest import Laboratory
from tests.e2e.database import POSTGRES, postgres, psql
from tests.e2e.stage import WEB, Curled, client, counted, curl, eventually, logged, serve

pytestmark = [pytest.mark.lab, pytest.mark.real]

VERSIONS = pytest.mark.parametrize("version", ["-4", "-6"])
ID = "spiffe://cluster.local/ns/default/sa/"


@pytest.fixture(scope="module")
def made(laboratory: Laboratory) -> Clusters:
    async def build() -> Clusters:
        made = clusters(laboratory.lab, "west", "east")
        west, east = made.meshes["west"], made.meshes["east"]
        member(made, "west", "web")
        member(made, "west", "guest")
        strict = {"inbound": {"require_identity": True, "allow": {str(WEB): [GATEWAY]}}}
        c, stock, db, hidden = (
            member(made, "east", name, **(strict if name == "c" else {}))
            for name in ("c", "stock", "db", "hidden")
        )
        east.service("c", [c], HTTP, export=True)
        east.service("stock", [stock], {GRPC: "http2"}, export=True)
        east.service("db", [db], {POSTGRES: "opaque", MAIL: "opaque"}, export=True)
        east.service("hidden", [hidden], HTTP)
        west.service("home", [member(made, "west", "home")], HTTP, export=True)
        made.sidecar("east", "gateway").settings["gateway"] = {"allow": [f"{ID}web", f"{ID}home"]}
        west.cluster.pod("stranger")
        async with trio.open_nursery() as nursery:
            for cluster, pod in (("east", "c"), ("east", "hidden"), ("west", "home")):
                nursery.start_soon(web_server, made, cluster, pod)
            nursery.start_soon(lambda: serve(stock, "grpc_service", str(GRPC), "stock", port=GRPC))
            nursery.start_soon(postgres, db)
            nursery.start_soon(lambda: serve(db, "mail", str(MAIL), port=MAIL))
            nursery.start_soon(made.start)
        return made

    return laboratory.run(build)


def web(made: Clusters) -> Pod:
    return made.pod("west", "web")


# Names and protocols...


@VERSIONS
@pytest.mark.parametrize(
    "name",
    [
        "c.east",
        "c.default.east",
        "c-east",
        "c-east.default",
        "c-east.default.svc",
        "c-east.default.svc.cluster.local",
        "C.East.",
    ],
)
async def test_a_service_of_the_other_cluster_has_all_its_names(
    made: Clusters, name: str, version: str
) -> None:
    response = await ask(web(made), f"http://{name}:{WEB}/head", version)
    assert response["name"] == "c of east"
    assert header(response, "host") == [f"c.default.svc.cluster.local:{WEB}"]


async def test_an_unknown_name_is_not_resolved(made: Clusters) -> None:
    for name in ("hidden.east", "nobody.east", "c.north"):
        assert (await curl(web(made), f"http://{name}:{WEB}/")).exit == 6, name


async def test_http_needs_no_name_service(made: Clusters) -> None:
    """A client that dials the gateway itself selects one of the services behind it by its
    authority."""
    response = await ask(
        web(made), f"http://c.east:{WEB}/head", "--connect-to", f"::{made.legs['east'].ipv4}:14143"
    )
    assert response["name"] == "c of east"


async def test_an_authority_chooses_nothing_at_an_address_outside_of_the_mesh(
    made: Clusters,
) -> None:
    """As a reverse proxy sends it that keeps the Host of a foreign name. No route leads to the
    address."""
    for authority in (f"c.east:{WEB}", f"c:{WEB}", f"c.default.svc.cluster.local:{WEB}"):
        for version in ("--http1.1", "--http2-prior-knowledge"):
            answer = await curl(
                web(made), version, "-H", f"Host: {authority}", f"http://203.0.113.1:{WEB}/head"
            )
            assert (answer.status, answer.error) == (502, "destination_ip_unroutable"), (
                authority,
                answer,
            )
        # In absolute form, as to a forward proxy.
        answer = await curl(web(made), "-x", "http://203.0.113.1:3128", f"http://{authority}/head")
        assert (answer.status, answer.error) == (502, "destination_ip_unroutable"), (
            authority,
            answer,
        )


async def test_http2_by_prior_knowledge_to_a_server_of_http1(made: Clusters) -> None:
    response = await ask(web(made), f"http://c.east:{WEB}/head", "--http2-prior-knowledge")
    assert response["name"] == "c of east"


async def test_grpc_in_all_its_kinds(made: Clusters) -> None:
    seen = await client(web(made), "grpc-kinds", "stock.east", str(GRPC), "tangerine")
    kinds = ("unary", "server", "client", "both")
    assert {kind: seen.get(kind) for kind in kinds} == dict.fromkeys(kinds, True), seen


@pytest.mark.parametrize("sslmode", ["disable", "prefer"])
async def test_psql_by_name(made: Clusters, sslmode: str) -> None:
    done = await psql(web(made), "db.east", "select 6 * 7", sslmode=sslmode)
    assert done.text == "42\n", done.stderr.decode()


async def test_psql_moves_a_large_table(made: Clusters) -> None:
    rows = b"".join(b"%d\t%s\n" % (number, b"x" * (number % 200)) for number in range(20_000))
    script = (
        b"create temp table t (n int, text text);\n\\copy t from stdin\n"
        + rows
        + b"\\.\n\\copy (select * from t order by n) to stdout\n"
    )
    done = await psql(web(made), "db.east", "", stdin=script)
    assert done.stdout == rows, done.stderr.decode()


async def test_the_first_bytes_of_a_server_arrive_at_once(made: Clusters) -> None:
    seen = await client(web(made), "mail", "db.east", str(MAIL), "tangerine")
    assert seen.get("refused") == 0, seen


async def test_large_bodies_go_through_unchanged(made: Clusters) -> None:
    size = 16 * 1024 * 1024
    down = await client(web(made), "download", "c.east", str(WEB), str(size))
    up = await client(web(made), "upload", "c.east", str(WEB), str(size))
    assert (down.get("bytes"), up.get("right")) == (size, True), (down, up)


async def test_the_other_way_round_through_the_gateway_with_an_address_of_its_own(
    made: Clusters,
) -> None:
    response = await ask(made.pod("east", "c"), f"http://home.west:{WEB}/head")
    assert response["name"] == "home of west"
    assert header(response, "isthmus-client-id") == [f"{ID}c"]


# Identities...


async def test_the_three_proxies_have_verified_each_other(made: Clusters) -> None:
    gateway = made.sidecar("east", "gateway")
    await ask(web(made), f"http://c.east:{WEB}/head/hops")
    first = await logged(made.sidecar("west", "web"), "/head/hops", direction="outbound")
    second = await logged(gateway, "/head/hops", direction="gateway")
    third = await logged(made.sidecar("east", "c"), "/head/hops", direction="inbound")
    assert (first["upstream_identity"], second["identity"]) == (GATEWAY, f"{ID}web")
    assert (second["upstream_identity"], third["identity"]) == (f"{ID}c", GATEWAY)
    # East is behind NAT: west's sidecar connected to the border, and the gateway saw a connection
    # from west's border.
    leg, border = made.legs["east"], made.lab.wide_area().border(made.meshes["west"].cluster).leg
    assert first["upstream"] == f"{leg.ipv4}:14143"
    assert second["peer"].startswith(f"{border.ipv4}:")


async def test_opaque_bytes_are_carried_between_verified_identities_too(made: Clusters) -> None:
    assert (await psql(web(made), "db.east", "select 1")).ok
    first = await logged(
        made.sidecar("west", "web"), f":{POSTGRES}", direction="outbound", upstream_identity=GATEWAY
    )
    assert first["message"] == "connection"
    second = await logged(
        made.sidecar("east", "gateway"),
        "db.default.svc.cluster.local:5432",
        method="CONNECT",
        identity=f"{ID}web",
    )
    assert second["upstream_identity"] == f"{ID}db"
    third = await logged(
        made.sidecar("east", "db"), "connection", direction="inbound", identity=GATEWAY
    )
    assert (third["protocol"], third["tls"]) == ("isthmus-tcp-confirmed", "TLSv1.3")


async def test_the_server_gets_the_identity_and_the_path_of_the_request(made: Clusters) -> None:
    response = await ask(web(made), f"http://c.east:{WEB}/head")
    assert header(response, "isthmus-client-id") == [f"{ID}web"]
    (way,) = header(response, "forwarded")
    assert "by=" in way
    assert "web.default.sa.cluster.local" in way


FORGED = ["isthmus-client-id", "Isthmus-Client-ID", "l5d-client-id", "isthmus_client_id"]


@pytest.mark.parametrize("name", FORGED)
async def test_no_client_can_claim_another_identity(made: Clusters, name: str) -> None:
    response = await ask(web(made), f"http://c.east:{WEB}/head", "-H", f"{name}: {ID}boss")
    assert header(response, "isthmus-client-id") == [f"{ID}web"]
    assert f"{ID}boss" not in json.dumps(response)


async def test_on_the_wide_area_everything_is_tls(made: Clusters) -> None:
    home = made.pod(
        "west", "home"
    )  # its sidecar has no connections that are older than the capture
    async with Capture(home) as wire:
        await ask(home, f"http://c.east:{WEB}/head", "-H", "X-Secret: tangerine")
        assert (await psql(home, "db.east", "select 'tangerine'")).ok
        verdict = wire.verdict(14143)
        assert verdict.ok, verdict.problems
        assert not wire.contains(b"tangerine")
        assert {fact.server_name for fact in verdict.facts if fact.server_name} == {
            "gateway.isthmus.sa.cluster.local"
        }


# Access...


async def direct(
    made: Clusters, authority: Authority | None, account: str, host: str, *arguments: str
) -> Curled:
    """curl from a pod without a sidecar to east's gateway, with a certificate or without one."""
    stranger, shown = made.pod("west", "stranger"), []
    if authority is not None:
        issued = authority.issue(authority.identity(account))
        for flag, name, data in (
            ("--cert", "c.pem", issued.certificate_pem),
            ("--key", "k.pem", issued.key_pem),
        ):
            file = stranger.directory / name
            await trio.Path(file).write_bytes(data)
            await trio.Path(file).chmod(0o644)
            shown += [flag, str(file)]
    address = made.legs["east"].ipv4
    # The server name has to be that of a workload. Otherwise the gateway cannot know that the
    # handshake is for itself.
    gate = "gateway.isthmus.sa.cluster.local"
    to = [
        "--connect-to",
        f"{gate}:443:{address}:14143",
        "-k",
        "--http1.1",
        "-H",
        f"Host: {host}",
        "-H",
        "X: y",
    ]
    return await curl(stranger, *shown, *to, *arguments, f"https://{gate}/head")


EXPORTED = f"c.default.svc.cluster.local:{WEB}"


async def test_a_member_on_the_list_is_served(made: Clusters) -> None:
    answer = await direct(made, made.meshes["west"].authority, "web", EXPORTED)
    assert (answer.status, json.loads(answer.body)["name"]) == (200, "c of east")


async def test_a_member_that_is_not_on_the_list_is_refused(made: Clusters) -> None:
    answer = await direct(made, made.meshes["west"].authority, "guest", EXPORTED)
    assert (answer.status, answer.error) == (403, "http_request_denied")
    through = await curl(made.pod("west", "guest"), f"http://c.east:{WEB}/")
    assert (through.status, through.error) == (403, "http_request_denied")


async def test_a_certificate_of_another_root_is_refused_in_the_handshake(made: Clusters) -> None:
    answer = await direct(made, Authority(), "web", EXPORTED)
    assert (answer.status, answer.body) == (0, b"")


async def test_a_client_without_a_certificate_is_refused(made: Clusters) -> None:
    answer = await direct(made, None, "", EXPORTED)
    assert (answer.status, answer.body) == (0, b"")


async def test_clear_text_is_refused(made: Clusters) -> None:
    answer = await curl(
        made.pod("west", "stranger"),
        "-H",
        f"Host: {EXPORTED}",
        f"http://{made.legs['east'].ipv4}:14143/head",
    )
    assert (answer.status, answer.error) == (403, "http_request_denied")


@pytest.mark.parametrize(
    "host",
    [
        "hidden.default.svc.cluster.local:8080",
        "c.default.svc.cluster.local:81",
        "nobody.default.svc.cluster.local",
        "home.west:8080",
        "x",
    ],
)
async def test_what_is_not_exported_is_not_there(made: Clusters, host: str) -> None:
    answer = await direct(made, made.meshes["west"].authority, "web", host)
    assert (answer.status, answer.error) == (404, "destination_not_found")


async def test_not_even_by_its_address(made: Clusters) -> None:
    """Nor does a gateway open a tunnel to an address, or to a service that is not exported."""
    hidden = made.pod("east", "hidden")
    answer = await direct(made, made.meshes["west"].authority, "web", f"{hidden.ipv4}:{WEB}")
    assert answer.status == 404
    stranger = made.pod("west", "stranger")
    code = """
import socket, ssl, sys
host, certificate, key, authority = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["http/1.1"])
context.load_cert_chain(certificate, key)
plain = socket.create_connection((host, 14143), timeout=20)
with context.wrap_socket(plain, server_hostname="gateway.isthmus.sa.cluster.local") as stream:
    stream.sendall(f"CONNECT {authority} HTTP/1.1\\r\\nHost: {authority}\\r\\n\\r\\n".encode())
    print(stream.recv(4096).split()[1].decode())
"""
    files = [str(stranger.directory / name) for name in ("c.pem", "k.pem")]
    for target in (
        f"{hidden.ipv4}:{WEB}",
        f"hidden.default.svc.cluster.local:{WEB}",
        "127.0.0.1:4191",
        f"{made.pod('east', 'gateway').ipv4}:4191",
    ):
        done = await stranger.run_python(code, made.legs["east"].ipv4, *files, target)
        assert done.text.strip() == "404", (target, done.stderr)


async def test_a_gateway_with_a_wrong_identity_gets_no_request(made: Clusters) -> None:
    """Another member of the mesh, with a certificate of the same root, has the gateway's
    address."""
    border = made.lab.wide_area().border(made.meshes["east"].cluster)
    hidden, gateway = made.pod("east", "hidden"), made.pod("east", "gateway")
    border.publish(14143, hidden, WEB)
    try:
        answer = await curl(web(made), "-H", "Connection: close", f"http://c.east:{WEB}/other")
        seen: list[Any] = [answer]

        async def refused() -> bool:
            # The request or the probe that finds it reports it once. Then the gateway's circuit is
            # open, with the reason.
            seen.append(await curl(web(made), f"http://c.east:{WEB}/other"))
            return (
                seen[-1].error in ("tls_certificate_error", "destination_unavailable")
                and b"sa/gateway was expected" in seen[-1].body
            )

        await eventually(refused, "the other one is refused for its name")
    finally:
        border.publish(14143, gateway, 4143)

    async def back() -> bool:
        return (await curl(web(made), f"http://c.east:{WEB}/")).status == 200

    await eventually(back, "the gateway is back")


async def test_requests_to_another_cluster_are_counted(made: Clusters) -> None:
    near = made.sidecar("west", "web")
    before = await counted(near, "isthmus_remote_attempts_total", cluster="east", reason="name")
    await ask(web(made), f"http://c.east:{WEB}/head")
    assert (
        await counted(near, "isthmus_remote_attempts_total", cluster="east", reason="name")
        == before + 1
    )


async def test_a_name_has_a_virtual_address_of_each_family(made: Clusters) -> None:
    assert ipaddress.ip_address(await resolved(web(made), "c.east")) in ipaddress.ip_network(
        "240.0.0.0/4"
    )
    assert ipaddress.ip_address(await resolved(web(made), "c.east", 6)) in ipaddress.ip_network(
        "fd69:7374:686d:7573::/64"
    )
