"""Traffic that would come back to the proxy that it came from: refused at once, counted and logged,
with little CPU time.

Rules: each round of a loop that is not stopped takes a connection and two descriptors. So a loop
shows in the proxy's CPU time and in its open connections. Other traffic must continue."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio

from lab.pod import Pod
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    LAST_GET,
    WEB,
    Pair,
    counted,
    curl,
    eventually,
    exchange_raw,
    logged,
    web_and_echo,
)

pytestmark = [pytest.mark.lab, pytest.mark.real]

OUTBOUND, INBOUND = 4140, 4143
HELLO = b"hello from the shop"
CONNECTIONS = 50
BUSY = (
    # Seconds of CPU time that the refusal of so many connections may take; a loop takes all there
    # is
    2.0
)


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    return laboratory.run(web_and_echo, laboratory.lab)


async def refused(pod: Pod, host: str, port: int, data: bytes) -> None:
    """The connection ends at once, and returns nothing, or for HTTP an error response of the proxy
    itself."""
    assert HELLO not in await exchange_raw(pod, host, port, data)


async def many(pod: Pod, host: str, port: int, data: bytes) -> None:
    for _ in range(CONNECTIONS // 10):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(refused, pod, host, port, data)


async def settled(sidecar: Sidecar) -> bool:
    return await counted(sidecar, "isthmus_connections_open", direction="outbound") == 0


@pytest.mark.parametrize("data", [LAST_GET, b"\x00bytes", b""], ids=["http", "bytes", "nothing"])
@pytest.mark.parametrize(
    ("place", "port"),
    [
        ("127.0.0.1", OUTBOUND),
        ("::1", OUTBOUND),
        ("ipv4", INBOUND),
        ("ipv6", INBOUND),
        ("127.0.0.1", INBOUND),
        ("ipv4", OUTBOUND),
    ],
)
async def test_an_application_that_connects_to_its_own_proxy_is_refused(
    pair: Pair, place: str, port: int, data: bytes
) -> None:
    host = {"ipv4": pair.web.ipv4, "ipv6": pair.web.ipv6}.get(place, place)
    if (place, port) == ("ipv4", OUTBOUND):
        # The outbound proxy listens on loopback only, so there is no listener at that address.
        with pytest.raises(OSError, match="refused"):
            await pair.web.connect(host, port)
        return
    process = pair.near.running()
    before, cpu = (
        await counted(pair.near, "isthmus_loops_total", kind="own_listener"),
        process.cpu_seconds(),
    )
    await many(pair.web, host, port, data)
    assert process.cpu_seconds() - cpu < BUSY
    assert (
        await counted(pair.near, "isthmus_loops_total", kind="own_listener") == before + CONNECTIONS
    )
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    await logged(
        pair.near,
        f"the connection was made to {shown}, which is this proxy's own listener",
        reason="loop",
    )
    assert HELLO in (await curl(pair.web, f"http://shop:{WEB}/")).body


@pytest.mark.parametrize("data", [LAST_GET, b"\x00bytes"], ids=["http", "bytes"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("port", [INBOUND, OUTBOUND])
async def test_another_pods_proxy_port_is_refused_by_that_proxy(
    pair: Pair, port: int, version: int, data: bytes
) -> None:
    before = await counted(pair.far, "isthmus_loops_total", kind="own_listener")
    processes = [sidecar.running() for sidecar in pair.both]
    cpu = [process.cpu_seconds() for process in processes]
    for _ in range(10):
        await refused(pair.web, pair.shop.address(version), port, data)
    assert await counted(pair.far, "isthmus_loops_total", kind="own_listener") >= before + 10
    for process, old in zip(processes, cpu, strict=True):
        assert process.cpu_seconds() - old < BUSY
    await logged(pair.far, "which is this proxy's own listener", reason="loop", direction="inbound")
    assert HELLO in (await curl(pair.web, f"http://shop:{WEB}/")).body


async def test_a_client_of_another_pods_proxy_port_gets_the_reason(pair: Pair) -> None:
    seen = await curl(pair.web, f"http://{pair.shop.ipv4}:{INBOUND}/")
    assert seen.status == 502
    assert seen.error.startswith(("tls_", "connection_"))


@pytest.mark.parametrize("target", [OUTBOUND, INBOUND])
async def test_a_directory_that_names_the_proxys_own_port_is_answered_508(
    pair: Pair, target: int
) -> None:
    """As when a directory has the sidecar's port as the application's."""
    document = pair.mesh.document()
    document["services"][0]["ports"] = [
        {"port": WEB, "target_port": target},
        {"port": ECHO, "target_port": target, "protocol": "opaque"},
    ]
    await take(pair.far, document)
    try:
        loops, cpu = (
            await counted(pair.far, "isthmus_loops_total", kind="own_target"),
            pair.far.running().cpu_seconds(),
        )
        for _ in range(10):
            seen = await curl(pair.shop, f"http://{pair.service.ipv4}:{WEB}/")
            assert (seen.status, seen.error) == (508, "proxy_loop_detected")
            assert b"own listener" in seen.body
        assert await exchange_raw(pair.shop, pair.service.ipv4, ECHO, b"\x00bytes") == b""
        assert await counted(pair.far, "isthmus_loops_total", kind="own_target") == loops + 11
        assert pair.far.running().cpu_seconds() - cpu < BUSY
    finally:
        with trio.move_on_after(60, shield=True):
            await take(pair.far, pair.mesh.document())


async def take(sidecar: Sidecar, document: dict[str, Any]) -> None:
    before = await counted(sidecar, "isthmus_directory_reloads_total", result="ok")
    sidecar.write_directory(document)
    await eventually(lambda: _more(sidecar, before), "the directory is loaded")


async def _more(sidecar: Sidecar, before: float) -> bool:
    return await counted(sidecar, "isthmus_directory_reloads_total", result="ok") > before


@pytest.mark.parametrize("version", [4, 6])
async def test_a_pod_may_call_its_own_service_and_its_own_address(pair: Pair, version: int) -> None:
    loops = await counted(pair.far, "isthmus_loops_total")
    for address in (pair.service.address(version), pair.shop.address(version)):
        host = f"[{address}]" if version == 6 else address
        for _ in range(3):
            assert HELLO in (await curl(pair.shop, f"http://{host}:{WEB}/")).body
        stream = await pair.shop.connect(address, ECHO)
        async with stream:
            await stream.send_all(b"to myself")
            assert await stream.receive_some() == b"to myself"
    assert await counted(pair.far, "isthmus_loops_total") == loops


async def test_nothing_stays_open_after_all_of_it(pair: Pair) -> None:
    for sidecar in pair.both:
        await eventually(partial(settled, sidecar), f"no connection is open in {sidecar.pod.name}")
        assert await counted(sidecar, "isthmus_errors_total", reason="internal") == 0
