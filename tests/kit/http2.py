"""HTTP/2 for tests: frames made by hand, header blocks that do not change the table, an engine with
its other half, and a small server."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import trio

from proxy.net.exceptions import NetError
from proxy.net.socket_stream import SocketStream
from proxy.wire.h1.connection import Role
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.events import (
    DataReceived,
    Event,
    HeadReceived,
    Http2Limits,
    StreamBroken,
    StreamGone,
    TrailersReceived,
    WindowOpened,
)
from proxy.wire.h2.flood_budget import BUDGET
from proxy.wire.h2.frames import END_HEADERS, END_STREAM, PREFACE, Code, Kind, frame
from proxy.wire.messages import Headers, ProtocolError, RequestHead, ResponseHead

Pair = tuple[bytes, bytes]
GET: list[Pair] = [
    (b":method", b"GET"),
    (b":scheme", b"http"),
    (b":path", b"/"),
    (b":authority", b"a"),
]
POST: list[Pair] = [(b":method", b"POST"), *GET[1:]]
OK: list[Pair] = [(b":status", b"200")]


def literal(pairs: Iterable[Pair], kind: int = 0) -> bytes:
    """A header block of literals without indexing: its meaning does not depend on earlier blocks.
    Strings of up to 16 KiB."""
    return b"".join(bytes([kind]) + _string(name) + _string(value) for name, value in pairs)


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest = len(text) - 127
    return bytes([127, rest % 128 + 128, rest // 128]) + text


def settings(*values: tuple[int, int], flags: int = 0, stream: int = 0) -> bytes:
    return frame(
        Kind.SETTINGS, flags, stream, b"".join(struct.pack(">HL", *value) for value in values)
    )


def headers(
    stream: int, pairs: Iterable[Pair] = GET, flags: int = END_HEADERS | END_STREAM
) -> bytes:
    return frame(Kind.HEADERS, flags, stream, literal(pairs))


def data(stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return frame(Kind.DATA, flags, stream, payload)


def long(kind: Kind, stream: int, number: int) -> bytes:
    """WINDOW_UPDATE or RST_STREAM."""
    return frame(kind, 0, stream, struct.pack(">L", number))


def frames_in(stream: bytes) -> list[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each frame; a preface in front is skipped."""
    at, found = len(PREFACE) if stream.startswith(PREFACE) else 0, []
    while at < len(stream):
        size = int.from_bytes(stream[at : at + 3], "big")
        assert at + 9 + size <= len(stream), "half a frame"
        found.append(
            (
                stream[at + 3],
                stream[at + 4],
                int.from_bytes(stream[at + 5 : at + 9], "big"),
                stream[at + 9 : at + 9 + size],
            )
        )
        at += 9 + size
    return found


class RecordingEngine:
    """An engine after its greeting, with a record of all that it sends."""

    def __init__(
        self,
        role: Role = Role.SERVER,
        limits: Http2Limits | None = None,
        *,
        greeted: bool = True,
        budget: float = BUDGET,
    ) -> None:
        self.engine = Http2Connection(role, limits or Http2Limits(), budget)
        self.now = 1.0
        self.sent: list[tuple[int, int, int, bytes]] = []
        if greeted:
            self.engine.receive_data(
                (PREFACE if role is Role.SERVER else b"") + settings(), self.now
            )
            self.engine.data_to_send()

    def receive(self, *pieces: bytes) -> list[Event]:
        """All events of the pieces. Raises ProtocolError; what it sent as a response is in `sent`
        in any case."""
        events: list[Event] = []
        for piece in pieces:
            try:
                events += self.engine.receive_data(piece, self.now)
                while self.engine.paused:
                    events += self.engine.receive_data(b"", self.now)
            except ProtocolError:
                events += self.engine.before_fault
                raise
            finally:
                self.sent += frames_in(self.engine.data_to_send())
        return events

    def request(self, method: bytes = b"GET", *, end: bool = True) -> int:
        """Open a stream (client)."""
        return self.engine.send_request(
            RequestHead(method, b"/", Headers([(b"Host", b"a")])), end=end
        )

    def codes(self, kind: Kind) -> list[tuple[int, Code]]:
        """(stream, code) of the RST_STREAM frames sent, or (last stream, code) of the GOAWAYs."""
        if kind is Kind.RST_STREAM:
            return [(s, Code(int.from_bytes(p, "big"))) for k, _, s, p in self.sent if k == kind]
        return [
            (int.from_bytes(p[:4], "big"), Code(int.from_bytes(p[4:8], "big")))
            for k, _, _, p in self.sent
            if k == kind
        ]


class _Answer:
    def __init__(self, head: RequestHead) -> None:
        self.body = b"hello from a small server\n" if head.method in (b"GET", b"HEAD") else b""
        self.ended = False
        self.started = False
        self.bodiless = head.method == b"HEAD"


class Server:
    """Answers every request when it has ended, with 200 and the request's body, or with a short
    text."""

    def __init__(self, stream: SocketStream, limits: Http2Limits | None = None) -> None:
        self._stream = stream
        self._engine = Http2Connection(Role.SERVER, limits or Http2Limits())
        self._answers: dict[int, _Answer] = {}

    async def serve(self) -> None:
        """Until the connection ends; closes it."""
        try:
            await self._flush()
            while received := await self._stream.receive_some():
                try:
                    self._receive(self._engine.receive_data(received, trio.current_time()))
                    while self._engine.paused:
                        self._receive(self._engine.receive_data(b"", trio.current_time()))
                except ProtocolError:
                    await self._flush()
                    break
                await self._flush()
            await self._stream.aclose()
        except NetError:
            pass
        finally:
            self._stream.close()

    async def _flush(self) -> None:
        if out := self._engine.data_to_send():
            await self._stream.send_all(out)

    def _receive(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case HeadReceived(stream=number, head=RequestHead() as head):
                    self._answers[number] = answer = _Answer(head)
                    answer.ended = event.ended
                case DataReceived(stream=number):
                    self._engine.consumed(number, event.credit)
                    if number in self._answers:
                        self._answers[number].body += event.data
                        self._answers[number].ended = event.ended
                case TrailersReceived(stream=number) if number in self._answers:
                    self._answers[number].ended = True
                case StreamBroken(stream=number):
                    self._answers.pop(number, None)
                case WindowOpened():
                    pass
        for number in list(self._answers):
            self._answer(number, self._answers[number])

    def _answer(self, number: int, answer: _Answer) -> None:
        """As much as the windows allow."""
        if not answer.ended:
            return
        try:
            if not answer.started:
                answer.started = True
                length = Headers([(b"content-length", b"%d" % len(answer.body))])
                self._engine.send_response(
                    number, ResponseHead(200, length), end=answer.bodiless or not answer.body
                )
                answer.body = b"" if answer.bodiless else answer.body
            while answer.body and (room := self._engine.window(number)):
                piece, answer.body = answer.body[:room], answer.body[room:]
                self._engine.send_data(number, piece, end=not answer.body)
        except StreamGone:
            answer.body = b""
        if not answer.body:
            del self._answers[number]
