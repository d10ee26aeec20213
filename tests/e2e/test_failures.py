"""Crashes, hangs and cut links under load: the client gets an error that says what failed and
where, and the errors end when the fault ends.

Rules: every request of the load has an outcome: the server's response, or a proxy's own with
Proxy-Status (RFC 9209). A connection may break within a response only if the response had started.
No proxy is restarted, except where that is the fault."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
import trio

from lab.faults import link_cut, paused
from lab.load import Load
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    WEB,
    Pair,
    counted,
    curl,
    echo_server,
    eventually,
    logged,
    prepare,
    web_server,
)

pytestmark = [pytest.mark.lab, pytest.mark.real]

HELLO = b"hello from the shop"
# Restarts are those of native sidecars, which the application outlives.
SETTINGS = {
    "log": {"access": True},
    "shutdown": {"grace": "60s", "outbound_minimum": "0s"},
    "tcp": {"connect_timeout": "30s", "handshake_timeout": "30s"},
}
PATIENCE = 1.0  # seconds: response_timeout
# The errors of the client's proxy while the circuit of the service's one endpoint is open.
BROKEN = "503 destination_unavailable"
IMPATIENT = {
    "log": {"access": True},
    "http": {"response_timeout": "1s"},
    "tcp": {"connect_timeout": "1s", "handshake_timeout": "1s"},
}


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        return await _built(laboratory, SETTINGS)

    return laboratory.run(build)


@pytest.fixture(scope="module")
def impatient(laboratory: Laboratory) -> Pair:
    """A pair whose client's proxy has short timeouts, for the tests that wait for them. In all
    other tests, a slow machine must not cause timeouts."""

    async def build() -> Pair:
        return await _built(laboratory, IMPATIENT)

    return laboratory.run(build)


@pytest.fixture(scope="module")
def patient(laboratory: Laboratory) -> Pair:
    """A pair whose requests wait for the endpoint for longer than a sidecar or an application takes
    to start on a busy machine. By default, they wait 3 s."""

    async def build() -> Pair:
        return await _built(laboratory, SETTINGS, {"queue": {"timeout": "25s"}})

    return laboratory.run(build)


async def _built(
    laboratory: Laboratory, settings: dict[str, Any], policy: dict[str, Any] | None = None
) -> Pair:
    pair = prepare(laboratory.lab, {WEB: "detect", ECHO: "opaque"}, web=settings, shop=SETTINGS)
    if settings is IMPATIENT:  # each request finds the fault by itself
        policy = {"breaker": {"failures": 0}}
    if policy is not None:
        pair.service.traits["policy"] = policy
    await web_server(pair.shop)
    await echo_server(pair.shop)
    await pair.mesh.start()
    return pair


def explained(load: Load, *statuses: str) -> bool:
    """Whether every failure is one of these statuses, with the type of the error after it."""
    return all(outcome.split()[0] in statuses and len(outcome.split()) == 2 for outcome in load.bad)


async def test_a_server_that_is_killed_under_load_and_comes_back(pair: Pair) -> None:
    server, pids = (
        pair.shop.processes[f"web-{WEB}"],
        [sidecar.running().pid for sidecar in pair.both],
    )
    async with Load(pair.web, pair.service.ipv4, WEB) as load:
        await load.more(100)
        server.kill()
        await server.wait()
        # The server's own proxy reports what is wrong. The client's proxy tries the one endpoint
        # again, and then fails the requests that have waited.
        await load.more(20, BROKEN)
        seen = await curl(pair.web, f"http://shop:{WEB}/")
        assert seen.status in (502, 503)
        assert seen.headers["proxy-status"][0].startswith(
            (
                "shop.default.inbound;error=connection_refused;",
                "web.default.outbound;error=destination_unavailable;",
            )
        )
        await web_server(pair.shop)
        await load.more(300)
    print(dict(load.outcomes))
    assert load.bad["502 connection_refused"], "those of the last trial"
    assert explained(load, "502", "503")
    assert [sidecar.running().pid for sidecar in pair.both] == pids
    assert (
        await counted(
            pair.far, "isthmus_errors_total", direction="inbound", reason="connect_refused"
        )
        >= 7
    ), "trials"
    await logged(pair.far, "connection refused", status=502)
    await clean(pair)


async def test_the_servers_sidecar_is_killed_under_load_and_comes_back(pair: Pair) -> None:
    near = pair.near.running().pid
    async with Load(pair.web, pair.service.ipv4, WEB) as load:
        await load.more(100)
        pair.far.running().kill()
        await pair.far.running().wait()
        await load.more(20, BROKEN)
        status = (await curl(pair.web, f"http://shop:{WEB}/")).headers["proxy-status"][0]
        assert status.startswith("web.default.outbound;error=")
        assert load.bad["502 connection_refused"]
        await pair.far.start(intercept=False)
        await load.more(300)
    print(dict(load.outcomes))
    assert explained(load, "502", "503")
    assert pair.near.running().pid == near
    await clean(pair)


async def test_the_servers_sidecar_is_restarted_politely_under_load(patient: Pair) -> None:
    """Its pod stays in the directory, so requests wait while it is down. None fails."""
    async with Load(patient.web, patient.service.ipv4, WEB) as load:
        await load.more(100)
        await patient.far.restart()
        await load.more(300)
    print(dict(load.outcomes))
    assert not load.bad
    await clean(patient)


async def test_a_server_that_is_restarted_at_once_loses_no_request(patient: Pair) -> None:
    """Requests in progress at the killed application are retried, because they are idempotent.
    Requests that came while it was down have waited."""
    server = patient.shop.processes[f"web-{WEB}"]
    async with Load(patient.web, patient.service.ipv4, WEB) as load:
        await load.more(100)
        server.kill()
        await server.wait()
        await web_server(patient.shop)
        await load.more(300)
    print(dict(load.outcomes))
    assert not load.bad
    await clean(patient)


async def test_a_server_that_hangs_is_given_up_after_the_response_timeout(impatient: Pair) -> None:
    async with Load(impatient.web, impatient.service.ipv4, WEB, clients=3) as load:
        await load.more(50)
        with paused(impatient.shop.processes[f"web-{WEB}"]):
            began = trio.current_time()
            seen = await curl(impatient.web, f"http://shop:{WEB}/")
            assert trio.current_time() - began > PATIENCE - 0.1
            assert (seen.status, seen.error) == (504, "http_response_timeout")
            await load.more(3, "504 http_response_timeout")
        await load.more(200)
    print(dict(load.outcomes))
    assert explained(load, "504", "503")
    assert (
        await counted(
            impatient.near, "isthmus_errors_total", direction="outbound", reason="upstream_timeout"
        )
        >= 4
    )
    await logged(impatient.near, "did not answer within 1.0 s", status=504)
    await clean(impatient)


async def test_a_sidecar_that_hangs_is_given_up_too(impatient: Pair) -> None:
    async with Load(impatient.web, impatient.service.ipv4, WEB, clients=3) as load:
        await load.more(50)
        with paused(impatient.far.running()):
            await load.more(3, "504 http_response_timeout")
            # Kept connections have been closed. A new one fails in the handshake.
            await load.more(3, "504 connection_timeout")
        await load.more(200)
    print(dict(load.outcomes))
    assert explained(load, "504", "503")
    await clean(impatient)


async def test_a_link_that_is_cut_under_load_and_mended(impatient: Pair) -> None:
    async with Load(impatient.web, impatient.service.ipv4, WEB, clients=3) as load:
        await load.more(50)
        with link_cut(impatient.shop):
            await load.more(3, "504 http_response_timeout")
            await load.more(3, "504 connection_timeout")
        await load.more(200)
    print(dict(load.outcomes))
    # When the neighbour's address is no longer known, the kernel itself reports that the host is
    # unreachable.
    assert explained(load, "504", "502", "503")
    assert set(load.bad) <= {
        "504 http_response_timeout",
        "504 connection_timeout",
        "502 destination_ip_unroutable",
        BROKEN,
    }
    await clean(impatient)


async def test_a_server_that_dies_within_a_response_is_not_taken_for_a_whole_response(
    pair: Pair,
) -> None:
    server = pair.shop.processes[f"web-{WEB}"]
    stream = await pair.web.connect(pair.service.ipv4, WEB)
    async with stream:
        await stream.send_all(b"GET /stream/10000000000 HTTP/1.1\r\nHost: shop\r\n\r\n")
        received = await stream.receive_some(65536)
        assert received.startswith(b"HTTP/1.1 200")
        server.kill()
        last = b""
        with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
            last = await _drain(stream)
        assert not last.endswith(b"0\r\n\r\n")
    await server.wait()
    await web_server(pair.shop)
    await clean(pair)


async def _drain(stream: trio.SocketStream) -> bytes:
    last = b""
    while piece := await stream.receive_some(65536):
        last = piece
    return last


async def test_an_opaque_connection_whose_server_dies_is_reset(pair: Pair) -> None:
    server = pair.shop.processes[f"echo-{ECHO}"]
    stream = await pair.web.connect(pair.service.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        server.kill()
        with trio.fail_after(40):
            # The kernel of a killed server ends its connections: with FIN if nothing was unread.
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""
    await server.wait()
    await echo_server(pair.shop)


async def clean(pair: Pair) -> None:
    """All requests succeed again, there was no unexpected error, and nothing is left of the
    fault."""

    async def answered() -> bool:
        return HELLO in (await curl(pair.web, f"http://shop:{WEB}/")).body

    await eventually(answered, "the service answers")
    for sidecar in pair.both:
        assert await counted(sidecar, "isthmus_errors_total", reason="internal") == 0
        assert [line for line in sidecar.logged() if "exception" in line] == []
        await eventually(
            partial(_nothing_active, sidecar),
            f"nothing is active in {sidecar.pod.name}",
        )


async def _nothing_active(sidecar: object) -> bool:
    return await counted(sidecar, "isthmus_pool_connections", state="active") == 0  # type: ignore[arg-type]
