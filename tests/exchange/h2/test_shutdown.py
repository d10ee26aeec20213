"""How the proxy ends an HTTP/2 connection: GOAWAY at shutdown, for an idle client and at the maximum
age, and without it for a peer that is silent, does not read or has gone."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Literal

import h2.connection
import h2.errors
import pytest
import trio

from proxy.exchange.exchange import ConnectionInfo, Exchange
from proxy.exchange.h1.pool import PoolSettings
from proxy.exchange.h2.server import Http2Exchange, Http2Server
from proxy.exchange.h2.settings import Http2Settings
from proxy.exchange.server_settings import Drain, ServerSettings
from proxy.net.address import Address
from proxy.net.exceptions import ConnectionLost
from tests.kit.http import until
from tests.kit.http2_hop import Settings2, through2
from tests.kit.http2_peers import (
    GET,
    OK,
    Answer,
    Peer2,
    answering2,
    frames_goaway,
    ok,
)

REFUSED = h2.errors.ErrorCodes.REFUSED_STREAM


async def test_draining_sends_goaway_serves_streams_that_cross_with_it_and_accepts_no_later_ones() -> (
    None
):
    release = trio.Event()

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        await release.wait()
        await ok(peer, number, message)

    async with through2(answering2(respond)) as (client, proxy):
        await client.request(GET)
        await until(lambda: proxy.exchanges == 2)
        proxy.drain.begin()
        crossing = [await client.request(GET) for _ in range(5)]
        answer = await client.last_call()
        await until(lambda: proxy.servers[0].mux.http.open_streams == 6)
        await answer()
        await client.peer.until(frames_goaway(crossing[-1]))
        late = await client.request(GET)
        await client.peer.until(
            b"\0\0\x04\x03\0" + late.to_bytes(4, "big") + REFUSED.to_bytes(4, "big")
        )
        release.set()
        assert (await client.peer.rest()).count(b"ok") == 6
        client.peer.close()
        await proxy.gone()


async def test_a_new_connection_while_draining_has_all_served_that_was_sent_before_it_could_know() -> (
    None
):
    """Not only its first request: a client sends its calls together, and repeats a refused one only
    once."""
    async with through2(answering2()) as (client, proxy):
        proxy.drain.begin()
        for _ in range(5):
            await client.request(GET)
        answer = await client.last_call()
        await until(lambda: len(proxy.ended) == 5)
        await answer()
        await client.peer.rest()
        client.peer.close()
        await proxy.gone()
        assert [each.failure for each in proxy.ended] == [None] * 5


async def test_a_silent_server_is_abandoned_and_an_idle_client_gets_goaway(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.06
    settings = Settings2(upstream=Http2Settings(ping_interval=20, ping_timeout=10))
    settings.downstream = Http2Settings(idle_timeout=90, ping_interval=1e6)

    async def deaf(peer: Peer2) -> None:
        await peer.next(h2.events.RequestReceived)
        await trio.sleep_forever()

    async with through2(deaf, settings) as (client, _):
        started = trio.current_time()
        answer = await client.ask()
        assert answer.status == 502
        assert trio.current_time() - started == pytest.approx(30, abs=6)
        started = trio.current_time()
        acknowledge = await client.last_call()
        assert trio.current_time() - started == pytest.approx(90, abs=3)
        await acknowledge()
        await client.peer.rest()


async def test_a_connection_that_is_too_old_accepts_no_new_streams_and_finishes() -> None:
    async with through2(answering2(), Settings2(pool=PoolSettings(max_age=0))) as (client, proxy):
        await client.ask()
        await until(lambda: proxy.pool2.sweep() == 1)
        await until(lambda: proxy.closed == 1)
        assert (await client.ask()).body == b"ok"
        assert proxy.dialled == 2


async def test_a_client_that_reads_nothing_is_disconnected() -> None:
    settings = Settings2()

    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, OK)
        await peer.send(number, bytes(200_000), end=True)

    settings.server = replace(settings.server, write_timeout=0.2)
    async with through2(answering2(respond), settings) as (client, proxy):
        number = await client.request(GET)
        with trio.fail_after(30):
            while number not in client.ended:
                await client.read()
        assert client.messages[number].reset is not None
        assert proxy.ended[0].failure == "client_gone"


async def test_a_client_that_ignores_goaway_cannot_hold_its_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It keeps sending, so it is not silent. And it may open any number of streams until the proxy
    has sent the final GOAWAY."""
    autojump_clock.autojump_threshold = 0.06
    settings = Settings2(
        downstream=Http2Settings(idle_timeout=5, ping_interval=20, ping_timeout=10)
    )
    async with through2(answering2(), settings) as (client, proxy):
        await client.ask()
        await client.last_call()
        started = trio.current_time()
        while proxy.acceptor.open and trio.current_time() < started + 1000:
            with contextlib.suppress(trio.BrokenResourceError):
                await client.peer.send(b"\0\0\x08\x06\0\0\0\0\0anything")
            await trio.sleep(3)
        assert trio.current_time() - started < 60


class _VanishingClient:
    """A client that has sent its requests and is gone: the first write fails, at the moment when
    the requests can be read."""

    peer = local = Address("127.0.0.1", 1)
    bytes_read = bytes_written = 0

    def __init__(self, sent: bytes) -> None:
        self.sent = [sent]
        self._gone = trio.Event()

    async def receive_some(self, _: int | None = None) -> bytes:
        await self._gone.wait()
        return self.sent.pop() if self.sent else b""

    async def send_all(self, _: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._gone.set()
        raise ConnectionLost("the peer is gone")

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def is_idle(self) -> bool:
        return False

    def ended(self) -> Literal["lost"]:
        return "lost"


async def test_requests_that_are_read_when_the_connection_has_ended_are_not_started() -> None:
    """An exchange on the fast path would have stayed there, and would later have been handed over
    to a connection that is not served."""
    client = h2.connection.H2Connection()
    client.initiate_connection()
    for number in (1, 3):
        client.send_headers(number, GET, end_stream=True)
    started: list[Http2Exchange] = []

    def fork(server: Http2Server, exchange: Http2Exchange) -> bool:
        started.append(exchange)
        return True

    async def handler(exchange: Exchange) -> None:
        raise AssertionError(f"{exchange.request.target!r} was served")

    stream = _VanishingClient(client.data_to_send())
    facts = ConnectionInfo("outbound", stream.peer, stream.local)
    server = Http2Server(stream, facts, ServerSettings(), Http2Settings(), Drain())
    server.fork = fork
    with trio.fail_after(10):
        await server.run(handler)
    assert not stream.sent  # it was read, after the end
    assert not started
    assert server.mux.broken == "the peer is gone"
    assert server.mux.exchanges == 0
