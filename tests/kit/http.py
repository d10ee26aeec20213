"""HTTP/1 over real loopback sockets: raw clients and scripted raw servers. A test sends bytes. What
it receives is parsed by h11, which is independent of this project."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h11
import trio

from proxy.net.address import Address

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

# What a reader may raise where the other side truncated a message.
BROKEN = (trio.BrokenResourceError, h11.RemoteProtocolError)


@dataclass
class Message:
    """A request or a response as h11 reads it. Names are in lower case."""

    start: tuple[bytes, bytes]  # (method, target) or (status, reason)
    headers: list[tuple[bytes, bytes]]
    version: bytes
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    interim: list[int] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.start[0])

    def get(self, name: bytes) -> bytes | None:
        values = [value for n, value in self.headers if n == name]
        assert len(values) < 2, f"{name!r} more than once in {self.headers}"
        return values[0] if values else None


class Peer:
    """One end of a raw connection."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.stream = trio.SocketStream(sock)
        self.received = bytearray()  # and not used yet

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def more(self) -> bytes:
        data = bytes(await self.stream.receive_some(65536))
        self.received += data
        return data

    async def exactly(self, count: int) -> bytes:
        while len(self.received) < count:
            assert await self.more(), f"the connection ended after {bytes(self.received)!r}"
        return self._take(count)

    async def least(self, count: int) -> None:
        """Wait until so many bytes have arrived, and leave them."""
        while len(self.received) < count:
            assert await self.more(), f"the connection ended after {bytes(self.received)!r}"

    def take_received(self) -> bytes:
        return self._take(len(self.received))

    async def until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            assert await self.more(), f"the connection ended after {bytes(self.received)!r}"
        return self._take(self.received.index(mark) + len(mark))

    async def head(self) -> bytes:
        return await self.until(b"\r\n\r\n")

    async def rest(self) -> bytes:
        """All bytes until the other side ends its direction."""
        while await self.more():
            pass
        return self._take(len(self.received))

    def _take(self, count: int) -> bytes:
        data = bytes(self.received[:count])
        del self.received[:count]
        return data

    async def response(self, method: str = "GET") -> Message:
        """The next response to a request of this method. Raises one of BROKEN if it is
        truncated."""
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        reader.send(h11.EndOfMessage())
        return await self._message(reader)

    async def request(self) -> Message:
        return await self._message(h11.Connection(h11.SERVER))

    async def _message(self, reader: h11.Connection) -> Message:
        """What follows the message stays in `received`."""
        message: Message | None = None
        interim: list[int] = []
        if self.received:
            reader.receive_data(self._take(len(self.received)))
        while True:
            event = reader.next_event()
            if event is h11.NEED_DATA:
                reader.receive_data(bytes(await self.stream.receive_some(65536)))
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Request):
                message = Message(
                    (event.method, event.target), list(event.headers), event.http_version
                )
            elif isinstance(event, h11.Response):
                start = (b"%d" % event.status_code, event.reason)
                message = Message(start, list(event.headers), event.http_version, interim=interim)
            elif isinstance(event, h11.Data):
                assert message is not None
                message.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert message is not None
                message.trailers = list(event.headers)
                self.received[:0] = reader.trailing_data[0]
                return message
            else:
                raise h11.RemoteProtocolError(f"the connection ended: {event!r}")

    async def ask(self, request: bytes = GET, method: str = "GET") -> Message:
        await self.send(request)
        return await self.response(method)

    async def flood(self) -> None:
        """Send until the other side breaks the connection."""
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await self.send(bytes(65536))

    async def eof(self) -> None:
        await self.stream.send_eof()

    def close(self) -> None:
        self.stream.socket.close()

    def reset(self) -> None:
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.close()

    async def ended(self) -> bool:
        """Whether the other side ends the connection, in any way, without another byte."""
        try:
            return await self.more() == b""
        except trio.BrokenResourceError:
            return True


def small(sock: socket.socket | trio.socket.SocketType, buffers: int | None) -> None:
    if buffers is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)


def listen(buffers: int | None = None, port: int = 0) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    small(listener, buffers)
    listener.setblocking(False)
    listener.bind(("127.0.0.1", port))
    listener.listen(256)
    return listener


async def connect(address: Address, buffers: int | None = None) -> Peer:
    sock = trio.socket.socket()
    small(sock, buffers)
    await sock.connect(tuple(address))
    return Peer(sock)


@dataclass
class Origin:
    """A raw server. `opened` counts its connections; they are closed when their script returns."""

    address: Address
    opened: int = 0


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def origin(
    script: Script,
    *,
    buffers: int | None = None,
    port: int = 0,
    listener: socket.socket | None = None,
) -> AsyncIterator[Origin]:
    """Runs `script` for each connection. An exception of a script fails the test, unless the proxy
    ended the connection. `listener`: a bound socket to listen on."""
    if listener is None:
        listener = listen(buffers, port)
    else:
        listener.setblocking(False)
        listener.listen(256)
    server = Origin(Address.of(listener.getsockname()))

    async def run(sock: socket.socket) -> None:
        peer = Peer(trio.socket.from_stdlib_socket(sock))
        try:
            await script(peer)
        except trio.BrokenResourceError:
            pass
        except h11.RemoteProtocolError as error:
            if "the connection ended" not in str(error) and "peer unexpectedly closed" not in str(
                error
            ):
                raise
        finally:
            peer.close()

    async def accept(nursery: trio.Nursery) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            else:
                server.opened += 1
                nursery.start_soon(run, sock)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept, nursery)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
            trio.lowlevel.notify_closing(listener)
            listener.close()


def answering(response: bytes = OK, received: list[Message] | None = None) -> Script:
    """A server that gives every request the same response, and keeps its connections."""

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            if received is not None:
                received.append(request)
            await peer.send(response)

    return script


async def echo(peer: Peer) -> None:
    """A server that sends each request's body back with its framing."""
    while True:
        request = await peer.request()
        if request.get(b"transfer-encoding"):
            body = (
                b"%x\r\n%b\r\n0\r\n\r\n" % (len(request.body), request.body)
                if request.body
                else b"0\r\n\r\n"
            )
            await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        else:
            await peer.send(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"
                % (len(request.body), request.body)
            )


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that happens elsewhere, on sockets and in other tasks, without an
    event."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  # there is no event to wait for
            await trio.sleep(0.002)


def descriptors() -> int:
    """Open file descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def chunked(*pieces: bytes, trailers: bytes = b"") -> bytes:
    return (
        b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        + b"0\r\n"
        + trailers
        + b"\r\n"
    )
