"""Per-connection counters: plain numbers, converted to Prometheus samples when a scrape reads them.

A counter of prometheus_client takes a lock and checks its arguments for each increment, and one
connection makes twenty increments: 6 us in all. Only the data path's thread changes the counters
here, so an entry in a dict is enough (2 us). Other threads may read them, because copying the dict
is one atomic step of the interpreter. As in every family, new series beyond `MOST_SERIES` are
counted as "other".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

MOST_SERIES = 256


class DataPathCounter(Collector):
    """A family of counters or gauges by label values. A series exists from its first `add`, even of
    0.
    """

    __slots__ = ("_family", "_labels", "_numbers", "_other", "_text")

    def __init__(
        self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        """A name that ends in `_total` makes a counter, any other name a gauge."""
        self._family = f"isthmus_{name}"
        self._text = text
        self._labels = labels
        self._other = ("other",) * len(labels)
        self._numbers: dict[tuple[str, ...], int] = {}
        registry.register(self)

    def add(self, values: tuple[str, ...], amount: int = 1) -> None:
        """For a gauge, `amount` may be negative."""
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
        # one atomic copy: other threads read this too
        for values, number in list(self._numbers.items()):
            found.add_metric(values, number)
        yield found


class DataPathHistogram(Collector):
    """A histogram with one label. `bounds`: the upper bounds of its buckets, ascending; +Inf is
    added.
    """

    __slots__ = ("_bounds", "_buckets", "_family", "_label", "_sums", "_text")

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], label: str, registry: CollectorRegistry
    ) -> None:
        self._family = f"isthmus_{name}"
        self._text = text
        self._bounds = bounds
        self._label = label
        self._buckets: dict[str, list[int]] = {}  # by label value: the count of each bucket
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, value: str, number: float) -> None:
        """`value` is the label's value; it must come from a small set."""
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
            found.add_metric(
                (value,),
                list(zip(names, accumulate(list(buckets)), strict=True)),
                self._sums[value],
            )
        yield found
