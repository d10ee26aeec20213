"""Who has gone, of those from whom nobody reads.

A client that waits for its response is not read from: what it may send next is its next request, and stays in the kernel. So its end would
be noticed with the next write only, and a quiet response may have none for hours. An epoll set of its own tells of it: each connection is
in it from its beginning to its end, for EPOLLRDHUP alone, and edge-triggered. So the kernel wakes nobody for data, and a request costs
nothing; a connection costs one system call.

What is told is what TCP says. FIN (EPOLLRDHUP) ends the peer's direction: it may have closed its connection, or shut down its direction
only (a half-close) and wait for what we have to say; nothing on the wire tells the two apart. RST, and a peer that answers nothing any
more (liveness.py), end the connection (EPOLLHUP). A peer that has closed answers whatever it gets by RST: data at once, and keep-alive
probes when its kernel has forgotten the connection (net.ipv4.tcp_fin_timeout, a minute).
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

# Events that are taken from the kernel at a time.
_EVENTS = 256
# Seconds from one look to the next. Most connections end between two requests, when somebody reads from them anyway: where many end,
# they are told of together.
_PAUSE = 0.005


class Disconnects:
    """Tells of connections whose peer ends its direction, or is lost. `open` comes first; `run` closes it."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._told: dict[int, Callable[[bool], None]] = {}

    def watch(self, descriptor: int, tell: Callable[[bool], None]) -> None:
        """Call `tell(lost)` when the peer of this socket ends its direction, and when the connection is lost, until `forget`.

        Either may have happened already. `tell` is called by the task of `run`, and must not raise."""
        if self._epoll is None or self._epoll.closed:
            return
        with suppress(OSError):  # the kernel watches no more for this user (epoll_ctl(2): ENOSPC)
            self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLET)
            self._told[descriptor] = tell

    def forget(self, descriptor: int, tell: Callable[[bool], None]) -> None:
        """Undo `watch`. The socket may be closed already, which took it out of the set, and its number may be another one's."""
        if self._told.get(descriptor) == tell:
            del self._told[descriptor]

    @contextmanager
    def watching(self, stream: Stream, tell: Callable[[bool], None]) -> Iterator[None]:
        """Watch the connection of `stream` for a block."""
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
        """Tell, until cancelled. Behind `open`."""
        epoll = self._epoll
        if epoll is None:
            raise RuntimeError("open comes first")
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
        except Exception as error:  # one connection's fault is not the others'
            _log.error("the end of a connection could not be told by a fault of this proxy's", exc_info=error)
