"""Every wait has a deadline, and each deadline has its own response. Time is trio's mock clock, the
sockets are real.

Also here: shutdown. Idle connections end at once, those in use after their response."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.server_settings import ServerSettings
from tests.kit.build import interpreted
from tests.kit.hop import Settings, hop, through
from tests.kit.http import BROKEN, GET, OK, POST, Message, Peer, answering, echo, origin, until

SETTINGS = Settings(
    server=ServerSettings(idle_timeout=90, head_timeout=10, body_timeout=60, write_timeout=50),
    client=ClientSettings(response_timeout=300, stream_timeout=400),
    buffers=16384,
)
UPLOAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def clock(mock_clock: MockClock) -> MockClock:
    """Jumps as soon as nothing has happened for this number of real seconds: the kernel delays
    acknowledgements by 40 ms."""
    mock_clock.autojump_threshold = 0.06
    return mock_clock


async def _silent(peer: Peer) -> None:
    await peer.rest()


def about(seconds: float) -> object:
    return pytest.approx(seconds, abs=2)


# The client's


@pytest.mark.parametrize("sent", [b"", GET], ids=["new", "used"])
async def test_a_connection_without_a_request_is_closed_quietly(
    clock: MockClock, sent: bytes
) -> None:
    async with through(answering(), SETTINGS) as (client, proxy):
        if sent:
            await client.ask(sent)
        started = trio.current_time()
        assert await client.rest() == b""
        assert trio.current_time() - started == about(90)
        assert len(proxy.ended) == bool(sent)


@dataclass(eq=False)
class Moving:
    """An exchange on the fast path that moves all the time."""

    moved: float = math.inf
    limit: float = math.inf


@interpreted
async def test_a_connection_without_a_request_is_closed_although_others_are_busy(
    clock: MockClock,
) -> None:
    settings = Settings(server=ServerSettings(idle_timeout=6), buffers=16384)
    async with through(answering(), settings) as (client, proxy):
        await client.ask()
        if proxy.fast_path is not None:
            proxy.fast_path.exchange_began(cast("Any", Moving()))
        started = trio.current_time()
        with trio.fail_after(60):
            assert await client.rest() == b""
        assert trio.current_time() - started == about(6)


@pytest.mark.parametrize("first", [b"", GET], ids=["first", "second"])
async def test_a_slow_head_is_cut_at_its_deadline_however_it_trickles(
    clock: MockClock, first: bytes
) -> None:
    async with through(answering(), SETTINGS) as (client, proxy):
        if first:
            await client.ask(first)
        started = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            for byte in b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100:
                await client.send(bytes([byte]))
                await trio.sleep(1)
        answer = await client.response()
        assert trio.current_time() - started < 15
        assert answer.status == 408
        assert answer.get(b"connection") == b"close"
        assert proxy.ended[-1].status == 408


async def test_a_body_that_stops_is_cut_at_its_deadline(clock: MockClock) -> None:
    async with through(_silent, SETTINGS) as (client, proxy):
        await client.send(UPLOAD % 10 + b"01234")
        started = trio.current_time()
        answer = await client.response()
        assert trio.current_time() - started == about(60)
        assert answer.status == 408
        assert b"stopped after 5 bytes" in answer.body
        assert proxy.ended[0].failure == "request_timeout"
        assert proxy.pool.counts() == (0, 0)


async def test_a_slow_body_may_take_its_time_without_a_minimum_rate(clock: MockClock) -> None:
    async with through(echo, SETTINGS) as (client, _):
        await client.send(UPLOAD % 20)
        for _ in range(20):
            await client.send(b"x")
            await trio.sleep(50)
        assert (await client.response()).body == b"x" * 20


async def test_a_body_below_the_least_rate_is_cut(clock: MockClock) -> None:
    settings = Settings(server=ServerSettings(body_timeout=60, body_min_rate=100))
    async with through(_silent, settings) as (client, _), trio.open_nursery() as nursery:

        async def trickle() -> None:
            while True:
                await client.send(b"x")
                await trio.sleep(5)

        await client.send(UPLOAD % 1000)
        nursery.start_soon(trickle)
        started = trio.current_time()
        answer = await client.response()
        assert answer.status == 408
        assert trio.current_time() - started == about(60)
        nursery.cancel_scope.cancel()


async def test_a_body_that_is_late_in_the_moment_of_the_response_still_gets_one_of_the_two_answers(
    clock: MockClock,
) -> None:
    """Both are known at once. Which one is handled first is trio's choice, so it is tried often."""
    servers: list[Peer] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        servers.append(peer)
        await peer.rest()

    seen = set()
    async with origin(script) as server, hop(server.address, SETTINGS) as proxy:
        for number in range(20):
            client = await proxy.connect()
            await client.send(UPLOAD % 100 + b"hello")
            await until(partial(lambda least: len(servers) > least, number))
            await wait_all_tasks_blocked()
            os.write(servers[-1].stream.socket.fileno(), OK)
            clock.jump(61)
            seen.add((await client.response()).status)
    assert seen <= {200, 408}


