"""Selects which connections a full listener keeps.

Each accepted connection has a slot. A slot is *pending* until its peer is known. Then it is a
*member* slot if the peer has an identity that counts, and *plain* otherwise. Pending slots have
their own limit, `pending`. Plain and member slots share `total`; plain slots may use all but
`reserved`. A listener that does not need to know its peers (`pending` is 0) has plain slots only.

A flood must not keep others out, so a full listener continues to accept, and ends the connection
that is cheapest to lose:

    a new connection     the oldest pending one. Half of the pending slots is for connections
                         without a ClientHello, the other half for handshakes in progress, so
                         neither kind can push out the other
    it becomes plain     the plain one that has waited longest for a request; if none waits, the
                         new one
    it becomes a member  the plain one that has waited longest for a request; if none waits, the
                         newest plain one; if there is no plain one, the member that has waited
                         longest for a request; if none waits, the new one

If busy connections may be cut (`cut_busy`), a new connection ends the one that has waited longest,
if it has waited for at least `_LEAST` seconds. Otherwise it ends the oldest one, even if it is
busy.

So a member can always connect if a pending slot lasts as long as its handshake, whatever clients
without an identity do. Busy connections of such clients are cut only for members.

A pending connection is not ended before it is `_LEAST` seconds old. In a faster flood, the listener
stops accepting until the oldest one is old enough. The others wait in the kernel's backlog.
Otherwise no handshake could complete during the flood.

Whether a connection waits for a request is not recorded, because it changes twice with each
request. When such connections are needed, a scan looks for them, and its result is used up before
the next scan.

Nothing here blocks. A connection is ended by `fail`, which wakes up its task.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from proxy.net.exceptions import ConnectionLost, NetError

# How many waiting connections one scan keeps, and the minimum time (seconds) between two scans if
# there are more connections than these. A scan of 10,000 takes some milliseconds.
_KEPT = 256
_SCAN_PAUSE = 0.1

# The time (seconds) that each connection has to send something: two round trips around the world,
# or some on a busy machine.
_LEAST = 0.25
# The longest time (seconds) that a caller waits before it asks again. It asks sooner if a
# connection ends.
_PAUSE = 0.2

Eviction = Literal["idle", "pending", "handshake", "busy", "source"]
Refusal = Literal["full", "reserved", "source"]
Kind = Literal["silent", "handshake", "plain", "member", "gone"]


class ListenerFull(NetError):
    """There is no slot for a connection, and none can be freed."""


class Endable(Protocol):
    """The part of a connection that its slot needs (socket_stream.SocketStream)."""

    def fail(self, loss: ConnectionLost) -> None: ...
    def is_idle(self) -> bool: ...


class Activity(Protocol):
    """The part of the code that serves a connection which its slot needs."""

    @property
    def waiting_since(self) -> float | None:
        """When it began to wait for a request, by `Slots.clock`. None: it is busy."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """The connection limits of a listener.

    `total`: connections whose peer is known. `pending`: additional ones whose peer is not known
    yet; 0: peers need not be known. `reserved`: the part of `total` for members only. `per_source`:
    for one client address; 0: no limit. `cut_busy`: a new connection may end the oldest busy one.
    Otherwise a listener without pending slots does not accept while all its connections are busy.
    """

    total: int
    pending: int = 0
    reserved: int = 0
    per_source: int = 0
    cut_busy: bool = False

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"a limit of {self.total} connections accepts none")
        if not 0 <= self.reserved < self.total:
            raise ValueError(f"of {self.total} connections, {self.reserved} cannot be reserved")


class Slot:
    """The slot of one connection. `evicted`: this module has ended the connection."""

    __slots__ = ("_slots", "activity", "evicted", "kind", "source", "stream", "taken")

    def __init__(self, slots: Slots, source: str, taken: float) -> None:
        self._slots = slots
        self.source = source
        self.taken = taken  # time of creation
        self.kind: Kind = "silent"
        self.activity: Activity | None = None  # None: busy
        self.stream: Endable | None = None  # set when the connection's task has started
        self.evicted = False

    def speaks(self) -> None:
        """Report that a ClientHello has arrived: a handshake is in progress."""
        if self.kind == "silent":
            self._slots.move(self, "handshake")

    def settle(self, *, member: bool) -> None:
        """Report that the peer is known. Raises ListenerFull; then the caller must end the
        connection."""
        if self.kind in ("silent", "handshake"):
            self._slots.settle(self, member=member)

    @property
    def waiting_since(self) -> float | None:
        return (
            self.activity.waiting_since if self.activity is not None and not self.evicted else None
        )


def _ignore(_: str, __: str) -> None:
    pass


class Slots:
    """The slots of one acceptor. `clock`: the clock of the activities, in seconds."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self.bounds = bounds
        self._clock = clock
        self.leaving = 0  # evicted connections that are still closing
        # Called with the reason and the client's address. They are synchronous and must not raise.
        self.on_evict: Callable[[Eviction, str], None] = _ignore
        self.on_refuse: Callable[[Refusal, str], None] = _ignore
        self._of: dict[Kind, OrderedDict[Slot, None]] = {
            "silent": OrderedDict(), "handshake": OrderedDict(), "plain": OrderedDict(),
            "member": OrderedDict(),
        }  # fmt: skip
        self._sources: dict[str, OrderedDict[Slot, None]] = {}
        self._plain_waiting = _Waiting(self._of["plain"], clock)
        self._members_waiting = _Waiting(self._of["member"], clock)

    def count(self, kind: Kind) -> int:
        return len(self._of[kind])

    @property
    def known(self) -> int:
        """The number of connections whose peer is known."""
        return self.count("plain") + self.count("member")

    @property
    def unknown(self) -> int:
        return self.count("silent") + self.count("handshake")

    @property
    def open(self) -> int:
        """The number of all connections, including evicted ones that are still closing."""
        return self.known + self.unknown + self.leaving

    def make_room(self) -> float:
        """Make room for one more connection.

        Returns 0 if there is room. Otherwise connections must end first: the caller asks again when
        one has ended, or after the returned number of seconds. Evicted connections count until they
        are closed, so the cost of a flood is limited.
        """
        bounds = self.bounds
        if self.leaving >= (bounds.pending or bounds.total):
            return _PAUSE
        if bounds.pending:
            return self._evict_pending() if self.unknown >= bounds.pending else 0.0
        # With `cut_busy`, a connection that has just arrived, and whose request is in flight, must
        # not be evicted first because it looks idle.
        if self.known < bounds.total or self._evict_waiting(_LEAST if bounds.cut_busy else 0.0):
            return 0.0
        if bounds.cut_busy:
            self._evict(next(iter(self._of["plain"])), "busy")
            return 0.0
        return _PAUSE

    def take(self, source: str) -> Slot:
        """Return a slot for a connection from this address.

        Call `make_room` first. Raises ListenerFull.
        """
        bounds = self.bounds
        if bounds.per_source:
            self._limit_source(source)
        slot = Slot(self, source, self._clock())
        slot.kind = "silent" if bounds.pending else "plain"
        self._of[slot.kind][slot] = None
        if bounds.per_source:
            self._sources.setdefault(source, OrderedDict())[slot] = None
        return slot

    def free(self, slot: Slot) -> None:
        """Release the slot of a connection that is closed."""
        if slot.evicted:
            self.leaving -= 1
        else:
            self._drop(slot)
        slot.kind, slot.activity, slot.stream = "gone", None, None

    def move(self, slot: Slot, kind: Kind) -> None:
        """Change the kind of a slot. For Slot only."""
        if not slot.evicted:
            del self._of[slot.kind][slot]
            slot.kind = kind
            self._of[kind][slot] = None

    def settle(self, slot: Slot, *, member: bool) -> None:
        """See Slot.settle. For Slot only."""
        if slot.evicted:
            raise ListenerFull("the connection was ended to make room for others")
        bounds = self.bounds
        if member:
            if self.known >= bounds.total and not self._evict_for_member():
                raise self._refused("full", slot.source)
        elif (
            self.count("plain") >= bounds.total - bounds.reserved or self.known >= bounds.total
        ) and not self._evict_waiting():
            raise self._refused("reserved" if self.known < bounds.total else "full", slot.source)
        self.move(slot, "member" if member else "plain")

    # Which connection to end...

    def _evict_pending(self) -> float:
        """End the oldest pending connection, or return the seconds until it is old enough."""
        handshakes, silent = self._of["handshake"], self._of["silent"]
        group = handshakes if len(handshakes) > self.bounds.pending // 2 or not silent else silent
        oldest = next(iter(group))
        left = oldest.taken + _LEAST - self._clock()
        if left <= 0:
            self._evict(oldest, "handshake" if group is handshakes else "pending")
        return max(left, 0.0)

    def _evict_waiting(self, least: float = 0.0) -> bool:
        """End the plain connection that has waited longest for a request.

        It must have waited for at least `least` seconds. Return whether there was one.
        """
        slot = self._plain_waiting.longest(least)
        if slot is not None:
            self._evict(slot, "idle")
        return slot is not None

    def _evict_for_member(self) -> bool:
        if self._evict_waiting():
            return True
        if self._of["plain"]:
            self._evict(next(reversed(self._of["plain"])), "busy")
            return True
        slot = self._members_waiting.longest()
        if slot is not None:
            self._evict(slot, "idle")
        return slot is not None

    def _limit_source(self, source: str) -> None:
        """Make room for one more connection of this address. Raises ListenerFull."""
        own = self._sources.get(source, ())
        if len(own) < self.bounds.per_source:
            return
        waiting = [
            (since, number, slot)
            for number, slot in enumerate(own)
            if (since := slot.waiting_since) is not None
        ]
        if waiting:
            self._evict(min(waiting)[2], "source")
        else:
            raise self._refused("source", source)

    def _evict(self, slot: Slot, reason: Eviction) -> None:
        self._drop(slot)
        slot.evicted = True
        self.leaving += 1
        self.on_evict(reason, slot.source)
        if slot.stream is not None:
            slot.stream.fail(ConnectionLost("ended to make room for others", "evicted"))

    def _refused(self, reason: Refusal, source: str) -> ListenerFull:
        self.on_refuse(reason, source)
        return ListenerFull(f"the listener has no room for the connection from {source} ({reason})")

    def _drop(self, slot: Slot) -> None:
        del self._of[slot.kind][slot]
        own = self._sources.get(slot.source)
        if own is not None:
            own.pop(slot, None)
            if not own:
                del self._sources[slot.source]


