"""Connects to an address.

Addresses are literals, so nothing is resolved and nothing blocks: connect(2) on a non-blocking
socket, wait until it is writable, read SO_ERROR. This module makes one attempt to one address. The
balancer decides which address to try, and how often.

For a destination on this machine there is nothing to wait for: the kernel has exchanged all three
packets, or the refusal, when connect(2) returns. But it returns EINPROGRESS for every non-blocking
socket. So connect(2) is called a second time, which costs a microsecond; a deadline and a scheduler
pass would cost twenty. Every connection to the pod's own application is of this kind.

Two protections are here because every connection passes this place: `refuse` is called before a
packet is sent; and the mark lets the packet filter recognise our own traffic, so that it is not
redirected to us.
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
    errno.EADDRNOTAVAIL: "no free local port (net.ipv4.ip_local_port_range), or no such address",
    errno.EAFNOSUPPORT: "this machine does not support that address family",
    errno.EPERM: "the local packet filter forbids it",
    errno.EACCES: "the local packet filter forbids it",
}


# The results of connect(2) for an established connection, and for one in progress.
_THERE = frozenset({0, errno.EISCONN})
_UNDERWAY = frozenset({errno.EINPROGRESS, errno.EALREADY})


def _allow(_: Address) -> None:
    pass


class OpenConnections(Protocol):
    """Observes our own connections: when the first packet is sent, and when they close."""

    def add(self, local: Address, remote: Address, depth: int) -> None: ...

    def remove(self, local: Address, remote: Address) -> None: ...


@dataclass(frozen=True, slots=True)
class Dialer:
    """How this proxy opens connections.

    `mark`: SO_MARK of every packet (needs CAP_NET_ADMIN), or None. `timeout`: seconds for one
    attempt. `liveness`: detects dead peers. `refuse`: raises if the address must not be dialled (a
    loop). `watch`: observes the connections.
    """

    mark: int | None = None
    timeout: float = 10.0
    liveness: Liveness = field(default_factory=Liveness)
    refuse: Callable[[Address], None] = _allow
    watch: OpenConnections | None = None

    async def dial(self, address: Address, depth: int = 1) -> SocketStream:
        """Connect to `address`. The caller owns the stream.

        Raises ConnectFailed, or what `refuse` raises; then nothing stays open. `depth` is for
        `watch`: the number of our own connections in which this one is nested.
        """
        self.refuse(address)
        await checkpoint_if_cancelled()
        sock = _socket(address, socket.SOCK_STREAM)
        forget: Callable[[], None] | None = None
        connected = False
        try:
            self._mark(sock, address)
            there = _connect(sock, address)
            local = Address.of(sock.getsockname())  # known once the first packet is sent
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
        """Create a UDP socket with a local port chosen by the kernel, connected to `address`.

        It receives datagrams from `address` only. Sends nothing. The caller owns the socket. Raises
        ConnectFailed, or what `refuse` raises.
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
                detail = (
                    f"the packet mark {self.mark:#x} is not permitted (SO_MARK needs CAP_NET_ADMIN)"
                )
                raise ConnectFailed(address, "other", detail) from error

    def _watched(self, local: Address, address: Address, depth: int) -> Callable[[], None] | None:
        """Report the connection to `watch`. Return the call that reports its end.

        This must happen before any other task runs: the connection may come back to us.
        """
        if self.watch is None:
            return None
        self.watch.add(local, address, depth)
        return partial(self.watch.remove, local, address)

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
        return socket.socket(
            socket.AF_INET6 if address.is_ipv6 else socket.AF_INET, kind | socket.SOCK_NONBLOCK
        )
    except OSError as error:
        raise failure(address, error.errno or 0) from error


def _connect(sock: socket.socket, address: Address) -> bool:
    """Call connect(2). The first call sends the first packet; later calls return the result.

    Returns whether the connection is established. Raises ConnectFailed.
    """
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
        # TCP lets a socket connect to itself (simultaneous open, RFC 9293, section 3.5). This
        # happens if no socket listens on a port of the ephemeral range, and the kernel selects that
        # port for our end. No server is there, so it counts as refused.
        stream.reset()
        raise ConnectFailed(address, "refused", "no server there (the socket connected to itself)")
    return stream


def failure(address: Address, code: int) -> ConnectFailed:
    """The error for a system call towards `address` that failed with the errno `code`."""
    return ConnectFailed(
        address, _REASONS.get(code, "other"), _WORDS.get(code) or os.strerror(code).lower()
    )
