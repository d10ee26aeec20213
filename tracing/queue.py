"""The span queue between the data path and the exporter's thread, which handles failed exports.

The data path calls `put`, which appends or drops, and never waits. The thread wakes up when a batch
is full or after `delay` seconds, and sends what is there, in batches. It holds at most one batch
outside of the queue. If the collector does not accept a batch, the thread retries with growing
pauses. Meanwhile the queue fills, and then new spans are dropped and counted. After `MOST_TRIES`
attempts a batch is dropped.

Python runs one thread at a time, so the exporter takes CPU time from the data path. Long stretches
are worse than the total. A thread that computes keeps the interpreter for 5 ms, and each system
call of the data path would wait this long to get it back. So spans are prepared a few at a time,
with a pause after each step that is as long as the step. There are no pauses if the queue is more
than half full.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tracing.spans import Record

MOST_TRIES = 6
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0

# Spans per step: about a third of a millisecond of work.
SLICE = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of sending a batch.

    `reason`: why it was not accepted completely; None: it was. `again`: it may be sent again, after
    `after` seconds. `lost`: how many spans the collector rejected in a batch that it accepted.
    """

    reason: str | None = None
    again: bool = False
    after: float = 0.0
    lost: int = 0
    words: str = ""


TAKEN = Outcome()


class Exporter(Protocol):
    """Sends spans to their destination. For use by one thread."""

    def prepare(self, records: Sequence[Record]) -> None:
        """Add spans to the next batch.

        Encode them here, so that the work is done in small steps.
        """

    def send(self, seconds: float) -> Outcome:
        """Send the batch within `seconds`. Never raises. The batch stays until `forget`."""
        ...

    def forget(self) -> None:
        """Drop the batch: it is sent or given up."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """`limit` and `batch` in spans, the others in seconds."""

    limit: int = 2048
    batch: int = 512
    delay: float = 5.0
    timeout: float = 10.0


class ExportCounts(Protocol):
    """Counts spans and attempts. Called from both threads."""

    def dropped(self, reason: str, spans: int) -> None: ...
    def exported(self, spans: int) -> None: ...
    def attempted(self, result: str) -> None: ...


class SpanQueue:
    """The queue and its thread, which starts at once.

    `build` creates the exporter in that thread. `complain` is called with a sentence when a problem
    begins and when it ends.
    """

    def __init__(
        self,
        build: Callable[[], Exporter],
        settings: QueueSettings,
        counts: ExportCounts,
        complain: Callable[[str], None],
    ) -> None:
        self._build = build
        self._settings = settings
        self._counts = counts
        self._complain = complain
        self._records: deque[Record] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._deadline = float("inf")
        self._held = 0  # spans of the batch in progress
        self._failing = False
        # A daemon thread: if it hangs in a system call, the process can still exit.
        self._thread = threading.Thread(target=self._run, name="isthmus-spans", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: Record) -> None:
        """Append a record, or drop it. Never waits."""
        records = self._records
        if len(records) >= self._settings.limit or self._closing:
            self._counts.dropped("shutdown" if self._closing else "queue_full", 1)
            return
        records.append(record)
        if len(records) == self._settings.batch:
            self._wake.set()

    def close(self, seconds: float) -> None:
        """Send what is queued, for at most `seconds`. The rest is dropped and counted."""
        self._deadline = time.monotonic() + seconds
        self._closing = True
        self._wake.set()
        self._thread.join(seconds)
        left = len(self._records) + (self._held if self._thread.is_alive() else 0)
        self._records.clear()
        if left:
            self._counts.dropped("shutdown", left)
            self._complain(f"{left} spans were not sent before the end")

    def _run(self) -> None:
        try:
            exporter = self._build()
        except Exception as error:  # noqa: BLE001, RUF100  (the boundary of this thread: the traffic goes on without spans)
            self._complain(f"spans cannot be exported: {error}")
            exporter = _Nowhere()
        while not (self._closing and not self._records):
            if not self._closing:
                self._wake.wait(self._settings.delay)
                self._wake.clear()
            while self._records and time.monotonic() < self._deadline:
                self._export(exporter)
            if time.monotonic() >= self._deadline:
                break
        exporter.close()

    def _export(self, exporter: Exporter) -> None:
        """Send or drop one batch."""
        try:
            self._prepare(exporter)
        except Exception as error:  # noqa: BLE001, RUF100  (one span that cannot be made must not end all others)
            self._trouble("unencodable", f"{type(error).__name__}: {error}", self._held)
        else:
            self._send(exporter)
        self._held = 0
        exporter.forget()

    def _prepare(self, exporter: Exporter) -> None:
        self._held = 0
        while self._records and self._held < self._settings.batch:
            started = time.perf_counter()
            few = [
                self._records.popleft()
                for _ in range(min(SLICE, len(self._records), self._settings.batch - self._held))
            ]
            self._held += len(few)
            exporter.prepare(few)
            if not self._closing and len(self._records) < self._settings.limit // 2:
                time.sleep(time.perf_counter() - started)

    def _send(self, exporter: Exporter) -> None:
        pause, outcome = _FIRST_PAUSE, TAKEN
        for _ in range(MOST_TRIES):
            left = min(self._settings.timeout, self._deadline - time.monotonic())
            if left <= 0:
                outcome = Outcome("shutdown", words="there was no time left to send them")
                break
            outcome = exporter.send(left)
            self._counts.attempted(outcome.reason or "ok")
            if outcome.reason is None:
                self._taken(outcome)
                return
            if not outcome.again or self._closing:
                break
            self._say(outcome)
            # A random factor, so that the proxies of a cluster do not retry at the same time.
            self._wait(max(outcome.after, pause * random.uniform(0.8, 1.2)))  # noqa: S311  # no secret depends on it
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._trouble(outcome.reason or "failed", outcome.words, self._held)

    def _wait(self, seconds: float) -> None:
        """Wait, or until `close` is called. A full batch does not shorten a pause."""
        until = time.monotonic() + seconds
        while not self._closing and (left := until - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()

    def _taken(self, outcome: Outcome) -> None:
        self._counts.exported(self._held - outcome.lost)
        if outcome.lost:
            self._trouble("refused", outcome.words, outcome.lost)
        elif self._failing:
            self._failing = False
            self._complain("spans are exported again")

    def _say(self, outcome: Outcome) -> None:
        if not self._failing:
            self._failing = True
            self._complain(
                f"spans cannot be exported, and will be tried again ({outcome.reason}):"
                f" {outcome.words}"
            )

    def _trouble(self, reason: str, words: str, spans: int) -> None:
        self._counts.dropped(reason, spans)
        if not self._failing:
            self._failing = True
            self._complain(f"{spans} spans were dropped ({reason}): {words}")


class _Nowhere:
    """Stands in for an exporter that could not be created: all spans are dropped and counted."""

    def prepare(self, records: Sequence[Record]) -> None:
        pass

    def send(self, seconds: float) -> Outcome:  # noqa: ARG002  # it takes no time
        return Outcome("no_exporter")

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass
