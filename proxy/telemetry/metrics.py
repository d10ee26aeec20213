"""The metrics of a proxy, as Prometheus reads them.

Three rules. Label sets are bounded: nothing that a client chooses (an authority, a path, an unknown
method) becomes a label value, and as a safeguard, a family counts new series beyond `MOST_SERIES`
as "other". Each connection and each request is recorded exactly once, on every exit of its `with`
block, including cancellation. Per-request and per-connection counts are plain numbers
(request_metrics.py, counters.py).

Names follow Prometheus: the unit is in the name, counters end in `_total`, units are seconds and
bytes. The registry belongs to the proxy and is not the global one, so several proxies in one
process (in tests) do not share metrics.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Literal, Self

import prometheus_client
from OpenSSL import SSL
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from proxy.telemetry.counters import DataPathCounter, DataPathHistogram
from proxy.telemetry.directory_metrics import DirectoryMetrics
from proxy.telemetry.endpoint_metrics import EndpointMetrics
from proxy.telemetry.log_output import Why
from proxy.telemetry.request_metrics import LATENCY_BUCKETS, Direction, HttpCollector, HttpMetrics
from proxy.telemetry.series import Series
from proxy.wire.h1 import fast_head

Peer = Literal["src", "dst"]
Tls = Literal["mutual", "none", "passthrough", "unknown"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DETECTION_BUCKETS = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 3, 5, 10)


class ConnectionRecord:
    """The metrics record of one connection; use it with `with`.

    The connection counts as open once it is known whether it uses TLS: at once, or when `secured`
    is called. If it ends before that, its label is "unknown".
    """

    __slots__ = ("_labels", "_metrics", "_peer", "_read", "_tls", "_written")

    def __init__(self, measures: ConnectionMetrics, peer: Peer, tls: Tls | None) -> None:
        self._metrics = measures
        self._peer: Peer = peer
        self._tls: Tls | None = tls
        self._labels: tuple[str, ...] | None = None  # set once the connection counts as open
        self._read = 0
        self._written = 0

    def secured(self, tls: Tls) -> None:
        """Set whether the connection uses TLS and whether peers are verified. Later calls have no
        effect.
        """
        if self._labels is None:
            measures = self._metrics
            self._labels = labels = measures.direction, self._peer, tls
            measures.opened.add(labels)
            measures.open.add(labels)

    def transferred(self, read: int, written: int) -> None:
        """Set the connection's totals so far, in bytes. May be called any number of times."""
        measures = self._metrics
        if read > self._read:
            measures.bytes.add((measures.direction, self._peer, "receive"), read - self._read)
            self._read = read
        if written > self._written:
            measures.bytes.add(
                (measures.direction, self._peer, "transmit"), written - self._written
            )
            self._written = written

    def __enter__(self) -> Self:
        if self._tls is not None:
            self.secured(self._tls)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.secured("unknown")
        if self._labels is not None:
            self._metrics.open.add(self._labels, -1)
            self._metrics.closed.add(self._labels)


class ConnectionMetrics:
    """Connections of one direction: from the client (peer "src") and to the server (peer "dst")."""

    __slots__ = ("bytes", "closed", "direction", "open", "opened")

    def __init__(self, metrics: Metrics, direction: Direction) -> None:
        self.direction = direction
        self.opened, self.open, self.closed, self.bytes = (
            metrics.opened,
            metrics.open,
            metrics.closed,
            metrics.bytes,
        )
        for peer in ("src", "dst"):
            for io_direction in ("receive", "transmit"):
                self.bytes.add((direction, peer, io_direction), 0)

    def connection(self, peer: Peer, tls: Tls | None = None) -> ConnectionRecord:
        """Create a record: `with measures.connection("src") as record: ...
        record.secured("mutual")`.
        """
        return ConnectionRecord(self, peer, tls)


class SpanCounts:
    """Span counters. The exporter's thread updates them; the data path too, for drops."""

    def __init__(
        self, exported: Series[Counter], dropped: Series[Counter], exports: Series[Counter]
    ) -> None:
        self._exported, self._dropped, self._exports = exported, dropped, exports

    def exported(self, spans: int) -> None:
        self._exported.at().inc(spans)

    def dropped(self, reason: str, spans: int) -> None:
        self._dropped.at(reason).inc(spans)

    def attempted(self, result: str) -> None:
        self._exports.at(result).inc()


