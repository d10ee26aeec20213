"""What several workers have counted, as one proxy's metrics.

A worker's *reading* is all of its samples at one moment. Counters and histograms of the workers are added. A gauge is what is true now, so
each has a rule of its own: connections are added, a certificate ends when the first of them does, and what all workers know alike (the
virtual addresses, a failover) is not counted several times.

A counter that goes backwards reads as a restart, and takes the rates of everybody's graphs along. So a worker's last reading stays when
the worker is gone: its counters are kept with those of all who went before, and its gauges are forgotten. What it counted after its last
reading is lost; a total is never below one that was told before.

Pure: readings in, text out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric


def _first(one: float, two: float) -> float:
    """The earlier moment; 0 is none."""
    return min(one, two) or max(one, two)


# Of the gauges that are not simply added.
RULES: Mapping[str, Callable[[float, float], float]] = {
    "isthmus_build_info": max,
    "isthmus_endpoint_broken": max,  # as the next
    "isthmus_failover_active": max,  # every worker judges for itself: one of them sends requests away
    "isthmus_virtual_addresses": max,  # made from names: the same in all
    "isthmus_former_identities": max,  # of one file: the same in all
    "isthmus_certificate_expiry_timestamp_seconds": _first,  # one that could not read the new certificate is the one to hear of
    "isthmus_certificate_start_timestamp_seconds": max,
    "isthmus_root_expiry_timestamp_seconds": _first,
    "process_start_time_seconds": _first,
}
_ACCUMULATED = frozenset({"counter", "histogram"})

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels, float]


class Family(msgspec.Struct, array_like=True):
    """A metric with all its samples."""

    name: str
    type: str
    text: str
    samples: list[Sample]


Reading = list[Family]


def reading(registry: CollectorRegistry) -> Reading:
    """All that a registry holds now."""
    return [
        Family(found.name, found.type, found.documentation, [(one.name, tuple(one.labels.items()), one.value) for one in found.samples])
        for found in registry.collect()
    ]


class Totals:
    """The readings of the workers, each in its place, and what is left of those that are gone."""

    def __init__(self) -> None:
        self._now: dict[int, Reading] = {}
        self._gone: Reading = []

    def take(self, place: int, new: Reading) -> None:
        """The newest reading of the worker at this place."""
        self._now[place] = new

    def gone(self, place: int) -> None:
        """The worker at this place has ended; the next one there begins at nothing."""
        last = self._now.pop(place, [])
        self._gone = list(_added([self._gone, [family for family in last if family.type in _ACCUMULATED]]))

    def render(self, own: Reading) -> bytes:
        """All together, and `own` with them, in Prometheus' text format 0.0.4."""
        return generate_latest(_Text(list(_added([own, *list(self._now.values()), self._gone]))))


def _added(readings: Iterable[Reading]) -> Iterator[Family]:
    """One family of each name, in the order in which they are first met."""
    found: dict[str, tuple[Family, dict[tuple[str, Labels], float]]] = {}
    for one in readings:
        for family in one:
            _, values = found.setdefault(family.name, (family, {}))
            rule = RULES.get(family.name)
            for name, labels, value in family.samples:
                key = name, labels
                if key not in values:
                    values[key] = value
                else:
                    values[key] = rule(values[key], value) if rule is not None else values[key] + value
    for family, values in found.values():
        yield Family(family.name, family.type, family.text, [(*key, value) for key, value in values.items()])


class _Text:
    """A registry as far as prometheus_client asks for one when it writes."""

    def __init__(self, families: Reading) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.text, family.type)
            for name, labels, value in family.samples:
                metric.add_sample(name, dict(labels), value)
            yield metric
