"""One end of a connection, or of a relay: a stream on the fast path."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy.exchange.h1.pool import Upstream
from proxy.net.memory_budget import Share
from proxy.net.nonblocking import Prompt
from proxy.net.socket_stream import RECEIVE_SIZE, SocketStream
from proxy.net.tls.handshake import TLSStream

if TYPE_CHECKING:
    from proxy.fastpath.event_loop import EventLoop

# Bytes that are read at a time where a body goes on: fewer steps, and more memory for those that do not take it. Of 64 KiB each, 1 MiB took
# a hop 19 % more processor time. TLS is put together of records, a copy that has to stay in the cache to be cheap.
BULK, BULK_TLS = 262144, 131072

IN, OUT = select.EPOLLIN, select.EPOLLOUT


class Side:
    """A stream on the fast path: what it is watched for, and what it would not take yet."""

    __slots__ = (
        "_event_loop", "_read", "_step", "_watched", "bulk", "descriptor", "peer", "receive", "send", "send_eof", "stream", "tls", "unsent",
    )  # fmt: skip

    def __init__(self, event_loop: EventLoop, stream: Prompt) -> None:
        self._event_loop = event_loop
        self._step: Callable[[int], None] | None = None
        self._watched = 0
        self._read = 0  # of the stream, when it came to rest
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
        """Read for `share`, less than usual when memory is short; `bulk`: what a body goes on with."""
        return self.receive(share.read_size(self.bulk if bulk else RECEIVE_SIZE))

    def belongs(self, step: Callable[[int], None]) -> None:
        """`step` hears of what is watched from now on."""
        self._step = self._event_loop.steps[self.descriptor] = step

    def watch(self, events: int) -> None:
        """Wait for these events from now on; 0: for none, not even for the end of the connection, which epoll cannot be told to ignore."""
        if events != self._watched:
            if not self._watched and self._step is not None:
                self._event_loop.steps[self.descriptor] = self._step  # which is forgotten with the last event
            self._event_loop.watch(self.descriptor, self._watched, events)
            self._watched = events

    def forget(self) -> None:
        """Watch for nothing, and let go of whose it was: a step that leads back here would keep a closed connection until the next garbage
        collection, and with it the TLS library's 10 to 30 KiB."""
        self.watch(0)
        self._step = None

    def rest(self) -> None:
        """An endpoint's connection goes back to the pool. It stays in the epoll set, which saves two system calls (0.7 µs) in the next
        exchange, and leaves it with the first event that nobody waits for: the ordinary path has taken it, or the server closes it."""
        self._step = None
        if self._watched == IN:
            self._event_loop.steps[self.descriptor] = self._stray
            self._read = self.stream.bytes_read
        else:
            self.watch(0)

    def is_quiet(self) -> bool:
        """See exchange.pool.Watch. What the poll of this turn has heard of it may be its end; also the very response behind which it came
        to rest, and then its end may be here by now. Where others have read from it meanwhile, OpenSSL may have kept back what came
        behind."""
        heard, stream = self._event_loop.heard, self.stream
        silent = heard is not None and self._watched == IN and self.descriptor not in heard
        return silent and stream.bytes_read == self._read and not stream.end_met

    def _stray(self, _: int) -> None:
        self.watch(0)


def side_of(upstream: Upstream, event_loop: EventLoop) -> Side:
    """The side of a kept connection; it is made once, and stays with it."""
    side = upstream.side
    if isinstance(side, Side):
        return side
    stream = upstream.stream
    if not isinstance(stream, SocketStream | TLSStream):
        raise TypeError(f"{type(stream).__name__} cannot be asked without waiting")
    upstream.side = side = Side(event_loop, stream)
    return side
