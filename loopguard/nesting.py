"""Connections of a pod to itself: a self-call is legitimate, a nested connection is a loop.

What a proxy sees of its own connections
========================================

*Our own connection comes back to us.* The redirection should exempt the proxy's own connections. It
does not if the proxy runs as another user than the rules exempt, or without their mark. Then each
connection that we open arrives at our listener and looks like one of the application's. So it is
opened again, without end. This is the most frequent loop in meshes. The same happens if we dial an
address that the network routes back to this pod. Nothing is in between, so it can be detected
exactly: the accepted connection has the same addresses and ports, at both ends, as one of our own
open connections. It is nested in that one, and its depth is one more.

The innermost connection is refused by closing it. The outer side would see a peer that restarts,
and would retry. So the refusal is first recorded in the table, at the connection that came back
(`stop`). The task that opened it finds the record (`stopped`) and refuses the connection for which
it dialled. So the refusal moves outwards level by level, and no level retries.

Both ends are compared, because one is not enough: Linux may use the same local port for connections
to different destinations. So a connection of the application may have the local address and port of
a connection of this proxy.

*The application connects to itself.* A pod calls its own service, and we forward the call to the
application. This is legitimate (a worker posts to its own API). But a relay whose target is itself
(socat, HAProxy in TCP mode, a wrong `upstream`) opens another connection to itself for each one
that it gets. Nothing connects the new connection with the old one: the application has opened it,
there may be no bytes yet, and only the application knows which connections belong together. So such
a loop cannot be *recognised*, only *limited*. The number of self-calls is not a good limit, because
an application may make many. But a loop has a property that a busy service does not have: its calls
are never answered, because the innermost call, which would have to answer, does not exist. The
self-calls of a service are answered sooner or later, and the number of unanswered ones is their
rate times the response time. So we count, for each port of the pod, the self-calls without a byte
of an answer, and refuse one that would exceed `max_self_calls`. Then the relay closes what it had
opened for it, and so the whole chain ends.

What is not detected, and why
=============================

A relay that answers before it has an answer itself (a greeting) hides this property; then only the
connection limits apply. A loop of opaque connections over two or more pods is not detected either:
each proxy sees incoming and outgoing connections, as for every relay. A protocol without answers
(syslog) looks the same without a loop. Requests carry tokens (l7.py) and are detected in both
cases.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from loopguard.l4 import Loop

End = Hashable  # an address and a port, of any type that the caller uses


class ConnectionTable(Protocol):
    """Depths by the two ends of connections, for one process or shared by all of a proxy.

    A depth is at most 101. Any of the processes may mark an open connection as stopped. The mark is
    removed together with the connection.
    """

    def __setitem__(self, ends: tuple[Any, Any], depth: int, /) -> None: ...
    def pop(self, ends: tuple[Any, Any], default: None, /) -> int | None: ...
    def get(self, ends: tuple[Any, Any], default: int, /) -> int: ...
    def stop(self, ends: tuple[Any, Any], /) -> None: ...
    def stopped(self, ends: tuple[Any, Any], /) -> bool: ...
    def __len__(self) -> int: ...


class LocalConnectionTable:
    """The connection table of a proxy with one process."""

    def __init__(self) -> None:
        self._table: dict[tuple[Any, Any], int] = {}
        self._stopped: set[tuple[Any, Any]] = set()

    def __setitem__(self, ends: tuple[Any, Any], depth: int, /) -> None:
        self._table[ends] = depth

    def pop(self, ends: tuple[Any, Any], default: None, /) -> int | None:
        self._stopped.discard(ends)
        return self._table.pop(ends, default)

    def get(self, ends: tuple[Any, Any], default: int, /) -> int:
        return self._table.get(ends, default)

    def stop(self, ends: tuple[Any, Any], /) -> None:
        if ends in self._table:
            self._stopped.add(ends)

    def stopped(self, ends: tuple[Any, Any], /) -> bool:
        return ends in self._stopped

    def __len__(self) -> int:
        return len(self._table)


@dataclass(slots=True)
class OwnConnections:
    """The open connections of this proxy, by both ends, and how deep each is nested."""

    max_nesting: int
    name: str
    _open: ConnectionTable = field(default_factory=LocalConnectionTable)

    def add(self, local: End, remote: End, depth: int) -> None:
        """Record that we are connecting to `remote` for a connection of depth `depth - 1`.

        Call it before a packet can have come back.
        """
        self._open[local, remote] = depth

    def remove(self, local: End, remote: End) -> None:
        self._open.pop((local, remote), None)

    def __len__(self) -> int:
        return len(self._open)

    def depth(self, peer: End, destination: End) -> int:
        """The depth of the connection from `peer` to `destination`. 0: it is not our own."""
        return self._open.get((peer, destination), 0)

    def check_depth(self, depth: int, destination: End) -> Loop | None:
        """Return the verdict on a connection of this depth. None: no loop."""
        if depth <= self.max_nesting:
            return None
        return self._loop(destination, f"{depth} times")

    def stop(self, peer: End, destination: End) -> None:
        """Record that the connection from `peer` to `destination` is refused because of a loop.

        Call it before the connection is closed.
        """
        self._open.stop((peer, destination))

    def stopped(self, local: End, remote: End) -> Loop | None:
        """Return the verdict on a connection that this proxy opened and that failed. Call it before
        `remove`."""
        return (
            self._loop(remote, "and was refused") if self._open.stopped((local, remote)) else None
        )

    def _loop(self, destination: End, how: str) -> Loop:
        words = (
            f"this proxy's own connection to {destination} has come back to it {how}: the"
            " redirection does not exempt the proxy (its user id, or its packet mark), or that"
            " address leads back to this pod"
        )
        return Loop("own_connection", words, f"{self.name} -> {self.name}")


@dataclass(slots=True)
class SelfCalls:
    """The calls of this pod to itself without a first answer byte, by port."""

    most: int
    name: str
    _waiting: dict[int, int] = field(default_factory=dict)

    def begin(self, port: int) -> Loop | None:
        """Record a call to our own `port`, or return a verdict against it.

        After None, call `end` once.
        """
        waiting = self._waiting.get(port, 0)
        if waiting >= self.most:
            words = (
                f"{waiting} connections or requests of this pod to its own port {port} wait for an"
                " answer, and this would be one more: the application is calling itself in a"
                " circle (loops.max_self_calls)"
            )
            return Loop("self_calls", words, f"{self.name} -> {self.name}")
        self._waiting[port] = waiting + 1
        return None

    def end(self, port: int) -> None:
        """Record that a call was answered or has ended."""
        left = self._waiting[port] - 1
        if left:
            self._waiting[port] = left
        else:
            del self._waiting[port]

    @property
    def waiting(self) -> int:
        return sum(self._waiting.values())
