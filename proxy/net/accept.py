"""Accepts connections, and is the boundary at which the errors of a connection end.

Each connection has one task, a child of `Acceptor.serve`. An error in its handler ends this
connection only. Cancellation is not an error and passes through. Smaller units have their own
boundaries in higher layers: an exchange (exchange/layers.py), a stream of a shared connection
(exchange/h2/server.py), a pooled connection (exchange/h2/pool.py), a datagram (dns/server.py). No
other code catches all exceptions.

Two limits keep a flood from costing too much. The number of connections is limited, and
connection_slots.py selects which one ends when the listener is full. If the process runs out of
file descriptors, accepting pauses for a moment; open connections are not affected.

`drain(grace)` stops accepting at once, lets open connections finish, and cancels the rest after
`grace` seconds. Connections in the kernel's queue are still accepted: their clients see an open
connection and may have sent data, and closing the listener would reset them.
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
from proxy.net.connection_slots import Bounds, ListenerFull, Slot, Slots
from proxy.net.exceptions import ConnectionLost, NetError, release_frames
from proxy.net.socket_stream import SocketStream

_log = logging.getLogger("isthmus.net")

# linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h: the same number in both families.
_SO_ORIGINAL_DST = 80
_SOCKADDR_IN = struct.Struct("=H2s4s8x")  # family, port, address
_SOCKADDR_IN6 = struct.Struct("=H2sI16sI")  # family, port, flow, address, scope

# The number of completed connections that the kernel keeps until they are accepted.
_BACKLOG = 1024

# Connections accepted in a row before other tasks run, so open connections continue in a flood. The
# new tasks run then too, so accepting is ahead of serving by at most this number.
_ACCEPT_BURST = 8

# The pause (seconds) when descriptors or memory are exhausted: long enough to save CPU, because the
# listener stays readable, and short enough that no client's connect times out.
_PAUSE = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# Errors of the listening socket itself, which do not go away. All other errors of accept(2) belong
# to a connection that has already ended (Linux reports its pending network error here), and the
# next call may succeed.
_LISTENER_BROKEN = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})


class BindFailed(NetError):
    """A listener could not be created. The message has the address and the reason."""


@dataclass(slots=True, eq=False)
class Connection:
    """An accepted connection.

    `original`: the original destination, if the kernel redirected the connection here; otherwise
    None. The handler reports to `slot` what it learns about the peer, and what serves the
    connection.
    """

    stream: SocketStream
    peer: Address
    local: Address
    original: Address | None
    slot: Slot


def bind(address: Address, backlog: int = _BACKLOG, *, shared: bool = False) -> socket.socket:
    """Create a listening, non-blocking socket. The caller closes it. Raises BindFailed.

    An IPv6 socket accepts IPv6 only, so `0.0.0.0` and `::` can be bound side by side. The kernel
    limits `backlog` to net.core.somaxconn. `shared`: other sockets of the same user may share the
    address (SO_REUSEPORT); the kernel distributes the connections by their addresses.
    """
    sock = _bound(address, socket.SOCK_STREAM, shared)
    try:
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise BindFailed(f"cannot listen on {address}: {_bind_problem(error)}") from error
    return sock


def bind_datagrams(address: Address, *, shared: bool = False) -> socket.socket:
    """Create a non-blocking UDP socket on `address`; `shared` as in `bind`. Raises BindFailed."""
    return _bound(address, socket.SOCK_DGRAM, shared)


def _bound(address: Address, kind: int, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise BindFailed(f"cannot listen on {address}: {error.strerror}") from error
    try:
        # Not for UDP: two processes could bind the port, and one of them would get nothing.
        if kind == socket.SOCK_STREAM:
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
    """The original destination of a redirected connection; None if it was not redirected.

    The kernel answers SO_ORIGINAL_DST or IP6T_SO_ORIGINAL_DST from its connection tracking: ENOENT
    without an entry, ENOPROTOOPT without the module, and the local address for a tracked connection
    that was not redirected. The result is None in all three cases.
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

    The connection is closed when `handler` returns or raises. `limit`: the maximum number of
    connections; an int is the total. `on_error` is called with what the handler raised (anything
    but cancellation), `on_pause` each time accepting pauses because resources are exhausted, and
    `on_accept` for each connection before `handler` gets it. They are synchronous and must not
    raise. `slots` reports which connections were evicted or refused because the listener was full.
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
        self.accepted = 0  # total number of connections
        self._handler = handler
        self._on_error = on_error
        self._on_pause = on_pause
        self.on_accept = on_accept
        # Accept loops that wait for a connection to end.
        self._slot_freed = trio.lowlevel.ParkingLot()
        self._accepting = trio.CancelScope()
        self._connections = trio.CancelScope()
        self._listeners: list[socket.socket] = []  # that are open
        self._nursery: trio.Nursery | None = None  # of the connections, during `serve`

    @property
    def open(self) -> int:
        """The number of open connections."""
        return self.slots.open

    @property
    def draining(self) -> bool:
        return self._accepting.cancel_called

    def drain(self, grace: float) -> None:
        """Stop accepting now. Cancel what is still open after `grace` seconds.

        A second call can only shorten the grace. When this returns, the listeners are closed, so a
        client that reconnects is refused.
        """
        self._accepting.cancel()
        self._close_listeners()
        self._connections.deadline = min(
            self._connections.deadline, trio.current_time() + max(grace, 0.0)
        )

    async def serve(self, listeners: Sequence[socket.socket]) -> None:
        """Accept until drained. Return when the last connection has ended. Call it once.

        Owns and closes the listeners. Raises OSError only if a listening socket itself is unusable.
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
        while not self.draining:  # the task may wake up exactly when the listener is closed
            if pause := self.slots.make_room():
                with trio.move_on_after(pause):
                    await self._slot_freed.park()
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
        """Accept what is in the kernel's queue, up to the limits.

        The loop is bounded by the length of the queue, so a flood cannot prolong it.
        """
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

    def _take(
        self, sock: socket.socket, client: tuple[Any, ...], connections: trio.Nursery
    ) -> None:
        self.accepted += 1
        try:
            slot = self.slots.take(str(client[0]))
        except ListenerFull:
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
                return  # the client closed it before it was accepted
            self.on_accept(stream)
            slot.stream = stream
            await self._guard(
                Connection(
                    stream,
                    stream.peer,
                    stream.local,
                    original_destination(sock, stream.local),
                    slot,
                )
            )
        finally:
            sock.close()
            self.slots.free(slot)
            if self._slot_freed:
                self._slot_freed.unpark_all()

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
            _log.exception(
                "cannot report the error of the connection from %s: %r", connection.peer, error
            )
        release_frames(error)


def _unpacked(group: BaseExceptionGroup[Exception]) -> BaseException:
    """Return the only error in a group at any depth, or the group if it has several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
