"""Loops that requests show: a proxy that meets its own token for the same request has a loop, and
nothing else is one.

Rules: every request ends within the hop limit. Without a cycle nothing is refused. Only its own
proxy can make a token. Any field is read in bounded time and never raises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopguard import HopLimits, HopTokens, Loop, ProxyName
from loopguard.l7 import (
    LONGEST,
    LONGEST_NAMED,
    Direction,
    from_outside,
    mark_outside,
    read,
    strip_names,
)

SECRET = bytes(range(32))
LIMITS = HopLimits(max_returns=2, max_hops=16)
REQUEST = (b"GET", b"/items?page=2", b"shop:8080")
# The grammar of the module's docstring, written again.
GRAMMAR = re.compile(
    rb"[oieg][A-Za-z0-9+/]{8}[A-Za-z0-9+/]{8}(:[-._A-Za-z0-9]{1,63}/[-._A-Za-z0-9]{1,63})?"
)


def hop_tokens(
    pod: str = "web-1",
    side: Direction = "outbound",
    limits: HopLimits = LIMITS,
    secret: bytes = SECRET,
) -> HopTokens:
    return HopTokens(side, ProxyName("west", "default", pod), secret, limits)


def pass_through(
    place: HopTokens, field: bytes, request: tuple[bytes, bytes, bytes] = REQUEST
) -> bytes | Loop:
    """What a proxy does with a request that came with `field`."""
    token = place.token(*request)
    if not field:
        return place.with_name(token)
    return place.check(field, token) or place.append(field, token)


def round_and_round(*places: HopTokens, first: bytes = b"") -> tuple[int, Loop]:
    """(how many proxies have forwarded the request, the verdict that ended it)"""
    field, passed = first, 0
    while True:
        for place in places:
            found = pass_through(place, field)
            if isinstance(found, Loop):
                return passed, found
            field, passed = found, passed + 1


# Returns...


@pytest.mark.parametrize("returns", [0, 1, 2, 5])
def test_the_same_request_may_come_back_as_often_as_configured_and_no_more(returns: int) -> None:
    passed, loop = round_and_round(hop_tokens(limits=HopLimits(returns, 64)))
    assert passed == returns + 1
    assert loop.kind == "request"
    assert loop.cycle == "west/web-1 -> west/web-1"
    assert loop.cycle in loop.words


def test_the_cycle_is_once_round_in_the_order_of_the_way() -> None:
    sides = [
        hop_tokens(pod, side) for pod in ("web-1", "shop-7") for side in ("inbound", "outbound")
    ]
    _, loop = round_and_round(*sides)
    assert loop.cycle == "west/web-1 -> west/shop-7 -> west/web-1"


def test_a_gateway_refuses_at_the_first_return_and_names_the_clusters() -> None:
    gateways = HopLimits(0, 64)
    west = HopTokens("gateway", ProxyName("west", "isthmus", "gateway"), SECRET, gateways)
    east = HopTokens(
        "gateway",
        ProxyName("east", "isthmus", "gateway"),
        b"another secret of 32 bytes or so",
        gateways,
    )
    passed, loop = round_and_round(hop_tokens(), east, west)
    assert passed == 4
    assert loop.cycle == "east/gateway -> west/gateway -> west/web-1 -> east/gateway"


def test_hops_before_the_cycle_are_not_a_part_of_it() -> None:
    before = pass_through(hop_tokens("client"), b"")
    assert isinstance(before, bytes)
    _, loop = round_and_round(hop_tokens("web-1"), hop_tokens("shop-7"), first=before)
    assert "client" not in loop.cycle


@pytest.mark.parametrize(
    "other",
    [
        (b"POST", *REQUEST[1:]),
        (b"GET", b"/items?page=3", b"shop:8080"),
        (b"GET", b"/items?page=2", b"stock:8080"),
    ],
    ids=["method", "target", "authority"],
)
def test_another_request_is_not_a_return(other: tuple[bytes, bytes, bytes]) -> None:
    place, field = hop_tokens(limits=HopLimits(0, 64)), b""
    for request in (REQUEST, other):
        found = pass_through(place, field, request)
        assert isinstance(found, bytes)
        field = found


def test_parts_of_a_request_do_not_run_into_each_other() -> None:
    place = hop_tokens()
    assert place.token(b"GET", b"/a", b"b") != place.token(b"GET", b"/", b"ab")
    assert place.token(b"GE", b"T/a", b"b") != place.token(b"GET", b"/a", b"b")


def test_the_two_sides_of_a_proxy_are_two_places() -> None:
    inside = HopLimits(0, 64)
    field = pass_through(hop_tokens(side="inbound", limits=inside), b"")
    assert isinstance(field, bytes)
    assert isinstance(pass_through(hop_tokens(side="outbound", limits=inside), field), bytes)


def test_the_two_sides_of_a_proxy_are_one_stop_of_a_cycle() -> None:
    limits = HopLimits(0, 64)
    a, b = hop_tokens("a", limits=limits), hop_tokens("b", limits=limits)
    into_b = hop_tokens("b", "inbound", limits=limits)
    assert round_and_round(a, into_b, b)[1].cycle == "west/a -> west/b -> west/a"
    assert round_and_round(b, a, into_b)[1].cycle == "west/b -> west/a -> west/b"


def test_the_first_hop_is_the_one_without_a_token_of_its_own_before_it() -> None:
    place = hop_tokens()
    field = pass_through(place, b"")
    assert isinstance(field, bytes)
    assert place.is_first_hop(field)
    assert not place.is_first_hop(place.append(field, place.token(*REQUEST)))


def test_a_token_from_outside_is_recognised_when_the_request_comes_back_from_inside() -> None:
    place = hop_tokens(side="inbound", limits=HopLimits(0, 64))
    field = mark_outside(place.token(*REQUEST))
    assert isinstance(pass_through(place, field), Loop)


@pytest.mark.parametrize("hops", [4, 16, 255])
def test_a_request_that_changes_on_each_round_ends_at_the_hop_limit(hops: int) -> None:
    place, field, passed = hop_tokens(limits=HopLimits(0, hops)), b"", 0
    while True:
        found = pass_through(place, field, (b"GET", b"/" + b"x" * passed, b"shop"))
        if isinstance(found, Loop):
            break
        field, passed = found, passed + 1
    assert passed == hops
    assert found.kind == "hops"
    assert "loops.max_hops" in found.words


def test_long_cycles_are_abbreviated() -> None:
    field, found = b"", None
    for number in range(40):
        found = pass_through(hop_tokens(f"pod-{number}", limits=HopLimits(0, 32)), field)
        if isinstance(found, Loop):
            break
        field = found
    assert isinstance(found, Loop)
    assert "more)" in found.words
    assert len(found.cycle.split(" -> ")) < 12


# Names...


def test_without_names_the_cycle_is_still_recognised_and_ourselves_are_named() -> None:
    field, round_ = b"", (hop_tokens("web-1", limits=HopLimits(0, 64)), hop_tokens("shop-7"))
    for place in round_:
        found = pass_through(place, field)
        assert isinstance(found, bytes)
        field = strip_names(found)
    assert b":" not in field
    found = pass_through(round_[0], field)
    assert isinstance(found, Loop)
    assert found.cycle == "west/web-1 -> ? -> west/web-1"


def test_a_field_that_grows_too_long_loses_its_names_and_not_its_tokens() -> None:
    field = b""
    for number in range(60):
        found = pass_through(
            hop_tokens(f"pod-{number}-" + "n" * 80, limits=HopLimits(0, 64)), field
        )
        assert isinstance(found, bytes)
        assert len(found) <= LONGEST_NAMED
        field = found
    assert field.count(b",") == 59


@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=80))
def test_whatever_a_pod_is_called_its_token_is_of_the_grammar(
    cluster: str, namespace: str, pod: str
) -> None:
    place = HopTokens("inbound", ProxyName(cluster, namespace, pod), SECRET, LIMITS)
    assert GRAMMAR.fullmatch(place.with_name(place.token(*REQUEST)))


def test_who_was_outside_is_remembered() -> None:
    place = hop_tokens(side="inbound")
    assert not from_outside(place.with_name(place.token(*REQUEST)))
    assert from_outside(mark_outside(place.token(*REQUEST)))
    assert from_outside(place.append(mark_outside(place.token(*REQUEST)), place.token(*REQUEST)))


# Trust...


@pytest.mark.parametrize("field", [b"", b"o" + b"A" * 16])
def test_no_token_is_a_return_without_the_secret(field: bytes) -> None:
    place = hop_tokens(limits=HopLimits(0, 64))
    stranger = hop_tokens(limits=HopLimits(0, 64), secret=b"x" * 32)
    forged = stranger.token(*REQUEST)
    assert forged[1:9] != place.token(*REQUEST)[1:9]
    assert forged[9:] != place.token(*REQUEST)[9:]
    assert isinstance(pass_through(place, b", ".join(filter(None, [field, forged]))), bytes)


def test_a_token_of_another_request_is_useless() -> None:
    place = hop_tokens(limits=HopLimits(0, 64))
    stolen = place.token(b"GET", b"/", b"shop")
    assert isinstance(pass_through(place, stolen, (b"GET", b"/login", b"shop")), bytes)


@pytest.mark.parametrize(
    ("lines", "kept", "why"),
    [
        ([b"o" + b"A" * 16], 1, ""),
        ([b"o" + b"A" * 16 + b":west/web-1, g" + b"B" * 16], 2, ""),
        ([b"o" + b"A" * 16, b"\ti" + b"B" * 16 + b" ,, "], 2, ""),
        ([b""], 0, ""),
        ([b"x" + b"A" * 16], 0, "malformed"),
        ([b"o" + b"A" * 15], 0, "malformed"),
        ([b"o" + b"A" * 16 + b":west"], 0, "malformed"),
        ([b"o" + b"A" * 16 + b":west/" + b"n" * 64], 0, "malformed"),
        ([b"o" + b"A" * 16 + b":<script>/x, i" + b"B" * 16], 1, "malformed"),
        ([b"o" + b"A" * 16 + b";q=1"], 0, "malformed"),
        ([b"\xff" * 40], 0, "malformed"),
        ([b"o" + b"A" * (LONGEST + 1)], 0, "oversized"),
        ([b"o" + b"A" * 16] * (LONGEST // 17 + 1), 0, "oversized"),
    ],
)
def test_invalid_tokens_are_dropped_and_valid_ones_kept(
    lines: list[bytes], kept: int, why: str
) -> None:
    field, dropped = read(lines)
    assert dropped == why
    assert len(field.split(b", ")) == kept if kept else field == b""


MEMBERS = st.lists(
    st.one_of(st.binary(max_size=60), st.from_regex(GRAMMAR, fullmatch=True)), max_size=6
)


@given(MEMBERS, st.sampled_from([b",", b", ", b" "]))
def test_anything_may_stand_in_the_field(members: list[bytes], separator: bytes) -> None:
    field, _ = read([separator.join(members)])
    assert all(GRAMMAR.fullmatch(hop) for hop in field.split(b", ")) if field else True
    place = hop_tokens()
    found = pass_through(place, field)
    if isinstance(found, bytes):
        assert read([found]) == (found, ""), "the forwarded field follows the grammar"
    else:
        assert found.words.isascii()
    assert b":" not in strip_names(field)


# Paths through a mesh...


@dataclass(frozen=True)
class Topology:
    """Applications that forward to others, each with a sidecar or behind a gateway. `routes[n]`:
    where node n forwards its requests, and whether it changes the path; None: it responds."""

    routes: tuple[tuple[int, bool] | None, ...]
    gateways: frozenset[int]

    def cyclic(self, start: int) -> bool:
        seen, node = set(), start
        while (route := self.routes[node]) is not None:
            if node in seen:
                return True
            seen.add(node)
            node = route[0]
        return False

    def length(self) -> int:
        return 2 * len(self.routes)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    count = draw(st.integers(1, 9))
    nodes = st.integers(0, count - 1)
    routes = tuple(
        draw(st.one_of(st.none(), st.tuples(nodes, st.booleans()))) for _ in range(count)
    )
    return Topology(routes, frozenset(draw(st.sets(nodes, max_size=3))))


def sent(
    topology: Topology, start: int, max_returns: int, max_hops: int
) -> tuple[int, Loop | None]:
    """Send a request into a topology whose applications copy the field: (proxies that it has
    passed, the verdict against it)."""
    sides: dict[tuple[int, Direction], HopTokens] = {}
    for node in range(len(topology.routes)):
        who = ProxyName("west", "default", f"pod-{node}")
        for side in ("inbound", "outbound", "gateway"):
            limits = HopLimits(0 if side == "gateway" else max_returns, max_hops)
            sides[node, side] = HopTokens(
                side, who, b"secret of node %d, or so......" % node, limits
            )
    field, path, node, passed = b"", b"/", start, 0
    while True:
        route = topology.routes[node]
        ways: tuple[Direction, ...] = (
            ("gateway",)
            if node in topology.gateways
            else ("inbound", "outbound")
            if route
            else ("inbound",)
        )
        for side in ways:
            found = pass_through(sides[node, side], field, (b"GET", path, b"svc"))
            if isinstance(found, Loop):
                return passed, found
            field, passed = found, passed + 1
        if route is None:
            return passed, None
        node = route[0]
        path += b"x" if route[1] else b""
        assert passed <= max_hops, "nothing ends it"


@settings(max_examples=200)
@given(topologies(), st.integers(0, 5), st.integers(18, 40))
def test_every_request_ends_within_the_hop_limit_and_is_refused_only_in_a_cycle(
    topology: Topology, returns: int, hops: int
) -> None:
    for start in range(len(topology.routes)):
        passed, loop = sent(topology, start, returns, hops)
        assert passed <= hops
        assert (loop is not None) == topology.cyclic(start)
        if loop is not None and loop.kind == "request":
            stops = loop.cycle.split(" -> ")
            assert stops[0] == stops[-1]
            edges = {
                (f"west/pod-{node}", f"west/pod-{route[0]}")
                for node, route in enumerate(topology.routes)
                if route
            }
            if not any("more" in stop for stop in stops):
                assert set(pairwise(stops)) <= edges, "the reported cycle is one of the topology"
