"""WebSocket servers, and the wait for them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import trio
import websockets.sync.server

from proxy.net.address import Address
from tests.kit.apps import HOST
from tests.kit.ports import free_port

HYPERCORN = """
import asyncio, sys
from hypercorn.asyncio import serve
from hypercorn.config import Config

async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": scope["http_version"].encode().ljust(3)})
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept", "headers": [(b"x-version", scope["http_version"].encode())]})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", **{key: event.get(key) for key in ("text", "bytes")}})

config = Config()
config.bind = ["127.0.0.1:" + sys.argv[1]]
asyncio.run(serve(app, config))
"""


@contextmanager
def first_only() -> Iterator[Address]:
    """The package websockets: HTTP/1.1 and nothing else. It echoes everything."""

    def echo(connection: websockets.sync.server.ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with websockets.sync.server.serve(echo, HOST, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Address.of(server.socket.getsockname())
        server.shutdown()
        thread.join()


@contextmanager
def hypercorn() -> Iterator[Address]:
    """Hypercorn: WebSockets by either version. It reports the version, which proves it. It echoes
    everything. See `listening`."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", HYPERCORN, str(port)], stderr=subprocess.DEVNULL
    )
    yield Address(HOST, port)
    process.terminate()
    process.wait(60)


async def listening(address: Address) -> None:
    """Wait until there is a listener."""
    with trio.fail_after(30):
        while True:
            with contextlib.suppress(OSError):
                async with await trio.open_tcp_stream(address.host, address.port):
                    return
            await trio.sleep(0.05)
