"""Which connections a listener keeps when there is room for no more.

Each accepted connection has a slot. A slot is *pending* until its peer is known, *plain* if the peer has shown no identity that counts,
or a *member's*. Pending slots have a bound of their own, `pending`; plain and members' slots share `total`, of which plain ones may use
all but `reserved`. A listener whose peers need not be known (`pending` is 0) has plain slots only.

A flood must not keep others out, so a full listener goes on accepting and ends the connection that is cheapest to lose:

    a new connection          the oldest pending one. One half of the pending slots is for connections of which no ClientHello has come
                              yet, the other half for handshakes that are under way, so neither kind can push out the other
    it turns out to be plain  the plain one that has waited longest for a request; if none waits, the new one
    it is a member's          the same; if no plain one waits, the newest plain one; if there is none, the member's that has waited longest
                              for a request; if none waits, the new one

Where busy connections are cut too (`cut_busy`), a new one ends the one that has waited longest, if that has waited for `_LEAST` seconds.
Otherwise it ends the oldest, whatever that does.

So whatever clients without an identity do, a member comes in if a pending slot lasts for as long as its handshake takes. What a client
without an identity has begun is cut for members only.

A pending connection is left alone for `_LEAST` seconds. In a flood that is faster than that allows, the listener stops accepting until the
oldest is old enough: the others wait in the kernel's backlog, which is better than a flood in which no handshake lives to its end.

Which connections wait for a request is not recorded when it changes, because it changes twice with each request. They are looked for when
one is needed, and what was found is used up before the next look.

No waits here. A connection is ended by `fail`, which wakes up its own task.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from proxy.net.exceptions import ConnectionLost, NetError

# How many waiting connections one look keeps, and how long (seconds) the next look at more than these has to wait. A look at 10,000 takes
# some milliseconds.
_KEPT = 256
_LOOK_PAUSE = 0.1

# What a connection has in any case to say something, in seconds: two round trips to the other side of the world, or some on a busy machine.
_LEAST = 0.25
# How long (seconds) a caller waits at most before it asks for room again. A connection that ends is a reason to ask sooner.
_PAUSE = 0.2

Eviction = Literal["idle", "pending", "handshake", "busy", "source"]
Refusal = Literal["full", "reserved", "source"]
Kind = Literal["silent", "handshake", "plain", "member", "gone"]


class NoRoom(NetError):
    """There is no slot for a connection, and none that could be freed for it."""


class Endable(Protocol):
    """A connection, as far as its slot asks (streams.SocketStream)."""

    def fail(self, loss: ConnectionLost) -> None: ...
    def is_idle(self) -> bool: ...


class Activity(Protocol):
    """What serves a connection, as far as its slot asks."""

    @property
    def waiting_since(self) -> float | None:
        """Since when it waits for a request, in the time of `Slots.clock`; None: it is doing something."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many connections a listener may have.

    `total`: whose peers are known. `pending`: beside these, whose peers are not known yet; 0: peers need not be known. `reserved`: of
    `total`, for members only. `per_source`: of one client address, 0: any. `cut_busy`: a new connection is worth more than the oldest that
    is doing something. Otherwise a listener without pending slots does not accept while all of its connections do something.
    """

    total: int
    pending: int = 0
    reserved: int = 0
    per_source: int = 0
    cut_busy: bool = False

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"a limit of {self.total} connections would accept none")
        if not 0 <= self.reserved < self.total:
            raise ValueError(f"of {self.total} connections, {self.reserved} cannot be reserved")


class Slot:
    """One connection's. `evicted`: it was ended from here."""

    __slots__ = ("_slots", "activity", "evicted", "kind", "source", "stream", "taken")

    def __init__(self, slots: Slots, source: str, taken: float) -> None:
        self._slots = slots
        self.source = source
        self.taken = taken  # when, by the clock
        self.kind: Kind = "silent"
        self.activity: Activity | None = None  # None: it is doing something
        self.stream: Endable | None = None  # once the connection's task has begun
        self.evicted = False

    def speaks(self) -> None:
        """A ClientHello has come: a handshake is under way."""
        if self.kind == "silent":
            self._slots.move(self, "handshake")

    def settle(self, *, member: bool) -> None:
        """The peer is known now. Raises NoRoom; then the connection has to end."""
        if self.kind in ("silent", "handshake"):
            self._slots.settle(self, member=member)

    @property
    def waiting_since(self) -> float | None:
        return self.activity.waiting_since if self.activity is not None and not self.evicted else None


def _unheard(_: str, __: str) -> None:
    pass


