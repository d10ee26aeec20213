"""What is counted for each connection: plain numbers of our own, which become Prometheus' when it reads them.

A counter of prometheus_client takes a lock, and a check of what it is given, for each increment, and the books of a connection have twenty
of them: 6 us in all. These are changed by the data path's thread only, so an entry in a dict does (2 us). Other threads may read them,
since each copy is made in one step of the interpreter. As of every other family, past `MOST_SERIES` all new series are "other".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

MOST_SERIES = 256


class Tally(Collector):
    """A family of counters, or of gauges, by their label values. A series begins with the first that is added to it, be it 0."""

    __slots__ = ("_family", "_labels", "_numbers", "_other", "_text")

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        """A name that ends in `_total` is a counter's, any other one a gauge's."""
        self._family = f"isthmus_{name}"
        self._text = text
        self._labels = labels
        self._other = ("other",) * len(labels)
        self._numbers: dict[tuple[str, ...], int] = {}
        registry.register(self)

    def add(self, values: tuple[str, ...], amount: int = 1) -> None:
        """For a gauge, `amount` may be below 0."""
        try:
            self._numbers[values] += amount
        except KeyError:
            place = values if len(self._numbers) < MOST_SERIES else self._other
            self._numbers[place] = self._numbers.get(place, 0) + amount

    def describe(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The family without its series."""
        family = CounterMetricFamily if self._family.endswith("_total") else GaugeMetricFamily
        yield family(self._family, self._text, labels=self._labels)

    def collect(self) -> Iterator[Metric]:
        (found,) = self.describe()
        for values, number in list(self._numbers.items()):  # whole, in one step: other threads read this too
            found.add_metric(values, number)
        yield found


class Spread(Collector):
    """A histogram by one label. `bounds` of its buckets, in ascending order; above the last one there is one more."""

    __slots__ = ("_bounds", "_buckets", "_family", "_label", "_sums", "_text")

    def __init__(self, name: str, text: str, bounds: Sequence[float], label: str, registry: CollectorRegistry) -> None:
        self._family = f"isthmus_{name}"
        self._text = text
        self._bounds = bounds
        self._label = label
        self._buckets: dict[str, list[int]] = {}  # of each value, how many fell into each
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, value: str, number: float) -> None:
        """`value`, of the label, is one of few."""
        buckets = self._buckets.get(value)
        if buckets is None:
            buckets = self._buckets[value] = [0] * (len(self._bounds) + 1)
            self._sums[value] = 0.0
        buckets[bisect_left(self._bounds, number)] += 1
        self._sums[value] += number

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """The family without its series."""
        yield HistogramMetricFamily(self._family, self._text, labels=(self._label,))

    def collect(self) -> Iterator[Metric]:
        (found,) = self.describe()
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for value, buckets in list(self._buckets.items()):
            found.add_metric((value,), list(zip(names, accumulate(list(buckets)), strict=True)), self._sums[value])
        yield found
