"""The metrics of a proxy, as Prometheus reads them. proxy/metric_families.py declares and counts
them.

Two rules. Label sets are bounded: nothing that a client chooses (an authority, a path, an unknown
method) becomes a label value; as a safeguard, each family limits its series. Each connection and
each request is recorded exactly once, on every exit of its `with` block, including cancellation.

Names follow Prometheus: the unit is in the name, counters end in `_total`, units are seconds and
bytes. The main thread counts, with three exceptions. Several threads count spans and dropped log
lines, under a lock. The thread of the administration listener counts its connections, in series of
their own.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Literal, NamedTuple, Self, get_args

from OpenSSL import SSL
from prometheus_client import ProcessCollector

from proxy.metric_families import Families, Family, Series
from proxy.telemetry.directory_metrics import DirectoryMetrics
from proxy.telemetry.endpoint_metrics import EndpointMetrics
from proxy.telemetry.log_output import Why
from proxy.telemetry.request_metrics import (
    LATENCY_BUCKETS,
    Direction,
    HttpMetrics,
    RequestFamilies,
)
from proxy.wire.h1 import fast_head

Peer = Literal["src", "dst"]
Tls = Literal["mutual", "none", "passthrough", "unknown"]

DETECTION_BUCKETS = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 3, 5, 10)


class ConnectionRecord:
    """The metrics record of one connection; use it with `with`.

    The connection counts as open once it is known whether it uses TLS: at once, or when `secured`
    is called. If it ends before that, its label is "unknown".
    """

    __slots__ = ("_counted", "_metrics", "_peer", "_read", "_tls", "_written")

    def __init__(self, measures: ConnectionMetrics, peer: Peer, tls: Tls | None) -> None:
        self._metrics = measures
        self._peer: Peer = peer
        self._tls: Tls | None = tls
        self._counted: _ConnectionSeries | None = None  # set once the connection counts as open
        self._read = 0
        self._written = 0

    def secured(self, tls: Tls) -> None:
        """Set whether the connection uses TLS and whether peers are verified. Later calls have no
        effect.
        """
        if self._counted is None:
            self._counted = counted = self._metrics.series(self._peer, tls)
            counted.opened.value += 1
            counted.open.value += 1

    def transferred(self, read: int, written: int) -> None:
        """Set the connection's totals so far, in bytes. May be called any number of times."""
        received, transmitted = self._metrics.bytes[self._peer]
        if read > self._read:
            received.value += read - self._read
            self._read = read
        if written > self._written:
            transmitted.value += written - self._written
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
        if self._counted is not None:
            self._counted.open.value -= 1
            self._counted.closed.value += 1


class _ConnectionSeries(NamedTuple):
    """The counts of the connections of one direction with one peer and one kind of TLS."""

    opened: Series
    open: Series
    closed: Series


class ConnectionMetrics:
    """Connections of one direction: from the client (peer "src") and to the server (peer "dst")."""

    __slots__ = ("_metrics", "_series", "bytes", "direction")

    def __init__(self, metrics: Metrics, direction: Direction) -> None:
        self.direction = direction
        self._metrics = metrics
        self._series: dict[tuple[Peer, Tls], _ConnectionSeries] = {}
        # received and transmitted, by peer
        self.bytes: dict[Peer, tuple[Series, Series]] = {
            peer: (
                metrics.bytes.at(direction, peer, "receive"),
                metrics.bytes.at(direction, peer, "transmit"),
            )
            for peer in get_args(Peer)
        }

    def series(self, peer: Peer, tls: Tls) -> _ConnectionSeries:
        """The counts of connections. Their series exist from the first call."""
        found = self._series.get((peer, tls))
        if found is None:
            labels, metrics = (self.direction, peer, tls), self._metrics
            found = self._series[peer, tls] = _ConnectionSeries(
                metrics.opened.at(*labels), metrics.open.at(*labels), metrics.closed.at(*labels)
            )
        return found

    def connection(self, peer: Peer, tls: Tls | None = None) -> ConnectionRecord:
        """Create a record: `with measures.connection("src") as record: ...
        record.secured("mutual")`.
        """
        return ConnectionRecord(self, peer, tls)


class SpanCounts:
    """Span counters. The exporter's thread and the data path update them."""

    def __init__(self, exported: Family, dropped: Family, exports: Family) -> None:
        self._exported, self._dropped, self._exports = exported, dropped, exports
        self._lock = threading.Lock()

    def exported(self, spans: int) -> None:
        with self._lock:
            self._exported.at().inc(spans)

    def dropped(self, reason: str, spans: int) -> None:
        with self._lock:
            self._dropped.at(reason).inc(spans)

    def attempted(self, result: str) -> None:
        with self._lock:
            self._exports.at(result).inc()


