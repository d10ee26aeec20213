"""Metrics of HTTP requests.

The series of a direction are looked up once, so that a request and its response cost a few
additions (docs/decisions/10-prometheus-client.md).
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

import trio

from proxy.metric_families import Families

Direction = Literal["inbound", "outbound", "gateway"]

METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH")
# Linkerd's buckets, with fewer steps above a second and two below a millisecond, where a proxy's
# own latency is.
LATENCY_BUCKETS = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    1,
    2,
    5,
    10,
    30,
)
_CLASSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")
_OUTCOMES = ("success", "failure", "cancelled")


class RequestRecord:
    """The record of one request; use it with `with`. Call `head` when the response's head has
    arrived.
    """

    __slots__ = ("_metrics", "_started", "failed", "status")

    def __init__(self, metrics: HttpMetrics, started: float) -> None:
        self._metrics = metrics
        self._started = started
        self.status = 0
        self.failed = False

    def head(self, status: int) -> None:
        """The response's head has arrived, or the proxy made one: the latency ends here. The last
        call counts, so do not call it for 1xx.
        """
        if self.status == 0:
            self._metrics.latency.observe(self._metrics.clock() - self._started)
        self.status = status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._metrics.finished(self, kind)


class RequestFamilies:
    """The families of HTTP requests, for all directions."""

    __slots__ = ("latency", "requests", "responses")

    def __init__(self, families: Families) -> None:
        self.requests = families.counter(
            "requests_total", "HTTP requests received.", "direction", "method"
        )
        self.responses = families.counter(
            "responses_total",
            "Finished HTTP exchanges, by status class.",
            "direction",
            "status_class",
            "classification",
        )
        self.latency = families.histogram(
            "response_latency_seconds",
            "Time from the head of a request to the head of its response.",
            LATENCY_BUCKETS,
            "direction",
        )


class HttpMetrics:
    """Requests and responses of one direction. All series exist from the start."""

    __slots__ = ("_other", "_requests", "_responses", "clock", "latency")

    def __init__(
        self, families: RequestFamilies, direction: Direction, clock: Callable[[], float]
    ) -> None:
        self.clock = clock
        self._requests = {
            method: families.requests.at(direction, method.decode()) for method in METHODS
        }
        self._other = families.requests.at(direction, "other")
        self._responses = {
            (status, outcome): families.responses.at(direction, _CLASSES[status], outcome)
            for status in range(len(_CLASSES))
            for outcome in _OUTCOMES
        }
        self.latency = families.latency.at(direction)

    def request(self, method: bytes) -> RequestRecord:
        """Count a request and open its record: `with metrics.request(b"GET") as record: ...
        record.head(200)`.
        """
        series = self._requests.get(method)
        if series is None:
            series = self._other
        series.value += 1
        return RequestRecord(self, self.clock())

    def finished(self, record: RequestRecord, kind: type[BaseException] | None) -> None:
        """Close a record; the record calls this itself. Failures are server errors, and requests
        without a response.
        """
        status = record.status // 100 if 100 <= record.status < 600 else 0
        if kind is None:
            outcome = "failure" if record.failed or status in (0, 5) else "success"
        else:
            outcome = "cancelled" if issubclass(kind, trio.Cancelled | GeneratorExit) else "failure"
        self._responses[status, outcome].value += 1
