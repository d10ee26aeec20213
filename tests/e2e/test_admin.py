"""The administration port, as probes and Prometheus see it."""

from __future__ import annotations

from functools import partial

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    WEB,
    Pair,
    counted,
    curl,
    echo_server,
    eventually,
    exchange_raw,
    logged,
    prepare,
    web_server,
)
from tests.kit.build import COMPILED
from tests.kit.library import LIBRARY

pytestmark = [pytest.mark.lab, pytest.mark.real]

ADMIN = "http://127.0.0.1:4191"
PLAIN = 9000  # a port of the shop that is not redirected


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        pair = prepare(
            laboratory.lab,
            {WEB: "detect", ECHO: "opaque", 4191: "http1"},
            shop={"intercept": {"skip_inbound_ports": [PLAIN]}},
        )
        pair.cluster.pod("prometheus")
        await web_server(pair.shop)
        await echo_server(pair.shop)
        await web_server(pair.shop, PLAIN)
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


@pytest.mark.parametrize(
    ("path", "body"), [("/live", b"live\n"), ("/ready", b"ready\n"), ("/live?probe=1", b"live\n")]
)
async def test_probes(pair: Pair, path: str, body: bytes) -> None:
    seen = await curl(pair.shop, ADMIN + path)
    assert (seen.status, seen.body, seen.headers["content-type"]) == (
        200,
        body,
        ["text/plain; charset=utf-8"],
    )


async def test_head_other_methods_and_other_paths(pair: Pair) -> None:
    head = await curl(pair.shop, "-I", f"{ADMIN}/ready")
    assert (head.status, head.headers["content-length"]) == (200, ["6"])
    assert "\n\n" not in head.body.decode().replace("\r", "").rstrip("\n")
    post = await curl(pair.shop, "-d", "x", f"{ADMIN}/ready")
    assert (post.status, post.headers["allow"]) == (405, ["GET, HEAD"])
    missing = await curl(pair.shop, f"{ADMIN}/")
    assert (missing.status, missing.body) == (404, b"there are /live, /ready and /metrics\n")
    assert (await curl(pair.shop, "-0", f"{ADMIN}/live")).body == b"live\n"


@pytest.mark.parametrize("version", [4, 6])
async def test_it_is_reached_from_outside_without_the_mesh(pair: Pair, version: int) -> None:
    address = pair.shop.address(version)
    host = f"[{address}]" if version == 6 else address
    seen = await curl(pair.cluster.pods["prometheus"], f"http://{host}:4191/metrics")
    assert seen.status == 200
    assert seen.headers["content-type"] == ["text/plain; version=0.0.4; charset=utf-8"]


@pytest.mark.parametrize("version", [4, 6])
async def test_a_pod_of_the_mesh_reaches_the_admin_port_of_another_one(
    pair: Pair, version: int
) -> None:
    """By the pod's address, and by a service that has it as its target: no sidecar ends TLS
    there."""
    address = pair.shop.address(version)
    host = f"[{address}]" if version == 6 else address
    for path, body in (("/live", b"live\n"), ("/ready", b"ready\n")):
        seen = await curl(pair.web, f"http://{host}:4191{path}")
        assert (seen.status, seen.body, seen.error) == (200, body, "")
    seen = await curl(pair.web, f"-{version}", "http://shop:4191/live")
    assert (seen.status, seen.body, seen.error) == (200, b"live\n", "")
    line = await logged(pair.near, "/live", direction="outbound", upstream=f"{host}:4191")
    assert "upstream_identity" not in line


async def test_a_port_that_is_not_redirected_is_clear_text_where_the_directory_says_so(
    pair: Pair,
) -> None:
    seen = await curl(pair.web, f"http://{pair.shop.ipv4}:{PLAIN}/")
    assert (seen.status, seen.error) == (502, "tls_protocol_error"), "never in clear text by itself"
    document = pair.mesh.document()
    for endpoint in document["services"][0]["endpoints"]:
        endpoint["skip_ports"] = [4191, PLAIN]
    pair.near.write_directory(document)
    await logged(pair.near, f"at [{PLAIN}], now in skip_ports")
    assert (await curl(pair.web, f"http://{pair.shop.ipv4}:{PLAIN}/")).status == 502, (
        "a pod in use moves to clear text only by name"
    )
    document["allow_identity_loss"] = ["default/shop"]
    pair.near.write_directory(document)

    async def answered() -> bool:
        return (await curl(pair.web, f"http://{pair.shop.ipv4}:{PLAIN}/")).status == 200

    await eventually(answered, "the directory is loaded")
    seen = await curl(pair.web, f"http://shop:{WEB}/")
    assert seen.status == 200
    line = await logged(pair.near, "200", direction="outbound", authority=f"shop:{WEB}")
    assert line["upstream_identity"] == str(pair.far.identity), (
        "all other ports are dialled with mutual TLS as before"
    )


