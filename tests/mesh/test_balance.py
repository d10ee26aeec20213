"""Choosing an endpoint: ready ones only, the less loaded of two, away from those that just failed, and never without need empty-handed."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from proxy.mesh.balance import AVOID, MOST_FAILED, Balancer
from proxy.mesh.directory import Endpoint, Target
from proxy.net.address import Address


def endpoints(count: int, **facts: object) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(Address(f"10.0.{n >> 8}.{n & 255}", 80), **facts) for n in range(count))  # type: ignore[arg-type]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def balancer(clock: Clock | None = None) -> Balancer:
    return Balancer(clock or Clock(), random.Random(7))


def test_nothing_can_be_picked_from_nothing() -> None:
    assert balancer().pick(Target(None, ())) is None
    assert balancer().pick(Target(None, endpoints(1, ready=False))) is None
    assert balancer().pick(Target(None, endpoints(3, ready=False))) is None


def test_an_endpoint_that_is_not_ready_is_never_picked() -> None:
    ready, other = Endpoint(Address("10.0.0.1", 80)), Endpoint(Address("10.0.0.2", 80), ready=False)
    assert {balancer().pick(Target(None, (other, ready))) for _ in range(50)} == {ready}


def test_of_two_the_one_with_less_to_do_is_picked() -> None:
    one, two = endpoints(2)
    choose = balancer()
    choose.started(one)
    assert {choose.pick(Target(None, (one, two))) for _ in range(50)} == {two}
    choose.finished(one)
    assert {choose.pick(Target(None, (one, two))) for _ in range(50)} == {one, two}


def test_work_spreads_evenly_when_nothing_finishes() -> None:
    target, choose = Target(None, endpoints(10)), balancer()
    for _ in range(1000):
        chosen = choose.pick(target)
        assert chosen is not None
        choose.started(chosen)
    loads = [choose.outstanding(endpoint.address) for endpoint in target.endpoints]
    assert sum(loads) == 1000
    assert max(loads) - min(loads) <= 10, loads


def test_twice_the_weight_gets_twice_the_work() -> None:
    light, heavy = Endpoint(Address("10.0.0.1", 80)), Endpoint(Address("10.0.0.2", 80), weight=2)
    choose = balancer()
    for _ in range(300):
        chosen = choose.pick(Target(None, (light, heavy)))
        assert chosen is not None
        choose.started(chosen)
    assert abs(choose.outstanding(heavy.address) - 200) <= 3


def test_an_endpoint_that_failed_is_avoided_for_a_while_if_there_is_another() -> None:
    clock = Clock()
    choose, (one, two) = balancer(clock), endpoints(2)
    choose.failed(one)
    assert {choose.pick(Target(None, (one, two))) for _ in range(50)} == {two}
    assert choose.pick(Target(None, (one,))) == one, "there is no other"
    choose.failed(two)
    assert {choose.pick(Target(None, (one, two))) for _ in range(50)} == {one, two}, "both failed: any"
    clock.now = AVOID
    choose.failed(two)
    assert {choose.pick(Target(None, (one, two))) for _ in range(50)} == {one}


def test_a_connection_that_succeeds_ends_the_avoidance() -> None:
    choose, (one, two) = balancer(), endpoints(2)
    choose.failed(one)
    choose.connected(one)
    assert {choose.pick(Target(None, (one, two))) for _ in range(50)} == {one, two}


def test_what_is_excluded_is_not_picked_even_if_it_is_all_there_is() -> None:
    choose, (one, two) = balancer(), endpoints(2)
    assert {choose.pick(Target(None, (one, two)), exclude=[one]) for _ in range(50)} == {two}
    assert choose.pick(Target(None, (one, two)), exclude=[one, two]) is None
    assert choose.pick(Target(None, (one,)), exclude=[one]) is None


def test_a_block_is_finished_however_it_ends() -> None:
    choose, (one,) = balancer(), endpoints(1)
    try:
        with choose.using(one):
            assert choose.outstanding(one.address) == 1
            raise KeyError
    except KeyError:
        pass
    assert choose.outstanding(one.address) == 0
    assert not choose._outstanding, "an idle endpoint takes no memory"


def test_the_table_of_failures_is_bounded_and_forgets() -> None:
    clock = Clock()
    choose, many = balancer(clock), endpoints(MOST_FAILED + 10)
    for endpoint in many:
        choose.failed(endpoint)
    assert len(choose._failed) == MOST_FAILED
    clock.now = AVOID + 1
    choose.pick(Target(None, many[:2]))
    assert not choose._failed


def test_every_pair_is_drawn_and_the_first_place_is_not_favoured() -> None:
    choose, target = balancer(), Target(None, endpoints(4))
    drawn = Counter(choose.pick(target) for _ in range(4000))
    assert len(drawn) == 4
    assert min(drawn.values()) > 800, drawn


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=8), st.integers())
def test_a_pick_is_ready_and_not_excluded_and_failed_only_for_want_of_others(kinds: list[tuple[bool, bool, bool]], seed: int) -> None:
    choose = Balancer(Clock(), random.Random(seed))
    listed = [Endpoint(Address(f"10.0.0.{n}", 80), ready=ready) for n, (ready, _, _) in enumerate(kinds)]
    exclude = [endpoint for endpoint, (_, out, _) in zip(listed, kinds, strict=True) if out]
    failed = [endpoint for endpoint, (_, _, bad) in zip(listed, kinds, strict=True) if bad]
    for endpoint in failed:
        choose.failed(endpoint)
    usable = [endpoint for endpoint in listed if endpoint.ready and endpoint not in exclude]
    picked = choose.pick(Target(None, tuple(listed)), exclude)
    if picked is None:
        assert not usable
    else:
        assert picked in ([endpoint for endpoint in usable if endpoint not in failed] or usable)
