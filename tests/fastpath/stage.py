"""A running event loop of the fast path, and sockets for it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from proxy.exchange.server_settings import Drain
from proxy.fastpath.event_loop import EventLoop
from proxy.fastpath.fast_path import FastPath


@asynccontextmanager
async def running_loop() -> AsyncIterator[EventLoop]:
    """A fast path whose event loop believes that it has connections."""
    fast_path = FastPath(
        Drain(), 1_000_000, 1_000_000
    )  # so that its watchdog does not check during the test
    await fast_path.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fast_path.run)
        fast_path.event_loop.lent += 1
        yield fast_path.event_loop
        fast_path.event_loop.lent -= 1
        nursery.cancel_scope.cancel()


@contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        yield one, other
