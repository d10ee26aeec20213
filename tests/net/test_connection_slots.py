"""A full listener ends the connection whose loss matters least, and never a member's for a client
that presented no identity.

Rules: the bounds hold for any clients in any order. A member is admitted unless members have
everything. Half of the pending slots is for connections that have sent nothing yet, half for
handshakes. The one that waits longest for a request goes first."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.net.connection_slots import Bounds, ListenerFull, Slot, Slots
from proxy.net.exceptions import ConnectionLost


@dataclass
class Serving:
    """The task of a connection: it has waited for a request since then, or is active."""

    waiting_since: float | None


class Stream:
    """A connection: its bytes have been read, or not."""

    def __init__(self, *, idle: bool) -> None:
        self.idle = idle
        self.lost: list[str] = []

    def is_idle(self) -> bool:
        return self.idle

    def fail(self, loss: ConnectionLost) -> None:
        self.lost.append(loss.reason)


class World:
    """Slots, a clock, and the ended and refused connections."""

    def __init__(self, bounds: Bounds) -> None:
        self.now = 1000.0
        self.slots = Slots(bounds, lambda: self.now)
        self.evicted: list[str] = []
        self.refused: list[str] = []
        self.slots.on_evict = lambda reason, _: self.evicted.append(reason)
        self.slots.on_refuse = lambda reason, _: self.refused.append(reason)

    def take(self, source: str = "192.0.2.1") -> Slot:
        self.now += 1.0
        assert self.slots.make_room() == 0
        return self.slots.take(source)

    def settled(self, *, member: bool, since: float | None = None) -> Slot:
        slot = self.take()
        slot.activity = Serving(since)
        slot.settle(member=member)
        return slot


def test_of_the_silent_ones_the_oldest_is_ended() -> None:
    world = World(Bounds(4, pending=3))
    slots = [world.take() for _ in range(5)]
    assert [slot.evicted for slot in slots] == [True, True, False, False, False]
    assert world.evicted == ["pending", "pending"]


def test_stalled_handshakes_leave_half_of_the_pending_slots_to_those_that_have_just_come() -> None:
    """Otherwise each new one would be ended by the next, before its first byte can be read."""
    world = World(Bounds(100, pending=8))
    stalled = [world.take() for _ in range(8)]
    for slot in stalled:
        slot.speaks()
    fresh = [world.take() for _ in range(4)]
    assert not any(slot.evicted for slot in fresh)
    assert sum(slot.evicted for slot in stalled) == 4
    assert [slot.evicted for slot in stalled] == [True] * 4 + [False] * 4, "the oldest first"


def test_silent_ones_cannot_push_out_handshakes() -> None:
    world = World(Bounds(100, pending=8))
    handshakes = [world.take() for _ in range(4)]
    for slot in handshakes:
        slot.speaks()
    silent: list[Slot] = []
    for _ in range(100):
        slot = world.take()
        for gone in [other for other in silent if other.evicted]:
            silent.remove(gone)
            world.slots.free(gone)
        silent.append(slot)
    assert not any(slot.evicted for slot in handshakes)


def test_a_plain_connection_replaces_the_one_that_has_waited_longest() -> None:
    world = World(Bounds(4, pending=2, reserved=1))
    first, second, third = (
        world.settled(member=False, since=since) for since in (30.0, 10.0, 20.0)
    )
    world.settled(member=False)
    assert (first.evicted, second.evicted, third.evicted) == (False, True, False)
    assert world.evicted == ["idle"]


def test_a_plain_connection_takes_no_reserved_slot_and_ends_no_active_one() -> None:
    world = World(Bounds(4, pending=2, reserved=1))
    busy = [world.settled(member=False) for _ in range(3)]
    with pytest.raises(ListenerFull, match="reserved"):
        world.settled(member=False)
    assert world.refused == ["reserved"]
    assert not any(slot.evicted for slot in busy)
    assert not world.settled(member=True).evicted


def test_a_member_ends_requests_of_plain_clients_the_newest_first() -> None:
    world = World(Bounds(4, pending=8, reserved=1))
    plain = [world.settled(member=False) for _ in range(3)]
    members = [world.settled(member=True) for _ in range(4)]
    assert [slot.evicted for slot in plain] == [True, True, True]
    assert world.evicted == ["busy"] * 3
    assert not any(slot.evicted for slot in members)


def test_members_give_way_to_members_only_while_they_wait() -> None:
    world = World(Bounds(2, pending=2))
    waiting, busy = world.settled(member=True, since=5.0), world.settled(member=True)
    with pytest.raises(ListenerFull, match="full"):
        world.settled(member=False)
    assert not world.settled(member=True).evicted
    assert (waiting.evicted, busy.evicted) == (True, False)
    with pytest.raises(ListenerFull, match="full"):
        world.settled(member=True)


def test_one_that_has_been_used_again_since_it_was_looked_at_is_left_alone() -> None:
    world = World(Bounds(3, pending=2))
    slots = [world.settled(member=False, since=float(number)) for number in range(3)]
    world.settled(member=False, since=50.0)  # the check finds all three, and ends the first
    slots[1].activity = Serving(60.0)
    world.settled(member=False, since=51.0)
    assert [slot.evicted for slot in slots] == [True, False, True]


def test_one_to_which_something_has_come_does_not_wait() -> None:
    world = World(Bounds(2, pending=2))
    reached, quiet = (world.settled(member=False, since=since) for since in (1.0, 2.0))
    reached.stream = Stream(idle=False)
    quiet.stream = Stream(idle=True)
    world.settled(member=False)
    assert (reached.evicted, quiet.evicted) == (False, True)
    assert (reached.stream.lost, quiet.stream.lost) == ([], ["evicted"])


def test_ended_connections_count_until_they_are_gone() -> None:
    world = World(Bounds(100, pending=2))
    slots = [world.take() for _ in range(4)]
    assert world.slots.leaving == 2
    assert world.slots.make_room() > 0, "two are about to end, as many as may be pending"
    world.slots.free(slots[0])
    world.now += 1.0
    assert world.slots.make_room() == 0


def test_a_pending_connection_is_left_alone_for_a_moment() -> None:
    world = World(Bounds(100, pending=2))
    first, second = world.take(), world.take()
    world.now = first.taken + 0.2
    assert world.slots.make_room() == pytest.approx(0.05)
    assert not first.evicted
    world.now = first.taken + 0.25
    assert world.slots.make_room() == 0
    assert (first.evicted, second.evicted) == (True, False)


def test_a_listener_without_pending_slots_waits_while_all_do_something() -> None:
    world = World(Bounds(2))
    busy = [world.take() for _ in range(2)]
    assert world.slots.make_room() > 0
    busy[1].activity = Serving(1.0)
    assert world.slots.make_room() == 0
    assert [slot.evicted for slot in busy] == [False, True]


def test_or_ends_the_oldest_if_a_new_one_is_worth_more() -> None:
    world = World(Bounds(2, cut_busy=True))
    slots = [world.take() for _ in range(3)]
    assert [slot.evicted for slot in slots] == [True, False, False]
    assert world.evicted == ["busy"]


def test_and_one_that_has_just_come_is_not_ended_for_waiting() -> None:
    """Its request is in flight. Otherwise a probe would be the first to go, when all others are
    busy on purpose."""
    world = World(Bounds(3, cut_busy=True))
    busy = [world.take() for _ in range(2)]
    probe = world.take()
    probe.activity = Serving(world.now)
    world.now += 0.1
    assert world.slots.make_room() == 0
    assert (busy[0].evicted, probe.evicted, world.evicted) == (True, False, ["busy"])
    world.slots.take("192.0.2.1")
    world.now += 0.2
    assert world.slots.make_room() == 0
    assert (busy[1].evicted, probe.evicted, world.evicted) == (False, True, ["busy", "idle"])


def test_one_address_has_its_part_and_no_more() -> None:
    world = World(Bounds(10, per_source=2, cut_busy=True))
    greedy = [world.take("192.0.2.66") for _ in range(2)]
    other = world.take("192.0.2.1")
    with pytest.raises(ListenerFull, match="source"):
        world.take("192.0.2.66")
    greedy[1].activity = Serving(3.0)
    world.take("192.0.2.66")
    assert [slot.evicted for slot in greedy] == [False, True]
    assert not other.evicted
    for slot in greedy:
        world.slots.free(slot)
    world.take("192.0.2.66")


def test_bounds_that_let_nothing_in_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="limit"):
        Bounds(0)
    with pytest.raises(ValueError, match="reserved"):
        Bounds(3, reserved=3)


TOTAL, PENDING, RESERVED = 6, 4, 2


class Flood(RuleBasedStateMachine):
    """Any clients, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(Bounds(TOTAL, pending=PENDING, reserved=RESERVED))
        self.alive: list[Slot] = []
        self.ended: list[Slot] = []

    def pick(self, number: int, *kinds: str) -> Slot | None:
        found = [slot for slot in self.alive if slot.kind in kinds and not slot.evicted]
        return found[number % len(found)] if found else None

    def sort(self) -> None:
        self.ended += [slot for slot in self.alive if slot.evicted]
        self.alive = [slot for slot in self.alive if not slot.evicted]

    @rule()
    def connect(self) -> None:
        self.world.now += 0.1
        if self.world.slots.make_room() == 0:
            slot = self.world.slots.take("192.0.2.1")
            self.alive.append(slot)
        self.sort()

    @rule(number=st.integers(0, 50))
    def hello(self, number: int) -> None:
        if (slot := self.pick(number, "silent")) is not None:
            slot.speaks()

    @rule(number=st.integers(0, 50), waits=st.booleans())
    def turns_out_plain(self, number: int, waits: bool) -> None:
        slot = self.pick(number, "silent", "handshake")
        if slot is None:
            return
        members = self.world.slots.count("member")
        slot.activity = Serving(self.world.now if waits else None)
        try:
            slot.settle(member=False)
        except ListenerFull:
            self.world.slots.free(slot)
            self.alive.remove(slot)
        self.sort()
        assert self.world.slots.count("member") == members, "no member's was ended for it"

    @rule(number=st.integers(0, 50), waits=st.booleans())
    def turns_out_a_member(self, number: int, waits: bool) -> None:
        slot = self.pick(number, "silent", "handshake")
        if slot is None:
            return
        everything = self.world.slots.count("member") == TOTAL
        slot.activity = Serving(self.world.now if waits else None)
        try:
            slot.settle(member=True)
        except ListenerFull:
            assert everything
            self.world.slots.free(slot)
            self.alive.remove(slot)
        self.sort()

    @rule(number=st.integers(0, 50), waits=st.booleans())
    def goes_on(self, number: int, waits: bool) -> None:
        self.world.now += 0.01
        if (slot := self.pick(number, "plain", "member")) is not None:
            slot.activity = Serving(self.world.now if waits else None)

    @rule(number=st.integers(0, 50))
    def ends(self, number: int) -> None:
        if (slot := self.pick(number, "silent", "handshake", "plain", "member")) is not None:
            self.world.slots.free(slot)
            self.alive.remove(slot)

    @precondition(lambda self: self.ended)
    @rule()
    def is_gone(self) -> None:
        self.world.slots.free(self.ended.pop(0))

    @invariant()
    def bounds_hold(self) -> None:
        slots = self.world.slots
        assert slots.known <= TOTAL
        assert slots.unknown <= PENDING
        assert slots.count("plain") <= TOTAL - RESERVED
        assert slots.leaving == len(self.ended) <= 2 * PENDING
        assert slots.open == len(self.alive) + len(self.ended)
        assert len(self.world.evicted) >= len(self.ended)


TestFlood = Flood.TestCase
TestFlood.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
