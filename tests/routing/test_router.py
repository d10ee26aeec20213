"""Where requests go: the address decides, and the authority only where it may; splits by weight,
around endpoints that cannot be used; failover, and back without flapping. Health is that of the
real balancer, with a clock of the test's."""

from __future__ import annotations

import math
import random
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.balancing.balancer import Balancer
from proxy.balancing.circuit_breaker import Failure
from proxy.directory import Directory, Endpoint, Requested, Service, Target, parse
from proxy.errors import DirectoryUnavailable, IdentityUnknown, NoEndpoint
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream
from proxy.routing.router import Router

GATEWAY = "spiffe://cluster.local/ns/isthmus/sa/gateway"
SETTLE = 10.0


def text(split: str = "", failover: str = "", ready: str = "true") -> str:
    return f"""
services:
  - name: c
    addresses: [10.96.0.1]
    ports: [{{port: 80}}]
    endpoints: [{{address: 10.1.0.1, ready: {ready}}}, {{address: 10.1.0.2, ready: {ready}}}]
    split: [{split}]
    {failover and f"failover: {failover}"}
  - {{name: new, ports: [{{port: 80}}], endpoints: [{{address: 10.1.0.9}}]}}
  - {{name: empty, ports: [{{port: 80}}]}}
clusters:
  - name: east
    gateways: [{{address: 203.0.113.7, identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}]}}]
  - name: north
    gateways: [{{address: 203.0.113.8, identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}]}}]
"""


class Known:
    """A directory that a test replaces."""

    def __init__(self, document: str) -> None:
        self.current: Directory = parse(document, "test")


class Counted:
    def __init__(self) -> None:
        self.away: Counter[tuple[str, str]] = Counter()
        self.states: list[tuple[str, bool]] = []

    def count_remote_attempt(self, cluster: str, why: str) -> None:
        self.away[cluster, why] += 1

    def set_failover(self, service: str, away: bool) -> None:
        self.states.append((service, away))


class World:
    """A router, and its dependencies."""

    def __init__(self, document: str, seed: int = 1) -> None:
        self.now = 1000.0
        self.known = Known(document)
        self.metrics = Counted()
        self.balancer = Balancer(lambda: self.now)
        chance = random.Random(seed)
        self.router = Router(
            self.known,
            self.balancer,
            self.metrics,
            "default",
            SETTLE,
            lambda: self.now,
            chance,
            networks=[ip_network("192.0.2.0/24")],
        )

    def to(self, address: str = "10.96.0.1:80", authority: bytes | None = None) -> Target:
        return self.router.choose(self.router.meant(Address.parse(address), lambda: authority))

    def where(self) -> str | None:
        return self.to().service

    def many(self, count: int) -> Counter[str | None]:
        return Counter(self.where() for _ in range(count))

    def breaks(self, *hosts: str, how: Failure = Failure.UNREACHABLE) -> None:
        """These endpoints have failed so often that their circuits are open now."""
        for service in self.services():
            for target in service.targets.values():
                for endpoint in target.endpoints:
                    if endpoint.address.host in hosts:
                        for _ in range(
                            1 if how is Failure.UNREACHABLE else target.policy.breaker.failures
                        ):
                            work = self.balancer.endpoint_set(target.service or "").begin(
                                target.policy, endpoint, alone=False
                            )
                            work.record_failure("test", how=how)
                            work.end()

    def recovers(self, *hosts: str) -> None:
        """When the open times of these are over, a trial request succeeds."""
        self.now += 1.6
        for service in self.known.current.services:
            for target in service.targets.values():
                for endpoint in target.endpoints:
                    if endpoint.address.host in hosts:
                        work = self.balancer.endpoint_set(target.service or "").begin(
                            target.policy, endpoint, alone=False
                        )
                        work.record_response(None)
                        work.end()

    def services(self) -> list[Service]:
        directory = self.known.current
        return [
            *directory.services,
            *(service for cluster in directory.clusters.values() for service in cluster.services),
        ]


# What was meant?


@pytest.mark.parametrize(
    ("address", "authority", "service"),
    [
        ("10.96.0.1:80", b"new", "default/c"),  # the address is known, so it decides
        ("10.1.0.9:80", b"c", "default/new"),
        ("192.0.2.1:80", b"c", "default/c"),
        ("192.0.2.1:8080", b"C.default.svc.cluster.local:80", "default/c"),
        ("192.0.2.1:80", b"c.east", "east/default/c"),
        ("192.0.2.1:80", b"c:81", None),
        ("192.0.2.1:80", b"example.com", None),
        ("192.0.2.1:80", None, None),
        ("[::ffff:192.0.2.1]:80", b"c", "default/c"),
        ("10.96.0.1:81", b"nobody", None),
        # Outside of the networks in the configuration, an authority chooses nothing.
        ("198.51.100.1:80", b"c", None),
        ("198.51.100.1:80", b"c.default.svc.cluster.local:80", None),
        ("198.51.100.1:80", b"c.east", None),
        ("10.96.0.1:81", b"c:80", None),
        ("[2001:db8::1]:80", b"c", None),
        ("127.0.0.1:80", b"c", None),
    ],
)
def test_the_address_decides_and_the_authority_only_where_the_operator_lets_it(
    address: str, authority: bytes | None, service: str | None
) -> None:
    target = World(text()).to(address, authority)
    assert target.service == service
    if service is None:
        assert target == Target(None, (Endpoint(Address.parse(address)),))


