"""Which cluster serves a request: failover, and back without flapping."""

from __future__ import annotations

from collections import Counter

import pytest

from proxy.balancing.circuit_breaker import Failure
from proxy.directory import Directory, Endpoint, Requested, parse
from proxy.errors import DirectoryUnavailable, IdentityUnknown, NoEndpoint
from tests.routing.router_world import SETTLE, World, text, within


def failing_over(below: int = 1) -> World:
    return World(text(failover=f"{{clusters: [east, north], below: {below}}}"))


def test_a_service_is_served_at_home_while_enough_of_its_endpoints_can_be_used() -> None:
    world = failing_over()
    world.breaks("10.1.0.1")
    assert set(world.many(50)) == {"default/c"}
    assert not world.metrics.states


def test_without_them_it_is_served_by_the_first_cluster_in_order_that_can() -> None:
    world = failing_over()
    world.breaks("10.1.0.1", "10.1.0.2")
    assert world.where() == "east/default/c"
    world.breaks("203.0.113.7")
    assert world.where() == "north/default/c"
    assert world.metrics.away == {("east", "failover"): 1, ("north", "failover"): 1}
    assert world.metrics.states == [("default/c", True)]


def test_a_threshold_sends_it_away_earlier() -> None:
    world = failing_over(below=2)
    world.breaks("10.1.0.1")
    assert world.where() == "east/default/c"


def test_without_other_clusters_a_service_stays_in_its_own() -> None:
    world = failing_over(below=2)
    world.breaks("10.1.0.1", "203.0.113.7", "203.0.113.8")
    assert world.where() == "default/c"


def test_it_comes_back_when_it_has_been_usable_for_long_enough_and_not_before() -> None:
    world = failing_over()
    for _ in range(3):  # down for a moment, again and again: no request goes back in between
        world.breaks("10.1.0.1", "10.1.0.2")
        assert world.where() == "east/default/c"
        world.recovers("10.1.0.1", "10.1.0.2")
        assert world.where() == "east/default/c"
        world.now += SETTLE - 1
        assert world.where() == "east/default/c"
    world.now += 1
    assert world.where() == "default/c"
    assert world.metrics.states == [("default/c", True), ("default/c", False)]


class Client:
    """Sends ten requests a second, by the router and the balancer, as proxy/routing/dispatch.py
    does: up to three endpoints, each time of the current choice. `dead` are hosts that cannot be
    connected to."""

    def __init__(self, world: World, *dead: str) -> None:
        self.world, self.dead = world, set(dead)
        self.wasted: Counter[str] = Counter()  # attempts, by host

    def ask(self) -> str | None:
        """The server of the request; None: there was none."""
        world = self.world
        world.now += 0.1
        tried: tuple[Endpoint, ...] = ()
        while len(tried) < 3:
            try:
                target = world.to()
            except NoEndpoint:
                return None
            endpoint_set = world.balancer.endpoint_set(target.service or "")
            endpoint = endpoint_set.pick(target, tried)
            if endpoint is None:
                return None
            work = endpoint_set.begin(target.policy, endpoint, alone=len(target.endpoints) == 1)
            bad = endpoint.address.host in self.dead
            if bad:
                work.record_failure("test", how=Failure.UNREACHABLE)
                self.wasted[endpoint.address.host] += 1
                tried = *tried, endpoint
            else:
                work.record_response(0.01)
            work.end()
            if not bad:
                return target.service
        return None

    def ask_for(self, seconds: float) -> Counter[str | None]:
        return Counter(self.ask() for _ in range(round(seconds * 10)))


HOME, EAST, NORTH = ("10.1.0.1", "10.1.0.2"), "203.0.113.7", "203.0.113.8"


@pytest.mark.parametrize("below", [1, 2])
def test_a_dead_home_cluster_is_tried_at_intervals_and_the_service_moves_away_once_and_back_once(
    below: int,
) -> None:
    world = failing_over(below)
    client = Client(world)
    assert set(client.ask_for(60)) == {"default/c"}
    client.dead = set(HOME)
    assert set(client.ask_for(600)) == {"east/default/c"}, "each request was served in the end"
    assert world.metrics.states == [("default/c", True)]
    assert 10 <= sum(client.wasted.values()) <= 2 * (8 + 600 / 60), (
        "by one attempt of one request in each open time of each endpoint"
    )
    client.dead.clear()
    seen = client.ask_for(90 + SETTLE)
    assert set(seen) == {"east/default/c", "default/c"}
    assert set(client.ask_for(60)) == {"default/c"}
    assert world.metrics.states == [("default/c", True), ("default/c", False)]


