"""Detects disconnects of clients from which no task reads.

While a client waits for its response, the proxy does not read from it: its next request stays in
the kernel. So only the next write would show that the client has gone, and a silent response may
have no write for hours. A separate epoll set detects this. Each connection is in it for its whole
life, edge-triggered and for EPOLLRDHUP only. So data causes no wake-ups, and a request costs
nothing; a connection costs one system call.

The events are those of TCP. FIN (EPOLLRDHUP) ends the peer's direction: the peer has either closed
the connection, or only shut down its direction (half-close) and waits for our data. The wire does
not show which. RST, and a peer that does not answer any more (liveness.py), end the connection
(EPOLLHUP). A peer that has closed answers by RST: to data at once, and to keep-alive probes when
its kernel has dropped the connection (net.ipv4.tcp_fin_timeout, a minute).
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import trio
from trio.lowlevel import wait_readable

from proxy.net.socket_stream import SocketStream, Stream
from proxy.net.tls.handshake import TLSStream

_log = logging.getLogger("isthmus.net")

# The maximum number of events in one epoll call.
_EVENTS = 256
# Seconds between two epoll calls. Most connections end between two requests, when a task reads from
# them anyway. If many end, this batches the events.
_PAUSE = 0.005


class Disconnects:
    """Reports connections whose peer ends its direction, or that are lost.

    Call `open` first; `run` closes the epoll set.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._told: dict[int, Callable[[bool], None]] = {}

    def watch(self, descriptor: int, tell: Callable[[bool], None]) -> None:
        """Call `tell(lost)` when the peer ends its direction, and when the connection is lost.

        Either may already have happened. The task of `run` calls `tell`, which must not raise. Use
        `forget` to stop.
        """
        if self._epoll is None or self._epoll.closed:
            return
        with suppress(OSError):  # the user's limit of epoll watches (epoll_ctl(2): ENOSPC)
            self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLET)
            self._told[descriptor] = tell

    def forget(self, descriptor: int, tell: Callable[[bool], None]) -> None:
        """Undo `watch`.

        The socket may already be closed, which removes it from the epoll set. Then its number may
        belong to another connection.
        """
        if self._told.get(descriptor) == tell:
            del self._told[descriptor]

    @contextmanager
    def watching(self, stream: Stream, tell: Callable[[bool], None]) -> Iterator[None]:
        """Watch the connection of `stream` within a `with` block."""
        descriptor = stream.socket.fileno() if isinstance(stream, SocketStream | TLSStream) else -1
        if descriptor >= 0:
            self.watch(descriptor, tell)
        try:
            yield
        finally:
            self.forget(descriptor, tell)

    def open(self) -> Disconnects:
        self._epoll = select.epoll()
        return self

    async def run(self) -> None:
        """Report events until cancelled. Call `open` first; otherwise this raises RuntimeError."""
        epoll = self._epoll
        if epoll is None:
            raise RuntimeError("Disconnects.run needs open() first")
        try:
            while True:
                await wait_readable(epoll.fileno())
                for descriptor, mask in epoll.poll(0, _EVENTS):
                    tell = self._told.get(descriptor)
                    if tell is not None:
                        self._tell(tell, lost=bool(mask & (select.EPOLLHUP | select.EPOLLERR)))
                await trio.sleep(_PAUSE)
        finally:
            epoll.close()

    @staticmethod
    def _tell(tell: Callable[[bool], None], *, lost: bool) -> None:
        try:
            tell(lost)
        except Exception as error:  # an error of one connection must not affect others
            _log.error("internal error while reporting the end of a connection", exc_info=error)
