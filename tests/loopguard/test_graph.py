"""Loops of a graph: one cycle for each group of nodes that reach each other, the shortest one, and
none where there is none."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopguard.graph import cycles


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({}, []),
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"a": ["a"]}, [("a", "a")]),
        ({"b": ["a"], "a": ["b"]}, [("a", "b", "a")]),
        ({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}, []),
        ({"c": ["a"], "b": ["c"], "a": ["b"], "x": ["a"]}, [("a", "b", "c", "a")]),
        ({"a": ["b"], "b": ["c", "a"], "c": ["a"]}, [("a", "b", "a")]),
        (
            {"a": ["b"], "b": ["a"], "c": ["d"], "d": ["c"], "b2": ["a"]},
            [("a", "b", "a"), ("c", "d", "c")],
        ),
        ({"a": ["nowhere"]}, []),
    ],
)
def test_the_shortest_cycle_of_each_group(
    graph: dict[str, list[str]], found: list[tuple[str, ...]]
) -> None:
    assert cycles(graph) == found


_GRAPHS = st.dictionaries(
    st.sampled_from("abcdefg"), st.lists(st.sampled_from("abcdefg"), max_size=3), max_size=7
)


@given(_GRAPHS)
def test_each_result_is_a_cycle_and_no_cycle_is_missing(
    graph: dict[str, list[str]],
) -> None:
    found = cycles(graph)
    for cycle in found:
        assert cycle[0] == cycle[-1] == min(cycle)
        assert len(set(cycle)) == len(cycle) - 1
        assert all(after in graph[before] for before, after in itertools.pairwise(cycle))
    circular = _peeled(graph)
    assert bool(found) == bool(circular)
    assert {node for cycle in found for node in cycle} <= circular


def _peeled(graph: dict[str, list[str]]) -> set[str]:
    """The nodes that are left when nodes without a predecessor or without a successor are removed,
    repeatedly."""
    nodes = {*graph, *(child for nexts in graph.values() for child in nexts)}
    while True:
        kept = {
            n
            for n in nodes
            if set(graph.get(n, ())) & nodes and any(n in graph.get(other, ()) for other in nodes)
        }
        if kept == nodes:
            return nodes
        nodes = kept


def test_ten_thousand_in_a_row_are_no_matter() -> None:
    graph = {f"{n:05}": [f"{n + 1:05}"] for n in range(10_000)}
    assert cycles(graph) == []
    graph["10000"] = ["09999"]
    assert cycles(graph) == [("09999", "10000", "09999")]
