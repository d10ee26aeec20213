"""Connecting to an address.

Addresses are literals, so there is nothing to resolve and nothing that blocks: connect(2) on a non-blocking socket, wait until
it is writable, read SO_ERROR. One attempt to one address; which address to try, and how often, is the balancer's business.

On this machine there is nothing to wait for: the kernel has carried all three packets, or the refusal, when connect(2) returns; only, it
says EINPROGRESS of every non-blocking socket. So it is asked a second time, which costs a microsecond; a deadline and a pass of the
scheduler would cost twenty. Every connection to the pod's own application is one of these.

Two guards stand here because every connection we open comes by: `refuse`, which is asked before a packet is sent, and the mark,
by which the packet filter knows our own traffic and does not send it back to us.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio
from trio.lowlevel import checkpoint_if_cancelled, notify_closing, wait_writable

from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed, ConnectionLost, ConnectReason
from proxy.net.liveness import Liveness
from proxy.net.socket_stream import SocketStream

_REASONS: dict[int, ConnectReason] = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "timeout",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETDOWN: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    errno.EMFILE: "local",
    errno.ENFILE: "local",
    errno.ENOBUFS: "local",
    errno.ENOMEM: "local",
    errno.EADDRNOTAVAIL: "local",
    errno.EAFNOSUPPORT: "local",
    errno.EPERM: "local",
    errno.EACCES: "local",
}

_WORDS = {
    errno.EMFILE: "this process has no file descriptor left (RLIMIT_NOFILE)",
    errno.ENFILE: "this machine has no file descriptor left",
    errno.EADDRNOTAVAIL: "no local port is left (net.ipv4.ip_local_port_range), or this machine has no address of that family",
    errno.EAFNOSUPPORT: "this machine does not speak that address family",
    errno.EPERM: "the local packet filter forbids it",
    errno.EACCES: "the local packet filter forbids it",
}


# What connect(2) says of a connection that is there, and of one that may come to be.
_THERE = frozenset({0, errno.EISCONN})
_UNDERWAY = frozenset({errno.EINPROGRESS, errno.EALREADY})


def _allow(_: Address) -> None:
    pass


class Watch(Protocol):
    """Who hears of our own connections: of each one when its first packet goes, and when it is closed."""

    def opened(self, local: Address, remote: Address, depth: int) -> None: ...

    def closed(self, local: Address, remote: Address) -> None: ...


@dataclass(frozen=True, slots=True)
class Dialer:
    """How this proxy opens connections.

    mark: SO_MARK of every packet (needs CAP_NET_ADMIN), or None. timeout: seconds for one attempt. liveness: how a
    connection finds out that its peer is gone. refuse: raises if we must not connect there (a loop).
    """

    mark: int | None = None
    timeout: float = 10.0
    liveness: Liveness = field(default_factory=Liveness)
    refuse: Callable[[Address], None] = _allow
    watch: Watch | None = None

    async def dial(self, address: Address, depth: int = 1) -> SocketStream:
        """Connect. The caller owns the stream. Raises ConnectFailed, or what `refuse` raises, and leaves nothing open then. `depth` is for
        `watch`: how many connections of our own this one lies in."""
        self.refuse(address)
        await checkpoint_if_cancelled()
        sock = _socket(address, socket.SOCK_STREAM)
        forget: Callable[[], None] | None = None
        connected = False
        try:
            self._mark(sock, address)
            there = _connect(sock, address)
            local = Address.of(sock.getsockname())  # chosen with the first packet
            forget = self._watched(local, address, depth)
            if not there and not _connect(sock, address):
                await self._finish(sock, address)
            stream = _stream(sock, address, local)
            stream.on_close = forget
            self.liveness.prepare(sock)
            self.liveness.watch(stream)
            connected = True
            return stream
        finally:
            if not connected:
                if forget is not None:
                    forget()
                notify_closing(sock)
                sock.close()

    def dial_datagrams(self, address: Address) -> socket.socket:
        """A UDP socket at a port that the kernel draws, of which `address` is the only peer: what others send does not arrive.

        The caller owns it. Raises ConnectFailed, or what `refuse` raises. Sends nothing.
        """
        self.refuse(address)
        sock = _socket(address, socket.SOCK_DGRAM)
        try:
            self._mark(sock, address)
            sock.connect((address.host, address.port))
        except OSError as error:
            sock.close()
            raise failure(address, error.errno or 0) from error
        except BaseException:
            sock.close()
            raise
        return sock

    def _mark(self, sock: socket.socket, address: Address) -> None:
        if self.mark is not None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.mark)
            except PermissionError as error:
                detail = f"marking our packets with {self.mark:#x} is not permitted (SO_MARK needs the capability CAP_NET_ADMIN)"
                raise ConnectFailed(address, "other", detail) from error

    def _watched(self, local: Address, address: Address, depth: int) -> Callable[[], None] | None:
        """Our end of it is known from the first packet on, and said before any other task runs: it may come back to us."""
        if self.watch is None:
            return None
        self.watch.opened(local, address, depth)
        return partial(self.watch.closed, local, address)

    async def _finish(self, sock: socket.socket, address: Address) -> None:
        with trio.move_on_after(self.timeout) as scope:
            await wait_writable(sock)
        if scope.cancelled_caught:
            raise ConnectFailed(address, "timeout", f"no answer within {self.timeout:g} s")
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise failure(address, code)


def _socket(address: Address, kind: int) -> socket.socket:
    try:
        return socket.socket(socket.AF_INET6 if address.is_ipv6 else socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise failure(address, error.errno or 0) from error


def _connect(sock: socket.socket, address: Address) -> bool:
    """connect(2): sends the first packet; later, says what has become of it. Whether the connection is there."""
    code = sock.connect_ex((address.host, address.port))
    if code in _UNDERWAY:
        return False
    if code not in _THERE:
        raise failure(address, code)
    return True


def _stream(sock: socket.socket, address: Address, local: Address) -> SocketStream:
    try:
        stream = SocketStream(sock, local)
    except ConnectionLost as error:
        raise ConnectFailed(address, "reset", str(error)) from error
    if stream.peer == stream.local:
        # TCP lets a socket connect to itself, if nobody listens on a port of the ephemeral range and the kernel picks that very
        # port for our end (simultaneous open, RFC 9293, section 3.5). Nobody is there: a refusal is the truth.
        stream.reset()
        raise ConnectFailed(address, "refused", "nobody listens there (the connection met itself)")
    return stream


def failure(address: Address, code: int) -> ConnectFailed:
    """The error for a system call towards `address` that failed with errno `code`."""
    return ConnectFailed(address, _REASONS.get(code, "other"), _WORDS.get(code) or os.strerror(code).lower())
