"""Back-pressure from end to end: a slow reader stops only its own sender, and nothing is buffered
without a bound."""

from __future__ import annotations

import math
from functools import partial

import h2.events
import h2.settings
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.h2.settings import Http2Settings
from proxy.exchange.server_settings import ServerSettings
from proxy.wire.h2.events import Http2Limits
from tests.kit.http import Peer, origin, until
from tests.kit.http2_hop import Settings2, hop2, through2
from tests.kit.http2_peers import (
    GET,
    GRPC,
    OK,
    POST,
    Answer,
    Peer2,
    answering2,
    echo2,
    ok,
    speaking,
)

WINDOW = 65536
# Small windows and small socket buffers, so that a few hundred KiB are much.
LIMITS = Http2Settings(Http2Limits(stream_window=WINDOW, connection_window=4 * WINDOW))
SLOW = Settings2(downstream=LIMITS, upstream=LIMITS, buffers=16384)
INITIAL = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE


class Source:
    """A server that sends for ever, as fast as it may, on streams whose path is /flood, and
    counts."""

    def __init__(self) -> None:
        self.sent: dict[int, int] = {}

    async def respond(self, peer: Peer2, number: int, message: Answer) -> None:
        if message.get(b":path") != b"/flood":
            await ok(peer, number, message)
            return
        peer.h2.send_headers(number, OK)
        self.sent[number] = 0
        while True:
            await peer.send(number, bytes(4096))
            self.sent[number] += 4096


FLOOD = [*GET[:3], (b":path", b"/flood")]


async def still(value: object, get: object) -> int:
    """Wait until the result of `get` no longer changes."""
    assert callable(get)
    with trio.fail_after(30):
        while True:
            before = get()
            await trio.sleep(0.15)
            if get() == before:
                return int(before)


async def test_a_client_that_does_not_take_its_response_stops_the_server_and_no_other_stream() -> (
    None
):
    source = Source()
    async with through2(answering2(source.respond), SLOW) as (client, proxy):
        client.h2.increment_flow_control_window(
            2**30
        )  # of the connection: only the stream's window is small
        number = await client.request(FLOOD)
        while not client.messages.get(number, Answer()).headers:
            await client.read()
        # From here on the client reads, but never enlarges the stream's window.
        for _ in range(20):
            other = await client.request(GET)
            while other not in client.ended:
                await client.read()
            client.h2.acknowledge_received_data(2, other)
        sent = await still(None, lambda: sum(source.sent.values()))
        # The client's window (65535), the server's (a window of the proxy's), and the buffers
        # between.
        assert sent <= 65535 + WINDOW + 16384
        mux = proxy.muxes()[0]
        assert sum(len(data) for s in mux._streams.values() for data, _ in s._chunks) <= WINDOW
        await client.reset(number)
        await proxy.idle()
        # The windows are full again: as much arrives as at the start, three times.
        for _ in range(3):
            number = await client.request(FLOOD)
            while len(client.messages.get(number, Answer()).body) < 50_000:
                await client.read()
            await client.reset(number)
            await proxy.idle()


async def test_a_client_that_reads_nothing_at_all_stops_the_server() -> None:
    source = Source()
    async with through2(answering2(source.respond), SLOW, buffers=16384) as (client, proxy):
        await client.next(h2.events.RemoteSettingsChanged)
        client.h2.increment_flow_control_window(2**30)
        for _ in range(8):
            await client.request(FLOOD)
        sent = await still(None, lambda: sum(source.sent.values()))
        assert sent > 0
        assert proxy.servers[0].mux.writer._ahead <= 256 * 1024 + WINDOW
        assert sent <= 2_000_000  # a few windows and the kernel's buffers
        # Slow consumers hold the window of the connection to the server, so it has no room for
        # others.
        await until(lambda: proxy.muxes()[0].congested)
        # Another client is served at the same time.
        other = await proxy.connect2()
        with trio.fail_after(30):
            assert (await other.ask()).body == b"ok"
        assert proxy.dialled == 2


