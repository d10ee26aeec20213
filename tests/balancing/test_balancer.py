"""The choice of an endpoint: only ready ones with a closed circuit, the less busy of two, by
weight, near zones first, and new ones with a growing share. Time is simulated."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancing.endpoint_set import ActiveRequest
from proxy.balancing.ewma import PeakEwma
from proxy.directory import Endpoint, Target
from proxy.directory.policy import Balancing, Policy
from proxy.net.address import Address
from tests.balancing.endpoint_sets import World, endpoints, target

# What there is to pick from...


def test_nothing_can_be_picked_from_nothing() -> None:
    world = World()
    for where in (target(), target(*endpoints(1, ready=False)), target(*endpoints(3, ready=False))):
        assert world.endpoint_set.pick(where) is None
        assert world.balancer.usable(where) == 0


def test_an_endpoint_that_is_not_ready_is_never_picked() -> None:
    ready, other = Endpoint(Address("10.0.0.1", 80)), Endpoint(Address("10.0.0.2", 80), ready=False)
    world = World()
    assert set(world.picks(target(other, ready))) == {ready}
    assert world.balancer.usable(target(other, ready)) == 1


def test_what_is_excluded_is_not_picked_even_if_it_is_all_there_is() -> None:
    world, (one, two) = World(), endpoints(2)
    assert set(world.picks(target(one, two), exclude=[one])) == {two}
    assert world.endpoint_set.pick(target(one, two), exclude=[one, two]) is None
    assert world.endpoint_set.pick(target(one), exclude=[one]) is None


def test_every_pair_is_drawn_and_the_first_place_is_not_favoured() -> None:
    drawn = World().picks(target(*endpoints(4)), 4000)
    assert len(drawn) == 4
    assert min(drawn.values()) > 800, drawn


# The less busy one...


def test_of_two_the_one_with_less_to_do_is_picked() -> None:
    world, (one, two) = World(), endpoints(2)
    where = target(one, two)
    work = world.endpoint_set.begin(where.policy, one, alone=False)
    assert set(world.picks(where)) == {two}
    work.end()
    assert set(world.picks(where)) == {one, two}


def test_the_faster_of_two_endpoints_is_picked_until_its_statistics_have_decayed() -> None:
    world, (one, two) = World(), endpoints(2)
    where = target(one, two)
    world.succeed(where, one, 0.2)
    world.succeed(where, two, 0.01)
    assert set(world.picks(where)) == {two}
    for _ in range(60):  # no request goes to the slow one
        world.now += 1
        world.succeed(where, two, 0.01)
    assert one in world.picks(where)


def test_a_difference_that_is_noise_does_not_decide() -> None:
    world, (one, two) = World(), endpoints(2)
    where = target(one, two)
    world.succeed(where, one, 0.051)
    world.succeed(where, two, 0.050)
    assert min(world.picks(where, 1000).values()) > 400


def test_a_quick_error_does_not_make_an_endpoint_attractive() -> None:
    world, (one, two) = World(), endpoints(2)
    where = target(one, two)
    for endpoint in (one, two):
        world.succeed(where, endpoint, 0.05)
    for _ in range(5):
        world.now += 5
        world.succeed(where, two, 0.05)
        work = world.endpoint_set.begin(where.policy, one, alone=False)
        work.record_response(0.0001, bad=True)
        work.end()
    assert world.picks(where, 1000)[one] < 600


def test_a_peak_counts_at_once_and_an_improvement_by_the_time_that_has_passed() -> None:
    load = PeakEwma(0.03, 0.0)
    load.observe(1.0, 1.0, 10.0)
    assert load.expected(1.0, 10.0) == 1.0
    load.observe(0.1, 1.0, 10.0)
    assert load.expected(1.0, 10.0) == pytest.approx(1.0), "no time has passed"
    load.observe(0.1, 11.0, 10.0)
    assert load.expected(11.0, 10.0) == pytest.approx(0.1 + 0.9 / 2.718281828)
    assert load.expected(21.0, 10.0) == pytest.approx((0.1 + 0.9 / 2.718281828) / 2.718281828), (
        "what is not confirmed fades"
    )


def test_work_spreads_evenly_when_nothing_finishes() -> None:
    world, where = World(), target(*endpoints(10))
    for _ in range(1000):
        chosen = world.endpoint_set.pick(where)
        assert chosen is not None
        world.endpoint_set.begin(where.policy, chosen, alone=False)
    loads = [world.endpoint_set.outstanding(endpoint.address) for endpoint in where.endpoints]
    assert sum(loads) == 1000
    assert max(loads) - min(loads) <= 50, loads


def simulate(
    where: Target, service: Callable[[int], float], clients: int, seconds: float
) -> list[int]:
    """A closed loop: each of `clients` sends its next request when it has the response. Endpoints
    respond after `service(index)` seconds. Returns the requests of each endpoint."""
    world = World()
    index = {endpoint: at for at, endpoint in enumerate(where.endpoints)}
    counts = [0] * len(index)
    events: list[tuple[float, int]] = [
        (world.now + 0.001 * client, client) for client in range(clients)
    ]
    heapq.heapify(events)
    out: dict[int, tuple[float, ActiveRequest]] = {}
    end = world.now + seconds
    while events[0][0] < end:
        world.now, client = heapq.heappop(events)
        if client in out:
            started, work = out.pop(client)
            work.record_response(world.now - started)
            work.end()
        endpoint = world.endpoint_set.pick(where)
        assert endpoint is not None
        counts[index[endpoint]] += 1
        out[client] = world.now, world.endpoint_set.begin(where.policy, endpoint, alone=False)
        heapq.heappush(events, (world.now + service(index[endpoint]), client))
    return counts


@pytest.mark.parametrize("clients", [3, 30], ids=["hardly loaded", "loaded"])
def test_an_endpoint_that_is_ten_times_slower_gets_its_small_share(clients: int) -> None:
    """Its fair share is what it can serve in the time: a tenth of another's. Under load it gets
    that. Without load it gets less, but never nothing."""
    chance = random.Random(1)
    counts = simulate(
        target(*endpoints(5)),
        lambda at: chance.uniform(0.5, 1.5) * (0.1 if at == 0 else 0.01),
        clients,
        120,
    )
    others = sum(counts[1:]) / 4
    assert 0.001 * others < counts[0] < 0.2 * others, counts
    assert min(counts[1:]) > 0.7 * others, counts


def test_an_endpoint_that_becomes_slow_loses_its_share_and_gets_it_back_when_it_recovers() -> None:
    chance = random.Random(2)
    where, slow = target(*endpoints(3)), [False]
    phases = []
    for slow[0], seconds in ((True, 30.0), (False, 120.0)):
        phases.append(
            simulate(
                where,
                lambda at: chance.uniform(0.5, 1.5) * (0.2 if at == 0 and slow[0] else 0.01),
                6,
                seconds,
            )
        )
    assert phases[0][0] < 0.2 * phases[0][1]
    assert phases[1][0] > 0.8 * phases[1][1]


@pytest.mark.parametrize(
    "weights", [(1, 1), (1, 9), (10, 20, 30), (3, 3, 3, 3), (500, 501), (1, 1000)]
)
@pytest.mark.parametrize("clients", [1, 40], ids=["one after the other", "forty at a time"])
def test_shares_are_as_the_weights_say(weights: tuple[int, ...], clients: int) -> None:
    """Endpoints that are equally fast in each run. 3 % is more than four standard deviations."""
    chance = random.Random(3)
    placed = [
        Endpoint(Address(f"10.0.0.{n}", 80), weight=weight) for n, weight in enumerate(weights)
    ]
    counts = simulate(
        target(*placed),
        lambda _: chance.uniform(0.9, 1.1) * 0.01,
        clients,
        200 if clients == 1 else 8,
    )
    for count, weight in zip(counts, weights, strict=True):
        assert count / sum(counts) == pytest.approx(weight / sum(weights), abs=0.03), counts


# Zones...


def zoned(*zones: str, ready: Sequence[bool] = ()) -> tuple[Endpoint, ...]:
    states = ready or [True] * len(zones)
    return tuple(
        Endpoint(Address(f"10.0.0.{n}", 80), zone=z, ready=r)
        for n, (z, r) in enumerate(zip(zones, states, strict=True))
    )


def test_the_own_zone_comes_first() -> None:
    world, places = World(zone="a"), zoned("a", "a", "b", "b", "c")
    assert set(world.picks(target(*places))) == set(places[:2])
    assert set(World(zone="").picks(target(*places))) == set(places), (
        "the proxy's own zone is not known"
    )
    assert set(World(zone="d").picks(target(*places))) == set(places), "no endpoint is ready"
    ignoring = Policy(balancing=Balancing(zone="ignore"))
    assert set(world.picks(target(*places, policy=ignoring))) == set(places)


def test_a_zone_with_too_few_that_can_be_used_gets_help() -> None:
    world, places = World(zone="a"), zoned("a", "a", "a", "b", "b")
    where = target(*places)
    assert set(world.picks(where)) == set(places[:3])
    world.fail(where, places[0])
    assert set(world.picks(where)) == set(places[1:]), (
        "two of three are less than the 70 % that are required"
    )
    third = target(*places, policy=Policy(balancing=Balancing(zone_share=0.3)))
    assert set(world.picks(third)) == set(places[1:3]), "and more than 30 %"


def test_endpoints_of_the_zone_that_are_not_ready_count_as_missing() -> None:
    world, places = World(zone="a"), zoned("a", "a", "b", ready=[True, False, True])
    assert set(world.picks(target(*places))) == {places[0], places[2]}


def test_if_all_of_the_own_zone_are_excluded_another_zone_helps() -> None:
    world, places = World(zone="a"), zoned("a", "a", "b")
    assert world.endpoint_set.pick(target(*places), exclude=places[:2]) == places[2]


# New endpoints...


def test_a_new_endpoint_gets_a_share_that_grows() -> None:
    world, places = World(), endpoints(4)
    world.endpoint_set.pick(
        target(*places[:3])
    )  # the first endpoints of the service: none of them is new
    where, shares = target(*places), []
    for _ in range(4):
        shares.append(world.picks(where, 2000)[places[3]] / 2000)
        world.now += 4
    assert shares[0] < 0.05
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert shares[3] == pytest.approx(0.25, abs=0.05), "12 s old, and no longer new"


def test_endpoints_that_are_all_new_share_evenly() -> None:
    world = World()
    assert min(world.picks(target(*endpoints(3)), 3000).values()) > 800
    replaced = tuple(Endpoint(Address(f"10.9.0.{n}", 80)) for n in range(3))
    assert min(world.picks(target(*replaced), 3000).values()) > 800


def test_statistics_of_one_service_do_not_count_for_another() -> None:
    world, places = World(), endpoints(2)
    world.fail(target(*places), places[0])
    other = Target("default/other", places)
    assert world.balancer.usable(other) == 2


def test_many_endpoints_of_which_some_are_broken() -> None:
    world, places = World(), endpoints(500)
    where = target(*places)
    for endpoint in places[:400]:
        world.fail(where, endpoint)
    assert world.balancer.usable(where) == 100
    picked = world.picks(where, 1000)
    assert set(picked) <= set(places[400:])
    assert len(picked) > 90


def test_a_new_directory_keeps_the_statistics_of_endpoints() -> None:
    world, (one, two) = World(), endpoints(2)
    world.fail(target(one, two), one)
    assert set(world.picks(target(*endpoints(2)))) == {two}


def test_old_statistics_are_removed() -> None:
    world, places = World(), endpoints(50)
    where = target(*places)
    for endpoint in places:
        world.succeed(where, endpoint)
        world.fail(where, endpoint)
    endpoint_set = world.endpoint_set
    for _ in range(3):
        world.now += 2000
        world.balancer.sweep()
    assert not endpoint_set._loads
    assert not endpoint_set._failed
    assert not endpoint_set.broken
    assert not endpoint_set._views
    assert not endpoint_set._older
    assert world.endpoint_set is not endpoint_set


def test_a_service_that_is_used_is_not_forgotten() -> None:
    world, where = World(), target(*endpoints(1))
    endpoint_set = world.endpoint_set
    for _ in range(5):
        endpoint_set.budget.requests += 1
        endpoint_set.pick(where)
        world.balancer.sweep()
    assert world.endpoint_set is endpoint_set


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=12),
    st.integers(),
    st.sampled_from(["", "a"]),
)
def test_a_pick_is_ready_sound_and_not_excluded_and_is_found_if_there_is_one(
    kinds: list[tuple[bool, bool, bool]], seed: int, zone: str
) -> None:
    world = World(zone, seed)
    listed = [
        Endpoint(Address(f"10.0.0.{n}", 80), ready=ready, zone="ab"[n % 2])
        for n, (ready, _, _) in enumerate(kinds)
    ]
    where = target(*listed)
    exclude = [endpoint for endpoint, (_, out, _) in zip(listed, kinds, strict=True) if out]
    for endpoint, (_, _, bad) in zip(listed, kinds, strict=True):
        if bad:
            world.fail(where, endpoint)
    sound = [
        endpoint
        for endpoint, (ready, _, bad) in zip(listed, kinds, strict=True)
        if ready and not bad
    ]
    assert world.balancer.usable(where) == len(sound)
    allowed = [endpoint for endpoint in sound if endpoint not in exclude]
    picked = world.endpoint_set.pick(where, exclude)
    assert picked in allowed if allowed else picked is None
