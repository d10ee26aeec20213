"""One connection carries the requests of many clients, and no client can end it for the others: not
by cancelling, and not by heads or trailers that are too large, in either direction. What is refused
is answered on its own stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h2.events
import h2.settings
import pytest
import trio
import trio.lowlevel

from proxy.exchange.h2.reset_pacing import ResetLimits
from proxy.exchange.h2.settings import Http2Settings
from proxy.wire.h2.frames import END_HEADERS, END_STREAM, Code, Kind, frame
from tests.kit.http import origin, until
from tests.kit.http2 import literal
from tests.kit.http2_hop import Hop2, Settings2, hop2, through2
from tests.kit.http2_peers import GET, GRPC, OK, POST, Answer, Peer2, Script2, answering2, speaking

SMALL_HEADS: dict[int, int] = {h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 16384}


def in_pieces(number: int, pairs: list[tuple[bytes, bytes]], flags: int = 0) -> bytes:
    """A header block, as HEADERS and CONTINUATION."""
    block = literal(pairs)
    cut = [block[at : at + 16384] for at in range(0, len(block), 16384)]
    out = frame(Kind.HEADERS, flags | (END_HEADERS if len(cut) == 1 else 0), number, cut[0])
    for piece in cut[1:]:
        out += frame(Kind.CONTINUATION, END_HEADERS if piece is cut[-1] else 0, number, piece)
    return out


LARGE = [(b"x%d" % number, b"v" * 7000) for number in range(10)]


@pytest.mark.parametrize("headers", [POST, GRPC])
@pytest.mark.parametrize("what", ["head", "trailers"])
async def test_seventy_kilobytes_from_a_server_end_their_stream_and_no_other(
    headers: list[tuple[bytes, bytes]], what: str
) -> None:
    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        if message.get(b":path") == b"/slow":
            peer.h2.send_headers(number, OK)
            await peer.flush()
            await release.wait()
            await peer.send(number, b"slow", end=True)
        elif what == "head":
            await peer.peer.send(in_pieces(number, [*OK, *LARGE], END_STREAM))
        else:
            await peer.peer.send(in_pieces(number, OK) + in_pieces(number, LARGE, END_STREAM))

    release = trio.Event()
    async with through2(answering2(respond)) as (client, proxy):
        other = await proxy.connect2()
        slow = await other.request([*GET[:3], (b":path", b"/slow")])
        while not other.messages.get(slow, Answer()).headers:
            await other.read()
        for _ in range(300):
            answer = await client.ask(headers, b"x")
            if headers is GRPC:
                assert dict(answer.trailers or answer.headers)[b"grpc-status"] == b"13"
            elif what == "head":
                assert answer.status == 502
            else:  # whichever was there first: the head, or the fault
                assert answer.reset is not None or answer.status == 502
        assert proxy.dialled == 1
        release.set()
        assert (await other.message(slow)).body == b"slow"
        assert {ended.failure for ended in proxy.ended[:300]} == {"upstream_protocol"}


async def test_seventy_kilobytes_from_a_client_end_their_stream_and_no_other() -> None:
    async with through2(answering2()) as (client, _):
        kept = await client.request(POST, end=False)
        await client.flush()
        refused = client.h2.get_next_available_stream_id()
        client.h2.send_headers(refused, GET, end_stream=True)
        client.h2.clear_outbound_data_buffer()
        await client.peer.send(in_pieces(refused, [*GET, *LARGE], END_STREAM))
        assert (await client.message(refused)).reset == Code.ENHANCE_YOUR_CALM
        await client.send(kept, b"x", end=True)
        assert (await client.message(kept)).status == 200


@pytest.mark.parametrize("headers", [GET, GRPC])
async def test_a_request_that_is_larger_than_the_server_takes_is_answered_431(
    headers: list[tuple[bytes, bytes]],
) -> None:
    async with shared(answering2(), up=SMALL_HEADS) as (client, proxy):
        assert (await client.ask()).status == 200
        answer = await client.ask([*headers, (b"x", b"v" * 17000)])
        if headers is GRPC:
            assert dict(answer.headers)[b"grpc-status"] == b"13"
        else:
            assert answer.status == 431
        assert (await client.ask()).status == 200
        assert proxy.dialled == 1
        assert proxy.ended[1].failure == "bad_request"


async def test_trailers_of_a_request_that_are_larger_than_the_server_takes_are_answered_431() -> (
    None
):
    async with shared(answering2(), up=SMALL_HEADS) as (client, proxy):
        assert (await client.ask()).status == 200
        number = await client.request(POST, end=False)
        await client.send(number, b"x")
        await until(lambda: proxy.exchanges >= 2)
        client.h2.send_headers(number, [(b"x", b"v" * 17000)], end_stream=True)
        await client.flush()
        assert (await client.message(number)).status == 431
        assert (await client.ask()).status == 200
        assert proxy.dialled == 1


@pytest.mark.parametrize("headers", [POST, GRPC])
@pytest.mark.parametrize("what", ["head", "trailers"])
async def test_a_response_that_is_larger_than_the_client_takes_is_not_sent(
    headers: list[tuple[bytes, bytes]], what: str
) -> None:
    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        large = [(b"x", b"v" * 17000)] if message.get(b"large") else []
        peer.h2.send_headers(number, [*OK, *(large if what == "head" else [])])
        peer.h2.send_data(number, b"body")
        peer.h2.send_headers(
            number,
            [(b"grpc-status", b"0"), *(large if what == "trailers" else [])],
            end_stream=True,
        )
        await peer.flush()

    async with shared(answering2(respond), down=SMALL_HEADS) as (client, proxy):
        other = await proxy.connect2()
        large = [*headers, (b"large", b"yes")]
        assert (await client.ask(headers, b"x")).status == 200
        answer = await client.ask(large, b"x")
        if headers is GRPC:
            assert dict(answer.trailers or answer.headers)[b"grpc-status"] == b"13"
        elif what == "head":
            assert answer.status == 502
        else:
            assert answer.reset is not None
        assert (await client.ask(headers, b"x")).status == 200
        whole = await other.ask(large, b"x")
        assert len(dict(whole.headers if what == "head" else whole.trailers)[b"x"]) == 17000
        assert proxy.dialled == 1
        assert proxy.ended[1].failure == "upstream_protocol"


async def test_a_client_that_accepts_no_head_has_its_stream_reset() -> None:
    async with shared(answering2(), down={h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 20}) as (
        client,
        _,
    ):
        assert (await client.ask()).reset is not None


async def never(peer: Peer2, number: int, message: Answer) -> None:
    """Answers only a request for /slow, at its end."""
    if message.get(b":path") == b"/ok":
        peer.h2.send_headers(number, OK, end_stream=True)
        await peer.flush()


@asynccontextmanager
async def shared(
    script: Script2,
    *,
    up: dict[int, int] | None = None,
    down: dict[int, int] | None = None,
    settings: Settings2 | None = None,
) -> AsyncIterator[tuple[Peer2, Hop2]]:
    async with (
        origin(speaking(script, up)) as server,
        hop2(server.address, settings=settings) as proxy,
    ):
        yield await proxy.connect2(settings=down), proxy


async def test_a_client_that_resets_too_fast_gets_goaway_and_its_open_streams_end_well() -> None:
    release = trio.Event()

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        if message.get(b":path") == b"/slow":
            await release.wait()
        peer.h2.send_headers(number, OK)
        await peer.send(number, b"ok", end=True)

    async with through2(answering2(respond)) as (client, proxy):
        other = await proxy.connect2()
        slow = await client.request([*GET[:3], (b":path", b"/slow")])
        kept = await other.request([*GET[:3], (b":path", b"/slow")])
        resets = 0
        while proxy.servers[0].mux.usable:
            number = client.h2.get_next_available_stream_id()
            client.h2.send_headers(number, POST)
            client.h2.reset_stream(number, Code.CANCEL)
            await client.flush()
            await trio.lowlevel.checkpoint()
            resets += 1
            assert resets < 1000
        assert resets > 400
        release.set()
        assert (await other.message(kept)).body == b"ok"
        answered = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while piece := await client.peer.stream.receive_some(65536):
                answered += piece
        assert frame(Kind.DATA, END_STREAM, slow, b"ok") in answered
        assert proxy.dialled == 1, "the connection to the server has not been touched"


async def test_cancellations_reach_the_server_no_faster_than_it_bears_and_none_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seen: list[tuple[float, int]] = []
    servers: list[Peer2] = []

    async def script(peer: Peer2) -> None:
        servers.append(peer)
        with contextlib.suppress(Exception):
            while True:
                events = await peer.read()
                seen.extend(
                    (trio.current_time(), event.stream_id)
                    for event in events
                    if isinstance(event, h2.events.StreamReset)
                )

    pace = Http2Settings(
        resets=ResetLimits(rate=10, burst=20, hold=1.0), budget=10**6, ping_interval=10**5
    )
    settings = Settings2(upstream=pace, downstream=Http2Settings(budget=10**6, ping_interval=10**5))
    allow: dict[int, int] = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 100}
    async with shared(script, up=allow, settings=settings) as (client, proxy):
        first = await client.request(GET)
        await until(lambda: proxy.exchanges == 2)
        client.h2.reset_stream(first, Code.CANCEL)
        await client.flush()
        await until(lambda: len(seen) == 1)
        began = trio.current_time()
        numbers = [await client.request(GET) for _ in range(40)]
        await until(lambda: proxy.exchanges == 80)
        for number in numbers:
            client.h2.reset_stream(number, Code.CANCEL)
        await client.flush()
        await until(lambda: len(seen) == 41)
        at_once = [at for at, _ in seen[1:] if at - began < 0.05]
        assert 15 <= len(at_once) <= 21
        assert all(at - began <= 1.1 for at, _ in seen[1:]), (
            "no stream is held for longer than allowed"
        )
        assert len({number for _, number in seen}) == 41
        assert proxy.dialled == 1


async def test_streams_that_wait_for_their_reset_never_take_more_than_half_of_what_the_server_allows() -> (
    None
):
    settings = Settings2(
        upstream=Http2Settings(resets=ResetLimits(rate=1, burst=1, hold=1000)),
        downstream=Http2Settings(budget=10**6),
    )
    allow: dict[int, int] = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 10}
    async with shared(answering2(never), up=allow, settings=settings) as (client, proxy):
        for _ in range(50):
            number = await client.request(GET)
            await until(lambda: proxy.exchanges == 2)
            client.h2.reset_stream(number, Code.CANCEL)
            await client.flush()
            await until(lambda: proxy.exchanges == 0)
        assert proxy.dialled == 1
        assert proxy.muxes()[0]._resets.waiting == 5
        assert (await client.ask([*GET[:3], (b":path", b"/ok")])).status == 200


async def test_a_goaway_with_an_error_lets_the_open_streams_end() -> None:
    release = trio.Event()

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        peer.h2.send_headers(number, OK)
        await peer.flush()
        await peer.peer.send(
            frame(
                Kind.GOAWAY,
                0,
                0,
                number.to_bytes(4, "big") + int(Code.ENHANCE_YOUR_CALM).to_bytes(4, "big"),
            )
        )
        await release.wait()
        await peer.send(number, b"slow", end=True)

    async with through2(answering2(respond)) as (client, proxy):
        slow = await client.request(GET)
        await until(lambda: any(mux.going_away for mux in proxy.muxes()))
        release.set()
        assert (await client.message(slow)).body == b"slow"


async def test_a_server_that_sends_goaway_and_closes_at_once_has_left() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        await peer.peer.send(
            frame(
                Kind.GOAWAY,
                0,
                0,
                number.to_bytes(4, "big") + int(Code.ENHANCE_YOUR_CALM).to_bytes(4, "big"),
            )
        )
        await peer.peer.stream.send_eof()

    async with through2(answering2(respond)) as (client, proxy):
        assert (await client.ask()).status == 502
        assert proxy.ended[0].failure == "upstream_goaway"
        assert "ENHANCE_YOUR_CALM" in (proxy.ended[0].words or "")