class Metrics:
    """All metric families of one proxy. Rare events have a method each; `http` and `connections`
    count the rest.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.families = Families("isthmus_")
        self.registry = self.families.registry
        ProcessCollector(registry=self.registry)
        self.families.rules["process_start_time_seconds"] = "first"
        self._data_path()
        self._events()
        self._states()
        self._memory()
        self._build_info()
        self._names()
        self._clock = clock
        self._requests = RequestFamilies(self.families)
        self.http: dict[Direction, HttpMetrics] = {}
        self.connections: dict[Direction, ConnectionMetrics] = {}
        self._drops = threading.Lock()
        for way in ("inbound", "outbound"):
            self.add_direction(way)

    def add_direction(self, direction: Direction) -> None:
        """Create the series of a direction. Those of a sidecar exist from the start."""
        self.http[direction] = HttpMetrics(self._requests, direction, self._clock)
        self.connections[direction] = ConnectionMetrics(self, direction)

    def _data_path(self) -> None:
        which = ("direction", "peer", "tls")
        self.opened = self.families.counter(
            "connections_opened_total",
            "Connections opened (src: from the client, dst: to the server).",
            *which,
        )
        self.open = self.families.gauge("connections_open", "Connections open now.", *which)
        self.closed = self.families.counter(
            "connections_closed_total", "Connections closed.", *which
        )
        self.bytes = self.families.counter(
            "bytes_total",
            "Bytes read from and written to peers.",
            "direction",
            "peer",
            "io_direction",
        )
        self._handshakes = self.families.counter(
            "tls_handshakes_total",
            "Finished TLS handshakes.",
            "direction",
            "side",
            "result",
            "version",
            "group",
            "resumed",
        )
        self._detections = self.families.counter(
            "detections_total", "Protocol detections by result.", "direction", "result"
        )
        self._detection_time = self.families.histogram(
            "detection_seconds",
            "Time from the start of protocol detection to its result.",
            DETECTION_BUCKETS,
            "direction",
        )
        self._declined = self.families.counter(
            "heads_declined_total",
            "HTTP/1 heads that the fast parser left to h11.",
            "direction",
            "role",
        )

    def _events(self) -> None:
        self._tls_failures = self.families.counter(
            "tls_failures_total", "Failed TLS handshakes by kind.", "direction", "kind"
        )
        self._loops = self.families.counter(
            "loops_total", "Traffic loops that were stopped.", "kind"
        )
        self.self_calls = self.families.counter(
            "self_calls_total", "Connections and requests of the pod to itself."
        )
        self._dropped_hops = self.families.counter(
            "hop_tokens_dropped_total", "Requests of which loop tokens were dropped.", "reason"
        )
        self._dropped_forwarded = self.families.counter(
            "forwarded_dropped_total",
            "Requests to a gateway of which Forwarded values were dropped.",
            "reason",
        )
        self._errors = self.families.counter(
            "errors_total",
            "Connections and requests that failed in the proxy.",
            "direction",
            "reason",
        )
        self._fast = self.families.counter(
            "fast_path_exchanges_total",
            "HTTP exchanges that started on the fast path, by where they ended.",
            "end",
        )
        self._probes = self.families.counter(
            "gateway_probes_total",
            "Health probes of other clusters' gateways.",
            "cluster",
            "result",
        )
        self._remote_attempts = self.families.counter(
            "remote_attempts_total",
            "Requests and connections sent to other clusters' gateways.",
            "cluster",
            "reason",
        )
        what = ("listener", "reason")
        self._evicted = self.families.counter(
            "connections_evicted_total",
            "Connections that were closed to make room for others.",
            *what,
        )
        self._refused = self.families.counter(
            "connections_refused_total",
            "Connections that were refused because a limit was reached.",
            *what,
        )
        self._directory = self.families.counter(
            "directory_reloads_total", "Reloads of the directory file, by result.", "result"
        )
        self._identity = self.families.counter(
            "identity_reloads_total",
            "Reloads of certificates, keys or trust roots, by result.",
            "result",
        )
        self.spans = SpanCounts(
            self.families.counter("spans_exported_total", "Spans that the collector accepted."),
            self.families.counter(
                "spans_dropped_total", "Spans that were not exported, by reason.", "reason"
            ),
            self.families.counter(
                "span_exports_total", "Export requests with spans, by result.", "result"
            ),
        )
        self._dropped_logs = self.families.counter(
            "dropped_logs_total", "Log lines that were not written, by reason.", "reason"
        )
        self.endpoints = EndpointMetrics(self.families)
        self.directory = DirectoryMetrics(self.families)

    def _states(self) -> None:
        self._gateways = self.families.gauge(
            "gateways_usable", "Gateways of another cluster that can get requests.", "cluster"
        )
        self._failovers = self.families.gauge(
            "failover_active",
            "1 while another cluster serves a service with failover.",
            "service",
            merge="max",  # each worker decides for itself; report it if one sends requests away
        )
        self._certificate = self.families.gauge(
            "certificate_expiry_timestamp_seconds",
            "Time when the proxy's certificate expires (Unix time).",
            merge="first",  # report a worker that could not load the new certificate
        )
        self._ended = self.families.counter(
            "certificate_ends_total",
            "Connections that ended because of a certificate, by how they ended.",
            "how",
        )
        self._begin = self.families.gauge(
            "certificate_start_timestamp_seconds",
            "Time when the proxy's whole certificate chain becomes valid (Unix time).",
            merge="max",
        )
        self._roots = self.families.gauge(
            "root_expiry_timestamp_seconds",
            "Time when the first trust root expires (Unix time).",
            merge="first",
        )
        self.former_identities = self.families.gauge(
            "former_identities",
            "Addresses that had an identity recently and get no clear text.",
            merge="max",  # from one file: the same in all workers
        )
        self._pool = self.families.gauge(
            "pool_connections", "Connections to endpoints kept by the pools.", "state"
        )
        self._span_queue = self.families.gauge("spans_waiting", "Spans that wait to be exported.")
        self.self_calls_waiting = self.families.gauge(
            "self_calls_waiting",
            "Connections and requests of the pod to itself that wait for a response.",
        )
        self.workers = self.families.gauge(
            "workers", "Worker processes, if there are several.", "state"
        )
        self.worker_exits = self.families.counter(
            "worker_exits_total", "Workers that ended unexpectedly, by how they ended.", "how"
        )

    def _memory(self) -> None:
        self.memory_used = self.families.gauge(
            "memory_used_bytes", "Buffered bytes, by kind of client.", "clients"
        )
        self.memory_limit = self.families.gauge(
            "memory_limit_bytes", "Bytes that may be buffered (memory.budget); 0: no limit."
        )
        self.memory_actions = self.families.counter(
            "memory_short_total", "Actions taken because memory is short.", "action"
        )
        self.memory_trims = self.families.counter(
            "memory_trims_total", "How often freed memory was returned to the system."
        )
        self.streams_open = self.families.gauge(
            "streams_open", "Open HTTP/2 streams of clients.", "clients"
        )
        self.streams_refused = self.families.counter(
            "streams_refused_total", "HTTP/2 streams refused (memory.max_streams, memory.budget)."
        )
        self.steps_waiting = self.families.gauge(
            "steps_waiting", "Streams and connections that wait to be opened or closed."
        )

    def _build_info(self) -> None:
        info = self.families.gauge(
            "build_info",
            "Always 1; the labels describe the build.",
            "version",
            "python",
            "compiled",
            "tls",
            merge="max",
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
        self.dns_queries = self.families.counter(
            "dns_queries_total", "DNS queries from the pod, by result.", *what
        )
        self.dns_upstream = self.families.counter(
            "dns_upstream_total", "DNS queries forwarded to resolvers, by result.", *what
        )
        self.dns_ignored = self.families.counter(
            "dns_ignored_datagrams_total", "Datagrams that did not match a forwarded query."
        )
        self.dns_latency = self.families.histogram(
            "dns_upstream_seconds",
            "Time from forwarding a query over UDP to its response.",
            LATENCY_BUCKETS,
        )
        self.dns_in_flight = self.families.gauge(
            "dns_in_flight", "DNS queries that wait for a resolver."
        )
        self._virtual = self.families.gauge(
            "virtual_addresses",
            "Services that have virtual addresses, or still reserve them.",
            "state",
            merge="max",  # derived from names: the same in all workers
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
        self._handshakes.at(
            direction, side, "ok", tls_version, group, "true" if resumed else "false"
        ).inc()

    def count_failed_handshake(
        self, direction: Direction, side: Literal["client", "server"], kind: str
    ) -> None:
        """A TLS handshake failed; `kind` is that of TLSFailed."""
        self._handshakes.at(direction, side, "failed", "", "", "false").inc()
        self._tls_failures.at(direction, kind).inc()

    def count_detection(self, direction: Direction, result: str, seconds: float) -> None:
        """Detection ended with `result` (http1, http2, opaque, tls, silent, closed, declared) after
        `seconds`.
        """
        self._detections.at(direction, result).inc()
        self._detection_time.at(direction).observe(seconds)

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
        self._declined.at(direction, role).inc(count)

    def set_fast_path_exchanges(self, finished: int, handed_over: int) -> None:
        """Set how many exchanges ended on the fast path, and how many were handed over."""
        self._fast.at("finished").set(finished)
        self._fast.at("handed_over").set(handed_over)

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

    def pool(self, state: Literal["active", "idle"]) -> Series:
        """The gauge of pooled connections; the pools of both directions share it."""
        return self._pool.at(state)

    def set_waiting_spans(self, count: int) -> None:
        self._span_queue.at().set(count)

    def count_dropped_logs(self, count: int, reason: Why) -> None:
        """Count log lines that were dropped. Any thread may call this."""
        with self._drops:
            self._dropped_logs.at(reason).inc(count)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4 (`CONTENT_TYPE`)."""
        return self.families.render()


def own_version() -> str:
    """The version of the installed distribution; "unknown" in a checkout that is not installed."""
    try:
        return version("isthmus")
    except PackageNotFoundError:
        return "unknown"