async def test_a_slow_server_is_not_the_client_s_low_rate(clock: MockClock) -> None:
    """The client has sent all it could. The server did not read it."""
    size = 2_000_000

    async def script(peer: Peer) -> None:
        await peer.head()
        for _ in range(3):
            await trio.sleep(100)
            await peer.exactly(size // 4)
        await peer.exactly(size - 3 * (size // 4))
        await peer.send(OK)
        await peer.rest()

    server = ServerSettings(body_timeout=60, body_min_rate=1e6)
    async with through(script, Settings(server=server, buffers=16384), buffers=16384) as (
        client,
        proxy,
    ):
        await client.send(UPLOAD % size + bytes(size))
        assert (await client.response()).status == 200
        await proxy.idle()
        assert proxy.ended[0].request_bytes == size


# These two in real time: with clogged buffers the kernel waits for timers of its own, which a mock
# clock would jump over.


async def test_a_client_that_does_not_read_loses_its_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        await peer.flood()

    settings = Settings(server=ServerSettings(write_timeout=0.1), buffers=16384)
    async with through(script, settings, buffers=16384) as (client, proxy):
        await client.send(GET)
        await client.head()
        await proxy.gone()
        assert proxy.ended[0].failure == "client_gone"
        assert "accepted no data for 0.1" in proxy.ended[0].words
        with pytest.raises(trio.BrokenResourceError):
            await client.rest()


async def test_a_client_that_reads_slowly_keeps_its_connection() -> None:
    size = 3_000_000

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        await peer.rest()

    settings = Settings(server=ServerSettings(write_timeout=3), buffers=65536)
    async with through(script, settings, buffers=65536) as (client, _):
        await client.send(GET)
        await client.head()
        received = len(client.received)
        started = trio.current_time()
        while received < size:
            await trio.sleep(0.08)
            received += len(await client.stream.receive_some(65536))
        assert trio.current_time() - started > 3
        assert received == size


# The server's


@pytest.mark.parametrize("request_bytes", [GET, POST])
async def test_a_silent_server_is_a_504(clock: MockClock, request_bytes: bytes) -> None:
    async with through(_silent, SETTINGS) as (client, proxy):
        started = trio.current_time()
        answer = await client.ask(request_bytes)
        assert answer.status == 504
        assert trio.current_time() - started == about(300)
        assert b"error=http_response_timeout" in (answer.get(b"proxy-status") or b"")
        assert proxy.pool.counts() == (0, 0)
        assert (
            await client.ask(request_bytes)
        ).status == 504  # the client's connection is still good


async def test_the_time_for_the_response_begins_at_the_end_of_the_request(clock: MockClock) -> None:
    async with through(_silent, SETTINGS) as (client, _):
        await client.send(UPLOAD % 10)
        for _ in range(10):
            await client.send(b"x")
            await trio.sleep(50)
        started = trio.current_time()
        assert (await client.response()).status == 504
        assert trio.current_time() - started == about(250)


async def test_interim_responses_do_not_move_the_deadline(clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        while True:
            await peer.send(b"HTTP/1.1 102 Processing\r\n\r\n")
            await trio.sleep(100)

    async with through(script, SETTINGS) as (client, _):
        answer = await client.ask()
        assert (answer.status, answer.interim) == (504, [102, 102, 102])


async def test_a_server_that_stops_within_its_response_breaks_the_connection(
    clock: MockClock,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n01234")
        await peer.rest()

    async with through(script, SETTINGS) as (client, proxy):
        started = trio.current_time()
        with pytest.raises(BROKEN):
            await client.ask()
        assert trio.current_time() - started == about(400)
        assert proxy.ended[0].failure == "upstream_timeout"


async def test_a_server_that_reads_nothing_of_the_request_is_a_504(clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await trio.sleep_forever()

    async with (
        through(script, SETTINGS, buffers=16384) as (client, _),
        trio.open_nursery() as nursery,
    ):
        await client.send(UPLOAD % 100_000_000)
        nursery.start_soon(client.flood)
        started = trio.current_time()
        answer = await client.response()
        assert answer.status == 504
        assert b"accepted no data of the request" in answer.body
        assert trio.current_time() - started == about(400)
        nursery.cancel_scope.cancel()


async def test_the_wait_for_100_continue_is_bounded(
    clock: MockClock,
) -> None:
    async with through(_silent, SETTINGS) as (client, _):
        await client.send((UPLOAD % 5).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert (await client.response()).status in (408, 504)


async def test_a_tunnel_has_no_deadline_of_an_exchange(clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
        )
        assert await peer.exactly(1) == b"?"
        await peer.send(b"!")
        await peer.rest()

    settings = Settings(server=SETTINGS.server, client=SETTINGS.client, tunnel_idle=10_000)
    async with through(script, settings) as (client, _):
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        await client.head()
        await trio.sleep(5000)
        await client.send(b"?")
        assert await client.exactly(1) == b"!"


# Shutdown


@pytest.mark.parametrize(
    ("quiet", "wait"),
    [(0, 1), (0.7, 0.3), (30, 0)],
    ids=["just answered", "a moment ago", "long ago"],
)
async def test_a_kept_connection_ends_when_it_has_been_quiet_for_a_moment(
    clock: MockClock, quiet: float, wait: float
) -> None:
    async with origin(answering()) as server, hop(server.address, SETTINGS) as proxy:
        client = await proxy.connect()
        await client.ask()
        await trio.sleep(quiet)
        await wait_all_tasks_blocked()
        proxy.drain.begin()
        began = trio.current_time()
        assert await client.rest() == b""
        assert trio.current_time() - began == pytest.approx(wait, abs=0.2)
        await proxy.gone()
        assert proxy.errors == []
        assert not proxy.drain.idle


async def test_a_request_that_was_on_its_way_to_a_kept_connection_is_served(
    clock: MockClock,
) -> None:
    received: list[Message] = []
    async with through(answering(received=received), SETTINGS) as (client, proxy):
        await client.ask()
        await wait_all_tasks_blocked()
        proxy.drain.begin()
        await trio.sleep(0.5)
        await client.send(POST)  # not retried automatically
        answer = await client.response()
        assert (answer.status, answer.get(b"connection")) == (200, b"close")
        assert await client.ended()
        assert len(received) == 2


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
async def test_a_client_that_has_just_been_accepted_may_still_send_a_request(
    clock: MockClock, early: bool
) -> None:
    """It is still in the handshake when the proxy gets SIGTERM: its request is in progress, and it
    might not be repeatable."""
    async with origin(answering()) as server, hop(server.address, SETTINGS) as proxy:
        if not early:
            proxy.drain.begin()
        client = await proxy.connect()
        await wait_all_tasks_blocked()
        if early:
            proxy.drain.begin()
        await trio.sleep(3)
        await client.send(POST)
        answer = await client.response()
        assert (answer.status, answer.get(b"connection")) == (200, b"close")
        assert await client.ended()


async def test_an_admitted_client_without_a_request_delays_no_shutdown(
    clock: MockClock,
) -> None:
    async with origin(answering()) as server, hop(server.address, SETTINGS) as proxy:
        client = await proxy.connect()
        await wait_all_tasks_blocked()
        proxy.drain.begin()
        began = trio.current_time()
        assert await client.rest() == b""
        assert trio.current_time() - began == about(5)
        await proxy.gone()


async def test_connections_in_use_end_after_their_response() -> None:
    release = trio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await release.wait()
        await peer.send(OK)
        await peer.rest()

    async with through(script) as (client, proxy):
        await client.send(GET + GET)
        await wait_all_tasks_blocked(0.01)
        proxy.drain.begin()
        release.set()
        answer = await client.response()
        assert (answer.body, answer.get(b"connection")) == (b"ok", b"close")
        assert await client.rest() == b""
        client.close()
        await proxy.gone()
        assert len(proxy.ended) == 1


async def test_a_request_that_has_started_is_still_served() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, proxy):
        await client.send(GET[:10])
        await wait_all_tasks_blocked(0.01)
        proxy.drain.begin()
        await client.send(GET[10:])
        answer = await client.response()
        assert (answer.status, answer.get(b"connection")) == (200, b"close")
        assert await client.ended()
