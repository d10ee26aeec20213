"""The metrics of the control plane. They are read from the parts' counters on each scrape."""

from __future__ import annotations

from collections.abc import Iterator

import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from control.discovery.discovery import Discovery
from control.kube.client import Client
from control.kube.leases import Election
from control.kube.recorder import Recorder

PREFIX = "isthmus_control_"


class _Parts:
    """A collector of prometheus_client."""

    def __init__(
        self, discovery: Discovery, election: Election, recorder: Recorder, client: Client
    ) -> None:
        self._discovery = discovery
        self._election = election
        self._recorder = recorder
        self._client = client

    def collect(self) -> Iterator[Metric]:
        yield from self._reflectors()
        catalog = self._discovery.catalog
        for name, text, value in (
            ("services", "Services that proxies are told of", len(catalog.services)),
            ("meshed_addresses", "Addresses of pods that have a sidecar", len(catalog.pods)),
            (
                "services_with_problems",
                "Services of which something is not used",
                len(catalog.problems),
            ),
            ("leading", "Whether this replica is the leader", int(self._election.leading)),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, value in (
            ("api_requests", "Requests to the API server", self._client.requests),
            ("api_refusals", "Requests that it has answered by an error", self._client.refusals),
            ("events_written", "Events of Kubernetes that were written", self._recorder.written),
            ("events_dropped", "Events of Kubernetes that were not", self._recorder.dropped),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)

    def _reflectors(self) -> Iterator[Metric]:
        now = trio.current_time()
        objects = GaugeMetricFamily(
            PREFIX + "objects", "Objects that are known", labels=["resource"]
        )
        synced = GaugeMetricFamily(
            PREFIX + "synced", "Whether a list was complete once", labels=["resource"]
        )
        silence = GaugeMetricFamily(
            PREFIX + "silence_seconds",
            "Since the API server last said something",
            labels=["resource"],
        )
        counted = CounterMetricFamily(
            PREFIX + "watch", "What has happened to a watch", labels=["resource", "what"]
        )
        for reflector in self._discovery.reflectors:
            name, counts = [reflector.resource.plural], reflector.counts
            objects.add_metric(name, len(reflector.known))
            synced.add_metric(name, int(reflector.synced.is_set()))
            if reflector.synced.is_set():
                silence.add_metric(name, max(0.0, now - reflector.heard))
            for what in ("lists", "watches", "events", "failures", "relists"):
                counted.add_metric([*name, what], getattr(counts, what))
        yield from (objects, synced, silence, counted)


def render(discovery: Discovery, election: Election, recorder: Recorder, client: Client) -> bytes:
    """All metrics in the Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Parts(discovery, election, recorder, client))
    return generate_latest(registry)