async def test_a_server_that_does_not_take_an_upload_stops_its_client_and_no_other_stream() -> None:
    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        if message.get(b":method") == b"GET":
            await ok(peer, number, message)

    async def script(peer: Peer2) -> None:
        while True:  # windows are never enlarged
            for event in await peer.read():
                if isinstance(event, h2.events.RequestReceived):
                    await respond(peer, event.stream_id, peer.messages[event.stream_id])

    async with through2(script, SLOW) as (client, proxy):
        number = await client.request(POST, end=False)
        sent = 0

        async def upload() -> None:
            nonlocal sent
            while True:
                await client.send(number, bytes(4096))
                sent += 4096

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.pump)
            nursery.start_soon(upload)
            held = await still(None, lambda: sent)
            assert held <= 65535 + 2 * WINDOW + 65536 + 16384
            for _ in range(20):
                other = await client.request(GET)
                with trio.fail_after(30):
                    while other not in client.ended:
                        async with client.moved:
                            await client.moved.wait()
            assert await still(None, lambda: sent) == held
            nursery.cancel_scope.cancel()
        await client.reset(number)
        await proxy.idle()


async def test_an_http1_client_that_reads_nothing_stops_an_http2_server() -> None:
    source = Source()
    async with (
        origin(speaking(answering2(source.respond))) as up,
        hop2(up.address, settings=SLOW) as proxy,
    ):
        slow = await proxy.connect(16384)
        await slow.send(b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")
        await slow.head()
        assert await still(None, lambda: sum(source.sent.values())) <= 1_000_000
        fast = await proxy.connect()
        assert (await fast.ask()).body == b"ok"
        assert proxy.dialled == 1


async def test_an_http1_server_that_floods_waits_for_an_http2_client() -> None:
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            await peer.send(bytes(4096))
            sent += 4096

    settings = Settings2(up=b"1.1", downstream=LIMITS, buffers=16384)
    async with origin(script, buffers=16384) as up, hop2(up.address, settings=settings) as proxy:
        client = await proxy.connect2()
        await client.request(GET)
        assert await still(None, lambda: sent) <= 65535 + 4 * 65536
        client.peer.reset()
        await proxy.gone()


async def test_streams_take_turns_where_the_connection_s_window_is_short() -> None:
    source = Source()
    async with through2(answering2(source.respond), server={INITIAL: 2**24}) as (client, proxy):
        client.h2.update_settings(
            {INITIAL: 2**24}
        )  # each stream has a large window: the limit is the 65535 bytes of all
        await client.flush()
        numbers = [await client.request(FLOOD) for _ in range(12)]
        got = dict.fromkeys(numbers, 0)
        with trio.fail_after(60):
            while sum(got.values()) < 3_000_000:
                taken = 0
                for event in await client.read():
                    if isinstance(event, h2.events.DataReceived):
                        got[event.stream_id] += len(event.data or b"")
                        taken += event.flow_controlled_length
                if taken:
                    client.h2.increment_flow_control_window(taken)
                    await client.flush()
        assert min(got.values()) * 4 > max(got.values()), got
        assert proxy.dialled == 1


async def test_many_uploads_at_once_arrive_whole() -> None:
    async with through2(answering2(echo2), SLOW) as (client, proxy):
        bodies = {
            await client.request(POST, end=False): bytes([n]) * (n * 13_001) for n in range(16)
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.pump)
            for number, body in bodies.items():
                nursery.start_soon(partial(client.send, number, body, end=True))
            with trio.fail_after(60):
                while not client.ended.issuperset(bodies):
                    async with client.moved:
                        await client.moved.wait()
            nursery.cancel_scope.cancel()
        assert {number: client.messages[number].body for number in bodies} == bodies
        await proxy.idle()
        assert {e.failure for e in proxy.ended} == {None}


async def test_a_cancelled_exchange_in_a_large_send_does_not_harm_the_others() -> None:
    """Why no exchange sends by itself: a send that is cancelled half-way leaves an incomplete
    frame."""
    async with through2(answering2(echo2), Settings2(buffers=16384), server={INITIAL: 2**20}) as (
        client,
        proxy,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.pump)
            body = bytes(range(256)) * 1500
            for round_ in range(10):
                doomed = [await client.request(POST, end=False) for _ in range(3)]
                healthy = await client.request(POST, end=False)
                async with trio.open_nursery() as uploads:
                    for number in doomed:
                        uploads.start_soon(client.send, number, body[: 60_000 - round_ * 100])
                    uploads.start_soon(partial(client.send, healthy, body[:100_000], end=True))
                for number in doomed:
                    await client.reset(number)
                with trio.fail_after(30):
                    while healthy not in client.ended:
                        async with client.moved:
                            await client.moved.wait()
                assert client.messages[healthy].body == body[:100_000]
            nursery.cancel_scope.cancel()
        await proxy.idle()
        assert proxy.dialled == 1
        seen = [(o, e.failure) for o, e in zip(proxy.outcomes, proxy.ended, strict=True)]
        assert sum(o == "cancelled" or f == "client_gone" for o, f in seen) == 30, seen


@pytest.mark.parametrize("size", [1, 100])
async def test_small_pieces_take_no_more_memory_than_large_ones(size: int) -> None:
    """A window of single bytes would otherwise need a hundred times as much memory."""

    async with through2(answering2()) as (client, proxy):
        proxy.hangs = trio.Event()  # the proxy keeps what the client sends
        number = await client.request(POST, end=False)
        await client.next(h2.events.RemoteSettingsChanged)
        for _ in range(60):
            for _ in range(300 // size):
                client.h2.send_data(number, b"x" * size)
            await client.flush()
        mux = proxy.servers[0].mux
        await until(lambda: mux._held == 18_000)
        assert len([c for s in mux._streams.values() for c in s._chunks]) < 12
        await client.reset(number)
        await proxy.idle()
        assert mux._held == 0


async def test_a_client_that_only_listens_is_not_silent_while_it_is_answered(
    mock_clock: MockClock,
) -> None:
    """A watch as a bidirectional call: the client sends only at the start. The test moves the
    time."""
    more = [trio.Event() for _ in range(4)]

    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, OK)
        for event in more:
            await peer.send(number, b"news")
            await event.wait()
        await trio.sleep_forever()

    quiet = Http2Settings(ping_interval=math.inf)
    client_settings = ClientSettings(stream_timeout=math.inf)
    settings = Settings2(
        server=ServerSettings(stream_timeout=1000),
        client=client_settings,
        downstream=quiet,
        upstream=quiet,
    )
    async with through2(answering2(respond, early=True), settings) as (client, proxy):
        number = await client.request(GRPC, end=False)
        for event in more:
            await client.next(h2.events.DataReceived, number)
            mock_clock.jump(900)
            await wait_all_tasks_blocked()
            assert not proxy.ended
            event.set()
        for _ in range(2):
            await wait_all_tasks_blocked()
            mock_clock.jump(1000)
        answer = await client.message(number)
        assert dict(answer.trailers)[b"grpc-status"] == b"4"
        assert proxy.ended[0].failure == "request_timeout"


async def test_padding_without_data_does_not_hide_how_much_follows() -> None:
    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        peer.h2.send_headers(number, OK)
        peer.h2.send_data(number, b"", pad_length=20)
        await peer.send(number, bytes(10_000), end=True)

    async with through2(answering2(respond)) as (_, proxy):
        client = await proxy.connect2(settings={INITIAL: 5000})
        for _ in range(3):  # h2 would raise if more came than the window allows
            assert len((await client.ask()).body) == 10_000
        await proxy.idle()
        assert all(mux._held == 0 for mux in proxy.muxes())
