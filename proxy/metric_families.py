"""Metric families: declared once, counted as plain numbers, and read as samples by Prometheus.

A counter of prometheus_client takes a lock and checks its arguments for each increment. Requests
and connections would make some twenty of them (docs/decisions/10-prometheus-client.md). So this
module holds the numbers, and prometheus_client does the rest: it reads `Families.registry`, and
writes the text format.

The family (`Counter`, `Gauge`, `Histogram`) has a name, a help text and label names. A series
belongs to one combination of label values. It exists from its first lookup; a family without labels
has its only series from the start. A family counts new series beyond `MOST_SERIES` as "other".

Threads: only one thread may change a series, or the threads share a lock. Any thread may create
series, and read them: copying a dict or a list is one atomic step of the interpreter.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_SERIES = 256

# How the values of several processes become that of one proxy. "first": the smallest value that is
# not 0; times use it, and 0 means none.
Merge = Literal["sum", "max", "first"]


class Series:
    """One number of a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """For a gauge, `amount` may be negative."""
        self.value += amount

    def set(self, value: float) -> None:
        """The current value of a gauge, or of a count that is kept elsewhere."""
        self.value = value


class HistogramSeries:
    """The counts of one histogram."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # by bucket; the last one has no bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Family:
    """A counter or a gauge."""

    __slots__ = ("_other", "_series", "kind", "labels", "name", "text")

    def __init__(
        self, kind: Literal["counter", "gauge"], name: str, text: str, labels: tuple[str, ...]
    ) -> None:
        self.kind = kind
        self.name = name
        self.text = text
        self.labels = labels
        self._other = ("other",) * len(labels)
        self._series: dict[tuple[str, ...], Series] = {}
        if not labels:
            self.at()

    def at(self, *values: str) -> Series:
        """The series with these label values, in the order of the label names."""
        found = self._series.get(values)
        return found if found is not None else self._create(values)

    def _create(self, values: tuple[str, ...]) -> Series:
        place = values if len(self._series) < MOST_SERIES else self._other
        return self._series.setdefault(place, Series())

    def replace(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Replace all series. The caller limits their number."""
        new: dict[tuple[str, ...], Series] = {}
        for labels, value in values.items():
            new[labels] = series = Series()
            series.value = value
        self._series = new

    def describe(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The family without its series, for the registry."""
        family = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        yield family(self.name, self.text, labels=self.labels)

    def collect(self) -> Iterator[Metric]:
        """The family with its series, for the registry."""
        for found in self.describe():
            for values, series in list(self._series.items()):
                found.add_metric(values, series.value)
            yield found


class HistogramFamily:
    """A histogram. `bounds`: the upper bounds of its buckets, ascending; +Inf is added."""

    __slots__ = ("_bounds", "_names", "_other", "_series", "kind", "labels", "name", "text")

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], labels: tuple[str, ...]
    ) -> None:
        self.kind = "histogram"
        self.name = name
        self.text = text
        self.labels = labels
        self._bounds = bounds
        self._names = [*map(floatToGoString, bounds), "+Inf"]
        self._other = ("other",) * len(labels)
        self._series: dict[tuple[str, ...], HistogramSeries] = {}
        if not labels:
            self.at()

    def at(self, *values: str) -> HistogramSeries:
        """The series with these label values, in the order of the label names."""
        found = self._series.get(values)
        return found if found is not None else self._create(values)

    def _create(self, values: tuple[str, ...]) -> HistogramSeries:
        place = values if len(self._series) < MOST_SERIES else self._other
        return self._series.setdefault(place, HistogramSeries(self._bounds))

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """The family without its series, for the registry."""
        yield HistogramMetricFamily(self.name, self.text, labels=self.labels)

    def collect(self) -> Iterator[Metric]:
        """The family with its series, for the registry."""
        for found in self.describe():
            for values, series in list(self._series.items()):
                buckets = zip(self._names, accumulate(list(series.counts)), strict=True)
                found.add_metric(values, list(buckets), series.total)
            yield found


class Families:
    """Declares the families of one process, or of one proxy in a test. `declared`: all of them.
    `registry` is that of prometheus_client, and not the global one. `rules`: how to merge the
    families that are not added, by the names that the registry gives them.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.registry = CollectorRegistry()
        self.declared: list[Family | HistogramFamily] = []
        self.rules: dict[str, Merge] = {}

    def counter(self, name: str, text: str, *labels: str) -> Family:
        """Raises ValueError if `name` does not end in `_total`: the text would differ from it."""
        if not name.endswith("_total"):
            raise ValueError(f"the counter {name} must end in _total")
        return self._family("counter", name, text, labels)

    def gauge(self, name: str, text: str, *labels: str, merge: Merge = "sum") -> Family:
        if merge != "sum":
            self.rules[self._prefix + name] = merge
        return self._family("gauge", name, text, labels)

    def _family(
        self, kind: Literal["counter", "gauge"], name: str, text: str, labels: tuple[str, ...]
    ) -> Family:
        family = Family(kind, self._prefix + name, text, labels)
        self.declared.append(family)
        self.registry.register(family)
        return family

    def histogram(
        self, name: str, text: str, bounds: Sequence[float], *labels: str
    ) -> HistogramFamily:
        family = HistogramFamily(self._prefix + name, text, bounds, labels)
        self.declared.append(family)
        self.registry.register(family)
        return family

    def render(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4 (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)
