"""Connections of a pod to itself: a self-call is legitimate, a connection within itself is a loop.

What a proxy sees of its own connections
========================================

*Our own connection comes back to us.* The redirection should leave a proxy's own connections alone. If it does not (the proxy runs as
another user than the rules exempt, or without their mark), each connection that we open arrives at our listener, is taken for one of
the application's, and opened again, without an end: the loop that most often takes meshes down. The same happens if we dial an address that
the network routes back to this pod. Nothing lies between, so it can be seen exactly: the connection that was accepted has the very
addresses and ports, at both ends, that one of our own open connections has. It is nested in that one, and its depth is one more.

The innermost connection is refused by closing it. To the outer one that looks like a peer that restarts, for which a request waits and
tries again. So the refusal is also noted in the table, at the connection that came back (`stop`), before it is closed. Its opener finds the
note (`stopped`) and refuses the connection on whose behalf it dialled. Thus the refusal goes outwards level by level, and no level tries
again.

Both ends are compared, because one is not enough: Linux gives the same local port to connections with different destinations, so an
application's connection may well have the local address and port of one of ours.

*The application connects to itself.* A pod calls its own service, and we carry the call back to the application. That
is legitimate (a worker posts to its own API). But a relay that has itself as its target (socat, HAProxy in TCP mode, a forgotten
`upstream`) opens, for each connection that it gets, another one to itself. Nothing in the new connection says to which old one it
belongs: the application has opened it, the bytes may not have begun, and what belongs together within the application only the
application knows. So it cannot be *recognised*, only *bounded*, and the question is by what. Not by the number of self-calls, which is as
large as the application likes. But a loop has a property that a busy service lacks: in it, no call is ever answered, because the answer
would have to come from the innermost, which there is none of. Self-calls of a service are answered, sooner or later, and the number of
those without an answer is their rate times the time that an answer takes. So we count, for each port of the pod, the self-calls of which
no byte of an answer has come, and refuse one that would be more than `max_self_calls`. The relay closes what it had opened for it, and
the whole chain with it.

What is not seen, and why
=========================

A relay that answers before it has an answer itself (a greeting) hides the property; then the limits of connections are all that bounds
it. So does a loop of opaque connections over two pods and more: each proxy sees connections that come and connections that go, as every
relay's does, and a protocol without answers (syslog) looks the same when it is well. Requests carry tokens (l7.py) and are seen in both
cases.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from loopguard.l4 import Loop

End = Hashable  # an address and a port, of whatever type the caller has


class ConnectionTable(Protocol):
    """Depths by ends, of one process or shared by several of a proxy. A depth is 101 at most. A connection that has been opened may be
    marked as stopped, by any of the processes. The mark goes with the connection."""

    def __setitem__(self, ends: tuple[Any, Any], depth: int, /) -> None: ...
    def pop(self, ends: tuple[Any, Any], default: None, /) -> int | None: ...
    def get(self, ends: tuple[Any, Any], default: int, /) -> int: ...
    def stop(self, ends: tuple[Any, Any], /) -> None: ...
    def stopped(self, ends: tuple[Any, Any], /) -> bool: ...
    def __len__(self) -> int: ...


class LocalConnectionTable:
    """Depths of a proxy that is one process."""

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
    """The connections that this proxy has opened, by both their ends, and how deep each lies in others of its own."""

    max_nesting: int
    name: str
    _open: ConnectionTable = field(default_factory=LocalConnectionTable)

    def opened(self, local: End, remote: End, depth: int) -> None:
        """We are connecting to `remote`, on behalf of a connection of depth `depth - 1`. Say it before a packet can have come back."""
        self._open[local, remote] = depth

    def closed(self, local: End, remote: End) -> None:
        self._open.pop((local, remote), None)

    def __len__(self) -> int:
        return len(self._open)

    def depth(self, peer: End, destination: End) -> int:
        """How deep a connection lies that `peer` made to `destination`; 0: it is not our own."""
        return self._open.get((peer, destination), 0)

    def accepted(self, depth: int, destination: End) -> Loop | None:
        """The verdict on a connection of this depth."""
        if depth <= self.max_nesting:
            return None
        return self._loop(destination, f"{depth} times")

    def stop(self, peer: End, destination: End) -> None:
        """The connection that `peer` made to `destination` is refused because of a loop. Say it before it is closed."""
        self._open.stop((peer, destination))

    def stopped(self, local: End, remote: End) -> Loop | None:
        """The verdict on a connection of our own that has failed. Ask before it is `closed`."""
        return self._loop(remote, "and was refused") if self._open.stopped((local, remote)) else None

    def _loop(self, destination: End, how: str) -> Loop:
        words = (
            f"this proxy's own connection to {destination} has come back to it {how}: the redirection does not exempt the proxy "
            "(its user id, or its packet mark), or that address leads back to this pod"
        )
        return Loop("own_connection", words, f"{self.name} -> {self.name}")


@dataclass(slots=True)
class SelfCalls:
    """The calls of this pod to itself that wait for the first byte of their answer, by port."""

    most: int
    name: str
    _waiting: dict[int, int] = field(default_factory=dict)

    def begin(self, port: int) -> Loop | None:
        """A call to our own `port` begins, unless there is a verdict against it; `end` has to follow, once."""
        waiting = self._waiting.get(port, 0)
        if waiting >= self.most:
            words = (
                f"{waiting} connections or requests of this pod to its own port {port} wait for an answer, and this would be one more: "
                "the application is calling itself in a circle (loops.max_self_calls)"
            )
            return Loop("self_calls", words, f"{self.name} -> {self.name}")
        self._waiting[port] = waiting + 1
        return None

    def end(self, port: int) -> None:
        """It has been answered, or is over."""
        left = self._waiting[port] - 1
        if left:
            self._waiting[port] = left
        else:
            del self._waiting[port]

    @property
    def waiting(self) -> int:
        return sum(self._waiting.values())
