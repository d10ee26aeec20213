"""The metrics of the control plane. They are read from the parts' counters on each scrape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from control.channel.server import Channel, ChannelCounts
from control.discovery.discovery import Discovery
from control.kube.client import Client
from control.kube.leases import Election
from control.kube.recorder import Recorder

PREFIX = "isthmus_control_"


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the process whose counters are read."""

    discovery: Discovery
    election: Election
    recorder: Recorder
    client: Client
    channel: Channel | None = None


class _Collector:
    """A collector of prometheus_client."""

    def __init__(self, parts: Parts) -> None:
        self._discovery = parts.discovery
        self._election = parts.election
        self._recorder = parts.recorder
        self._client = parts.client
        self._channel = parts.channel

    def collect(self) -> Iterator[Metric]:
        yield from self._reflectors()
        yield from self._proxies(self._channel)
        catalog = self._discovery.catalog
        for name, text, value in (
            ("services", "Services in the directory", len(catalog.services)),
            ("meshed_addresses", "Addresses of pods that have a sidecar", len(catalog.pods)),
            (
                "services_with_problems",
                "Services with a problem, such as a refused endpoint",
                len(catalog.problems),
            ),
            ("leading", "Whether this replica is the leader", int(self._election.leading)),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, value in (
            ("api_requests", "Requests to the API server", self._client.requests),
            (
                "api_refusals",
                "Requests that the API server answered with an error",
                self._client.refusals,
            ),
            ("events_written", "Kubernetes events that were written", self._recorder.written),
            (
                "events_dropped",
                "Kubernetes events that were dropped or could not be written",
                self._recorder.dropped,
            ),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)

    @staticmethod
    def _proxies(channel: Channel | None) -> Iterator[Metric]:
        """All zero if there is no listener for proxies."""
        counts = channel.counts if channel is not None else ChannelCounts()
        views = channel.views if channel is not None else None
        open_, subscriptions, updates = (
            (channel.connections, channel.subscriptions, channel.updates)
            if channel is not None
            else (0, 0, 0)
        )
        for name, text, value in (
            ("proxies", "Proxies that are connected", open_),
            ("subscriptions", "Entries that proxies follow, for each proxy", subscriptions),
            ("topics", "Different entries that proxies follow", len(views.topics) if views else 0),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, value in (
            ("proxies_accepted", "Connections of proxies that were accepted", counts.accepted),
            ("updates", "Entries that were sent to proxies", updates),
            (
                "contents_computed",
                "Contents that were computed and encoded",
                views.computed if views else 0,
            ),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        ended = CounterMetricFamily(
            PREFIX + "proxies_ended", "Connections of proxies that have ended", labels=["reason"]
        )
        for reason, count in counts.ended.items():
            ended.add_metric([reason], count)
        yield ended

    def _reflectors(self) -> Iterator[Metric]:
        now = trio.current_time()
        objects = GaugeMetricFamily(PREFIX + "objects", "Known objects", labels=["resource"])
        synced = GaugeMetricFamily(
            PREFIX + "synced", "Whether a list was complete once", labels=["resource"]
        )
        silence = GaugeMetricFamily(
            PREFIX + "silence_seconds",
            "Seconds since the API server last sent data",
            labels=["resource"],
        )
        counted = CounterMetricFamily(
            PREFIX + "watch",
            "Lists, watches, events, failures and relists",
            labels=["resource", "what"],
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


def render(parts: Parts) -> bytes:
    """All metrics in the Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(parts))
    return generate_latest(registry)
