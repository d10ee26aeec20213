"""A link that can be broken: a relay of TCP connections, on loopback, in this process."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio

from tests.kit.apps import HOST

_RESET = struct.pack("ii", 1, 0)


@dataclass
class Link:
    """Connections to `port` go to the port `to`."""

    port: int
    to: int = 0
    _open: set[trio.SocketStream] = field(default_factory=set)

    @classmethod
    @asynccontextmanager
    async def opened(cls) -> AsyncIterator[Link]:
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host=HOST)
            link = cls(listener.socket.getsockname()[1])
            await nursery.start(trio.serve_listeners, link._carry, [listener])
            yield link
            nursery.cancel_scope.cancel()

    def reset(self) -> None:
        """Reset all connections, at both ends."""
        for stream in list(self._open):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            stream.socket.close()

    async def _carry(self, near: trio.SocketStream) -> None:
        with suppress(OSError, trio.ClosedResourceError):
            async with await trio.open_tcp_stream(HOST, self.to) as far:
                self._open |= {near, far}
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._pass_on, near, far)
                        nursery.start_soon(self._pass_on, far, near)
                finally:
                    self._open -= {near, far}

    async def _pass_on(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for piece in source:
                await sink.send_all(piece)
            await sink.send_eof()