def test_the_authority_is_not_even_looked_at_where_it_may_not_choose() -> None:
    def ask() -> bytes | None:
        raise AssertionError("the authority is not asked for")

    router = World(text()).router
    assert router.meant(Address("10.96.0.1", 80), ask).service == "default/c"
    assert router.meant(Address("198.51.100.1", 80), ask).service is None
    router.networks = ()
    assert router.meant(Address("192.0.2.1", 80), ask).service is None


@given(
    st.ip_addresses().map(str),
    st.sampled_from([80, 81, 4143, 8080]),
    st.sampled_from([b"c", b"new", b"c.east", b"c-east", b"c:80"]),
)
def test_an_address_outside_of_the_mesh_is_itself_whatever_the_authority(
    host: str, port: int, authority: bytes
) -> None:
    original = Address(host, port)
    router = World(text()).router
    router.networks = ()
    if router.known(original) is None:
        assert router.meant(original, lambda: authority) == Target(None, (Endpoint(original),))


class Gates:
    """203.0.113.7, port 4143, is the gateway of east, and 203.0.113.8 that of north; all of them
    can be used."""

    def cluster(self, address: Address) -> str | None:
        return {Address("203.0.113.7", 4143): "east", Address("203.0.113.8", 4143): "north"}.get(
            address
        )

    def through(self, target: Target) -> Target:
        return target

    def why(self, cluster: str) -> str:
        return f"no gateway of {cluster}"

    def connected(self, endpoint: Endpoint, stream: SocketStream | TLSStream) -> None: ...


@pytest.mark.parametrize(
    ("address", "authority", "service"),
    [
        ("203.0.113.7:4143", b"c.east", "east/default/c"),
        ("203.0.113.7:4143", b"c-east.default.svc.cluster.local:80", "east/default/c"),
        ("203.0.113.7:4143", b"c.north", None),  # at a gateway, the services of its own cluster
        ("203.0.113.7:4143", b"c", None),
        ("203.0.113.7:4143", b"new.default.svc.cluster.local", None),
        ("203.0.113.7:80", b"c.east", None),  # another port of the gateway's host
        ("203.0.113.8:4143", b"c.north", "north/default/c"),
    ],
)
def test_at_a_gateway_the_authority_chooses_among_the_services_of_its_cluster(
    address: str, authority: bytes, service: str | None
) -> None:
    world = World(text())
    world.router.remote_gateways = Gates()
    assert world.to(address, authority).service == service


DUAL = """
services:
  - name: c
    ports: [{port: 80}]
    endpoints: [{address: 10.1.0.1}, {address: "fd00::1"}, {address: 10.1.0.2}]
    split: [{service: c, weight: 1}]
  - {name: d, ports: [{port: 80}], endpoints: [{address: 10.1.0.3}, {address: "fd00::3"}]}
  - {name: six, ports: [{port: 80}], endpoints: [{address: "fd00::6"}]}
"""


@pytest.mark.parametrize(
    ("address", "authority", "hosts"),
    [
        ("192.0.2.1:80", b"d", {"10.1.0.3"}),
        ("[2001:db8::1]:80", b"d", {"fd00::3"}),
        ("192.0.2.1:80", b"c", {"10.1.0.1", "10.1.0.2"}),
        ("[2001:db8::1]:80", b"c", {"fd00::1"}),
        ("192.0.2.1:80", b"six", {"fd00::6"}),
    ],
)
def test_a_name_leads_to_endpoints_of_the_family_that_was_dialled(
    address: str, authority: bytes, hosts: set[str]
) -> None:
    world = World(DUAL)
    world.router.networks = [ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")]
    target = world.to(address, authority)
    assert {endpoint.address.host for endpoint in target.endpoints} == hosts
    assert world.to(address, authority) is target, (
        "a target's endpoint set belongs to the target object"
    )


class OneAddress:
    """Virtual addresses: 240.0.0.1 is c of east, 240.0.0.2 was something that is gone."""

    def lookup(self, host: str) -> tuple[str, str, str] | None:
        return {
            "240.0.0.1": ("east", "default", "c"),
            "240.0.0.2": ("east", "default", "gone"),
        }.get(host)

    def covers(self, host: str) -> bool:
        return host.startswith("240.")

    def held(self, host: str) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize(
    ("address", "service", "gateways"),
    [
        ("240.0.0.1:80", "east/default/c", 1),
        ("240.0.0.1:81", "east/default/c", 0),
        ("240.0.0.2:80", "east/default/gone", 0),
        ("240.0.0.3:80", None, 0),
    ],
)
def test_a_virtual_address_is_its_service_or_none_but_never_itself(
    address: str, service: str | None, gateways: int
) -> None:
    world = World(text())
    world.router.virtual = OneAddress()
    target = world.to(address, b"new")
    assert (target.service, len(target.endpoints)) == (service, gateways)


# Which service?


def within(seen: int, share: float, count: int) -> bool:
    """Five standard deviations: one in two million random draws is outside."""
    return abs(seen - share * count) <= 5 * math.sqrt(count * share * (1 - share))


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


# Where is it served?


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
