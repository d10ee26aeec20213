"""HTTP/2 over real loopback sockets, by python-hyper's h2, which is independent of this project. A
peer reads only on request, and enlarges no window by itself, so that a test decides which side is
slow."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from proxy.net.address import Address
from tests.kit.http import Peer

Pair = tuple[bytes, bytes]
E = TypeVar("E", bound=h2.events.Event)

GET: list[Pair] = [
    (b":method", b"GET"),
    (b":scheme", b"http"),
    (b":authority", b"a"),
    (b":path", b"/"),
]
POST: list[Pair] = [(b":method", b"POST"), *GET[1:]]
GRPC: list[Pair] = [*POST, (b"content-type", b"application/grpc"), (b"te", b"trailers")]
OK: list[Pair] = [(b":status", b"200")]
WEBSOCKET: list[Pair] = [
    (b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"), (b":path", b"/chat"), (b":authority", b"shop"),
]  # fmt: skip
EXTENDED: dict[int, int] = {h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}


class Gone(Exception):
    """The other side has ended the connection."""


@dataclass
class Answer:
    """A message as h2 parsed it."""

    headers: list[Pair] = field(default_factory=list)
    body: bytes = b""
    trailers: list[Pair] = field(default_factory=list)
    interim: list[list[Pair]] = field(default_factory=list)
    reset: int | None = None  # the code, if the stream was reset

    @property
    def status(self) -> int:
        return int(self.get(b":status") or 0)

    def get(self, name: bytes) -> bytes | None:
        values = [value for n, value in self.headers if n == name]
        assert len(values) < 2, f"{name!r} more than once in {self.headers}"
        return values[0] if values else None


class Peer2:
    """One end of an HTTP/2 connection."""

    def __init__(
        self,
        peer: Peer,
        *,
        client: bool,
        settings: dict[int, int] | None = None,
        checked: bool = True,
    ) -> None:
        self.peer = peer
        config = h2.config.H2Configuration(client_side=client, header_encoding=None)
        if not checked:  # for what h2 itself would not send
            config.validate_outbound_headers = config.normalize_outbound_headers = False
        self.h2 = h2.connection.H2Connection(config)
        self.settings = settings or {}
        self.first = peer.take_received()  # what was read before
        self.events: list[h2.events.Event] = []  # read, and not processed yet
        self.messages: dict[int, Answer] = {}
        self.ended: set[int] = set()
        self.opened_by_peer: list[int] = []  # the streams that the other side has opened, in order
        self.goaway: h2.events.ConnectionTerminated | None = None
        self.sending = trio.Lock()
        self.moved = trio.Condition()

    async def start(self) -> None:
        self.h2.initiate_connection()
        if self.settings:
            self.h2.update_settings(self.settings)
        await self.flush()

    async def flush(self) -> None:
        async with self.sending:
            if data := self.h2.data_to_send():
                await self.peer.send(data)

    async def read(self) -> list[h2.events.Event]:
        """The result of one read, recorded in `messages`. Raises Gone."""
        try:
            data, self.first = self.first, b""
            data = data or bytes(await self.peer.stream.receive_some(65536))
        except trio.BrokenResourceError as error:
            raise Gone("reset") from error
        if not data:
            raise Gone("closed")
        events = self.h2.receive_data(data)
        for event in events:
            self._note(event)
        with contextlib.suppress(trio.BrokenResourceError):
            await self.flush()
        async with self.moved:
            self.moved.notify_all()
        return events

    def _note(self, event: h2.events.Event) -> None:
        self.events.append(event)
        number = getattr(event, "stream_id", None) or 0
        message = self.messages.setdefault(number, Answer()) if number else Answer()
        if isinstance(event, h2.events.RequestReceived | h2.events.ResponseReceived):
            message.headers = list(event.headers or [])
            if isinstance(event, h2.events.RequestReceived):
                self.opened_by_peer.append(number)
        elif isinstance(event, h2.events.InformationalResponseReceived):
            message.interim.append(list(event.headers or []))
        elif isinstance(event, h2.events.DataReceived):
            message.body += event.data or b""
        elif isinstance(event, h2.events.TrailersReceived):
            message.trailers = list(event.headers or [])
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(number)
        elif isinstance(event, h2.events.StreamReset):
            message.reset = int(event.error_code or 0)
            self.ended.add(number)
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = event

    async def next(self, kind: type[E], stream: int | None = None) -> E:
        """The next event of a kind; those before it are skipped. Raises Gone."""
        while True:
            for at, event in enumerate(self.events):
                if isinstance(event, kind) and (
                    stream is None or getattr(event, "stream_id", None) == stream
                ):
                    del self.events[: at + 1]
                    return event
            await self.read()

    def credit(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                with contextlib.suppress(h2.exceptions.StreamClosedError):
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    async def request(self, headers: list[Pair], *, end: bool = True) -> int:
        number = self.h2.get_next_available_stream_id()
        self.h2.send_headers(number, headers, end_stream=end)
        await self.flush()
        return number

    async def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Send as the windows allow. Another task has to read at the same time, or `data` has to
        fit."""
        while True:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            piece, data = data[:room], data[room:]
            if piece or not data:
                self.h2.send_data(number, piece, end_stream=end and not data)
                await self.flush()
            if not data:
                return
            if not self.h2.local_flow_control_window(number):
                async with self.moved:
                    await self.moved.wait()

    async def trailers(self, number: int, fields: list[Pair]) -> None:
        self.h2.send_headers(number, fields, end_stream=True)
        await self.flush()

    async def reset(self, number: int, code: int = h2.errors.ErrorCodes.CANCEL) -> None:
        self.h2.reset_stream(number, code)
        await self.flush()

    async def message(self, number: int) -> Answer:
        """The whole message of a stream, or the part that arrived before its reset. Enlarges
        windows. Raises Gone."""
        while number not in self.ended:
            self.credit(await self.read())
            await self.flush()
        return self.messages[number]

    async def ask(self, headers: list[Pair] = GET, body: bytes = b"") -> Answer:
        number = await self.request(headers, end=not body)
        if body:
            await self.send(number, body, end=True)
        return await self.message(number)

    async def pump(self) -> None:
        """Read and enlarge windows until the connection ends."""
        try:
            while True:
                self.credit(await self.read())
                await self.flush()
        except (Gone, trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def last_call(self) -> Callable[[], Awaitable[None]]:
        """Wait for a server's first GOAWAY, which refuses nothing, and the PING after it; returns
        the bytes that answer it. From here on, all that is read is parsed by hand: h2 takes GOAWAY
        for the end."""
        assert frames_goaway(2**31 - 1) in await self.peer.until(b"goodbye\0")
        return lambda: self.peer.send(b"\0\0\x08\x06\x01\0\0\0\0goodbye\0")

    async def gone(self) -> h2.events.ConnectionTerminated | None:
        """Wait for the end of the connection; returns the contents of GOAWAY."""
        with contextlib.suppress(Gone):
            while True:
                await self.read()
        return self.goaway


Script2 = Callable[[Peer2], Awaitable[None]]
Respond = Callable[[Peer2, int, Answer], Awaitable[None]]


def speaking(
    script: Script2, settings: dict[int, int] | None = None
) -> Callable[[Peer], Awaitable[None]]:
    """A script of an HTTP/2 server's connection for `origin`."""

    async def run(peer: Peer) -> None:
        peer2 = Peer2(peer, client=False, settings=settings)
        await peer2.start()
        with contextlib.suppress(Gone, trio.ClosedResourceError):
            await script(peer2)

    return run


async def silent(peer: Peer2) -> None:
    """A script that reads and sends nothing."""
    while True:
        await peer.read()


def only2(
    script: Script2, settings: dict[int, int] | None = None
) -> Callable[[Peer], Awaitable[None]]:
    """Serve HTTP/2 by `script`, and close a connection with another protocol."""

    async def run(peer: Peer) -> None:
        await peer.least(4)
        if peer.received.startswith(b"PRI "):
            await speaking(script, settings)(peer)

    return run


async def ok(peer: Peer2, number: int, message: Answer) -> None:
    peer.h2.send_headers(number, OK)
    await peer.send(number, b"ok", end=True)


async def echo2(peer: Peer2, number: int, message: Answer) -> None:
    peer.h2.send_headers(number, OK)
    await peer.send(number, message.body, end=not message.trailers)
    if message.trailers:
        await peer.trailers(number, message.trailers)


def answering2(respond: Respond = ok, *, early: bool = False) -> Script2:
    """Answer every stream in its own task, as soon as its request is complete; or, if `early`, as
    soon as it has started."""

    async def script(peer: Peer2) -> None:
        async def one(number: int) -> None:
            with contextlib.suppress(
                h2.exceptions.ProtocolError, trio.BrokenResourceError, KeyError
            ):
                await respond(peer, number, peer.messages[number])
            peer.messages.pop(number, None)
            peer.events.clear()

        async with trio.open_nursery() as nursery:
            try:
                while True:
                    events = await peer.read()
                    peer.credit(events)
                    await peer.flush()
                    kind = h2.events.RequestReceived if early else h2.events.StreamEnded
                    for event in events:
                        if isinstance(event, kind):
                            nursery.start_soon(one, event.stream_id)
            except (Gone, trio.BrokenResourceError):
                nursery.cancel_scope.cancel()

    return script


def reserve() -> tuple[socket.socket, Address]:
    """A port that is bound, but has no listener."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock, Address.of(sock.getsockname())


def frames_goaway(last: int) -> bytes:
    """A GOAWAY by hand: h2 sends one only to end its connection."""
    return b"\0\0\x08\x07\0\0\0\0\0" + last.to_bytes(4, "big") + bytes(4)
