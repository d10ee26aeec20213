"""Metrics of HTTP requests: plain numbers on the hot path, converted to Prometheus samples when a
scrape reads them.

A counter of prometheus_client takes a lock and up to three method calls per increment, and a
histogram several: 3 µs for a request and its response, in a hop of some 40 µs. Only the data path's
thread changes the numbers here, so plain ones are enough (0.7 µs).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from types import TracebackType
from typing import Literal, Self

import trio
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

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
_BOUNDS = [*map(floatToGoString, LATENCY_BUCKETS), "+Inf"]
_OTHER = b"other"
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
            self._metrics.waited(self._metrics.clock() - self._started)
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


class HttpMetrics:
    """Requests and responses of one direction."""

    __slots__ = ("clock", "latency", "requests", "responses", "seconds")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.requests = dict.fromkeys((*METHODS, _OTHER), 0)
        self.responses = {
            (status, outcome): 0 for status in range(len(_CLASSES)) for outcome in _OUTCOMES
        }
        # counts by bucket; the last bucket is unbounded
        self.latency = [0] * (len(LATENCY_BUCKETS) + 1)
        self.seconds = 0.0  # the sum of all latencies

    def request(self, method: bytes) -> RequestRecord:
        """Count a request and open its record: `with metrics.request(b"GET") as record: ...
        record.head(200)`.
        """
        requests = self.requests
        requests[method if method in requests else _OTHER] += 1
        return RequestRecord(self, self.clock())

    def waited(self, seconds: float) -> None:
        """A response's head arrived this long after the request's head."""
        self.latency[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.seconds += seconds

    def finished(self, record: RequestRecord, kind: type[BaseException] | None) -> None:
        """Close a record; the record calls this itself. Failures are server errors, and requests
        without a response.
        """
        status = record.status // 100 if 100 <= record.status < 600 else 0
        if kind is None:
            outcome = "failure" if record.failed or status in (0, 5) else "success"
        else:
            outcome = "cancelled" if issubclass(kind, trio.Cancelled | GeneratorExit) else "failure"
        self.responses[status, outcome] += 1


class HttpCollector(Collector):
    """Reports the numbers of all directions to Prometheus; directions may be added later."""

    def __init__(self, metrics: Mapping[Direction, HttpMetrics]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "isthmus_requests", "HTTP requests received.", labels=("direction", "method")
        )
        responses = CounterMetricFamily(
            "isthmus_responses",
            "Finished HTTP exchanges, by status class.",
            labels=("direction", "status_class", "classification"),
        )
        latency = HistogramMetricFamily(
            "isthmus_response_latency_seconds",
            "Time from the head of a request to the head of its response.",
            labels=("direction",),
        )
        # one atomic copy: other threads read this too
        for direction, metrics in list(self._metrics.items()):
            for method, count in metrics.requests.items():
                requests.add_metric((direction, method.decode()), count)
            for (status, outcome), count in metrics.responses.items():
                responses.add_metric((direction, _CLASSES[status], outcome), count)
            buckets = zip(_BOUNDS, accumulate(list(metrics.latency)), strict=True)
            latency.add_metric((direction,), list(buckets), metrics.seconds)
        yield from (requests, responses, latency)
