"""Loops that are written down: a configuration in which traffic would go round in a circle before any of it has been sent.

The facts are a graph: who passes requests on to whom. The verdict is its cycles: one for each group of nodes that can all reach each other
(a strongly connected component; two cycles that touch are one mistake), and of each group the shortest cycle, because that is the one
that a person can follow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping


def cycles(graph: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """The cycles of a graph, each with its first node repeated at the end, which begins with its least name. In the order of those.

    Takes time in proportion to nodes and edges, but for the groups that have cycles; uses no recursion, so it may be as deep as it likes.
    """
    edges = {node: sorted(set(nexts)) for node, nexts in graph.items()}
    circular = (group for group in _components(edges) if len(group) > 1 or group[0] in edges.get(group[0], ()))
    return sorted(_shortest(edges, frozenset(group)) for group in circular)


def _components(edges: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """The strongly connected components (Tarjan, "Depth-First Search and Linear Graph Algorithms", 1972), with a stack of our own."""
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
    """The shortest cycle within a group; of several, the one whose least name comes first."""
    ring = min((_back_to(start, edges, group) for start in sorted(group)), key=len)[:-1]
    least = ring.index(min(ring))
    return (*ring[least:], *ring[:least], ring[least])


def _back_to(start: str, edges: Mapping[str, list[str]], group: frozenset[str]) -> tuple[str, ...]:
    """The shortest way from a node of a group back to it, breadth first."""
    came_from: dict[str, str] = {}
    queue = deque([start])
    while queue:
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
    return (start, start)