class _Waiting:
    """Finds the slots of a group that wait for a request."""

    def __init__(self, group: OrderedDict[Slot, None], clock: Callable[[], float]) -> None:
        self._group = group
        self._clock = clock
        self._found: list[tuple[float, int, Slot]] = []  # the last one has waited longest
        self._next_scan = 0.0

    def longest(self, least: float = 0.0) -> Slot | None:
        """Return the slot that has waited longest, for at least `least` seconds.

        None: no slot has waited so long, or the next scan is not allowed yet.
        """
        slot = self._next(least)
        if slot is None and self._clock() >= self._next_scan:
            self._scan()
            slot = self._next(least)
        return slot

    def _next(self, least: float) -> Slot | None:
        until = self._clock() - least
        while self._found and self._found[-1][0] <= until:
            since, _, slot = self._found.pop()
            if (
                slot in self._group
                and slot.waiting_since == since
                and (slot.stream is None or slot.stream.is_idle())
            ):
                return slot
        return None

    def _scan(self) -> None:
        waiting = (
            (since, number, slot)
            for number, slot in enumerate(self._group)
            if (since := slot.waiting_since) is not None
        )
        self._found = heapq.nsmallest(_KEPT, waiting)
        self._found.reverse()
        self._next_scan = self._clock() + (_SCAN_PAUSE if len(self._group) > _KEPT else 0.0)
