"""Detects dead peers by TCP, and distinguishes them from peers that read slowly.

Three cases, and what the kernel does (tcp(7)):

    nothing is sent            keep-alive: probes after `keepalive` seconds of silence
    data is not acknowledged   TCP_USER_TIMEOUT: ETIMEDOUT after that time, not after 15 minutes
    the window is closed       the peer acknowledges but accepts nothing: it is alive and slow

With TCP_USER_TIMEOUT, Linux also ends the third case after that time, whether or not the peer
answers the probes. (RFC 9293 §3.8.6.1 says that such a connection must stay open.) So `run` checks
the open connections several times within the timeout. It switches the option off if the peer has
closed its window and answers. It switches it on again when the window opens or probes are not
answered. If a connection is closed with unsent data, the kernel continues to send it while the peer
answers, unless the option is set. So the option is switched off at the close.

A socket inherits the options of its listening socket, so `prepare` costs nothing for accepted
connections.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from proxy.net.socket_stream import SocketStream

# Seconds between keep-alive probes, and the number of unanswered probes that end the connection,
# unless TCP_USER_TIMEOUT ends it earlier.
_KEEPALIVE_INTERVAL = 10
_KEEPALIVE_PROBES = 3

# linux/tcp.h. Python has this name since 3.13.
_TCP_USER_TIMEOUT = 18

# The states in which the peer has ended its direction (linux/tcp_states.h): CLOSE, CLOSE_WAIT,
# LAST_ACK, CLOSING.
_ENDED = frozenset({7, 8, 9, 11})

# Checks of a connection within one TCP_USER_TIMEOUT, so that a closed window is noticed in time.
_LOOKS = 4
# Connections that are checked between two checkpoints.
_SLICE = 256
# The first bytes of struct tcp_info: state, congestion state, retransmissions, unanswered probes,
# exponential backoff.
_INFO = 5
# One unanswered probe does not count: a probe or its answer may be lost.
_UNANSWERED = 2


@dataclass(slots=True, eq=False)
class Liveness:
    """The options of this proxy's TCP sockets. Both times in seconds; 0: off.

    `run` must run while connections are open.
    """

    user_timeout: float = 0.0
    keepalive: float = 0.0
    _open: set[SocketStream] = field(default_factory=set)
    _slow: set[SocketStream] = field(default_factory=set)  # those whose peer has closed its window

    @property
    def _milliseconds(self) -> int:
        return max(1, round(self.user_timeout * 1000))

    def prepare(self, sock: socket.socket) -> None:
        """Set the options on a listening socket (for all its connections) or on a connected one."""
        if self.user_timeout:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, self._milliseconds)
        if self.keepalive:
            idle = max(1, round(self.keepalive))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
            sock.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(idle, _KEEPALIVE_INTERVAL)
            )
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)

    def watch(self, stream: SocketStream) -> None:
        """Keep the connection open if its peer reads slowly, until `stream` is closed.

        Call `prepare` for its socket first.
        """
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
        """Check the connections until cancelled."""
        if not self.user_timeout:
            return
        while True:
            await trio.sleep(self.user_timeout / _LOOKS)
            streams = list(self._open)
            for at in range(0, len(streams), _SLICE):
                for stream in streams[at : at + _SLICE]:
                    if not stream.closed:
                        self._check(stream)
                await trio.lowlevel.checkpoint()

    def _check(self, stream: SocketStream) -> None:
        try:
            info = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO)
        except OSError:
            return
        # A backoff without retransmissions belongs to window probes.
        slow = bool(info[4]) and not info[2] and info[3] < _UNANSWERED
        if slow is not (stream in self._slow):
            _set_timeout(stream.socket, 0 if slow else self._milliseconds)
            (self._slow.add if slow else self._slow.discard)(stream)


def _set_timeout(sock: socket.socket, milliseconds: int) -> None:
    with suppress(OSError):  # the connection is lost already
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, milliseconds)


def peer_ended(stream: SocketStream) -> bool:
    """Whether the peer has ended its direction or reset the connection; unread data may be left."""
    if stream.closed:
        return True
    # tcp(7): the state is the first byte of struct tcp_info.
    return stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _ENDED
