"""How TCP finds out that a peer is gone, and how a peer that only reads slowly is told from one.

Three cases, and what the kernel does about each (tcp(7)):

    nothing is sent            keep-alive: probes after `keepalive` seconds of silence
    data is not acknowledged   TCP_USER_TIMEOUT: the connection fails with ETIMEDOUT after that time, and not after 15 minutes
    the window is closed       the peer acknowledges everything and takes nothing: it is there, and it reads slowly

With TCP_USER_TIMEOUT, Linux ends the third case too, when the window has been closed for that time, whether or not the peer answers
the probes. (RFC 9293 §3.8.6.1 says that such a connection must stay open.) So `run` looks at the open connections a few times within
the timeout, and switches the option off for those whose peer has closed its window and answers. When the window opens, or probes stay
without an answer, it switches the option on again. When a connection is closed with data unsent, the kernel goes on to send it, as
long as the peer answers, unless the option is set; so it is switched off at the close.

A socket inherits the options from its listening socket, so `prepare` costs accepted connections nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from proxy.net.socket_stream import SocketStream

# Seconds between keep-alive probes, and so many without an answer end the connection, where TCP_USER_TIMEOUT does not end it earlier.
_KEEPALIVE_INTERVAL = 10
_KEEPALIVE_PROBES = 3

# linux/tcp.h. Python has the name from 3.13 on.
_TCP_USER_TIMEOUT = 18

# States of a connection whose peer has ended its direction (linux/tcp_states.h): CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING.
_ENDED = frozenset({7, 8, 9, 11})

# Looks at a connection within one TCP_USER_TIMEOUT: a window that closes is seen in time.
_LOOKS = 4
# Connections that are looked at in one go.
_SLICE = 256
# The first bytes of struct tcp_info: state, congestion state, retransmissions, probes without an answer, exponential backoff.
_INFO = 5
# A probe, or its answer, may be lost.
_UNANSWERED = 2


@dataclass(slots=True, eq=False)
class Liveness:
    """The options of this proxy's TCP sockets; both times in seconds, 0: off. `run` has to run beside the connections."""

    user_timeout: float = 0.0
    keepalive: float = 0.0
    _open: set[SocketStream] = field(default_factory=set)
    _slow: set[SocketStream] = field(default_factory=set)  # of these, whose peer has closed its window

    @property
    def _milliseconds(self) -> int:
        return max(1, round(self.user_timeout * 1000))

    def prepare(self, sock: socket.socket) -> None:
        """Set the options on a listening socket, for all that it accepts, or on a connected one."""
        if self.user_timeout:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, self._milliseconds)
        if self.keepalive:
            idle = max(1, round(self.keepalive))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(idle, _KEEPALIVE_INTERVAL))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)

    def watch(self, stream: SocketStream) -> None:
        """Keep the connection of a slow reader open, from now on until `stream` is closed. Its socket has been prepared."""
        if self.user_timeout:
            self._open.add(stream)
            stream.on_close = partial(self._closing, stream, stream.on_close)

    def _closing(self, stream: SocketStream, then: Callable[[], None] | None) -> None:
        self._open.discard(stream)
        if stream in self._slow:
            self._slow.discard(stream)
        else:
            _set_timeout(stream.socket, 0)
        if then is not None:
            then()

    async def run(self) -> None:
        """Look at the connections, until cancelled."""
        if not self.user_timeout:
            return
        while True:
            await trio.sleep(self.user_timeout / _LOOKS)
            streams = list(self._open)
            for at in range(0, len(streams), _SLICE):
                for stream in streams[at : at + _SLICE]:
                    if not stream.closed:
                        self._look(stream)
                await trio.lowlevel.checkpoint()

    def _look(self, stream: SocketStream) -> None:
        try:
            info = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO)
        except OSError:
            return
        # The backoff without a retransmission is that of window probes.
        slow = bool(info[4]) and not info[2] and info[3] < _UNANSWERED
        if slow is not (stream in self._slow):
            _set_timeout(stream.socket, 0 if slow else self._milliseconds)
            (self._slow.add if slow else self._slow.discard)(stream)


def _set_timeout(sock: socket.socket, milliseconds: int) -> None:
    with suppress(OSError):  # the connection is lost already
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, milliseconds)


def peer_ended(stream: SocketStream) -> bool:
    """Whether the peer has ended its direction, or reset the connection; also where there is something left to read before that."""
    if stream.closed:
        return True
    # tcp(7): the state is the first byte of struct tcp_info.
    return stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _ENDED
