"""One socket on the fast path: an end of a connection or of a relay."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy.exchange.h1.pool import Upstream
from proxy.net.memory_budget import Share
from proxy.net.nonblocking import NonblockingStream
from proxy.net.socket_stream import RECEIVE_SIZE, SocketStream
from proxy.net.tls.handshake import TLSStream

if TYPE_CHECKING:
    from proxy.fastpath.event_loop import EventLoop

# Bytes per read within a body: larger reads need fewer steps, but more memory when the other side
# is slow. With reads of 64 KiB, 1 MiB cost a hop 19 % more processor time. TLS joins records in a
# copy, which is only cheap while it fits into the cache.
BULK, BULK_TLS = 262144, 131072

IN, OUT = select.EPOLLIN, select.EPOLLOUT


class ReadySocket:
    """A stream on the fast path, with the events that it waits for and the bytes that it did not
    accept yet."""

    __slots__ = (
        "_event_loop", "_read", "_step", "_watched", "bulk", "descriptor", "peer", "receive",
        "send", "send_eof", "stream", "tls", "unsent",
    )  # fmt: skip

    def __init__(self, event_loop: EventLoop, stream: NonblockingStream) -> None:
        self._event_loop = event_loop
        self._step: Callable[[int], None] | None = None
        self._watched = 0
        self._read = 0  # `bytes_read` of the stream when it became idle
        self.stream = stream
        self.peer = stream.peer
        self.tls = stream.info if isinstance(stream, TLSStream) else None
        self.descriptor = stream.socket.fileno()
        self.receive = stream.receive_nowait
        self.send = stream.send_nowait
        self.send_eof = stream.send_eof_nowait
        self.bulk = BULK if self.tls is None else BULK_TLS
        self.unsent = b""

    def take(self, share: Share, *, bulk: bool) -> bytes | None:
        """Read for `share`: less than usual when memory is short. `bulk`: read in larger pieces,
        within a body. Returns None if nothing has arrived, b"" at the end. Raises NetError."""
        return self.receive(share.read_size(self.bulk if bulk else RECEIVE_SIZE))

    def set_step(self, step: Callable[[int], None]) -> None:
        """Call `step` for the events of this socket from now on."""
        self._step = self._event_loop.steps[self.descriptor] = step

    def watch(self, events: int) -> None:
        """Wait for these events from now on. 0: for none, not even for a hang-up, which epoll
        otherwise always reports."""
        if events != self._watched:
            if not self._watched and self._step is not None:
                # removed when no events were left
                self._event_loop.steps[self.descriptor] = self._step
            self._event_loop.watch(self.descriptor, self._watched, events)
            self._watched = events

    def forget(self) -> None:
        """Wait for no events, and drop the reference to the owner's step. Otherwise the reference
        cycle would keep a closed connection, and 10 to 30 KiB in the TLS library, until the next
        garbage collection."""
        self.watch(0)
        self._step = None

    def park(self) -> None:
        """The connection to an endpoint goes back to the pool. It stays in the epoll set, which
        saves two system calls (0.7 µs) in the next exchange. The first event while no exchange uses
        it removes it from the set: the ordinary path uses the connection, or the server closes it.
        """
        self._step = None
        if self._watched == IN:
            self._event_loop.steps[self.descriptor] = self._on_unused_event
            self._read = self.stream.bytes_read
        else:
            self.watch(0)

    def is_quiet(self) -> bool:
        """Implements exchange.h1.pool.IdleWatch. True only if this turn's poll reported no event.
        An event in this turn may be the end of the connection. It may also be the last response,
        but the end may have arrived after that. If the ordinary path has read from the connection
        since, OpenSSL may hold data that arrived later."""
        events, stream = self._event_loop.last_events, self.stream
        silent = events is not None and self._watched == IN and self.descriptor not in events
        return silent and stream.bytes_read == self._read and not stream.end_met

    def _on_unused_event(self, _: int) -> None:
        self.watch(0)


def ready_socket_of(upstream: Upstream, event_loop: EventLoop) -> ReadySocket:
    """Return the `ReadySocket` of a pooled connection. It is created once and stays with the
    connection."""
    side = upstream.side
    if isinstance(side, ReadySocket):
        return side
    stream = upstream.stream
    if not isinstance(stream, SocketStream | TLSStream):
        raise TypeError(f"{type(stream).__name__} has no operations that do not wait")
    upstream.side = side = ReadySocket(event_loop, stream)
    return side
