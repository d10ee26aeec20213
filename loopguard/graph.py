"""Loops in a configuration: traffic would go in a circle, and this is visible before it is sent.

The input is a graph: which node passes requests on to which. The result is its cycles: the shortest
one of each strongly connected component. Two cycles that touch are one mistake, and the shortest
cycle is the easiest to understand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping


def cycles(graph: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """Return the cycles of a graph, sorted. Each begins and ends with its smallest name.

    The time is linear in nodes and edges, except for components with cycles. There is no recursion,
    so the depth of the graph is not limited.
    """
    edges = {node: sorted(set(nexts)) for node, nexts in graph.items()}
    circular = (
        group
        for group in _components(edges)
        if len(group) > 1 or group[0] in edges.get(group[0], ())
    )
    return sorted(_shortest(edges, frozenset(group)) for group in circular)


def _components(edges: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """The strongly connected components, by Tarjan's algorithm with an explicit stack.

    Tarjan, "Depth-First Search and Linear Graph Algorithms", 1972.
    """
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    for root in sorted(edges):
        if root in order:
            continue
        walk: list[tuple[str, Iterator[str]]] = []
        node: str | None = root
        while node is not None or walk:
            if node is not None:
                order[node] = low[node] = len(order)
                path.append(node)
                on_path.add(node)
                walk.append((node, iter(edges.get(node, ()))))
            here, nexts = walk[-1]
            node = None
            for child in nexts:
                if child not in order:
                    node = child
                    break
                if child in on_path:
                    low[here] = min(low[here], order[child])
            if node is not None:
                continue
            walk.pop()
            if walk:
                low[walk[-1][0]] = min(low[walk[-1][0]], low[here])
            if low[here] == order[here]:
                group = [path.pop()]
                while group[-1] != here:
                    group.append(path.pop())
                on_path.difference_update(group)
                yield group


def _shortest(edges: Mapping[str, list[str]], group: frozenset[str]) -> tuple[str, ...]:
    """The shortest cycle of a component. If there are several, the smallest start node decides."""
    ring = min((_back_to(start, edges, group) for start in sorted(group)), key=len)[:-1]
    least = ring.index(min(ring))
    return (*ring[least:], *ring[:least], ring[least])


def _back_to(start: str, edges: Mapping[str, list[str]], group: frozenset[str]) -> tuple[str, ...]:
    """The shortest path from a node of a component back to itself, by breadth-first search."""
    came_from: dict[str, str] = {}
    queue = deque([start])
    while True:  # each node of a component leads back to itself
        node = queue.popleft()
        for child in edges.get(node, ()):
            if child == start:
                way = [start]
                while node != start:
                    way.append(node)
                    node = came_from[node]
                return (start, *reversed(way[1:]), start)
            if child in group and child not in came_from:
                came_from[child] = node
                queue.append(child)
