"""The metrics of the control plane. They are read from the parts' counters on each scrape."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from control.channel.server import Channel
from control.discovery.discovery import Discovery
from control.identity.authority import Authority
from control.identity.service import IssuingService
from control.kube.client import Client
from control.kube.event_recorder import EventRecorder
from control.kube.leader_election import Election
from proxy.metric_families import Families


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the process whose counters are read."""

    discovery: Discovery
    election: Election
    recorder: EventRecorder
    client: Client
    channel: Channel | None = None
    issuing: IssuingService | None = None


class Metrics:
    """All metric families of one control plane."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._families = families = Families("isthmus_control_")
        counter, gauge = families.counter, families.gauge
        self._objects = gauge("objects", "Known objects", "resource")
        self._synced = gauge("synced", "Whether a list was complete once", "resource")
        self._silence = gauge(
            "silence_seconds", "Seconds since the API server last sent data", "resource"
        )
        self._watch = counter(
            "watch_total", "Lists, watches, events, failures and relists", "resource", "what"
        )
        self._proxies = gauge("proxies", "Proxies that are connected")
        self._subscriptions = gauge("subscriptions", "Entries that proxies follow, for each proxy")
        self._topics = gauge("topics", "Different entries that proxies follow")
        self._accepted = counter(
            "proxies_accepted_total", "Connections of proxies that were accepted"
        )
        self._updates = counter("updates_total", "Entries that were sent to proxies")
        self._contents = counter(
            "contents_computed_total", "Contents that were computed and encoded"
        )
        self._ended = counter(
            "proxies_ended_total", "Connections of proxies that have ended", "reason"
        )
        self._issued = counter("certificates_issued_total", "Certificates that were issued")
        self._refused = counter(
            "certificates_refused_total",
            "Requests for certificates that were refused, and connections that failed",
            "reason",
        )
        self._issuer_expiry = gauge(
            "issuer_expiry_timestamp_seconds",
            "When the issuer's certificate expires (Unix time); 0: there is no usable issuer",
        )
        self._issuer_failures = counter(
            "issuer_refused_total", "Changed issuers or trust roots that were not usable"
        )
        self._services = gauge("services", "Services in the directory")
        self._meshed = gauge("meshed_addresses", "Addresses of pods that have a sidecar")
        self._unknown = gauge(
            "unknown_addresses", "Addresses at which an identity may be expected that is not known"
        )
        self._problems = gauge(
            "services_with_problems", "Services with a problem, such as a refused endpoint"
        )
        self._leading = gauge("leading", "Whether this replica is the leader")
        self._requests = counter("api_requests_total", "Requests to the API server")
        self._refusals = counter(
            "api_refusals_total", "Requests that the API server answered with an error"
        )
        self._written = counter("events_written_total", "Kubernetes events that were written")
        self._dropped = counter(
            "events_dropped_total", "Kubernetes events that were dropped or could not be written"
        )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4."""
        self._observe_reflectors()
        if self._parts.channel is not None:
            self._observe_channel(self._parts.channel)
        if self._parts.issuing is not None:
            self._observe_issuing(self._parts.issuing.authority)
        parts, catalog = self._parts, self._parts.discovery.catalog
        self._services.at().set(len(catalog.services))
        self._meshed.at().set(catalog.meshed)
        self._unknown.at().set(len(catalog.unknown))
        self._problems.at().set(len(catalog.problems))
        self._leading.at().set(parts.election.leading)
        self._requests.at().set(parts.client.requests)
        self._refusals.at().set(parts.client.refusals)
        recorders = [parts.recorder]
        if parts.issuing is not None:
            recorders.append(parts.issuing.authority.recorder)
        self._written.at().set(sum(recorder.written for recorder in recorders))
        self._dropped.at().set(sum(recorder.dropped for recorder in recorders))
        return self._families.render()

    def _observe_channel(self, channel: Channel) -> None:
        self._proxies.at().set(channel.connections)
        self._subscriptions.at().set(channel.subscriptions)
        self._topics.at().set(len(channel.views.topics))
        self._accepted.at().set(channel.counts.accepted)
        self._updates.at().set(channel.updates)
        self._contents.at().set(channel.views.computed)
        for reason, count in channel.counts.ended.items():
            self._ended.at(reason).set(count)

    def _observe_issuing(self, authority: Authority) -> None:
        issuer = authority.issuer
        self._issued.at().set(authority.counts.issued)
        for reason, count in authority.counts.refused.items():
            self._refused.at(reason).set(count)
        found = issuer.certificate
        self._issuer_expiry.at().set(found.not_valid_after_utc.timestamp() if found else 0.0)
        self._issuer_failures.at().set(issuer.failures)

    def _observe_reflectors(self) -> None:
        now = trio.current_time()
        for reflector in self._parts.discovery.reflectors:
            name, counts = reflector.resource.plural, reflector.counts
            self._objects.at(name).set(len(reflector.known))
            self._synced.at(name).set(reflector.synced.is_set())
            if reflector.synced.is_set():
                self._silence.at(name).set(max(0.0, now - reflector.last_data))
            for what in ("lists", "watches", "events", "failures", "relists"):
                self._watch.at(name, what).set(getattr(counts, what))
