"""Loops that only `Forwarded` shows: a gateway that occurs there more often than an application may
call back, for the same host.

Rules: others' hops, other clusters' gateways and other hosts never count. The field never raises,
whatever it contains, and is shown only if it is harmless."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopguard import Loop
from loopguard.forwarded_loops import check_forwarded

OWN = (b"_east.gateway.isthmus.sa.cluster.local", b"pong.default.svc.cluster.local")
BACK = (b"_west.gateway.isthmus.sa.cluster.local", b"ping.default.svc.cluster.local")
NAME = "east/gateway"


@pytest.mark.parametrize("returns", [0, 1, 4])
def test_it_may_stand_there_as_often_as_configured_and_no_more(returns: int) -> None:
    way: list[tuple[bytes, bytes]] = []
    while not isinstance(loop := check_forwarded(way, OWN, NAME, returns), Loop):
        way += [OWN, BACK]
    assert len(way) == 2 * (returns + 1)
    assert loop.kind == "forwarded"
    assert loop.cycle == "east/gateway -> west.gateway.isthmus.sa.cluster.local -> east/gateway"
    assert loop.words.endswith(loop.cycle)


def test_case_is_nothing() -> None:
    assert check_forwarded([(OWN[0].upper(), OWN[1].title())], OWN, NAME, 0) is not None


@pytest.mark.parametrize(
    "other",
    [
        (BACK[0], OWN[1]),
        (OWN[0], b"shop"),
        (b"", OWN[1]),
        (OWN[0], b""),
        (b"_gateway.isthmus.sa.cluster.local", OWN[1]),
    ],
    ids=["another-cluster", "another-host", "no-by", "no-host", "no-cluster"],
)
def test_other_hops_and_other_hosts_do_not_count(
    other: tuple[bytes, bytes],
) -> None:
    assert check_forwarded([other] * 100, OWN, NAME, 0) is None


def test_adjacent_hops_of_one_place_are_one_stop_and_ours_for_another_host_is_the_last() -> None:
    loop = check_forwarded([OWN, BACK, BACK, (OWN[0], BACK[1])], OWN, NAME, 0)
    assert loop is not None
    assert loop.cycle == "east/gateway -> west.gateway.isthmus.sa.cluster.local -> east/gateway"


@pytest.mark.parametrize("by", [b"192.0.2.1", b'_a" b', b"\xff", b"", b"_", b"_" + b"a" * 400])
def test_names_with_unsafe_characters_are_not_shown(by: bytes) -> None:
    loop = check_forwarded([OWN, (by, b"x")], OWN, NAME, 0)
    assert loop is not None
    assert loop.cycle == "east/gateway -> ? -> east/gateway"


hops = st.sampled_from([OWN, BACK, (OWN[0], BACK[1]), (BACK[0], OWN[1])]) | st.tuples(
    st.binary(max_size=20), st.binary(max_size=20)
)


@settings(max_examples=200)
@given(st.lists(hops, max_size=60), st.integers(0, 5))
def test_exactly_the_number_of_own_hops_for_the_host_decides(
    way: list[tuple[bytes, bytes]], returns: int
) -> None:
    loop = check_forwarded(way, OWN, NAME, returns)
    assert (loop is not None) == (way.count(OWN) > returns)
    if loop is not None:
        assert re.fullmatch(r"[-A-Za-z0-9._/?> ()]+", loop.cycle)
        stops = loop.cycle.split(" -> ")
        assert stops[0] == stops[-1] == NAME
        assert len(stops) <= 9