class Slots:
    """The slots of one acceptor. `clock`: the time that activities are told in, seconds."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self.bounds = bounds
        self._clock = clock
        self.leaving = 0  # connections that were ended here, and are not gone yet
        # Told the reason and the client's address; synchronous, and must not raise.
        self.on_evict: Callable[[Eviction, str], None] = _unheard
        self.on_refuse: Callable[[Refusal, str], None] = _unheard
        self._of: dict[Kind, OrderedDict[Slot, None]] = {
            "silent": OrderedDict(), "handshake": OrderedDict(), "plain": OrderedDict(), "member": OrderedDict(),
        }  # fmt: skip
        self._sources: dict[str, OrderedDict[Slot, None]] = {}
        self._plain_waiting = _Waiting(self._of["plain"], clock)
        self._members_waiting = _Waiting(self._of["member"], clock)

    def count(self, kind: Kind) -> int:
        return len(self._of[kind])

    @property
    def known(self) -> int:
        """Connections whose peers are known."""
        return self.count("plain") + self.count("member")

    @property
    def unknown(self) -> int:
        return self.count("silent") + self.count("handshake")

    @property
    def open(self) -> int:
        """All of them, those that are about to end included."""
        return self.known + self.unknown + self.leaving

    def make_room(self) -> float:
        """Have room for one more connection. 0: there is. Otherwise some have to end first; the caller asks again when one has, or after so
        many seconds. Those that were ended here count until they are gone, so what a flood costs is bounded."""
        bounds = self.bounds
        if self.leaving >= (bounds.pending or bounds.total):
            return _PAUSE
        if bounds.pending:
            return self._evict_pending() if self.unknown >= bounds.pending else 0.0
        # Where busy ones are cut, one that has just come, and whose request is on its way, must not be the first to go for being idle.
        if self.known < bounds.total or self._evict_waiting(_LEAST if bounds.cut_busy else 0.0):
            return 0.0
        if bounds.cut_busy:
            self._evict(next(iter(self._of["plain"])), "busy")
            return 0.0
        return _PAUSE

    def take(self, source: str) -> Slot:
        """A slot for a connection from this address, behind `make_room`. Raises NoRoom."""
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
        """Its connection is gone."""
        if slot.evicted:
            self.leaving -= 1
        else:
            self._drop(slot)
        slot.kind, slot.activity, slot.stream = "gone", None, None

    def move(self, slot: Slot, kind: Kind) -> None:
        """For slots..."""
        if not slot.evicted:
            del self._of[slot.kind][slot]
            slot.kind = kind
            self._of[kind][slot] = None

    def settle(self, slot: Slot, *, member: bool) -> None:
        """For slots: see Slot.settle."""
        if slot.evicted:
            raise NoRoom("the connection was ended to make room for others")
        bounds = self.bounds
        if member:
            if self.known >= bounds.total and not self._room_for_member():
                raise self._refused("full", slot.source)
        elif (self.count("plain") >= bounds.total - bounds.reserved or self.known >= bounds.total) and not self._evict_waiting():
            raise self._refused("reserved" if self.known < bounds.total else "full", slot.source)
        self.move(slot, "member" if member else "plain")

    # Whom to end...

    def _evict_pending(self) -> float:
        """End the oldest that is pending; or the seconds until it is old enough for that."""
        handshakes, silent = self._of["handshake"], self._of["silent"]
        group = handshakes if len(handshakes) > self.bounds.pending // 2 or not silent else silent
        oldest = next(iter(group))
        left = oldest.taken + _LEAST - self._clock()
        if left <= 0:
            self._evict(oldest, "handshake" if group is handshakes else "pending")
        return max(left, 0.0)

    def _evict_waiting(self, least: float = 0.0) -> bool:
        """End the plain connection that has waited longest for a request, for `least` seconds at least; whether there was one."""
        slot = self._plain_waiting.longest(least)
        if slot is not None:
            self._evict(slot, "idle")
        return slot is not None

    def _room_for_member(self) -> bool:
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
        """Have room for one more of this address."""
        own = self._sources.get(source, ())
        if len(own) < self.bounds.per_source:
            return
        waiting = [(since, number, slot) for number, slot in enumerate(own) if (since := slot.waiting_since) is not None]
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

    def _refused(self, reason: Refusal, source: str) -> NoRoom:
        self.on_refuse(reason, source)
        return NoRoom(f"there is no room for the connection from {source} ({reason})")

    def _drop(self, slot: Slot) -> None:
        del self._of[slot.kind][slot]
        own = self._sources.get(slot.source)
        if own is not None:
            own.pop(slot, None)
            if not own:
                del self._sources[slot.source]


class _Waiting:
    """Of a group of slots, those that wait for a request."""

    def __init__(self, group: OrderedDict[Slot, None], clock: Callable[[], float]) -> None:
        self._group = group
        self._clock = clock
        self._found: list[tuple[float, int, Slot]] = []  # the one that has waited longest stands last
        self._next_look = 0.0

    def longest(self, least: float = 0.0) -> Slot | None:
        """The slot that has waited longest, for `least` seconds at least; None: none waits so long, or it is not known which do."""
        slot = self._next(least)
        if slot is None and self._clock() >= self._next_look:
            self._look()
            slot = self._next(least)
        return slot

    def _next(self, least: float) -> Slot | None:
        until = self._clock() - least
        while self._found and self._found[-1][0] <= until:
            since, _, slot = self._found.pop()
            if slot in self._group and slot.waiting_since == since and (slot.stream is None or slot.stream.is_idle()):
                return slot
        return None

    def _look(self) -> None:
        waiting = ((since, number, slot) for number, slot in enumerate(self._group) if (since := slot.waiting_since) is not None)
        self._found = heapq.nsmallest(_KEPT, waiting)
        self._found.reverse()
        self._next_look = self._clock() + (_LOOK_PAUSE if len(self._group) > _KEPT else 0.0)
