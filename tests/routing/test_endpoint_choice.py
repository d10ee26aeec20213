"""The endpoint of each attempt: whom it avoids, when it waits, and when it gives up. The fast path
makes the same first choice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.balancing.circuit_breaker import Failure
from proxy.balancing.endpoint_set import EndpointSet
from proxy.directory import Endpoint, Target
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed
from proxy.routing.endpoint_choice import (
    ENDPOINTS_TRIED,
    EndpointChoice,
    only_endpoint,
    pick_healthy,
)
from tests.balancing.endpoint_sets import World, endpoints, target

LOST = ConnectFailed(Address("10.0.0.1", 80), "refused", "refused")


def ordinary(endpoint_set: EndpointSet, where: Target) -> Endpoint | None:
    return EndpointChoice().pick(endpoint_set, where)


both_paths = pytest.mark.parametrize("pick", [ordinary, pick_healthy])
Pick = Callable[[EndpointSet, Target], Endpoint | None]


@both_paths
def test_a_healthy_endpoint_is_the_first_choice(pick: Pick) -> None:
    world, places = World(), endpoints(2)
    assert {pick(world.endpoint_set, target(*places)) for _ in range(50)} == set(places)


@both_paths
def test_who_comes_waits_behind_those_who_wait(pick: Pick) -> None:
    world, where = World(), target(*endpoints(2))
    with world.endpoint_set.queue.place():
        assert pick(world.endpoint_set, where) is None
    assert pick(world.endpoint_set, where) is not None


@both_paths
def test_an_endpoint_that_is_not_ready_is_no_choice(pick: Pick) -> None:
    assert pick(World().endpoint_set, target(*endpoints(1, ready=False))) is None


def test_only_the_fast_path_declines_while_a_breaker_is_open() -> None:
    world, (good, bad) = World(), endpoints(2)
    where = target(good, bad)
    world.fail(where, bad, 20)
    assert world.endpoint_set.broken
    assert pick_healthy(world.endpoint_set, where) is None
    assert ordinary(world.endpoint_set, where) == good


def test_the_draw_of_the_fast_path_is_kept_once_if_it_is_usable() -> None:
    world, places = World(), endpoints(3)
    where = target(*places)
    choice = EndpointChoice(places[1])
    assert choice.pick(world.endpoint_set, where) == places[1]
    assert {choice.pick(world.endpoint_set, where) for _ in range(50)} == set(places)
    gone = EndpointChoice(places[2])
    assert gone.pick(world.endpoint_set, target(*places[:2])) in places[:2]


def test_what_was_tried_is_avoided_and_what_answered_is_used_again() -> None:
    world, places = World(), endpoints(2)
    where, choice = target(*places), EndpointChoice()
    choice.answered(places[0])
    assert {choice.pick(world.endpoint_set, where) for _ in range(20)} == {places[1]}
    choice.not_connected(places[1], LOST)
    assert {choice.pick(world.endpoint_set, where) for _ in range(20)} == {places[0]}


def test_without_a_connection_anywhere_it_gives_up_or_waits() -> None:
    """It waits if an endpoint may come back, and tells the client at once if none will."""
    world, places = World(), endpoints(2)
    where, choice = target(*places), EndpointChoice()
    for place in places:
        choice.not_connected(place, LOST)
    with pytest.raises(ConnectFailed):
        choice.pick(world.endpoint_set, where)
    for place in places:
        world.fail(where, place, 20)
    assert choice.pick(world.endpoint_set, where) is None
    rejecting = World()
    for place in places:
        rejecting.fail(where, place, 20, how=Failure.REJECTED)
    with pytest.raises(ConnectFailed):
        choice.pick(rejecting.endpoint_set, where)


def test_it_tries_a_few_endpoints_and_no_more() -> None:
    world, places = World(), endpoints(ENDPOINTS_TRIED + 2)
    where, choice = target(*places), EndpointChoice()
    for place in places[:ENDPOINTS_TRIED]:
        assert choice.pick(world.endpoint_set, where) is not None
        choice.not_connected(place, LOST)
    with pytest.raises(ConnectFailed):
        choice.pick(world.endpoint_set, where)
    with world.endpoint_set.queue.place():
        assert choice.pick(world.endpoint_set, where) is None, "a place in the queue comes first"
    choice.waited()
    assert choice.pick(world.endpoint_set, where) in places


def test_an_address_has_its_one_endpoint() -> None:
    (place,) = endpoints(1)
    assert only_endpoint(target(place)) == place
    assert only_endpoint(target(*endpoints(1, ready=False))) is None
    assert only_endpoint(target()) is None
