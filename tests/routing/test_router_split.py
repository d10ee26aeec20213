"""Which backend of a service gets a request: splits by weight, around endpoints that cannot be
used."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.directory import parse
from proxy.errors import NoEndpoint
from tests.routing.router_world import World, text, within


def test_requests_are_split_by_weight() -> None:
    world = World(
        text(
            "{service: c, weight: 90}, {service: c, cluster: east, weight: 10}, {service: new,"
            " weight: 0}"
        )
    )
    seen = world.many(20_000)
    assert set(seen) == {"default/c", "east/default/c"}
    assert within(seen["default/c"], 0.9, 20_000)
    assert world.metrics.away["east", "split"] == seen["east/default/c"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), st.integers(0, 2**32))
def test_any_weights_are_kept_to(weights: list[int], seed: int) -> None:
    one, two, three = weights
    shares = (
        f"{{service: c, weight: {one}}}, {{service: c, cluster: east, weight: {two}}}, {{service:"
        f" new, weight: {three}}}"
    )
    world = World(text(shares), seed)
    seen = world.many(2000)
    for name, weight in (("default/c", one), ("east/default/c", two), ("default/new", three)):
        assert within(seen[name], weight / sum(weights), 2000)
        assert weight or not seen[name]


def test_the_share_of_a_backend_that_cannot_be_used_goes_to_the_others_in_proportion() -> None:
    world = World(
        text(
            "{service: c, weight: 50}, {service: c, cluster: east, weight: 10}, {service: new,"
            " weight: 40}"
        )
    )
    world.breaks("10.1.0.1", "10.1.0.2")
    seen = world.many(10_000)
    assert set(seen) == {"east/default/c", "default/new"}
    assert within(seen["default/new"], 0.8, 10_000)


def test_a_backend_without_endpoints_gets_no_requests() -> None:
    world = World(text("{service: empty, weight: 99}, {service: new, weight: 1}"))
    assert set(world.many(200)) == {"default/new"}


def test_a_backend_of_weight_0_gets_no_requests_even_if_it_is_the_last_one() -> None:
    world = World(text("{service: empty, weight: 1}, {service: new, weight: 0}"))
    with pytest.raises(
        NoEndpoint, match=r"no backend of default/c has a usable endpoint: default/empty none of 0$"
    ):
        world.to()


def test_without_any_backend_that_can_be_used_the_error_names_them_all() -> None:
    world = World(text("{service: c, weight: 1}, {service: c, cluster: east, weight: 1}"))
    world.breaks("10.1.0.1", "10.1.0.2", "203.0.113.7")
    with pytest.raises(
        NoEndpoint,
        match=r"no backend of default/c .*: default/c none of 2, east/default/c none of 1",
    ):
        world.to()


def test_weights_change_between_two_requests() -> None:
    world = World(text("{service: c, weight: 1}, {service: new, weight: 0}"))
    assert set(world.many(100)) == {"default/c"}
    world.known.current = parse(text("{service: c, weight: 0}, {service: new, weight: 1}"), "test")
    assert set(world.many(100)) == {"default/new"}