def test_a_trial_of_a_dead_home_is_one_request_however_many_ask_at_once() -> None:
    world = failing_over()
    client = Client(world, *HOME)
    client.ask_for(1)
    world.now += 100
    home = world.to()
    assert home.service == "default/c"
    works = []
    for _ in HOME:
        endpoint_set = world.balancer.endpoint_set("default/c")
        endpoint = endpoint_set.pick(world.to())
        assert endpoint is not None
        works.append(endpoint_set.begin(home.policy, endpoint, alone=False))
    assert {work.endpoint.address.host for work in works} == set(HOME)
    assert set(world.many(100)) == {"east/default/c"}, "while both are being tried"
    for work in works:
        work.record_failure("test", how=Failure.UNREACHABLE)
        work.end()
    assert set(world.many(100)) == {"east/default/c"}
    assert world.metrics.states == [("default/c", True)]


def test_if_nothing_is_left_anywhere_each_place_is_tried_in_about_a_second() -> None:
    for back in ((EAST,), (NORTH,), HOME):
        world = failing_over()
        client = Client(world, *HOME, EAST, NORTH)
        client.ask_for(600)
        client.dead -= set(back)
        seen = client.ask_for(5)
        assert seen[None] <= 35, f"{back}: {seen}"
        assert len(set(seen) - {None}) == 1, (
            f"{back}: {seen}"
        )  # the first trial may succeed by chance: then no request fails
        assert world.metrics.states == [("default/c", True)]


def test_a_split_of_which_nothing_was_left_is_served_within_seconds_of_its_recovery() -> None:
    world = World(text("{service: c, weight: 50}, {service: c, cluster: east, weight: 50}"))
    client = Client(world, *HOME, EAST)
    assert set(client.ask_for(600)) == {None}
    client.dead.clear()
    assert client.ask_for(5)[None] <= 25
    assert set(client.ask_for(90)) == {"default/c", "east/default/c"}


def test_a_home_cluster_with_only_bad_responses_is_used_only_without_other_clusters() -> None:
    world = failing_over()
    world.breaks(*HOME, how=Failure.RESPONSE)
    assert set(world.many(50)) == {"east/default/c"}
    world.breaks(EAST, NORTH)
    assert set(world.many(50)) == {"default/c"}
    assert all(
        world.balancer.endpoint_set("default/c").pick(world.to()) is not None for _ in range(50)
    ), "without a pause"


def test_backends_of_a_split_that_all_answer_badly_keep_their_shares() -> None:
    world = World(text("{service: c, weight: 50}, {service: c, cluster: east, weight: 50}"))
    world.breaks(*HOME, EAST, how=Failure.RESPONSE)
    seen = world.many(2000)
    assert within(seen["default/c"], 0.5, 2000)
    assert seen["default/c"] + seen["east/default/c"] == 2000


def test_readiness_in_the_directory_decides_too() -> None:
    world = failing_over()
    world.known.current = parse(text(failover="{clusters: [east]}", ready="false"), "test")
    assert world.where() == "east/default/c"
    world.known.current = parse(text(failover="{clusters: [east]}"), "test")
    assert world.where() == "east/default/c"
    world.now += SETTLE
    assert world.where() == "default/c"


def test_a_backend_of_a_split_keeps_its_share_while_another_cluster_stands_in_for_it() -> None:
    split = "{service: c, weight: 50}, {service: new, weight: 50}"
    world = World(text(split, failover="{clusters: [east]}"))
    world.breaks("10.1.0.1", "10.1.0.2")
    seen = world.many(4000)
    assert set(seen) == {"east/default/c", "default/new"}
    assert within(seen["east/default/c"], 0.5, 4000)


def test_requests_for_another_cluster_are_sent_only_there() -> None:
    world = failing_over()
    world.breaks("203.0.113.7")
    assert world.to("192.0.2.1:80", b"c.east").service == "east/default/c"
    assert world.metrics.away == {("east", "name"): 1}


def test_an_address_without_a_known_meaning_fails() -> None:
    world = World("services: []")
    requested = Requested()
    world.known.current = Directory(requested=requested)
    assert world.to("10.1.0.1:80").endpoints[0].identity is None
    requested.hosts.add("10.1.0.1")
    with pytest.raises(DirectoryUnavailable):
        world.to("10.1.0.1:80")
    requested.unidentified.add("10.1.0.1")
    for address in ("10.1.0.1:80", "[::ffff:10.1.0.1]:80"):
        with pytest.raises(IdentityUnknown):
            world.to(address)
