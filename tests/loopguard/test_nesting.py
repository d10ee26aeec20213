"""Connections of a pod to itself: the proxy's own connections that come back are recognised by both
ends, the application's are bounded by their responses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loopguard import OwnConnections, SelfCalls

HERE, THERE = ("10.1.0.5", 40000), ("10.1.0.9", 8080)


@pytest.mark.parametrize("most", [0, 1, 5])
def test_our_own_connection_may_come_back_as_often_as_configured(most: int) -> None:
    own, rounds, depth = OwnConnections(most, "west/web-1"), 0, 0
    while True:
        rounds += 1
        port = 40000 + rounds
        own.add(("10.1.0.5", port), THERE, depth + 1)
        depth = own.depth(("10.1.0.5", port), THERE)
        if (loop := own.check_depth(depth, "10.1.0.9:8080")) is not None:
            break
    assert rounds == most + 1
    assert loop.kind == "own_connection"
    assert "10.1.0.9:8080" in loop.words
    assert loop.cycle == "west/web-1 -> west/web-1"


def test_an_application_may_have_the_same_local_port_towards_another_place() -> None:
    own = OwnConnections(0, "west/web-1")
    own.add(HERE, THERE, 1)
    assert own.depth(HERE, ("10.1.0.7", 8080)) == 0
    assert own.depth(HERE, THERE) == 1
    assert own.check_depth(0, "anywhere") is None


def test_closed_connections_are_removed() -> None:
    own = OwnConnections(0, "west/web-1")
    own.add(HERE, THERE, 1)
    own.remove(HERE, THERE)
    own.remove(HERE, THERE)
    assert own.depth(HERE, THERE) == 0
    assert len(own) == 0


def test_a_stopped_connection_is_known_until_it_is_closed() -> None:
    own = OwnConnections(0, "west/web-1")
    own.stop(HERE, THERE)
    own.add(HERE, THERE, 1)
    assert own.stopped(HERE, THERE) is None, "there was no such connection to stop"
    own.stop(HERE, THERE)
    loop = own.stopped(HERE, THERE)
    assert loop is not None
    assert loop.kind == "own_connection"
    own.remove(HERE, THERE)
    own.add(HERE, THERE, 1)
    assert own.stopped(HERE, THERE) is None


def test_an_answer_makes_room_for_another_call() -> None:
    calls = SelfCalls(2, "west/web-1")
    assert [calls.begin(7000), calls.begin(7000), calls.begin(8080)] == [None, None, None]
    assert calls.waiting == 3
    loop = calls.begin(7000)
    assert loop is not None
    assert loop.kind == "self_calls"
    assert loop.words.startswith("2 connections or requests of this pod to its own port 7000 wait")
    assert loop.cycle == "west/web-1 -> west/web-1"
    assert calls.waiting == 3, "a refused call does not wait"
    calls.end(7000)
    assert calls.begin(7000) is None
    for port in (7000, 7000, 8080):
        calls.end(port)
    assert calls.waiting == 0


@given(st.integers(1, 50))
def test_as_many_calls_of_a_pod_to_itself_may_wait_as_configured(most: int) -> None:
    calls = SelfCalls(most, "west/web-1")
    assert [calls.begin(7000) for _ in range(most)] == [None] * most
    loop = calls.begin(7000)
    assert loop is not None
    assert loop.kind == "self_calls"
    assert "7000" in loop.words
    assert calls.begin(8080) is None, "another port is counted separately"
    calls.end(7000)
    assert calls.begin(7000) is None


class Calls(RuleBasedStateMachine):
    """An application that calls itself: a call is refused exactly while the allowed number of calls
    wait. Answered calls do not count."""

    waiting: list[int]

    @initialize(most=st.integers(1, 4))
    def start(self, most: int) -> None:
        self.most, self.calls, self.waiting = most, SelfCalls(most, "west/web-1"), []

    @rule(port=st.sampled_from([80, 81]))
    def begin(self, port: int) -> None:
        refused = self.calls.begin(port) is not None
        assert refused == (self.waiting.count(port) == self.most)
        if not refused:
            self.waiting.append(port)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(port)
        self.calls.end(port)

    @invariant()
    def count(self) -> None:
        if hasattr(self, "calls"):
            assert self.calls.waiting == len(self.waiting)


TestCalls = Calls.TestCase