class Metrics:
    """All metric families of one proxy. Rare events have a method each; `http` and `connections`
    count the rest.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        # Without this, two thirds of all series would be `_created` timestamps. The switch is
        # process-wide.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped in the library
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._data_path()
        self._events()
        self._states()
        self._names()
        self._clock = clock
        self.http: dict[Direction, HttpMetrics] = {}
        self.registry.register(HttpCollector(self.http))
        self.connections: dict[Direction, ConnectionMetrics] = {}
        for way in ("inbound", "outbound"):
            self.add_direction(way)

    def add_direction(self, direction: Direction) -> None:
        """Create the series of a direction. Those of a sidecar exist from the start."""
        self.http[direction] = HttpMetrics(self._clock)
        self.connections[direction] = ConnectionMetrics(self, direction)

    def _counter(self, name: str, text: str, *labels: str) -> Series[Counter]:
        return Series(Counter(f"isthmus_{name}", text, labels, registry=self.registry), len(labels))

    def _gauge(self, name: str, text: str, *labels: str) -> Series[Gauge]:
        return Series(Gauge(f"isthmus_{name}", text, labels, registry=self.registry), len(labels))

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], *labels: str
    ) -> Series[Histogram]:
        return Series(
            Histogram(f"isthmus_{name}", text, labels, registry=self.registry, buckets=buckets),
            len(labels),
        )

    def _data_path_counter(self, name: str, text: str, *labels: str) -> DataPathCounter:
        return DataPathCounter(name, text, labels, self.registry)

    def _data_path(self) -> None:
        which = ("direction", "peer", "tls")
        self.opened = self._data_path_counter(
            "connections_opened_total",
            "Connections opened (src: from the client, dst: to the server).",
            *which,
        )
        self.open = self._data_path_counter("connections_open", "Connections open now.", *which)
        self.closed = self._data_path_counter(
            "connections_closed_total", "Connections closed.", *which
        )
        self.bytes = self._data_path_counter(
            "bytes_total",
            "Bytes read from and written to peers.",
            "direction",
            "peer",
            "io_direction",
        )
        self._handshakes = self._data_path_counter(
            "tls_handshakes_total",
            "Finished TLS handshakes.",
            "direction",
            "side",
            "result",
            "version",
            "group",
            "resumed",
        )
        self._detections = self._data_path_counter(
            "detections_total", "Protocol detections by result.", "direction", "result"
        )
        self._detection_time = DataPathHistogram(
            "detection_seconds",
            "Time from the start of protocol detection to its result.",
            DETECTION_BUCKETS,
            "direction",
            self.registry,
        )
        self._declined = self._data_path_counter(
            "heads_declined_total",
            "HTTP/1 heads that the fast parser left to h11.",
            "direction",
            "role",
        )

    def _events(self) -> None:
        self._tls_failures = self._counter(
            "tls_failures_total", "Failed TLS handshakes by kind.", "direction", "kind"
        )
        self._loops = self._counter("loops_total", "Traffic loops that were stopped.", "kind")
        self.self_calls = self._counter(
            "self_calls_total", "Connections and requests of the pod to itself."
        )
        self._dropped_hops = self._counter(
            "hop_tokens_dropped_total", "Requests of which loop tokens were dropped.", "reason"
        )
        self._dropped_forwarded = self._counter(
            "forwarded_dropped_total",
            "Requests to a gateway of which Forwarded values were dropped.",
            "reason",
        )
        self._errors = self._counter(
            "errors_total",
            "Connections and requests that failed in the proxy.",
            "direction",
            "reason",
        )
        self._fast = self._counter(
            "fast_path_exchanges_total",
            "HTTP exchanges that started on the fast path, by where they ended.",
            "end",
        )
        self._probes = self._counter(
            "gateway_probes_total",
            "Health probes of other clusters' gateways.",
            "cluster",
            "result",
        )
        self._remote_attempts = self._counter(
            "remote_attempts_total",
            "Requests and connections sent to other clusters' gateways.",
            "cluster",
            "reason",
        )
        what = ("listener", "reason")
        self._evicted = self._counter(
            "connections_evicted_total",
            "Connections that were closed to make room for others.",
            *what,
        )
        self._refused = self._counter(
            "connections_refused_total",
            "Connections that were refused because a limit was reached.",
            *what,
        )
        self._directory = self._counter(
            "directory_reloads_total", "Reloads of the directory file, by result.", "result"
        )
        self._identity = self._counter(
            "identity_reloads_total",
            "Reloads of certificates, keys or trust roots, by result.",
            "result",
        )
        self.spans = SpanCounts(
            self._counter("spans_exported_total", "Spans that the collector accepted."),
            self._counter(
                "spans_dropped_total", "Spans that were not exported, by reason.", "reason"
            ),
            self._counter("span_exports_total", "Export requests with spans, by result.", "result"),
        )
        self._dropped_logs = self._counter(
            "dropped_logs_total", "Log lines that were not written, by reason.", "reason"
        )
        self.endpoints = EndpointMetrics(self._counter, self._gauge, self.registry)
        self.directory = DirectoryMetrics(self._counter, self._gauge)

    def _states(self) -> None:
        self._gateways = self._gauge(
            "gateways_usable", "Gateways of another cluster that can get requests.", "cluster"
        )
        self._failovers = self._gauge(
            "failover_active", "1 while another cluster serves a service with failover.", "service"
        )
        self._certificate = self._gauge(
            "certificate_expiry_timestamp_seconds",
            "Time when the proxy's certificate expires (Unix time).",
        )
        self._ended = self._counter(
            "certificate_ends_total",
            "Connections that ended because of a certificate, by how they ended.",
            "how",
        )
        self._begin = self._gauge(
            "certificate_start_timestamp_seconds",
            "Time when the proxy's whole certificate chain becomes valid (Unix time).",
        )
        self._roots = self._gauge(
            "root_expiry_timestamp_seconds", "Time when the first trust root expires (Unix time)."
        )
        self.former_identities = self._gauge(
            "former_identities", "Addresses that had an identity recently and get no clear text."
        )
        self._pool = self._gauge(
            "pool_connections", "Connections to endpoints kept by the pools.", "state"
        )
        self._span_queue = self._gauge("spans_waiting", "Spans that wait to be exported.")
        self.self_calls_waiting = self._gauge(
            "self_calls_waiting",
            "Connections and requests of the pod to itself that wait for a response.",
        )
        self.memory_used = self._gauge(
            "memory_used_bytes", "Buffered bytes, by kind of client.", "clients"
        )
        self.memory_limit = self._gauge(
            "memory_limit_bytes", "Bytes that may be buffered (memory.budget); 0: no limit."
        )
        self.memory_actions = self._counter(
            "memory_short_total", "Actions taken because memory is short.", "action"
        )
        self.memory_trims = self._counter(
            "memory_trims_total", "How often freed memory was returned to the system."
        )
        self.streams_open = self._gauge(
            "streams_open", "Open HTTP/2 streams of clients.", "clients"
        )
        self.streams_refused = self._counter(
            "streams_refused_total", "HTTP/2 streams refused (memory.max_streams, memory.budget)."
        )
        self.steps_waiting = self._gauge(
            "steps_waiting", "Streams and connections that wait to be opened or closed."
        )
        self.workers = self._gauge("workers", "Worker processes, if there are several.", "state")
        self.worker_exits = self._counter(
            "worker_exits_total", "Workers that ended unexpectedly, by how they ended.", "how"
        )
        info = self._gauge(
            "build_info",
            "Always 1; the labels describe the build.",
            "version",
            "python",
            "compiled",
            "tls",
        )
        compiled = "yes" if fast_head.__file__.endswith(".so") else "no"
        info.at(
            own_version(),
            platform.python_version(),
            compiled,
            SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode(),
        ).set(1)

    def _names(self) -> None:
        what = ("transport", "result")
        self.dns_queries = self._counter(
            "dns_queries_total", "DNS queries from the pod, by result.", *what
        )
        self.dns_upstream = self._counter(
            "dns_upstream_total", "DNS queries forwarded to resolvers, by result.", *what
        )
        self.dns_ignored = self._counter(
            "dns_ignored_datagrams_total", "Datagrams that did not match a forwarded query."
        )
        self.dns_latency = self._histogram(
            "dns_upstream_seconds",
            "Time from forwarding a query over UDP to its response.",
            LATENCY_BUCKETS,
        )
        self.dns_in_flight = self._gauge("dns_in_flight", "DNS queries that wait for a resolver.")
        self._virtual = self._gauge(
            "virtual_addresses",
            "Services that have virtual addresses, or still reserve them.",
            "state",
        )

    def set_virtual_addresses(self, existing: int, quarantined: int) -> None:
        self._virtual.at("existing").set(existing)
        self._virtual.at("quarantined").set(quarantined)

    def count_handshake(
        self, direction: Direction, side: Literal["client", "server"], facts: tuple[str, str, bool]
    ) -> None:
        """A TLS handshake succeeded. `facts`: the version, the key-exchange group, and whether the
        session was resumed.
        """
        tls_version, group, resumed = facts
        self._handshakes.add(
            (direction, side, "ok", tls_version, group, "true" if resumed else "false")
        )

    def count_failed_handshake(
        self, direction: Direction, side: Literal["client", "server"], kind: str
    ) -> None:
        """A TLS handshake failed; `kind` is that of TLSFailed."""
        self._handshakes.add((direction, side, "failed", "", "", "false"))
        self._tls_failures.at(direction, kind).inc()

    def count_detection(self, direction: Direction, result: str, seconds: float) -> None:
        """Detection ended with `result` (http1, http2, opaque, tls, silent, closed, declared) after
        `seconds`.
        """
        self._detections.add((direction, result))
        self._detection_time.observe(direction, seconds)

    def count_remote_attempt(self, cluster: str, why: str) -> None:
        """A request or connection goes to another cluster's gateway: by its name, a split, or a
        failover.
        """
        self._remote_attempts.at(cluster, why).inc()

    def count_gateway_probe(self, cluster: str, result: str) -> None:
        """A gateway was probed; `result` is `ok` or `failed`."""
        self._probes.at(cluster, result).inc()

    def set_usable_gateways(self, cluster: str, count: int) -> None:
        """Set how many gateways of a cluster can get requests."""
        self._gateways.at(cluster).set(count)

    def set_failover(self, service: str, away: bool) -> None:
        """Set whether another cluster serves a service (failover), or the local one again."""
        self._failovers.at(service).set(1 if away else 0)

    def count_dropped_tokens(self, reason: str) -> None:
        """Loop tokens of a request were dropped: the `malformed` ones, or all because they were
        `oversized`.
        """
        self._dropped_hops.at(reason).inc()

    def count_dropped_forwarded(self, reason: Literal["malformed", "oversized"]) -> None:
        """Forwarded values of a request were dropped: the `malformed` ones, or all because they
        were `oversized`.
        """
        self._dropped_forwarded.at(reason).inc()

    def count_loop(self, kind: str) -> None:
        self._loops.at(kind).inc()

    def count_error(self, direction: Direction, reason: str) -> None:
        self._errors.at(direction, reason).inc()

    def count_eviction(self, listener: str, reason: str) -> None:
        """A connection was closed to make room for others (reasons: see net.connection_slots)."""
        self._evicted.at(listener, reason).inc()

    def count_refusal(self, listener: str, reason: str) -> None:
        """A connection was refused because a limit was reached (reasons: see
        net.connection_slots)."""
        self._refused.at(listener, reason).inc()

    def count_declined_heads(
        self, direction: Direction, role: Literal["request", "response"], count: int
    ) -> None:
        self._declined.add((direction, role), count)

    def set_fast_path_exchanges(self, finished: int, handed_over: int) -> None:
        """Add exchanges that ended on the fast path, and those that moved to the ordinary path."""
        self._fast.at("finished").inc(finished)
        self._fast.at("handed_over").inc(handed_over)

    def count_directory_reload(self, result: Literal["ok", "error", "refused"]) -> None:
        self._directory.at(result).inc()

    def count_identity_reload(self, result: Literal["ok", "error"]) -> None:
        self._identity.at(result).inc()

    def set_validity(self, begin: float, end: float, first_root: float) -> None:
        """Set when the certificate becomes valid and expires, and when the first root expires, as
        Unix times.
        """
        self._begin.at().set(begin)
        self._certificate.at().set(end)
        self._roots.at().set(first_root)

    def count_certificate_end(self, how: Literal["retired", "cut"]) -> None:
        self._ended.at(how).inc()

    def pool(self, state: Literal["active", "idle"]) -> Gauge:
        """The gauge of pooled connections; the pools of both directions share it."""
        return self._pool.at(state)

    def set_waiting_spans(self, count: int) -> None:
        self._span_queue.at().set(count)

    def count_dropped_logs(self, count: int, reason: Why) -> None:
        self._dropped_logs.at(reason).inc(count)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4 (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)


def own_version() -> str:
    """The version of the installed distribution; "unknown" in a checkout that is not installed."""
    try:
        return version("isthmus")
    except PackageNotFoundError:
        return "unknown"
