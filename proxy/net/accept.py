"""Accepting connections, and the boundary at which a connection's errors end.

One task per connection, all of them children of `Acceptor.serve`. Whatever goes wrong in a connection's handler ends that
connection and nothing else. Cancellation is not an error and passes. What is smaller than a connection has boundaries of its own, above:
an exchange (exchange/layers.py), a stream of a shared connection (exchange/h2/server.py), a kept connection (exchange/h2/pool.py), a
datagram (dns/server.py); nobody else catches broadly.

Two things bound what a flood can cost us. The number of connections is bounded, and where there is room for no more, connection_slots.py
says which one ends. If the process runs out of file descriptors, accepting pauses for a moment and goes on; connections that are open do
not notice.

Draining: `drain(grace)` stops accepting at once, lets open connections finish, and cancels what is left after `grace` seconds. What
waits in the kernel's queue then is still taken: for these clients the connection is open, and they may have sent something; closing
the listener would reset them.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio
from trio.lowlevel import checkpoint, notify_closing, wait_readable

from proxy.net.address import Address
from proxy.net.connection_slots import Bounds, NoRoom, Slot, Slots
from proxy.net.exceptions import ConnectionLost, NetError
from proxy.net.socket_stream import SocketStream

_log = logging.getLogger("isthmus.net")

# linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h; the number is the same in both families.
_SO_ORIGINAL_DST = 80
_SOCKADDR_IN = struct.Struct("=H2s4s8x")  # family, port, address
_SOCKADDR_IN6 = struct.Struct("=H2sI16sI")  # family, port, flow, address, scope

# Connections that the kernel completes and keeps until they are accepted.
_BACKLOG = 1024

# Connections accepted in a row before other tasks run: in a flood, those that are open must go on. The tasks just started get
# their turn at the same time, so accepting cannot run ahead of serving by more than this.
_ACCEPT_BURST = 8

# How long accepting pauses when descriptors or memory have run out: long enough not to burn CPU (the listener stays readable all
# the while), short enough that nobody's connect times out.
_PAUSE = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# Errors of the listening socket itself, which no waiting mends. Everything else that accept(2) reports belongs to a connection
# that is already gone (Linux passes its pending network errors on here), and the next one may be fine.
_LISTENER_BROKEN = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})


class BindFailed(NetError):
    """A listener could not be set up; the message names the address and the reason."""


@dataclass(slots=True, eq=False)
class Connection:
    """An accepted connection. `original` is where the client wanted to go, if the kernel redirected it here, else None. Its handler tells
    `slot` what it learns of the peer, and what serves the connection."""

    stream: SocketStream
    peer: Address
    local: Address
    original: Address | None
    slot: Slot


def bind(address: Address, backlog: int = _BACKLOG, *, shared: bool = False) -> socket.socket:
    """A listening, non-blocking socket. An IPv6 one takes IPv6 only, so that `0.0.0.0` and `::` can be bound side by side.

    `backlog` is capped by net.core.somaxconn. `shared`: with others of the same user that say so too (SO_REUSEPORT), among whom the kernel
    divides the connections by their addresses. Raises BindFailed.
    """
    sock = _bound(address, socket.SOCK_STREAM, shared)
    try:
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise BindFailed(f"cannot listen on {address}: {_bind_problem(error)}") from error
    return sock


def bind_datagrams(address: Address, *, shared: bool = False) -> socket.socket:
    """A non-blocking UDP socket on `address`; `shared` as with `bind`. Raises BindFailed."""
    return _bound(address, socket.SOCK_DGRAM, shared)


def _bound(address: Address, kind: int, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise BindFailed(f"cannot listen on {address}: {error.strerror}") from error
    try:
        if kind == socket.SOCK_STREAM:  # with UDP it would let two processes share the port, of which one gets nothing
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address.is_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address.host, address.port))
    except OSError as error:
        sock.close()
        raise BindFailed(f"cannot listen on {address}: {_bind_problem(error)}") from error
    return sock


def _bind_problem(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another process listens there already"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address"
    if error.errno == errno.EACCES:
        return "ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE"
    return str(error.strerror or error)


def original_destination(sock: socket.socket, local: Address) -> Address | None:
    """Where a redirected connection wanted to go (SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST); None if it was not redirected.

    The kernel answers from its connection tracking: ENOENT without an entry there, ENOPROTOOPT without the module; for a tracked
    connection that was not redirected it answers the local address. All three mean the same to us.
    """
    try:
        if local.is_ipv6:
            raw = sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
            _, port, _, packed, _ = _SOCKADDR_IN6.unpack(raw)
            host = socket.inet_ntop(socket.AF_INET6, packed)
        else:
            raw = sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, _SOCKADDR_IN.size)
            _, port, packed = _SOCKADDR_IN.unpack(raw)
            host = socket.inet_ntop(socket.AF_INET, packed)
    except OSError:
        return None
    original = Address.of((host, int.from_bytes(port, "big")))
    return None if original == local else original


def _ignore(_: OSError) -> None:
    pass


def _accept(_: SocketStream) -> None:
    pass


class Acceptor:
    """Accepts on some listeners and runs `handler` for each connection.

    `handler` owns nothing: the connection is closed when it returns or raises. `limit`: how many connections there may be; a number alone
    is the total. `on_error` hears what the handler raised (anything but cancellation), `on_pause` each time accepting pauses because
    descriptors ran out, `on_accept` of each connection, before `handler` gets it; they are synchronous and must not raise. `slots` tells
    which connections were ended or refused for want of room.
    """

    def __init__(
        self,
        handler: Callable[[Connection], Awaitable[None]],
        *,
        limit: int | Bounds,
        on_error: Callable[[Connection, BaseException], None],
        on_pause: Callable[[OSError], None] = _ignore,
        on_accept: Callable[[SocketStream], None] = _accept,
    ) -> None:
        self.slots = Slots(limit if isinstance(limit, Bounds) else Bounds(limit), trio.current_time)
        self.accepted = 0  # connections so far
        self._handler = handler
        self._on_error = on_error
        self._on_pause = on_pause
        self.on_accept = on_accept
        self._room = trio.lowlevel.ParkingLot()  # accept loops that wait for a connection to end
        self._accepting = trio.CancelScope()
        self._connections = trio.CancelScope()
        self._listeners: list[socket.socket] = []  # while they are open
        self._nursery: trio.Nursery | None = None  # of the connections, while we serve

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return self.slots.open

    @property
    def draining(self) -> bool:
        return self._accepting.cancel_called

    def drain(self, grace: float) -> None:
        """Stop accepting now; cancel what is still open after `grace` seconds. A second call can only shorten the grace.

        When it returns the listeners are closed: whoever is sent away from here on is refused if it comes back.
        """
        self._accepting.cancel()
        self._close_listeners()
        self._connections.deadline = min(self._connections.deadline, trio.current_time() + max(grace, 0.0))

    async def serve(self, listeners: Sequence[socket.socket]) -> None:
        """Accept until drained; returns when the last connection has ended. Owns and closes the listeners. Call it once.

        Raises OSError only if a listening socket itself is unusable.
        """
        self._listeners = list(listeners)
        with self._connections:
            async with trio.open_nursery() as connections:
                self._nursery = connections
                try:
                    with self._accepting:
                        async with trio.open_nursery() as loops:
                            for listener in listeners:
                                loops.start_soon(self._accept_from, listener, connections)
                finally:
                    self._close_listeners()

    async def _accept_from(self, listener: socket.socket, connections: trio.Nursery) -> None:
        streak = 0
        while not self.draining:  # we may be woken in the moment in which the listener is closed
            if pause := self.slots.make_room():
                with trio.move_on_after(pause):
                    await self._room.park()
                continue
            try:
                sock, client = listener.accept()
            except BlockingIOError:
                streak = 0
                await wait_readable(listener)
                continue
            except OSError as error:
                if error.errno in _LISTENER_BROKEN:
                    raise
                if error.errno in _EXHAUSTED:
                    self._on_pause(error)
                    await trio.sleep(_PAUSE)
                else:
                    await checkpoint()
                continue
            self._take(sock, client, connections)
            streak += 1
            if streak >= _ACCEPT_BURST:
                streak = 0
                await checkpoint()

    def _close_listeners(self) -> None:
        while self._listeners:
            listener = self._listeners.pop()
            if self._nursery is not None:
                self._accept_rest(listener, self._nursery)
            notify_closing(listener)
            listener.close()

    def _accept_rest(self, listener: socket.socket, connections: trio.Nursery) -> None:
        """Take what is in the kernel's queue, as far as there is room. A flood cannot keep us here: the queue's length is the bound."""
        for _ in range(_BACKLOG):
            if self.slots.make_room():
                return
            try:
                self._take(*listener.accept(), connections)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _LISTENER_BROKEN or error.errno in _EXHAUSTED:
                    return

    def _take(self, sock: socket.socket, client: tuple[Any, ...], connections: trio.Nursery) -> None:
        self.accepted += 1
        try:
            slot = self.slots.take(str(client[0]))
        except NoRoom:
            sock.close()
        else:
            connections.start_soon(self._run, sock, slot)

    async def _run(self, sock: socket.socket, slot: Slot) -> None:
        try:
            if slot.evicted:
                return
            try:
                stream = SocketStream(sock)
            except ConnectionLost:
                return  # it was gone before anyone looked at it
            self.on_accept(stream)
            slot.stream = stream
            await self._guard(Connection(stream, stream.peer, stream.local, original_destination(sock, stream.local), slot))
        finally:
            sock.close()
            self.slots.free(slot)
            if self._room:
                self._room.unpark_all()

    async def _guard(self, connection: Connection) -> None:
        """The error boundary."""
        try:
            await self._handler(connection)
        except BaseExceptionGroup as group:
            errors, others = group.split(Exception)
            if errors is not None:
                self._report(connection, _unpacked(errors))
            if others is not None:  # cancellation, KeyboardInterrupt
                raise others from None
        except Exception as error:
            self._report(connection, error)
        finally:
            connection.stream.close()

    def _report(self, connection: Connection, error: BaseException) -> None:
        try:
            self._on_error(connection, error)
        except Exception:
            _log.exception("the error of the connection from %s could not be reported: %r", connection.peer, error)


def _unpacked(group: BaseExceptionGroup[Exception]) -> BaseException:
    """The one error in a group, however deep, or the group if there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
