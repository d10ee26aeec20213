"""Metrics of endpoint selection: retries, circuit breakers, queues."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from proxy.metric_families import MOST_SERIES, Families


class QueueRecord:
    """Whether a queued request was served."""

    __slots__ = ("served",)

    def __init__(self) -> None:
        self.served = False


class EndpointMetrics:
    """The endpoint metrics of one proxy."""

    def __init__(self, families: Families) -> None:
        self._retries = families.counter(
            "retries_total", "Retried requests, by the failure of the previous attempt.", "cause"
        )
        self._no_retries = families.counter(
            "retries_refused_total", "Failed requests that were not retried, by reason.", "reason"
        )
        self._breakers = families.counter(
            "breaker_changes_total",
            "Changes of endpoints' circuit breakers, by new state.",
            "state",
        )
        self._queue = families.counter(
            "queued_total", "Requests and connections that waited for an endpoint.", "result"
        )
        self._waiting = families.gauge(
            "queue_waiting", "Requests and connections that wait for an endpoint now."
        )
        self._broken = families.gauge(
            "endpoint_breaker_state",
            "Endpoints whose circuit breaker is open or half-open (1 each; others are not listed).",
            "service",
            "endpoint",
            "state",
            merge="max",  # as for failover
        )

    def count_retry(self, cause: str) -> None:
        """A request is retried because of `cause`: status, grpc_status, connection_lost, refused,
        timeout."""
        self._retries.at(cause).inc()

    def count_skipped_retry(self, reason: str) -> None:
        """A failed request is not retried because of `reason`: limit, response_started, body,
        deadline, budget.
        """
        self._no_retries.at(reason).inc()

    def count_breaker_change(self, state: str) -> None:
        self._breakers.at(state).inc()

    @contextmanager
    def record_wait(self) -> Iterator[QueueRecord]:
        """Record a request that waits for an endpoint. Set `served` of the result if it gets
        one."""
        record = QueueRecord()
        self._waiting.at().inc()
        try:
            yield record
        finally:
            self._waiting.at().inc(-1)
            self._queue.at("served" if record.served else "failed").inc()

    def set_open_breakers(self, endpoints: Iterable[tuple[str, str, str]]) -> None:
        """All endpoints with an open or half-open circuit breaker: service, address, state. Shows
        the first 256.
        """
        self._broken.replace(dict.fromkeys(itertools.islice(endpoints, MOST_SERIES), 1.0))
