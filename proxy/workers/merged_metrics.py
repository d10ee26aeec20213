"""The metrics of several workers, merged into those of one proxy.

A worker's *reading* is all of its samples at one moment. Counters and histograms of the workers are
added. A gauge is a current value, so each has its own rule, which its declaration states.
Connections are added. The certificate expiry is the earliest one. Values that all workers share
(virtual addresses, a failover) are not added.

A counter that decreases looks like a restart and breaks rates in graphs. So when a worker has
ended, its last reading stays: its counters are added to those of all former workers, its gauges are
dropped. Counts after its last reading are lost, but a total never decreases.

Pure: readings in, text out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import add

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from proxy.metric_families import Merge


def _first(one: float, two: float) -> float:
    """The earlier of two times; 0 means none."""
    return min(one, two) or max(one, two)


_FUNCTIONS: Mapping[Merge, Callable[[float, float], float]] = {
    "sum": add,
    "max": max,
    "first": _first,
}
_ACCUMULATED = frozenset({"counter", "histogram"})

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels, float]


class MetricSamples(msgspec.Struct, array_like=True):
    """A metric with all its samples."""

    name: str
    type: str
    text: str
    samples: list[Sample]


Reading = list[MetricSamples]


def reading(registry: CollectorRegistry) -> Reading:
    """All samples that a registry holds now."""
    return [
        MetricSamples(
            found.name,
            found.type,
            found.documentation,
            [(one.name, tuple(one.labels.items()), one.value) for one in found.samples],
        )
        for found in registry.collect()
    ]


class MergedMetrics:
    """The current readings by worker, and the counters of workers that have ended. `rules`: how to
    merge the families that are not added, by their names (proxy/metric_families.py).
    """

    def __init__(self, rules: Mapping[str, Merge]) -> None:
        self._rules = rules
        self._now: dict[int, Reading] = {}
        self._gone: Reading = []

    def take(self, place: int, new: Reading) -> None:
        """Store the newest reading of the worker at this place."""
        self._now[place] = new

    def gone(self, place: int) -> None:
        """Keep the counters of a worker that has ended; its successor starts at zero."""
        last = self._now.pop(place, [])
        self._gone = list(
            self._merged([self._gone, [family for family in last if family.type in _ACCUMULATED]])
        )

    def render(self, own: Reading) -> bytes:
        """All readings and `own` merged, in Prometheus' text format 0.0.4."""
        return generate_latest(
            _Text(list(self._merged([own, *list(self._now.values()), self._gone])))
        )

    def _merged(self, readings: Iterable[Reading]) -> Iterator[MetricSamples]:
        """One family per name, in the order of first appearance."""
        found: dict[str, tuple[MetricSamples, dict[tuple[str, Labels], float]]] = {}
        for one in readings:
            for family in one:
                _, values = found.setdefault(family.name, (family, {}))
                rule: Merge = self._rules.get(family.name, "sum")
                merge = _FUNCTIONS[rule]
                for name, labels, value in family.samples:
                    key = name, labels
                    values[key] = merge(values[key], value) if key in values else value
        for family, values in found.values():
            yield MetricSamples(
                family.name,
                family.type,
                family.text,
                [(*key, value) for key, value in values.items()],
            )


class _Text:
    """The part of a registry's interface that prometheus_client uses for rendering."""

    def __init__(self, families: Reading) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.text, family.type)
            for name, labels, value in family.samples:
                metric.add_sample(name, dict(labels), value)
            yield metric
