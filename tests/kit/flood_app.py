"""The application behind a proxy that is flooded, as a process: `python -m tests.kit.flood_app PORT
WHAT`.

HTTP/1 is answered at once. HTTP/2 is `answer`ed when a request has ended, or `hold` accepts all
streams that are opened, and consumes and answers nothing."""

from __future__ import annotations

import sys
from functools import partial

import trio

from proxy.net.accept import Acceptor, Connection, bind
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from proxy.wire.h2.frames import Setting
from tests.kit.http2 import Server, settings

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def hold(stream: SocketStream) -> None:
    await stream.send_all(settings((Setting.MAX_CONCURRENT_STREAMS, 100_000)))
    while await stream.receive_some():
        pass


async def answer(stream: SocketStream) -> None:
    """Requests without bodies."""
    data = b""
    while piece := await stream.receive_some():
        data += piece
        heads, _, data = data.rpartition(b"\r\n\r\n")
        if heads:
            await stream.send_all(ANSWER * (heads.count(b"\r\n\r\n") + 1))


async def serve(what: str, connection: Connection) -> None:
    stream = connection.stream
    if await stream.peek(3, 3) != b"PRI":
        await answer(stream)
    elif what == "hold":
        await hold(stream)
    else:
        await Server(stream).serve()


def main(port: int, what: str) -> None:
    acceptor = Acceptor(partial(serve, what), limit=20_000, on_error=lambda *_: None)
    trio.run(acceptor.serve, [bind(Address("127.0.0.1", port))])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
