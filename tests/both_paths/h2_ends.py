"""Ends of HTTP/2 connections, outside of the proxies. Data is read at once, and python-hyper's h2
parses it into messages."""

from __future__ import annotations

import contextlib
import random
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio

from proxy.wire.h2.frames import PREFACE, Kind, frame
from tests.both_paths.stage import End, masked, pieces

if TYPE_CHECKING:
    from tests.both_paths.stage import Stage

Pair = tuple[bytes, bytes]
INITIAL_WINDOW = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE
EXTENDED_CONNECT = h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL


@dataclass
class Message:
    """What has arrived on a stream."""

    head: list[Pair] = field(default_factory=list)
    interim: list[list[Pair]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: list[Pair] = field(default_factory=list)
    ended: bool = False
    reset: int | None = None  # reset by the other side, with this code
    left: bool = False  # ended by us: reset, or with a connection that we closed
    finished: bool = False  # our direction has ended
    held: bool = False  # its window is not enlarged

    @property
    def over(self) -> bool:
        """Nothing more can arrive."""
        return self.ended or self.reset is not None or self.left

    @property
    def done(self) -> bool:
        """Besides, nothing is left to send."""
        return (self.ended and self.finished) or self.reset is not None or self.left

    def get(self, name: bytes) -> bytes:
        return next((value for n, value in self.head if n == name), b"")

    def shown(self) -> str:
        heads = [
            masked(b"".join(b"%b: %b\r\n" % pair for pair in pairs))
            for pairs in (*self.interim, self.head, self.trailers)
        ]
        return (
            f"{heads} {len(self.body)} {zlib.crc32(self.body):x} {'ended' if self.ended else ''}"
            f" {None if self.left else self.reset}"
        )


class End2(End):
    """Sends what the test asks for, right or wrong. If the other side no longer reads, the rest is
    not sent."""

    client = False

    def __init__(
        self, stage: Stage, sock: trio.socket.SocketType, settings: dict[int, int] | None = None
    ) -> None:
        super().__init__(stage, sock)
        config = h2.config.H2Configuration(client_side=self.client, header_encoding=None)
        config.validate_outbound_headers = config.normalize_outbound_headers = (
            config.normalize_inbound_headers
        ) = False
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        if settings is not None:
            self.h2.update_settings(settings)
        self.messages: dict[int, Message] = {}
        self.opened_by_peer: list[int] = []  # streams that the other side has opened, in order
        self.goaways: list[tuple[int, int]] = []  # last stream, code
        self.greedy = True  # windows are enlarged at once
        self.cut: random.Random | None = None  # writes are cut at random places
        self.fault = ""  # of the other side
        self._lock = trio.Lock()
        self._preface = 0 if self.client else len(PREFACE)

    # Receiving...

    async def read(self) -> None:
        await self.flush()
        await super().read()

    async def receive(self, data: bytes) -> None:
        """h2 does not get GOAWAY, because it would take it for the end of the connection."""
        self.received += data
        while len(self.received) >= (size := self._preface or 9):
            if not self._preface:
                size += int.from_bytes(self.received[:3], "big")
            if len(self.received) < size:
                break
            piece = bytes(self.received[:size])
            del self.received[:size]
            if not self._preface and piece[3] == Kind.GOAWAY:
                self.goaways.append(
                    (int.from_bytes(piece[9:13], "big"), int.from_bytes(piece[13:17], "big"))
                )
            else:
                self._read(piece)
            self._preface = 0
        await self.flush()

    def _read(self, piece: bytes) -> None:
        try:
            for event in self.h2.receive_data(piece):
                self._note(event)
        except h2.exceptions.ProtocolError as error:
            self.fault = self.fault or repr(error)

    def _note(self, event: h2.events.Event) -> None:
        number = getattr(event, "stream_id", None) or 0
        message = self.messages.setdefault(number, Message()) if number else Message()
        match event:
            case h2.events.RequestReceived():
                message.head = list(event.headers or [])
                message.held = message.get(b":path").startswith(b"/slow-take")
                self.opened_by_peer.append(number)
            case h2.events.ResponseReceived():
                message.head = list(event.headers or [])
            case h2.events.InformationalResponseReceived():
                message.interim.append(list(event.headers or []))
            case h2.events.DataReceived():
                message.body += event.data or b""
                if self.greedy and not message.held:
                    self.credit(number, event.flow_controlled_length or 0)
            case h2.events.TrailersReceived():
                message.trailers = list(event.headers or [])
            case h2.events.StreamEnded():
                message.ended = True
            case h2.events.StreamReset(remote_reset=True):
                message.reset = int(event.error_code or 0)

    def credit(self, number: int, size: int) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.h2.acknowledge_received_data(size, number)

    # Sending...

    async def flush(self, *raw: bytes) -> None:
        async with self._lock:
            data = self.h2.data_to_send()
            await self.send(*([data] if self.cut is None else pieces(data, self.cut)), *raw)

    def head(self, number: int, pairs: list[Pair], *, end: bool = False) -> None:
        """Buffers the head; the next `flush` or `put` sends it. So do all methods that are not
        coroutines."""
        message = self.messages.setdefault(number, Message())
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.h2.send_headers(number, pairs, end_stream=end)
            message.finished = message.finished or end

    def piece(self, number: int, data: bytes, *, end: bool = False, pad: int | None = None) -> None:
        """DATA that the windows allow."""
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.h2.send_data(number, data, end_stream=end, pad_length=pad)
            self.messages[number].finished = self.messages[number].finished or end

    def reset(self, number: int, code: int) -> None:
        self.messages[number].left = True
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.h2.reset_stream(number, code)

    async def put(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Sends as the windows allow, or until the stream has ended."""
        while self._open(number):
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            now, data = data[:room], data[room:]
            if now or not data:
                self.piece(number, now, end=end and not data)
            await self.flush()
            if not data:
                return
            await self._stage.until(
                lambda: not self._open(number) or self.h2.local_flow_control_window(number) > 0
            )

    def _open(self, number: int) -> bool:
        message = self.messages[number]
        return self.ended is None and not self.closed and message.reset is None and not message.left

    async def goaway(self, last: int, code: int = 0) -> None:
        """Written by hand: h2 sends GOAWAY only to end its connection."""
        await self.flush(
            frame(Kind.GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big"))
        )

    def close(self, *, reset: bool = False) -> None:
        for message in self.messages.values():
            message.left = True
        super().close(reset=reset)

    # Results of a play...

    @property
    def quiet(self) -> bool:
        return (
            self.closed
            or self.ended is not None
            or all(message.done for message in self.messages.values())
        )

    def seen(self) -> object:
        """Sorted, because the order in which the requests of one write arrive at a server is not
        defined."""
        messages = [self.messages[number].shown() for number in sorted(self.messages)]
        return (
            (self.fault, messages, self.goaways) if self.client else (self.fault, sorted(messages))
        )


class Client2(End2):
    client = True

    def open(self, pairs: list[Pair], *, end: bool = True) -> int:
        number = self.h2.get_next_available_stream_id()
        self.head(number, pairs, end=end)
        return number

    def answered(self, number: int) -> bool:
        """The response is complete and nothing is left to send, or there will be no response."""
        return self.messages[number].done or self.ended is not None


class Server2(End2):
    def __init__(self, stage: Stage, sock: trio.socket.SocketType) -> None:
        super().__init__(stage, sock, {EXTENDED_CONNECT: 1})


def fuzzed(rng: random.Random) -> list[Pair]:
    """Fields with random names and values, some of them repeated, and some that only proxies may
    send."""
    names = [bytes(rng.choices(b"abcxyz-_.0~", k=rng.choice([1, 5, 20]))) for _ in range(3)]
    names += [
        b"cookie",
        b"l5d_client_id",
        b"isthmus-client-id",
        b"isthmus-retry-limit",
        b"user-agent",
        b"x-request-id",
    ]
    values = [
        b"",
        b"1",
        bytes(rng.choices(b'!az\x80\xff,;="', k=rng.choice([3, 30, 400]))),
        b"a \t b",
    ]
    return [(rng.choice(names), rng.choice(values)) for _ in range(rng.randrange(7))]
