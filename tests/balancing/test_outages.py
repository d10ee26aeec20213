"""Endpoints that fail: which circuits are open, and which endpoint is tried when, so that an outage
ends soon after its cause. Time is simulated."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from proxy.balancing.circuit_breaker import BreakerState, Failure
from proxy.balancing.endpoint_set import BreakerChange
from proxy.directory import Endpoint
from tests.balancing.endpoint_sets import World, endpoints, target


def test_an_endpoint_that_cannot_be_connected_to_is_left_alone_and_then_tried_once() -> None:
    world, (one, two) = World(), endpoints(2)
    where = target(one, two)
    world.fail(where, one)
    (change,) = world.changes
    assert change == BreakerChange(
        "default/web", one.address, BreakerState.OPEN, change.penalty, "test"
    )
    assert change.penalty == pytest.approx(1.25, abs=0.26)
    assert set(world.picks(where)) == {two}
    assert world.balancer.usable(where) == 1
    world.now += 1.6
    assert world.balancer.usable(where) == 1, "whether it can be used is not known yet"
    assert world.balancer.trial(where), "but it may be tried"
    assert set(world.picks(where)) == {one}, "and is, first of all"
    probe = world.endpoint_set.begin(where.policy, one, alone=False)
    assert probe.probe
    assert not world.balancer.trial(where)
    world.now += 1000
    assert set(world.picks(where)) == {two}, "by one request"
    probe.record_response(0.01)
    probe.end()
    assert [change.state for change in world.changes] == [
        BreakerState.OPEN,
        BreakerState.HALF_OPEN,
        BreakerState.CLOSED,
    ]
    assert one in world.picks(where)
    assert not list(world.balancer.broken())


def test_a_probe_that_says_nothing_leaves_the_next_request_to_decide() -> None:
    world, (one, two) = World(), endpoints(2)
    where = target(one, two)
    world.fail(where, one)
    world.now += 2
    world.endpoint_set.begin(where.policy, one, alone=False).end()
    assert world.endpoint_set.pick(where) == one


def test_if_all_are_broken_nothing_is_picked_and_it_is_known_when() -> None:
    world, places = World(), endpoints(3)
    where = target(*places)
    for endpoint in places:
        world.fail(where, endpoint)
    assert world.endpoint_set.pick(where) is None
    assert world.balancer.usable(where) == 0
    opens = world.endpoint_set.penalty_ends(where)
    assert world.now + 1 <= opens <= world.now + 1.5
    world.now = opens
    chosen = world.endpoint_set.pick(where)
    assert chosen is not None
    world.endpoint_set.begin(where.policy, chosen, alone=False)
    assert world.endpoint_set.penalty_ends(where) <= world.now, "one is being tried"


def test_endpoints_with_bad_responses_are_used_if_there_are_no_better_ones() -> None:
    world, places = World(), endpoints(3)
    where = target(*places)
    bad, worse, gone = places
    for endpoint in (bad, worse):
        world.fail(where, endpoint, 7, how=Failure.RESPONSE)
    assert set(world.picks(where)) == {gone}, "one works again"
    world.fail(where, gone)
    assert world.balancer.usable(where) == 0, "another cluster may have its requests"
    assert not world.balancer.trial(where)
    assert world.balancer.trial(where, alone=True)
    assert set(world.picks(where)) == {bad, worse}
    assert world.endpoint_set.pick(where, [bad]) == worse
    world.fail(where, bad, 100, how=Failure.RESPONSE)
    assert len(world.changes) == 3, "that has changed nothing"
    world.succeed(where, worse)
    assert set(world.picks(where)) == {worse}
    assert world.changes[-1].state is BreakerState.CLOSED


def test_one_that_stops_responding_is_used_no_more_for_want_of_better_ones() -> None:
    world, (one, two) = World(), endpoints(2)
    where = target(one, two)
    world.fail(where, one, 7, how=Failure.RESPONSE)
    world.fail(where, two, 7, how=Failure.RESPONSE)
    world.fail(where, one, 7, how=Failure.SILENCE)
    assert set(world.picks(where)) == {two}
    world.fail(where, two)
    assert world.endpoint_set.pick(where) is None
    assert world.endpoint_set.next_probe(where) > world.now


def test_one_that_responds_badly_is_tried_when_its_penalty_is_over_although_another_is_well() -> (
    None
):
    world, (one, two) = World(), endpoints(2)
    where = target(one, two)
    world.fail(where, one, 7, how=Failure.RESPONSE)
    world.now += 1.6
    assert set(world.picks(where)) == {one}
    world.fail(where, one, how=Failure.RESPONSE)
    assert set(world.picks(where)) == {two}
    assert world.endpoint_set.broken[one.address].until - world.now >= 2


class Outage:
    """Endpoints that all refuse connections, and a client that sends ten requests a second."""

    def __init__(self, *places: Endpoint) -> None:
        self.world, self.places = World(), places
        self.where = target(*places)
        self.dead = set(places)
        self.tried: list[tuple[float, Endpoint]] = []  # without success
        for endpoint in places:
            self.world.fail(self.where, endpoint)

    def ask(self) -> Endpoint | None:
        """The endpoint that has served a request. None: there was no endpoint, or it failed."""
        self.world.now += 0.1
        endpoint = self.world.endpoint_set.pick(self.where)
        if endpoint is None:
            return None
        if endpoint in self.dead:
            self.tried.append((self.world.now, endpoint))
            self.world.fail(self.where, endpoint)
            return None
        self.world.succeed(self.where, endpoint)
        return endpoint

    def ask_for(self, seconds: float) -> Counter[Endpoint | None]:
        return Counter(self.ask() for _ in range(round(seconds * 10)))


def test_the_only_endpoint_is_tried_about_once_a_second_however_long_it_was_away() -> None:
    outage = Outage(*endpoints(1))
    assert set(outage.ask_for(600)) == {None}
    times = [when for when, _ in outage.tried]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert max(gaps) < 1.7, gaps
    assert sum(gap < 0.99 for gap in gaps) <= 8 + 600 / 60, (
        "when an open time of about a minute is over it is tried in any case"
    )
    outage.dead.clear()
    assert outage.ask_for(2)[outage.places[0]] >= 3
    assert not outage.world.endpoint_set.broken


def test_early_trials_do_not_make_a_penalty_longer() -> None:
    outage = Outage(*endpoints(1))
    for seconds, expected in ((1.6, 2), (4, 4), (8, 8)):
        outage.ask_for(seconds)
        left = outage.world.endpoint_set.penalty_ends(outage.where) - outage.world.now
        assert left <= expected * 1.5, f"after {seconds} s more"


def test_of_many_that_are_all_away_one_in_a_second_is_tried_early_and_each_gets_its_turn() -> None:
    outage = Outage(*endpoints(20))
    outage.ask_for(600)
    outage.tried.clear()
    outage.ask_for(60)
    assert 40 <= len(outage.tried) <= 60 + 20 * 2, (
        "one in 1 to 1.6 s, and each when its open time of about a minute is over"
    )
    assert {endpoint for _, endpoint in outage.tried} == set(outage.places)


def test_when_one_is_back_the_others_are_tried_soon() -> None:
    outage = Outage(*endpoints(10))
    outage.ask_for(600)
    outage.dead.clear()
    seen = outage.ask_for(4)
    assert set(seen) - {None} == set(outage.places)
    assert not outage.world.endpoint_set.broken


def test_while_one_is_well_the_others_are_left_alone_for_the_whole_of_their_penalty() -> None:
    outage = Outage(*endpoints(2))
    outage.dead = {outage.places[0]}
    outage.ask_for(600)
    assert not [when for when, endpoint in outage.tried if endpoint is outage.places[1]]
    times = [when for when, _ in outage.tried]
    assert len(times) <= 8 + 600 / 60, times
    assert min(later - earlier for earlier, later in pairwise(times[-5:])) > 59


def test_a_probe_that_gets_no_answer_does_not_keep_others_from_trying() -> None:
    world, (one,) = World(), endpoints(1)
    where = target(one)
    world.fail(where, one)
    world.now += 1.6
    hanging = world.endpoint_set.begin(where.policy, one, alone=True)
    assert world.endpoint_set.pick(where) is None
    assert world.balancer.trial(where, alone=True) is False
    world.now = world.endpoint_set.next_probe(where)
    assert world.balancer.trial(where, alone=True)
    assert not world.balancer.trial(where), "but not if another cluster could serve the request"
    assert world.endpoint_set.pick(where) is one
    second = world.endpoint_set.begin(where.policy, one, alone=True)
    assert [change.state for change in world.changes] == [BreakerState.OPEN, BreakerState.HALF_OPEN]
    second.record_response(0.01)
    second.end()
    assert not world.endpoint_set.broken
    hanging.record_failure("late")
    hanging.end()
    assert not world.endpoint_set.broken, "one failure of a response"


def test_a_trial_that_says_nothing_is_followed_by_another_at_once() -> None:
    outage = Outage(*endpoints(1))
    outage.ask_for(60)
    world, where = outage.world, outage.where
    world.now = max(world.now, world.endpoint_set.next_probe(where))
    world.endpoint_set.begin(where.policy, outage.places[0], alone=True).end()
    assert world.endpoint_set.pick(where) is outage.places[0]
