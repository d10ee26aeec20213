"""A server for the edges of HTTP/1.1.  `edge HOST PORT`

GET /quiet        a head and one event, then nothing; the server notes when the client is gone
GET /gone         when clients of /quiet were gone, as JSON: seconds of the system's monotonic clock
POST /early       413 at once, before the body; the body is then read, and the connection kept
anything else     200 with a short body

SIGTERM stops the listener. The process ends when the last connection has ended, as servers do that
drain.
"""

import asyncio
import json
import signal
import sys
import time

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
EARLY = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 6\r\n\r\nlarge\n"
QUIET = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding:"
    b" chunked\r\n\r\n8\r\ndata: 1\n\r\n"
)


class Edge:
    """The server's state: its open connections, and when clients went away."""

    def __init__(self) -> None:
        self.open = 0
        self.gone: list[float] = []
        self.idle = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.open += 1
        self.idle.clear()
        try:
            while await self.exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.open -= 1
            if not self.open:
                self.idle.set()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request. False: the connection ends after it."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        _, target, version = head[0].split()
        if target == "/quiet":
            writer.write(QUIET)
            await writer.drain()
            try:
                await reader.read(1)
            finally:
                self.gone.append(time.monotonic())
            return False
        if target == "/early":
            writer.write(EARLY)
        await self.discard(reader, fields)
        if target != "/early":
            body = json.dumps({"name": "edge", "gone": self.gone}).encode()
            writer.write(OK % (len(body), body))
        await writer.drain()
        return version == "HTTP/1.1" and fields.get("connection") != "close"

    @staticmethod
    async def discard(reader: asyncio.StreamReader, fields: dict[str, str]) -> None:
        """Read a request's body."""
        if fields.get("transfer-encoding") == "chunked":
            while size := int(await reader.readline(), 16):
                await reader.readexactly(size + 2)
            await reader.readline()
        left = int(fields.get("content-length", "0"))
        while left:
            left -= len(data := await reader.read(min(left, 65536)))
            if not data:
                raise asyncio.IncompleteReadError(b"", left)


async def main() -> None:
    """Serve until SIGTERM, and then until the last connection has ended."""
    edge, stop = Edge(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(
        edge.serve, None if sys.argv[1] == "::" else sys.argv[1], int(sys.argv[2])
    )
    await stop.wait()
    server.close()
    if edge.open:
        await edge.idle.wait()


if __name__ == "__main__":
    asyncio.run(main())
