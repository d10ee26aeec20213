"""Frames that cost the proxy more than the peer.

Each flood is answered by GOAWAY with ENHANCE_YOUR_CALM within a bounded number of frames. A peer
that continues loses the connection, and one that stops keeps its open streams. The memory of a
connection stays small during the flood. An honest peer under load is never taken for an attacker.
The test moves the time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count

import hpack
import pytest

from proxy.wire.h1.connection import Role
from proxy.wire.h2.events import (
    DataReceived,
    Exhausted,
    HeadTooLarge,
    Http2Limits,
    StreamBroken,
    TrailersReceived,
)
from proxy.wire.h2.frames import ACK, END_HEADERS, END_STREAM, PADDED, Code, Kind, frame
from proxy.wire.messages import Headers, ProtocolError, RequestHead, ResponseHead
from tests.kit.http2 import GET, OK, POST, RecordingEngine, data, headers, literal, long, settings

# Floods run the same lines a hundred thousand times, which takes the tracer long. Other tests cover
# these lines.
pytestmark = pytest.mark.no_cover

BLOCK = literal(GET)
OPEN = headers(1, POST, END_HEADERS)


def odd() -> Iterator[int]:
    return count(1, 2)


def padded_reset(number: int) -> bytes:
    return frame(
        Kind.HEADERS, END_HEADERS | END_STREAM | PADDED, number, b"\xff" + BLOCK + bytes(255)
    ) + long(Kind.RST_STREAM, number, 8)


# What is sent first, and then without end. The number: of pieces that may pass before our GOAWAY,
# and as many before the connection ends.
FLOODS: dict[str, tuple[bytes, Callable[[], Iterator[bytes]], int]] = {
    "rapid reset (CVE-2023-44487)": (b"", lambda: (headers(n) + long(Kind.RST_STREAM, n, 8) for n in odd()), 501),
    "rapid reset of requests with a body": (
        b"", lambda: (headers(n, POST, END_HEADERS) + data(n, bytes(9000)) + long(Kind.RST_STREAM, n, 8) for n in odd()), 501
    ),
    "rapid reset with padding": (b"", lambda: (padded_reset(n) for n in odd()), 501),
    "resets that we are made to send (CVE-2025-8671)": (b"", lambda: (headers(n) + long(Kind.WINDOW_UPDATE, n, 0) for n in odd()), 501),
    "malformed requests": (b"", lambda: (headers(n, OK) for n in odd()), 501),
    "refused streams": (b"".join(headers(n) for n in range(1, 512, 2)), lambda: (headers(n) for n in count(513, 2)), 1001),
    "resets of closed streams": (OPEN + long(Kind.RST_STREAM, 1, 8), lambda: (long(Kind.RST_STREAM, 1, 8) for _ in odd()), 501),
    "PING (CVE-2019-9512)": (b"", lambda: (frame(Kind.PING, 0, 0, bytes(8)) for _ in odd()), 1001),
    "answers to PINGs that were not sent": (b"", lambda: (frame(Kind.PING, ACK, 0, bytes(8)) for _ in odd()), 1001),
    "SETTINGS (CVE-2019-9515)": (b"", lambda: (settings((4, n)) for n in odd()), 501),
    "empty SETTINGS": (b"", lambda: (settings() for _ in odd()), 501),
    "acknowledgements of SETTINGS that were not sent": (b"", lambda: (settings(flags=ACK) for _ in odd()), 1001),
    "PRIORITY": (b"", lambda: (frame(Kind.PRIORITY, 0, 1, bytes(5)) for _ in odd()), 1001),
    "unknown frames": (b"", lambda: (frame(0x99, 0, 0, b"x" * 10) for _ in odd()), 1001),
    "large unknown frames": (b"", lambda: (frame(0x99, 0, 0, bytes(16384)) for _ in odd()), 1001),
    "GOAWAY": (b"", lambda: (frame(Kind.GOAWAY, 0, 0, bytes(8)) for _ in odd()), 1001),
    "empty DATA (CVE-2019-9518)": (OPEN, lambda: (data(1) for _ in odd()), 1001),
    "DATA of padding alone": (OPEN, lambda: (data(1, b"\0", PADDED) for _ in odd()), 1001),
    "WINDOW_UPDATE by the byte (CVE-2019-9517)": (OPEN, lambda: (long(Kind.WINDOW_UPDATE, 1, 1) for _ in odd()), 4001),
    "WINDOW_UPDATE of closed streams": (headers(1, OK), lambda: (long(Kind.WINDOW_UPDATE, 1, 1) for _ in odd()), 4001),
    "empty DATA on a stream that we have reset": (headers(1, OK), lambda: (data(1) for _ in odd()), 1007),
    "trailers on a stream that we have reset": (headers(1, OK), lambda: (headers(1) for _ in odd()), 1007),
    "CONTINUATION (CVE-2024-27316)": (headers(1, flags=END_STREAM), lambda: (frame(Kind.CONTINUATION, 0, 1, b"") for _ in odd()), 17),
    "large CONTINUATION": (headers(1, flags=0), lambda: (frame(Kind.CONTINUATION, 0, 1, bytes(16384)) for _ in odd()), 17),
    "heads in many pieces": (
        b"",
        lambda: (headers(n, flags=0) + frame(Kind.CONTINUATION, 0, n, b"") * 14 + frame(Kind.CONTINUATION, 4, n, b"") for n in odd()),
        110,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("first", "flood", "most"), FLOODS.values(), ids=FLOODS)
def test_a_flood_ends_the_connection(
    request: pytest.FixtureRequest, first: bytes, flood: Callable[[], Iterator[bytes]], most: int
) -> None:
    ours = RecordingEngine()
    ours.receive(first)
    pieces = flood()
    sent = 0
    while True:
        try:
            for event in ours.receive(next(pieces)):
                ours.engine.consumed(0, getattr(event, "credit", 0))
                if isinstance(event, Exhausted):
                    assert [code for _, code in ours.codes(Kind.GOAWAY)] == [Code.ENHANCE_YOUR_CALM]
                    sent = 0
        except ProtocolError:
            break
        sent += 1
        assert sent <= most, "the flood continues"
        assert ours.engine.open_streams <= 256
        assert len(ours.engine._forgiven) <= 1024
        assert len(ours.engine._buffer) == 0
        assert (
            sum(map(len, ours.engine._block.pieces if ours.engine._block is not None else []))
            <= 256 * 1024
        )
    goaways = ours.codes(Kind.GOAWAY)
    assert {code for _, code in goaways} == {Code.ENHANCE_YOUR_CALM}
    assert len(goaways) == (1 if "CONTINUATION" in request.node.name else 2)


@pytest.mark.parametrize(
    "name",
    [
        "rapid reset (CVE-2023-44487)",
        "PING (CVE-2019-9512)",
        "WINDOW_UPDATE by the byte (CVE-2019-9517)",
    ],
)
def test_a_flood_below_the_limit_continues_and_memory_stays_flat(name: str) -> None:
    first, flood, _ = FLOODS[name]
    ours = RecordingEngine()
    ours.receive(first)
    pieces = flood()
    sizes = []
    tracemalloc.start()
    try:
        for _ in range(3):
            for _ in range(1500):
                ours.now += 0.025
                ours.receive(next(pieces))
                ours.sent.clear()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert ours.codes(Kind.GOAWAY) == []
    assert sizes[2] - sizes[1] < 64 * 1024


def test_the_streams_that_are_open_go_on_behind_the_goaway_that_answers_a_flood() -> None:
    ours = RecordingEngine()
    ours.receive(OPEN)
    for number in count(3, 2):
        ours.receive(headers(number) + long(Kind.RST_STREAM, number, 8))
        if ours.codes(Kind.GOAWAY):
            break
    assert ours.codes(Kind.GOAWAY) == [(number, Code.ENHANCE_YOUR_CALM)]
    ours.receive(headers(number + 2))
    assert ours.codes(Kind.RST_STREAM)[-1] == (number + 2, Code.REFUSED_STREAM)
    assert ours.receive(data(1, b"still here", END_STREAM)) == [
        DataReceived(1, b"still here", 10, True)
    ]
    ours.engine.send_response(1, ResponseHead(200), end=True)
    assert ours.engine.open_streams == 0


def test_a_larger_budget_bears_more() -> None:
    """As for a peer whose connection carries the requests of many clients."""
    ours = RecordingEngine(budget=20000)
    for number in range(1, 2 * 9999, 2):
        ours.receive(headers(number) + long(Kind.RST_STREAM, number, 8))
        ours.sent.clear()
    assert ours.codes(Kind.GOAWAY) == []
    for number in range(2 * 9999 + 1, 2 * 10001, 2):
        ours.receive(headers(number) + long(Kind.RST_STREAM, number, 8))
    assert [code for _, code in ours.codes(Kind.GOAWAY)] == [Code.ENHANCE_YOUR_CALM]


def test_resets_that_one_client_of_a_proxy_can_cause_are_free_where_they_cost_us_no_more_than_a_request() -> (
    None
):
    """On streams that we have answered, and those that cross with a reset of ours, each with
    everything in flight after it."""
    ours = RecordingEngine()
    before = ours.engine._patience
    for number in range(1, 20000, 4):
        ours.receive(headers(number, POST, END_HEADERS), headers(number + 2, POST, END_HEADERS))
        ours.engine.send_response(number, ResponseHead(200), end=True)
        ours.engine.reset(number + 2, Code.NO_ERROR)
        ours.receive(
            long(Kind.RST_STREAM, number, 8),
            data(number + 2, b"under way"),
            long(Kind.RST_STREAM, number + 2, 8),
        )
    assert ours.codes(Kind.GOAWAY) == []
    assert ours.engine._patience == before


def test_a_server_s_answers_that_cross_with_cancellations_cost_nothing() -> None:
    ours = RecordingEngine(Role.CLIENT)
    before = ours.engine._patience
    for _ in range(5000):
        number = ours.request()
        ours.engine.reset(number, Code.CANCEL)
        ours.receive(
            headers(number, OK, END_HEADERS),
            data(number, b"late"),
            headers(number, [(b"grpc-status", b"0")]),
        )
    assert ours.codes(Kind.GOAWAY) == []
    assert ours.engine._patience == before


def test_responses_that_are_malformed_too_large_or_interim_are_their_streams_fault_however_many_they_are() -> (
    None
):
    ours = RecordingEngine(Role.CLIENT, Http2Limits(head=8192))
    large = [(b"x%d" % n, b"v" * 4000) for n in range(3)]
    kept = ours.request()
    ours.receive(headers(kept, OK, END_HEADERS))
    for _ in range(1000):
        number = ours.request()
        ours.receive(headers(number, GET))
        number = ours.request()
        ours.receive(
            *[headers(number, [(b":status", b"103")], END_HEADERS)] * 3,
            headers(number, OK, END_HEADERS),
            headers(number, large),
        )
        ours.engine.reset(number, Code.CANCEL)
    assert ours.codes(Kind.GOAWAY) == []
    assert ours.receive(data(kept, b"fine", END_STREAM)) == [DataReceived(kept, b"fine", 4, True)]


@pytest.mark.parametrize("role", Role)
def test_seventy_kilobytes_of_trailers_reset_their_stream_and_the_table_stays_in_step(
    role: Role,
) -> None:
    ours = RecordingEngine(role)
    first = ours.request() if role is Role.CLIENT else 1
    other = ours.request() if role is Role.CLIENT else 3
    head = OK if role is Role.CLIENT else POST
    encoder = hpack.Encoder()

    def pieces(stream: int, pairs: list[tuple[bytes, bytes]], end: int = 0) -> bytes:
        block = encoder.encode(pairs)
        cut = [block[at : at + 16384] for at in range(0, len(block), 16384)]
        out = frame(Kind.HEADERS, end | (END_HEADERS if len(cut) == 1 else 0), stream, cut[0])
        for piece in cut[1:]:
            out += frame(Kind.CONTINUATION, END_HEADERS if piece is cut[-1] else 0, stream, piece)
        return out

    ours.receive(pieces(first, head), pieces(other, head))
    # The next block uses entries that the table got after the large values: it has another meaning
    # if the block was not decoded.
    large = [(b"x%d" % n, b"~" * 7000) for n in range(10)]
    events = ours.receive(
        pieces(first, [(b"x-small", b"kept"), *large, (b"x-last", b"kept")], END_STREAM)
    )
    assert [type(event) for event in events] == [StreamBroken]
    assert ours.codes(Kind.RST_STREAM) == [(first, Code.ENHANCE_YOUR_CALM)]
    (end,) = ours.receive(pieces(other, [(b"x-last", b"kept")], END_STREAM))
    assert isinstance(end, TrailersReceived)
    assert end.trailers.items == [(b"x-last", b"kept")]
    assert ours.codes(Kind.GOAWAY) == []


def test_we_send_no_header_list_that_the_peer_does_not_take() -> None:
    ours = RecordingEngine()
    ours.receive(settings((6, 16384)), headers(1), headers(3))
    size = 16384 - (32 + 7 + 3) - (32 + 1)
    ours.engine.send_response(1, ResponseHead(200, Headers([(b"x", b"v" * size)])), end=False)
    with pytest.raises(HeadTooLarge, match="16385 bytes"):
        ours.engine.send_response(
            3, ResponseHead(200, Headers([(b"x", b"v" * (size + 1))])), end=False
        )
    with pytest.raises(HeadTooLarge):
        ours.engine.send_trailers(1, Headers([(b"x", b"v" * 16384)]))
    ours.engine.send_response(3, ResponseHead(502), end=True)  # the stream is unchanged
    ours.receive()
    sender = RecordingEngine(Role.CLIENT)
    sender.receive(settings((6, 1000)))
    with pytest.raises(HeadTooLarge):
        sender.engine.send_request(
            RequestHead(b"GET", b"/" + b"x" * 1000, Headers([(b"Host", b"a")])), end=True
        )
    assert sender.engine.open_streams == 0
    assert sender.request() == 1, "no number was used up"


def test_a_header_list_over_the_limit_is_one_streams_fault_and_a_bomb_is_the_connections() -> None:
    ours = RecordingEngine(limits=Http2Limits(head=8192))
    # One entry of the table, nearly as large as the table
    entry = b"\x40\1x\x7f\xa1\x1e" + b"v" * 4000
    ours.receive(frame(Kind.HEADERS, END_HEADERS | END_STREAM, 1, BLOCK + entry))
    ours.receive(frame(Kind.HEADERS, END_HEADERS | END_STREAM, 3, BLOCK + b"\xbe" * 3))
    assert ours.codes(Kind.RST_STREAM) == [(3, Code.ENHANCE_YOUR_CALM)]
    with pytest.raises(ProtocolError):
        ours.receive(frame(Kind.HEADERS, END_HEADERS | END_STREAM, 5, BLOCK + b"\xbe" * 8000))
    assert ours.codes(Kind.GOAWAY) == [(5 - 2, Code.ENHANCE_YOUR_CALM)]


def test_many_parameters_in_one_settings_frame_are_too_many() -> None:
    ours = RecordingEngine()
    ours.receive(settings(*[(4, 65535)] * 32))
    with pytest.raises(ProtocolError):
        ours.receive(settings(*[(4, 65535)] * 33))
    assert ours.codes(Kind.GOAWAY) == [(0, Code.ENHANCE_YOUR_CALM)]


def test_table_sizes_that_come_without_a_header_block_are_not_collected() -> None:
    ours = RecordingEngine()
    for step in range(20000):
        ours.now += 0.02
        ours.receive(settings(*[(1, step % 7 * 100)] * 32))
    assert len(ours.engine._encoder._hpack.table_size_changes) == 0


def test_more_streams_than_allowed_are_refused_and_the_others_continue() -> None:
    ours = RecordingEngine(limits=Http2Limits(streams=10))
    for number in range(1, 61, 2):
        ours.receive(headers(number))
    assert ours.engine.open_streams == 10
    assert ours.codes(Kind.RST_STREAM) == [
        (number, Code.REFUSED_STREAM) for number in range(21, 61, 2)
    ]
    ours.engine.send_response(1, ResponseHead(200), end=True)
    ours.receive(headers(61))
    assert ours.engine.open_streams == 10


# Honest peers...


def answer(ours: RecordingEngine, number: int, body: bytes = b"hello") -> None:
    ours.engine.send_response(number, ResponseHead(200), end=False)
    ours.engine.send_data(number, body, end=False)
    ours.engine.send_trailers(number, Headers([(b"grpc-status", b"0")]))


def test_a_hundred_thousand_exchanges_half_of_them_cancelled() -> None:
    ours = RecordingEngine()
    request = headers(1, POST, END_HEADERS) + data(1, b"12345", END_STREAM)
    for number in range(1, 200000, 2):
        ours.now += 0.01
        wire = number.to_bytes(4, "big")
        ours.engine.receive_data(
            request[:5] + wire + request[9:-14] + request[-14:-9] + wire + request[-5:], ours.now
        )
        ours.engine.consumed(number, 5)
        if number % 4 == 1:
            ours.engine.receive_data(long(Kind.RST_STREAM, number, 8), ours.now)
        else:
            answer(ours, number)
        ours.engine.data_to_send()
    assert ours.engine.open_streams == 0
    assert ours.engine._patience > 900


def test_as_many_cancelled_at_once_as_are_answered() -> None:
    ours = RecordingEngine()
    for number in range(1, 20000, 4):
        ours.receive(headers(number), headers(number + 2), long(Kind.RST_STREAM, number, 8))
        answer(ours, number + 2)
    assert ours.engine._patience > 900


def test_a_server_that_hangs_and_all_its_clients_give_up() -> None:
    ours = RecordingEngine()
    for wave in range(1, 20000, 512):
        numbers = range(wave, wave + 512, 2)
        ours.receive(*[headers(number) for number in numbers])
        ours.now += 0.2
        ours.receive(*[long(Kind.RST_STREAM, number, 8) for number in numbers])
    assert ours.codes(Kind.RST_STREAM) == []


def test_grpc_go_measures_the_bandwidth_with_a_ping_for_every_small_message() -> None:
    ours = RecordingEngine()
    ours.receive(OPEN, long(Kind.WINDOW_UPDATE, 0, 2**30), long(Kind.WINDOW_UPDATE, 1, 2**30))
    ours.engine.send_response(1, ResponseHead(200), end=False)
    for _ in range(20000):
        ours.engine.send_data(1, b"small", end=False)
        ours.receive(frame(Kind.PING, 0, 0, bytes(8)), data(1, b"small"))
        ours.engine.consumed(1, 5)
        ours.sent.clear()


def test_a_download_whose_reader_gives_back_every_frame_twice() -> None:
    ours = RecordingEngine()
    ours.receive(headers(1))
    ours.engine.send_response(1, ResponseHead(200), end=False)
    for _ in range(20000):
        ours.engine.send_data(1, bytes(100), end=False)
        ours.receive(long(Kind.WINDOW_UPDATE, 0, 100), long(Kind.WINDOW_UPDATE, 1, 100))
        ours.sent.clear()


def test_a_thousand_streams_before_our_settings_were_read() -> None:
    ours = RecordingEngine()
    ours.receive(b"".join(headers(number) for number in range(1, 2000, 2)))
    assert len(ours.codes(Kind.RST_STREAM)) == 1000 - 256


def test_keepalive_pings_and_a_priority_for_every_request() -> None:
    ours = RecordingEngine()
    for number in range(1, 20000, 2):
        ours.now += 0.001
        ours.receive(
            frame(Kind.PRIORITY, 0, number, bytes(5)),
            headers(number),
            long(Kind.WINDOW_UPDATE, number, 1000),
        )
        answer(ours, number)
        if number % 100 == 1:
            ours.receive(frame(Kind.PING, 0, 0, bytes(8)))


def test_a_server_that_resets_every_stream_is_not_an_attacker() -> None:
    ours = RecordingEngine(Role.CLIENT)
    for _ in range(5000):
        number = ours.request()
        ours.receive(long(Kind.RST_STREAM, number, Code.REFUSED_STREAM))
        ours.sent.clear()
    assert ours.engine.open_streams == 0


def test_a_cancelled_stream_of_small_messages_is_not_a_flood_for_a_client() -> None:
    ours = RecordingEngine(Role.CLIENT)
    for _ in range(20):
        number = ours.request()
        ours.receive(headers(number, OK, END_HEADERS))
        ours.engine.reset(number, Code.CANCEL)
        ours.receive(*[data(number, b"small")] * 2000)
    assert ours.codes(Kind.GOAWAY) == []