async def test_bad_requests_get_an_error_response_there_too(pair: Pair) -> None:
    assert (await exchange_raw(pair.shop, "127.0.0.1", 4191, b"nonsense\r\n\r\n")).startswith(
        b"HTTP/1.1 400"
    )
    assert (await curl(pair.shop, f"{ADMIN}/live")).status == 200


async def test_the_metrics_can_be_parsed_and_keep_prometheus_rules(pair: Pair) -> None:
    await curl(pair.web, f"http://shop:{WEB}/")
    text = (await curl(pair.web, f"{ADMIN}/metrics")).body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name, family in families.items():
        assert family.documentation, name
        assert family.type in ("counter", "gauge", "histogram"), name
    wanted = """
        requests responses response_latency_seconds connections_opened connections_open connections_closed bytes tls_handshakes tls_failures
        detections detection_seconds loops errors certificate_expiry_timestamp_seconds root_expiry_timestamp_seconds build_info
        identity_reloads directory_reloads pool_connections dropped_logs
    """
    missing = {f"isthmus_{name}" for name in wanted.split()} - set(families)
    assert missing == set()
    assert "process_resident_memory_bytes" in families
    (build,) = families["isthmus_build_info"].samples
    # The running version is the one under test
    assert build.labels["compiled"] == ("yes" if COMPILED else "no")
    assert build.labels["tls"] == LIBRARY


async def test_requests_connections_and_bytes_are_counted_in_both_proxies(pair: Pair) -> None:
    places = ((pair.near, "outbound"), (pair.far, "inbound"))
    before = [await _numbers(sidecar, direction) for sidecar, direction in places]
    for _ in range(5):
        assert (await curl(pair.web, f"http://shop:{WEB}/stream/100000")).status == 200
    stream = await pair.web.connect(pair.service.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"x" * 1000)
        assert len(await stream.receive_some()) <= 1000
        for sidecar, direction in places:
            await eventually(
                partial(_open, sidecar, direction), "the connection is counted as open"
            )
    for (sidecar, direction), old in zip(places, before, strict=True):
        await eventually(
            partial(_all_closed, sidecar, direction),
            "all connections are counted as closed",
        )
        new = await _numbers(sidecar, direction)
        assert new["requests"] == old["requests"] + 5
        assert new["responses"] == old["responses"] + 5
        assert new["latency"] == old["latency"] + 5
        assert new["written"] >= old["written"] + 500_000 + 1000
        assert new["opened"] == new["closed"]


async def _numbers(sidecar: Sidecar, direction: str) -> dict[str, float]:
    samples: dict[str, tuple[str, dict[str, str]]] = {
        "requests": ("isthmus_requests_total", {"method": "GET"}),
        "responses": (
            "isthmus_responses_total",
            {"status_class": "2xx", "classification": "success"},
        ),
        "latency": ("isthmus_response_latency_seconds_count", {}),
        "written": ("isthmus_bytes_total", {"peer": "src", "io_direction": "transmit"}),
        "opened": ("isthmus_connections_opened_total", {}),
        "closed": ("isthmus_connections_closed_total", {}),
    }
    return {
        key: await counted(sidecar, name, direction=direction, **labels)
        for key, (name, labels) in samples.items()
    }


async def _open(sidecar: object, direction: str) -> bool:
    return await counted(sidecar, "isthmus_connections_open", direction=direction, peer="src") >= 1  # type: ignore[arg-type]


async def _all_closed(sidecar: object, direction: str) -> bool:
    return await counted(sidecar, "isthmus_connections_open", direction=direction) == 0  # type: ignore[arg-type]
