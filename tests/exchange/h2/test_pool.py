"""The pool of HTTP/2 connections: streams are limited, waits are bounded, a failed dial fails all that
waited, and a closed or trimmed pool closes connections after their last stream."""

from __future__ import annotations

from functools import partial

import h2.connection
import h2.errors
import pytest
import trio

from proxy.exchange.h1.pool import PoolSettings
from tests.kit.http import origin, until
from tests.kit.http2_hop import Settings2, hop2, through2
from tests.kit.http2_peers import (
    GET,
    POST,
    Answer,
    Peer2,
    answering2,
    ok,
    reserve,
    silent,
    speaking,
)

MAX_STREAMS = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS


@pytest.mark.parametrize("allowed", [1, 3])
async def test_no_more_streams_than_the_server_takes(allowed: int) -> None:
    most = now = 0

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        nonlocal most, now
        now += 1
        most = max(most, peer.h2.open_inbound_streams)
        await trio.sleep(0.003)
        now -= 1
        await ok(peer, number, message)

    async with through2(answering2(respond), server={MAX_STREAMS: allowed}) as (client, proxy):
        numbers = [await client.request(POST, end=False) for _ in range(90)]
        for number in numbers:
            await client.send(number, b"x", end=True)
        with trio.fail_after(60):
            for number in numbers:
                assert (await client.message(number)).body == b"ok"
        assert most <= allowed
        assert proxy.dialled <= 16
        assert {e.failure for e in proxy.ended} == {None}


async def test_a_request_waits_for_a_stream_so_long_and_no_longer() -> None:
    settings = Settings2(pool=PoolSettings(wait_timeout=0.1))
    async with through2(silent, settings, server={MAX_STREAMS: 1}) as (client, proxy):
        for number in range(1, 17):
            await client.request(GET)
            # Each has a connection before the next one asks for one.
            await until(partial(lambda most: proxy.exchanges == most, 2 * number))
        with trio.fail_after(20):
            answer = await client.ask()
        assert answer.status == 503
        assert b"connection_limit_reached" in (answer.get(b"proxy-status") or b"")


async def test_while_a_connection_is_being_opened_no_stream_is_refused() -> None:
    settings = Settings2(pool=PoolSettings(wait_timeout=0.05))
    async with (
        origin(speaking(answering2(), {MAX_STREAMS: 10})) as server,
        hop2(server.address, settings=settings) as proxy,
    ):
        client = await proxy.connect2()
        proxy.hangs = trio.Event()
        numbers = [await client.request(GET) for _ in range(90)]
        await until(lambda: proxy.exchanges == 90)
        await trio.sleep(0.2)  # four times as long as a request waits for a stream
        assert not client.ended
        proxy.hangs.set()
        assert {(await client.message(number)).status for number in numbers} == {200}
        assert proxy.dialled > 1, "one connection has room for ten of them"


async def test_a_failed_dial_fails_all_streams_that_waited_for_it() -> None:
    sock, address = reserve()
    with sock:
        async with hop2(address) as proxy:
            client = await proxy.connect2()
            proxy.hangs = trio.Event()
            numbers = [await client.request(GET) for _ in range(20)]
            await until(lambda: proxy.exchanges == 20)
            slot = next(iter(proxy.pool2._slots.values()))
            await until(lambda: len(slot.waiting) == 19)
            proxy.hangs.set()
            assert {(await client.message(number)).status for number in numbers} == {502}
            assert not proxy.pool2._slots


async def test_a_closed_pool_closes_each_connection_after_its_last_stream() -> None:
    async with through2(answering2()) as (client, proxy):
        for dialled in (1, 2, 3):  # the first before it is closed
            assert (await client.ask()).body == b"ok"
            assert proxy.dialled == dialled
            if dialled == 1:
                proxy.pool2.close()
            await until(lambda: not proxy.pool2._slots)


async def test_trimming_retires_connections_without_a_stream() -> None:
    release = trio.Event()

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        if message.get(b":path") == b"/slow":
            await release.wait()
        await ok(peer, number, message)

    async with through2(answering2(respond)) as (client, proxy):
        slow = await client.request([*GET[:3], (b":path", b"/slow")])
        await until(lambda: proxy.exchanges == 2)
        proxy.pool2.trim({})
        assert (await client.ask()).body == b"ok"
        assert proxy.dialled == 1, "it has a stream, so it continues"
        release.set()
        assert (await client.message(slow)).body == b"ok"
        proxy.pool2.trim(dict.fromkeys(proxy.targets, 1))
        assert (await client.ask()).body == b"ok"
        assert proxy.dialled == 1
        proxy.pool2.trim({})
        await until(lambda: not proxy.pool2._slots)
