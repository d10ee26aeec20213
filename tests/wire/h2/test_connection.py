"""Our engine against the h2 library, in both roles: whatever the two send to each other, in any
order and any pieces, both read the same messages.

h2 checks our flow control, our frame sizes and our use of its header table: it raises if they are
wrong. What one side sends is a script, one per stream: a head, perhaps informational ones before
it, data, trailers, the end, or a reset. The other side must read the same script, or the start of
it where a reset has cut it."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
from h2.settings import SettingCodes
from hyperframe.frame import Frame, HeadersFrame
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.wire.h1.connection import Role
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.events import (
    DataReceived,
    GoingAway,
    HeadReceived,
    Http2Limits,
    PingAnswered,
    StreamBroken,
    TrailersReceived,
    WindowOpened,
)
from proxy.wire.h2.fields import request_head, request_pairs, response_head, response_pairs
from proxy.wire.h2.frames import PREFACE
from proxy.wire.messages import Headers, RequestHead
from tests.kit.chunkings import at_random, byte_by_byte
from tests.kit.http2 import Pair

Script = list[tuple[str, object]]


class Side:
    """One end: what it may still send on each stream, what it has sent, and what it has
    received."""

    def __init__(self) -> None:
        self.open: set[int] = set()  # streams on which it may send more
        self.headless: set[int] = set()  # of those, the ones on which its head has not been sent
        self.sent: dict[int, Script] = defaultdict(list)
        self.received: dict[int, Script] = defaultdict(list)
        self.cut: set[int] = set()  # streams that were reset, by either side
        self.pongs: list[bytes] = []
        self.gone: list[int] = []  # codes of the other's GOAWAY

    def hears_data(self, number: int, data: bytes, *, ended: bool) -> None:
        script = self.received[number]
        if data:
            script.append(("data", data))
        if ended:
            script.append(("end", None))

    def hears_request(self, number: int) -> None:
        self.open.add(number)
        self.headless.add(number)

    def cuts(self, number: int) -> None:
        self.cut.add(number)
        self.open.discard(number)
        self.headless.discard(number)


class Engine(Side):
    """Ours."""

    def __init__(self, *, client: bool, limits: Http2Limits) -> None:
        super().__init__()
        self.client = client
        self.limits = limits
        self.http = Http2Connection(Role.CLIENT if client else Role.SERVER, limits)
        self.now = 0.0
        self.owed: list[tuple[int, int]] = []  # credit that is not returned yet

    def receive(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            self.now += 1
            for event in self.http.receive_data(piece, self.now):
                match event:
                    case HeadReceived(stream=number, head=head):
                        pairs = (
                            request_pairs(head)
                            if isinstance(head, RequestHead)
                            else response_pairs(head)
                        )
                        self.received[number].append(("head", pairs))
                        self.hears_data(number, b"", ended=event.ended)
                        if isinstance(head, RequestHead):
                            self.hears_request(number)
                    case DataReceived(stream=number):
                        self.hears_data(number, event.data, ended=event.ended)
                        self.owed.append((number, event.credit))
                    case TrailersReceived(stream=number):
                        self.received[number] += [("trailers", event.trailers.items), ("end", None)]
                    case StreamBroken(stream=number):
                        assert event.by_peer, event
                        self.cuts(number)
                    case PingAnswered():
                        self.pongs.append(event.payload)
                    case GoingAway():
                        self.gone.append(event.code)
                    case WindowOpened():
                        pass

    def give_back(self) -> None:
        for number, credit in self.owed:
            self.http.consumed(number, credit)
        self.owed.clear()

    def take_out(self) -> bytes:
        return self.http.data_to_send()

    def capacity(self) -> int:
        return self.http.capacity

    def request(self, pairs: list[Pair], *, end: bool) -> int:
        return self.http.send_request(request_head(pairs), end=end)

    def head(self, number: int, pairs: list[Pair], *, end: bool) -> None:
        self.http.send_response(number, response_head(pairs), end=end)

    def trailers(self, number: int, pairs: list[Pair]) -> None:
        self.http.send_trailers(number, Headers(pairs))

    def window(self, number: int) -> int:
        return self.http.window(number)

    def blocked(self, number: int) -> bool:
        """The window is negative: then h2 refuses even DATA without a byte."""
        return self.http._streams[number].send_window < 0

    def data(self, number: int, data: bytes, *, end: bool, source: random.Random) -> None:
        self.http.send_data(number, data, end=end)

    def reset(self, number: int, code: int) -> None:
        self.http.reset(number, code)

    def ping(self, payload: bytes) -> None:
        self.http.ping(payload)

    def odd_thing(self, source: random.Random) -> None:
        pass


class _H2(h2.connection.H2Connection):
    """h2 counts trailers on a stream that it has reset as a new stream, and raises if as many as it
    allows are open."""

    _late = False

    @property
    def open_inbound_streams(self) -> int:
        return 0 if self._late else super().open_inbound_streams

    def _receive_headers_frame(
        self, frame: HeadersFrame
    ) -> tuple[list[Frame], list[h2.events.Event]]:
        self._late = (
            frame.stream_id not in self.streams
            and frame.stream_id <= self.highest_inbound_stream_id
        )
        try:
            return super()._receive_headers_frame(frame)
        finally:
            self._late = False


class Library(Side):
    """h2, without what it does wrong: it gets whole frames (a new MAX_FRAME_SIZE has no effect
    within a piece of bytes), and has one SETTINGS in flight at a time (an acknowledgement makes it
    believe that later ones have been read, too)."""

    def __init__(self, *, client: bool) -> None:
        super().__init__()
        self.client = client
        config = h2.config.H2Configuration(client_side=client, header_encoding=False)
        self.h2 = _H2(config)
        self.h2.initiate_connection()
        self.settling = True  # its last SETTINGS is not acknowledged yet
        self.unheard = b""
        self.owed: list[tuple[int, int]] = []

    def receive(self, pieces: Sequence[bytes]) -> None:
        self.unheard += b"".join(pieces)
        if self.unheard.startswith(PREFACE):
            self.h2.receive_data(PREFACE)
            self.unheard = self.unheard[len(PREFACE) :]
        while self.unheard:
            size = 9 + int.from_bytes(self.unheard[:3], "big")
            frame, self.unheard = self.unheard[:size], self.unheard[size:]
            for event in self.h2.receive_data(frame):
                self._receive(event)

    def _receive(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=number):
                self.received[number].append(("head", [tuple(pair) for pair in event.headers]))
                self.hears_request(number)
            case (
                h2.events.ResponseReceived(stream_id=number)
                | h2.events.InformationalResponseReceived(stream_id=number)
            ):
                self.received[number].append(("head", [tuple(pair) for pair in event.headers]))
            case h2.events.DataReceived(stream_id=number):
                self.hears_data(number, event.data, ended=False)
                self.owed.append((number, event.flow_controlled_length))
            case h2.events.TrailersReceived(stream_id=number):
                self.received[number].append(("trailers", [tuple(pair) for pair in event.headers]))
            case h2.events.StreamEnded(stream_id=number):
                self.received[number].append(("end", None))
            case h2.events.StreamReset(stream_id=number):
                assert event.remote_reset
                self.cuts(number)
            case h2.events.SettingsAcknowledged():
                self.settling = False
            case h2.events.PingAckReceived():
                self.pongs.append(event.ping_data)
            case h2.events.ConnectionTerminated():
                self.gone.append(int(event.error_code or 0))

    def give_back(self) -> None:
        for number, credit in self.owed:
            if credit:
                self.h2.acknowledge_received_data(credit, number)
        self.owed.clear()

    def take_out(self) -> bytes:
        return self.h2.data_to_send()

    def capacity(self) -> int:
        return self.h2.remote_settings.max_concurrent_streams - self.h2.open_outbound_streams

    def request(self, pairs: list[Pair], *, end: bool) -> int:
        number = self.h2.get_next_available_stream_id()
        # h2 does not leave room for the priority in a HEADERS frame that is full.
        if number % 3 == 0 and len(pairs[-1][1]) < 10000:
            self.h2.send_headers(
                number, pairs, end_stream=end, priority_weight=7, priority_depends_on=0
            )
        else:
            self.h2.send_headers(number, pairs, end_stream=end)
        return number

    def head(self, number: int, pairs: list[Pair], *, end: bool) -> None:
        self.h2.send_headers(number, pairs, end_stream=end)

    def trailers(self, number: int, pairs: list[Pair]) -> None:
        self.h2.send_headers(number, pairs, end_stream=True)

    def window(self, number: int) -> int:
        return min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)

    def blocked(self, number: int) -> bool:
        return False

    def data(self, number: int, data: bytes, *, end: bool, source: random.Random) -> None:
        padding = source.choice([None, None, 0, 5, 255])
        if padding is not None and len(data) + padding + 1 > self.window(number):
            padding = None
        self.h2.send_data(number, data, end_stream=end, pad_length=padding)

    def reset(self, number: int, code: int) -> None:
        self.h2.reset_stream(number, code)

    def ping(self, payload: bytes) -> None:
        self.h2.ping(payload)

    def odd_thing(self, source: random.Random) -> None:
        """What only h2 can send: new settings, a priority, more window than necessary."""
        match source.randrange(8):
            case 0 | 1 | 2 | 3 | 4 if not self.settling:
                values = {
                    SettingCodes.INITIAL_WINDOW_SIZE: source.choice([0, 1, 1000, 65535, 200000]),
                    SettingCodes.MAX_FRAME_SIZE: source.choice([16384, 20000, 2**20]),
                    SettingCodes.HEADER_TABLE_SIZE: source.choice([0, 60, 500, 4096, 65536]),
                }
                if not self.client:
                    values[SettingCodes.MAX_CONCURRENT_STREAMS] = source.choice([3, 10, 50])
                self.h2.update_settings(
                    dict(source.sample(sorted(values.items()), source.randrange(len(values) + 1)))
                )
                self.settling = True
            case 5 if self.client:
                self.h2.prioritize(
                    source.choice([1, 3, 5, 101]), weight=16, depends_on=0, exclusive=False
                )
            case _:
                self.h2.increment_flow_control_window(source.randrange(1, 5000))


METHODS = [b"GET", b"POST", b"PUT", b"OPTIONS"]
FIELDS: list[Pair] = [
    (b"x-a", b"1"), (b"x-a", b"2"), (b"accept", b"*/*"), (b"te", b"trailers"), (b"authorization", b"Bearer abc"), (b"cookie", b"a=1"),
    (b"x-empty", b""), (b"x-long", b"v" * 300), (b"x-larger", b"w" * 5000), (b"x-obs", b"\xc3\xa4"),
]  # fmt: skip


class Conversation:
    """A client and a server, one of them ours, that send random things. These arrive now, or later,
    in pieces."""

    def __init__(self, seed: int, *, ours_is_client: bool) -> None:
        self.source = source = random.Random(seed)
        limits = Http2Limits(
            streams=source.choice([5, 100]),
            stream_window=source.choice([65535, 262144]),
            connection_window=2**20,
        )
        self.engine = Engine(client=ours_is_client, limits=limits)
        self.library = Library(client=not ours_is_client)
        self.client: Engine | Library = self.engine if ours_is_client else self.library
        self.server: Engine | Library = self.library if ours_is_client else self.engine
        self.carry_all()

    def pieces(self, data: bytes) -> list[bytes]:
        if len(data) < 200 and self.source.random() < 0.3:
            return byte_by_byte(data)
        return at_random(data, self.source.randrange(1000), self.source.randrange(6))

    def carry(self, side: Engine | Library) -> bool:
        """What `side` has sent so far reaches the other. True if there was anything."""
        data = side.take_out()
        (self.server if side is self.client else self.client).receive(self.pieces(data))
        return bool(data)

    def carry_all(self) -> None:
        while self.carry(self.client) | self.carry(self.server):
            pass

    def fields(self) -> list[Pair]:
        # Sometimes one that does not fit into a frame; seldom, because h2 takes long to compress
        # it.
        large = [(b"x-largest", b"z" * 17000)] if self.source.random() < 0.03 else []
        return self.source.sample(FIELDS, self.source.randrange(4)) + large

    def step(self) -> None:
        source = self.source
        side = source.choice([self.client, self.server])
        choice = source.randrange(12)
        if choice < 2:
            if self.client.capacity() > 0:
                self.ask()
        elif choice < 7:
            if side.open:
                self.say(side, source.choice(sorted(side.open)))
        elif choice == 7:
            side.odd_thing(source)
        elif choice == 8:
            payload = source.randbytes(8)
            side.ping(payload)
            side.sent[0].append(("ping", payload))
        elif choice == 9:
            side.give_back()
        elif choice == 10:
            self.carry_all()
        else:
            self.carry(side)

    def ask(self) -> None:
        path = b"/" + b"p" * self.source.randrange(3)
        pairs = [
            (b":method", self.source.choice(METHODS)),
            (b":scheme", b"http"),
            (b":authority", b"a:80"),
            (b":path", path),
            *self.fields(),
        ]
        end = self.source.random() < 0.4
        number = self.client.request(pairs, end=end)
        self.client.sent[number].append(("head", pairs))
        if end:
            self.client.sent[number].append(("end", None))
        else:
            self.client.open.add(number)

    def say(self, side: Engine | Library, number: int) -> None:
        """One more item on a stream, as HTTP allows it."""
        source, script = self.source, side.sent[number]
        end = False
        if source.random() < 0.05:
            side.reset(number, source.choice([0, 2, 7, 8]))
            side.cuts(number)
            return
        if number in side.headless:
            early = [] if number in self.client.cut else [b"103"]
            status = source.choice([*early, b"200", b"200", b"404", b"500"])
            end = source.random() < 0.2 and status != b"103"
            pairs = [
                (b":status", status),
                *[
                    pair
                    for pair in self.fields()
                    if pair[0] not in (b"te", b"cookie", b"authorization")
                ],
            ]
            side.head(number, pairs, end=end)
            script.append(("head", pairs))
            if status != b"103":
                side.headless.discard(number)
            else:
                self.carry(side)  # h2 raises for one that comes too late for its reset
        elif source.random() < 0.2 or side.blocked(number):
            pairs = [
                (b"grpc-status", b"%d" % source.randrange(17)),
                (b"x-t", b"t" * source.choice([1, 100])),
            ]
            side.trailers(number, pairs)
            script.append(("trailers", pairs))
            end = True
        else:
            size = min(source.choice([0, 1, 100, 20000, 70000]), max(0, side.window(number)))
            end = source.random() < 0.3
            side.data(number, (data := source.randbytes(size)), end=end, source=source)
            script += [("data", data)] if data else []
        if end:
            script.append(("end", None))
            side.open.discard(number)


def whole(script: Script) -> Script:
    """With adjacent pieces of data as one, and cookies at the end, where h2 puts them."""
    found: Script = []
    for kind, what in script:
        if kind == "head":
            found.append((kind, sorted(what, key=lambda pair: pair[0] == b"cookie")))  # type: ignore[call-overload]
        elif kind == "data" and found and found[-1][0] == "data":
            found[-1] = ("data", found[-1][1] + what)  # type: ignore[operator]
        else:
            found.append((kind, what))
    return found


def compare(teller: Side, hearer: Side, cut: set[int]) -> None:
    for number in {*teller.sent, *hearer.received} - {0}:
        said, received = whole(teller.sent[number]), whole(hearer.received[number])
        if number not in cut:
            assert received == said, number
            continue
        # Cut short: the beginning of it, the last piece of data perhaps not whole.
        assert len(received) <= len(said)
        for (kind, what), (kind_said, what_said) in zip(received, said, strict=False):
            assert kind == kind_said
            assert what == what_said or (kind == "data" and what_said.startswith(what))  # type: ignore[attr-defined]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), ours_is_client=st.booleans(), steps=st.integers(20, 150))
@example(
    seed=34470, ours_is_client=True, steps=94
)  # trailers on a stream that has been reset, when all others are in use
def test_both_sides_understand_the_same(seed: int, ours_is_client: bool, steps: int) -> None:
    conversation = Conversation(seed, ours_is_client=ours_is_client)
    client, server, engine = conversation.client, conversation.server, conversation.engine
    for _ in range(steps):
        conversation.step()
    conversation.carry_all()
    cut = client.cut | server.cut
    compare(client, server, cut)
    compare(server, client, cut)
    for side, other in ((client, server), (server, client)):
        assert [payload for _, payload in side.sent[0]] == side.pongs
        assert not other.gone
    # Everything is read: the windows are full again, except for what is held back to be returned in
    # one piece.
    engine.give_back()
    conversation.carry_all()
    http = engine.http
    assert http._window + http._grant == engine.limits.connection_window
    assert http._grant * 2 < engine.limits.connection_window
    for stream in http._streams.values():
        if stream.receives:
            assert stream.window + stream.taken == engine.limits.stream_window
    # And both agree on what may be sent.
    assert conversation.library.h2.outbound_flow_control_window == http._window
    assert http._send_window == conversation.library.h2.inbound_flow_control_window


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), ours_is_client=st.booleans(), ours_goes=st.booleans())
def test_goaway_is_understood_by_the_other(
    seed: int, ours_is_client: bool, ours_goes: bool
) -> None:
    conversation = Conversation(seed, ours_is_client=ours_is_client)
    for _ in range(30):
        conversation.step()
    conversation.carry_all()
    if ours_goes:
        conversation.engine.http.go_away()
        conversation.carry(conversation.engine)
        assert conversation.library.gone == [0]
    else:
        conversation.library.h2.close_connection(2)
        conversation.carry(conversation.library)
        assert conversation.engine.gone == [2]
        assert conversation.engine.capacity() == 0


def test_h2_would_have_said_so() -> None:
    """The check that the other tests depend on: h2 raises for DATA over its window."""
    conversation = Conversation(1, ours_is_client=True)
    conversation.ask()
    number = conversation.engine.http.send_request(
        request_head([(b":method", b"PUT"), *PUT]), end=False
    )
    for _ in range(5):
        conversation.engine.http.send_data(number, bytes(16384), end=False)
    with pytest.raises(h2.exceptions.FlowControlError):
        conversation.carry(conversation.engine)


PUT: list[Pair] = [(b":scheme", b"http"), (b":path", b"/"), (b":authority", b"a")]


@pytest.mark.parametrize("size", [16384, 16385, 65536, 2**24 - 1])
def test_frames_are_as_large_as_the_peer_allows_and_no_larger_than_is_sensible(size: int) -> None:
    conversation = Conversation(1, ours_is_client=False)
    conversation.library.h2.update_settings(
        {SettingCodes.MAX_FRAME_SIZE: size, SettingCodes.INITIAL_WINDOW_SIZE: 2**20}
    )
    conversation.library.h2.increment_flow_control_window(2**20)
    number = conversation.library.request([(b":method", b"GET"), *PUT], end=True)
    conversation.carry_all()
    engine = conversation.engine.http
    engine.send_response(number, response_head([(b":status", b"200")]), end=False)
    engine.data_to_send()
    engine.send_data(number, bytes(200000), end=True)
    out, sizes = engine.data_to_send(), []
    while out:
        sizes.append(int.from_bytes(out[:3], "big"))
        out = out[9 + sizes[-1] :]
    assert sum(sizes) == 200000
    assert set(sizes[:-1]) == {min(size, 65536)}
