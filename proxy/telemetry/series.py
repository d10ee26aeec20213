"""The children of a Prometheus family, looked up once."""

from __future__ import annotations

from typing import Generic, TypeVar

from prometheus_client import Counter, Gauge, Histogram

from proxy.telemetry.counters import MOST_SERIES

_Child = TypeVar("_Child", Counter, Gauge, Histogram)


class Series(Generic[_Child]):
    """The children of one family by label values, looked up once and cached. New ones beyond
    `MOST_SERIES` become "other".
    """

    def __init__(self, family: _Child, labels: int) -> None:
        self._family: _Child = family
        self._other = ("other",) * labels
        self._children: dict[tuple[str, ...], _Child] = {}

    def at(self, *values: str) -> _Child:
        child = self._children.get(values)
        if child is None:
            if len(self._children) >= MOST_SERIES and values != self._other:
                return self.at(*self._other)
            child = self._children[values] = (
                self._family.labels(*values) if values else self._family
            )
        return child
