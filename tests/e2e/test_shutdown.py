"""The end of a proxy: after SIGTERM, exchanges in progress may finish within the grace period. A
second SIGTERM ends it at once.

Rules: the application gets SIGTERM at the same moment as its sidecar and may have work to finish.
So the outbound side serves it until it is idle. Every test ends a proxy, so every test has its
own."""

from __future__ import annotations

import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from lab.load import Load
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    LAST_GET,
    WEB,
    Pair,
    echo_server,
    eventually,
    exchange_raw,
    prepare,
    web_server,
)

pytestmark = pytest.mark.lab

SLOW = 8300
# Creates a file when it has a request, and responds when the file that the path names exists.
SLOW_SERVER = """
import http.server, os, socket, sys, time
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        print("asked", flush=True)
        while not os.path.exists(self.path[1:]):
            time.sleep(0.02)
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")
Server(("::", int(sys.argv[1])), Handler).serve_forever()
"""


GRACE = 60.0  # seconds: an earlier end did not wait for the whole period
SHORT = 4.0  # where the whole period is waited for


@pytest.fixture
def pair(laboratory: Laboratory, request: pytest.FixtureRequest) -> Pair:
    grace = getattr(request, "param", GRACE)

    async def build() -> Pair:
        settings = {"shutdown": {"grace": f"{grace:g}s"}}
        pair = prepare(
            laboratory.lab,
            {WEB: "detect", SLOW: "detect", ECHO: "opaque"},
            web=settings,
            shop=settings,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(web_server, pair.shop)
            nursery.start_soon(echo_server, pair.shop)
            nursery.start_soon(lambda: pair.shop.python("slow", SLOW_SERVER, str(SLOW), port=SLOW))
            nursery.start_soon(pair.mesh.start)
        return pair

    return laboratory.run(build)


def stop(sidecar: Sidecar) -> float:
    """Send SIGTERM to a proxy; returns the time."""
    sidecar.running().signal(signal.SIGTERM)
    return time.monotonic()


async def ended(sidecar: Sidecar) -> int:
    with trio.fail_after(GRACE / 2):
        return await sidecar.running().wait()


def in_background(nursery: trio.Nursery, function: Callable[[], Awaitable[bytes]]) -> list[bytes]:
    """Run `function`; its result will be in the list."""
    results: list[bytes] = []

    async def run() -> None:
        results.append(await function())

    nursery.start_soon(run)
    return results


def slow(pair: Pair, file: str) -> Callable[[], Awaitable[bytes]]:
    request = f"GET /{file} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n".encode()
    return lambda: exchange_raw(pair.web, pair.service.ipv4, SLOW, request, patience=GRACE)


async def test_an_idle_proxy_ends_at_once_with_exit_code_0(pair: Pair) -> None:
    stop(pair.far)
    assert await ended(pair.far) == 0


async def test_the_servers_proxy_finishes_the_requests_it_has_and_accepts_no_others(
    pair: Pair,
) -> None:
    async with trio.open_nursery() as nursery:
        answers = in_background(nursery, slow(pair, "go"))
        await pair.shop.processes["slow"].wait_line("asked")
        stop(pair.far)
        status, body = await eventually(lambda: _not_ready(pair.far), "not ready any more")
        assert (status, body) == (503, "not ready: shutting down\n")
        assert (await pair.far.admin("/live"))[0] == 200
        assert (await pair.far.admin("/metrics"))[0] == 200
        refused = await exchange_raw(pair.web, pair.service.ipv4, WEB, LAST_GET)
        assert refused.startswith(b"HTTP/1.1 502")
        assert b"error=connection_refused" in refused
        assert not answers
        (pair.shop.directory / "go").touch()
    assert answers[0].startswith(b"HTTP/1.1 200")
    assert answers[0].endswith(b"done")
    assert await ended(pair.far) == 0


async def _not_ready(sidecar: Sidecar) -> Any:
    status, body = await sidecar.admin("/ready")
    return (status, body) if status != 200 else None


async def test_the_clients_proxy_serves_the_application_until_it_is_quiet(pair: Pair) -> None:
    """While it has one connection open all its new ones are served, although the proxy got SIGTERM
    before the first."""
    stream = await pair.web.connect(pair.service.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        stop(pair.near)
        await eventually(lambda: _not_ready(pair.near), "not ready any more")
        for _ in range(3):
            answer = await exchange_raw(pair.web, pair.service.ipv4, WEB, LAST_GET)
            assert answer.startswith(b"HTTP/1.1 200")
            assert (
                await exchange_raw(pair.web, pair.service.ipv4, ECHO, b"last words", end=True)
                == b"last words"
            )
            await trio.sleep(1.2)  # longer than the time after which it would be taken for idle
            assert pair.near.running().alive
    assert await ended(pair.near) == 0


async def test_under_load_nothing_that_was_taken_is_lost(pair: Pair) -> None:
    """The client's proxy closes kept connections after a response, and announces that. The
    application uses new ones until the end. An idle connection stays open. Otherwise a moment
    without requests, as on a busy machine, would be the end."""
    held = await pair.web.connect(pair.service.ipv4, ECHO)
    async with held, Load(pair.web, pair.service.ipv4, WEB) as load:
        await load.more(100)
        stop(pair.near)
        await load.more(200)
        await load.stop()
    assert load.bad == {}
    assert load.connections > 12  # each request on its own connection now
    assert await ended(pair.near) == 0


async def test_the_servers_proxy_under_load_loses_nothing_that_it_has_taken(pair: Pair) -> None:
    async with Load(pair.web, pair.service.ipv4, WEB) as load:
        await load.more(100)
        stop(pair.far)
        assert await ended(pair.far) == 0
        await load.more(1, "502 connection_refused")
    # A few refusals open the circuit of the only endpoint. Then requests fail without being sent.
    assert set(load.bad) <= {"502 connection_refused", "503 destination_unavailable"}


async def test_a_kept_connection_without_a_request_does_not_hold_the_proxy_up(pair: Pair) -> None:
    stream = await pair.web.connect(pair.service.ipv4, WEB)
    async with stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        stop(pair.near)
        with trio.fail_after(GRACE / 2):
            assert await stream.receive_some() == b""
        assert await ended(pair.near) == 0


@pytest.mark.parametrize("pair", [SHORT], indirect=True, ids=[""])
async def test_a_connection_that_does_not_end_is_cut_at_the_grace(pair: Pair) -> None:
    stream = await pair.web.connect(pair.service.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        began = stop(pair.far)
        await eventually(lambda: _not_ready(pair.far), "not ready any more")
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"
        with trio.fail_after(GRACE), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert time.monotonic() - began > SHORT - 0.5
        assert await ended(pair.far) == 0


@pytest.mark.parametrize("side", ["near", "far"])
async def test_a_second_sigterm_ends_it_at_once(pair: Pair, side: str) -> None:
    sidecar: Sidecar = getattr(pair, side)
    async with trio.open_nursery() as nursery:
        answers = in_background(nursery, slow(pair, "never"))
        stream = await pair.web.connect(pair.service.ipv4, ECHO)
        async with stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await pair.shop.processes["slow"].wait_line("asked")
            stop(sidecar)
            await eventually(lambda: _not_ready(sidecar), "not ready any more")
            await trio.sleep(0.3)
            assert sidecar.running().alive
            stop(sidecar)
            assert await ended(sidecar) == 0
    assert not answers[0].endswith(b"done")


async def test_a_sidecar_that_is_killed_leaves_its_rules_and_starts_again(pair: Pair) -> None:
    """Without a proxy no traffic bypasses the rules. With a new one everything is as before."""
    pair.near.running().kill()
    await pair.near.running().wait()
    with pytest.raises(OSError, match="refused"):
        await pair.web.connect(pair.service.ipv4, WEB)
    await pair.near.start(intercept=False)
    assert (await exchange_raw(pair.web, pair.service.ipv4, WEB, LAST_GET)).startswith(
        b"HTTP/1.1 200"
    )
