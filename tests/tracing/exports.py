"""An export queue with short waits, and a collector that stores what it gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tracing import export
from tracing.otlp import Collector
from tracing.queue import Exporter, QueueSettings, SpanQueue
from tracing.resource import About, Resource

FAST = QueueSettings(limit=100, batch=10, delay=0.02, timeout=10)


class Book:
    """The counters. Every span must be in them once."""

    def __init__(self) -> None:
        self.taken = 0
        self.lost: Counter[str] = Counter()
        self.results: Counter[str] = Counter()
        self.reports: list[str] = []

    def exported(self, spans: int) -> None:
        self.taken += spans

    def dropped(self, reason: str, spans: int) -> None:
        self.lost[reason] += spans

    def attempted(self, result: str) -> None:
        self.results[result] += 1

    @property
    def all(self) -> int:
        return self.taken + sum(self.lost.values())


def otlp(endpoint: str, **collector: Any) -> export.OtlpExporter:
    about = About(
        {"POD_NAME": "web-7d4b9c6f5d-x2x9k", "POD_NAMESPACE": "shop"}, cluster="east", version="9"
    )
    return export.OtlpExporter(
        export.SpanFactory(Resource(about, print), "9"),
        Collector(f"{endpoint}/v1/traces", **collector),
    )


@contextmanager
def queue(
    build: Callable[[], Exporter], settings: QueueSettings = FAST
) -> Iterator[tuple[SpanQueue, Book]]:
    book = Book()
    spans = SpanQueue(build, settings, book, book.reports.append)
    try:
        yield spans, book
    finally:
        spans.close(5)
