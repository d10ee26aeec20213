"""A peer that vanishes (its node dies, its link is cut) is detected within the configured times.

Rules: the link of a pod is cut, so that packets in both directions are lost and no kernel answers
for it. All other limits are long: what ends within `SOON` was ended by the limit under test. `EVER`
is the minimum that the other limits would have allowed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import trio

from lab.faults import link_cut
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    WEB,
    Pair,
    curl,
    echo_server,
    eventually,
    exchange_raw,
    prepare,
    web_server,
)

pytestmark = [pytest.mark.lab, pytest.mark.real]

NGHTTPD = 8443
PRIOR = "--http2-prior-knowledge"
SOON, EVER = 15.0, 60.0
SOCKETS: dict[str, Any] = {
    "tcp": {"user_timeout": "2s", "keepalive": "1s"},
    "http2": {"ping_interval": "1m", "ping_timeout": "1m"},
    "shutdown": {"grace": "60s"},
}
PINGS: dict[str, Any] = {
    "tcp": {"user_timeout": 0, "keepalive": 0},
    "http2": {"ping_interval": "1s", "ping_timeout": "1s"},
}


async def build(laboratory: Laboratory, settings: dict[str, Any], *, fast: bool) -> Pair:
    pair = prepare(
        laboratory.lab,
        {WEB: "detect", NGHTTPD: "detect", ECHO: "opaque"},
        web=settings,
        shop=settings,
    )
    for sidecar in pair.both:
        sidecar.settings = {**settings, "fast_path": fast}
    files = pair.shop.directory / "files"
    files.mkdir()
    (files / "index.html").write_text("hello from the shop\n")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(web_server, pair.shop)
        nursery.start_soon(echo_server, pair.shop)
        nursery.start_soon(
            lambda: pair.shop.start(
                "nghttpd", ["nghttpd", "--no-tls", "-d", str(files), str(NGHTTPD)], port=NGHTTPD
            )
        )
        nursery.start_soon(pair.mesh.start)
    return pair


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "ordinary"])
def pair(laboratory: Laboratory, request: pytest.FixtureRequest) -> Pair:
    return laboratory.run(build, laboratory, SOCKETS, fast=request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "ordinary"])
def pinging(laboratory: Laboratory, request: pytest.FixtureRequest) -> Pair:
    return laboratory.run(build, laboratory, PINGS, fast=request.param)


async def answers(pair: Pair) -> None:
    await eventually(lambda: _answers(pair), "the service answers again")


async def _answers(pair: Pair) -> bool:
    return (await curl(pair.web, f"http://shop:{WEB}/")).status == 200


async def test_a_request_on_a_kept_connection(pair: Pair) -> None:
    """The client's own connection is kept too, so that the request uses the pool, and the fast path
    if there is one."""
    stream = await pair.web.connect(pair.service.ipv4, WEB)
    async with stream:
        for _ in range(3):
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        with link_cut(pair.shop):
            began = time.monotonic()
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n")
            with trio.fail_after(EVER):
                answer = await stream.receive_some()
            assert time.monotonic() - began < SOON
        assert answer.startswith(b"HTTP/1.1 502")
        assert b"error=connection_terminated" in answer
    await answers(pair)


async def test_a_request_on_a_shared_connection(pair: Pair) -> None:
    """Over HTTP/2, by the options of the socket."""
    await request_of_http2(pair)


async def test_a_request_on_a_shared_connection_and_ping(pinging: Pair) -> None:
    await request_of_http2(pinging)


async def request_of_http2(pair: Pair) -> None:
    url = f"http://shop:{NGHTTPD}/"
    assert (await curl(pair.web, PRIOR, url)).status == 200
    with link_cut(pair.shop):
        began = time.monotonic()
        answer = await curl(pair.web, PRIOR, url, timeout=EVER)
        assert time.monotonic() - began < SOON
    # It may have been retried on a new connection, which cannot be established.
    assert (answer.status, answer.error) in {
        (502, "connection_terminated"),
        (504, "connection_timeout"),
    }
    await eventually(lambda: _answers(pair), "the service answers again")


async def test_a_relay_with_data_that_nothing_acknowledges(pair: Pair) -> None:
    stream = await pair.web.connect(pair.service.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        with link_cut(pair.shop):
            began = time.monotonic()
            await stream.send_all(b"are you there?")
            with trio.fail_after(EVER), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            assert time.monotonic() - began < SOON
    await answers(pair)


async def test_a_relay_in_which_nothing_is_sent(pair: Pair) -> None:
    """The client's pod vanishes: its sidecar detects that. So does the server's sidecar, which then
    releases the connection to its application."""
    await eventually(lambda: pair.shop.connected(ECHO) == 0, "no client is connected")
    stream = await pair.web.connect(pair.service.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        assert pair.shop.connected(ECHO) == 1
        with link_cut(pair.web):
            await eventually(
                lambda: pair.shop.connected(ECHO) == 0,
                "the server's connection has ended",
                timeout=SOON,
            )
            with trio.fail_after(SOON), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
    await answers(pair)


async def test_a_client_without_a_sidecar_that_vanishes(pair: Pair) -> None:
    outside = pair.cluster.pods.get("outside") or pair.cluster.pod("outside")
    stream = await outside.connect(pair.shop.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"hello")
        with trio.fail_after(EVER):
            assert await stream.receive_some() == b"hello"
        with link_cut(outside):
            await eventually(
                lambda: pair.shop.connected(ECHO) == 0,
                "the server's connection has ended",
                timeout=SOON,
            )


async def test_a_quiet_link_that_is_there_is_not_taken_for_a_dead_one(pair: Pair) -> None:
    stream = await pair.web.connect(pair.service.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        await trio.sleep(6)  # three times the timeout
        await stream.send_all(b"again")
        assert await stream.receive_some() == b"again"
    assert (
        await exchange_raw(pair.web, pair.service.ipv4, ECHO, b"last words", end=True)
        == b"last words"
    )


async def test_a_slow_reader_gets_all_data(pair: Pair) -> None:
    """For three times the timeout it reads nothing and its window is closed, for a download and for
    a relay."""
    size = 64 << 20
    stream = await pair.web.connect(pair.service.ipv4, WEB)
    async with stream:
        await stream.send_all(b"GET /stream/%d HTTP/1.0\r\nHost: shop\r\n\r\n" % size)
        await trio.sleep(6)
        got = 0
        with trio.fail_after(EVER):
            while data := await stream.receive_some(1 << 20):
                got += len(data)
    assert got > size
