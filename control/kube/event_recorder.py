"""Kubernetes Events: messages about an object, which `kubectl describe` shows.

`record` never waits and never fails. It puts the event into a queue. When the queue is full, the
oldest event is dropped. Repetitions of an event become one event with a count (events.k8s.io/v1,
`series`), which is written at intervals. Writes are paced, so that a fault of ten thousand objects
does not load the API server.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import trio

from control.kube.api_errors import KubeError
from control.kube.client import Client
from control.kube.error_log import ErrorLog
from control.kube.objects import Event, Meta, ObjectReference
from control.kube.resources import EVENTS
from proxy.settings.declare import Section, number, seconds

# Limits of the API server (validation of events.k8s.io/v1).
_MOST_NOTE = 1024
_MOST_WORD = 128
# A name is a DNS subdomain. The last part of an event's name is added here.
_MOST_NAME = 230


class RecorderRules(Section, frozen=True):
    """Kubernetes events about Services with a problem."""

    max_queued: Annotated[
        int, number(1, 100_000, "maximum events that wait; above: the oldest is dropped")
    ] = 256
    max_remembered: Annotated[
        int,
        number(
            1,
            100_000,
            "maximum events that are kept to count their repetitions; above: the least recent one"
            " is forgotten",
        ),
    ] = 1024
    forget_after: Annotated[
        float, seconds(1, 86400, "time for which an event is kept to count its repetitions")
    ] = 360.0
    repeat_interval: Annotated[
        float, seconds(1, 86400, "minimum time between two writes of the same event")
    ] = 60.0
    interval: Annotated[float, seconds(0.01, 60, "minimum time between any two writes")] = 0.2


@dataclass(frozen=True, slots=True)
class EventContent:
    """An event. `reason`: a CamelCase identifier. `note`: a sentence. `action`: what was tried."""

    regarding: ObjectReference
    reason: str
    note: str
    action: str
    warning: bool = False


@dataclass(slots=True)
class _Series:
    count: int = 1
    last: float = 0.0
    written: int = 0  # how much of `count` has been written
    written_at: float = float("-inf")
    stored: Event | None = None


class EventRecorder:
    """Writes events as `controller`. `instance` is the name of this process."""

    def __init__(
        self, client: Client, controller: str, instance: str, rules: RecorderRules | None = None
    ) -> None:
        self.dropped = 0
        self.written = 0
        self._client = client
        self._reporter = controller, instance
        self._rules = rules or RecorderRules()
        self._series: OrderedDict[EventContent, _Series] = OrderedDict()
        self._waiting: OrderedDict[EventContent, None] = OrderedDict()
        self._queued = trio.Event()
        self._errors = ErrorLog("Kubernetes events")

    def record(self, content: EventContent) -> None:
        """Queue an event about an object."""
        now = trio.current_time()
        series = self._series.get(content)
        if series is None or now - series.last > self._rules.forget_after:
            series = self._series[content] = _Series()
        else:
            series.count += 1
        series.last = now
        self._series.move_to_end(content)
        while len(self._series) > self._rules.max_remembered:
            old, _ = self._series.popitem(last=False)
            self._drop(old)
        self._waiting[content] = None
        while len(self._waiting) > self._rules.max_queued:
            self._drop(next(iter(self._waiting)))
        self._queued.set()

    def _drop(self, content: EventContent) -> None:
        if content in self._waiting:
            del self._waiting[content]
            self.dropped += 1

    async def run(self) -> None:
        """Write queued events, until cancelled."""
        while True:
            if not self._waiting:
                await self._queued.wait()
            self._queued = trio.Event()
            now = trio.current_time()
            due = [
                content
                for content in self._waiting
                if now - self._series[content].written_at >= self._rules.repeat_interval
            ]
            for content in due:
                if (
                    self._waiting.pop(content, False) is None
                    and (series := self._series.get(content)) is not None
                ):
                    await self._write(content, series)
                    await trio.sleep(self._rules.interval)
            if self._waiting and not due:  # only repetitions, and no count is due yet
                first = (
                    min(self._series[content].written_at for content in self._waiting)
                    + self._rules.repeat_interval
                )
                with trio.move_on_at(max(first, now + self._rules.interval)):
                    await self._queued.wait()

    async def _write(self, content: EventContent, series: _Series) -> None:
        count = series.count
        try:
            if series.stored is None:
                series.stored = await self._client.create(
                    EVENTS, self._event(content), content.regarding.namespace or "default"
                )
            if count > 1:
                changes = {"series": {"count": count, "lastObservedTime": _now()}}
                await self._client.patch(EVENTS, series.stored, changes)
            series.written = count
            self.written += 1
            self._errors.works()
        except KubeError as error:
            series.stored = None  # the stored event may no longer exist
            self.dropped += 1
            self._errors.failed(str(error))
        series.written_at = trio.current_time()

    def _event(self, content: EventContent) -> Event:
        controller, instance = self._reporter
        unique = f"{random.getrandbits(64):016x}"  # part of a name, not a secret
        name = f"{content.regarding.name[:_MOST_NAME].rstrip('.-')}.{unique}"
        return Event(
            metadata=Meta(name=name, namespace=content.regarding.namespace or "default"),
            event_time=_now(),
            type="Warning" if content.warning else "Normal",
            reason=content.reason[:_MOST_WORD],
            action=content.action[:_MOST_WORD],
            note=content.note.encode()[:_MOST_NOTE].decode(errors="ignore"),
            reporting_controller=controller,
            reporting_instance=instance[:_MOST_WORD],
            regarding=content.regarding,
        )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
