"""What is counted between a flow and an endpoint: retries, breakers, and who waits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

if TYPE_CHECKING:
    from proxy.telemetry.metrics import Series

# Broken endpoints that are shown one by one.
_MOST_SHOWN = 256


class QueueRecord:
    """Whether one that waited was served."""

    __slots__ = ("served",)

    def __init__(self) -> None:
        self.served = False


class EndpointMetrics:
    """Of one proxy. `counter` and `gauge` make families (proxy/telemetry/metrics.py)."""

    def __init__(
        self, counter: Callable[..., Series[Counter]], gauge: Callable[..., Series[Gauge]], registry: CollectorRegistry
    ) -> None:
        self._retries = counter("retries_total", "Requests that were tried again, by what the attempt before came to.", "cause")
        self._no_retries = counter("retries_refused_total", "Requests that were not tried again, by what stood against it.", "reason")
        self._breakers = counter("breaker_changes_total", "Endpoints whose breaker changed its state.", "state")
        self._queue = counter("queued_total", "Requests and connections that waited for an endpoint.", "result")
        self._waiting = gauge("queue_waiting", "Requests and connections that wait for an endpoint now.")
        self._broken = Gauge(
            "isthmus_endpoint_broken",
            "Endpoints that are left alone or on probation (1 each; the others are not listed).",
            ("service", "endpoint", "state"),
            registry=registry,
        )

    def retried(self, cause: str) -> None:
        """A request is tried again, for `cause`: status, grpc_status, broken, refused, timeout."""
        self._retries.at(cause).inc()

    def not_retried(self, reason: str) -> None:
        """There was cause to try again, but `reason` stood against it: limit, begun, body, deadline, budget."""
        self._no_retries.at(reason).inc()

    def breaker_changed(self, state: str) -> None:
        self._breakers.at(state).inc()

    @contextmanager
    def queued(self) -> Iterator[QueueRecord]:
        """The account of one that waits for an endpoint; it has `served` set if it got one."""
        record = QueueRecord()
        self._waiting.at().inc()
        try:
            yield record
        finally:
            self._waiting.at().dec()
            self._queue.at("served" if record.served else "failed").inc()

    def broken(self, endpoints: Iterable[tuple[str, str, str]]) -> None:
        """All endpoints that are not used now: service, address and state. The first 256 are shown."""
        self._broken.clear()
        for labels in itertools.islice(endpoints, _MOST_SHOWN):
            self._broken.labels(*labels).set(1)
