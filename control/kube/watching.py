"""Parses the body of a watch: lines of JSON, one event each. It has no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from control.kube import objects
from control.kube.api_errors import InvalidAnswer, TooLarge
from control.kube.client import refusal
from control.kube.objects import Object, WatchEvent
from control.kube.resources import Resource, decode

T = TypeVar("T", bound=objects.Object)

INITIAL_EVENTS_END = "k8s.io/initial-events-end"

_event = msgspec.json.Decoder(WatchEvent)
_object = msgspec.json.Decoder(Object)


class Lines:
    """Splits data into lines. A line may have at most `most` bytes."""

    __slots__ = ("_most", "_parts", "_size")

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts: list[bytes] = []  # of the incomplete line
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that `data` completes. Raises TooLarge."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._keep(data[start:end])
            line, self._parts, self._size = b"".join(self._parts), [], 0
            start = end + 1
            if line.strip():
                yield line
        self._keep(data[start:])

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._most:
            raise TooLarge(
                f"an event of a watch is larger than {self._most} bytes (watch.max_event_bytes)"
            )
        if part:
            self._parts.append(part)

    @property
    def pending(self) -> int:
        """Bytes of the incomplete line."""
        return self._size


@dataclass(frozen=True, slots=True)
class ObjectChange(Generic[T]):
    """A change of an object. `gone`: deleted, or no longer selected. `added`: it is new."""

    item: T
    gone: bool
    added: bool


@dataclass(frozen=True, slots=True)
class Bookmark:
    """All changes up to `version` have been sent. `complete`: the initial events end here."""

    version: str
    complete: bool


def event_of(line: bytes, resource: Resource[T]) -> ObjectChange[T] | Bookmark:
    """Parse a line. Raises Refused for an ERROR event (the watch has ended), and InvalidAnswer."""
    event = decode(_event, line)
    if event.type == "ERROR":
        raise refusal(event.object, 0)
    if event.type == "BOOKMARK":
        found = decode(_object, event.object)
        if found.kind != resource.kind:
            raise InvalidAnswer(
                f"expected a bookmark of kind {resource.kind}, found {found.kind!r}"
            )
        return Bookmark(
            found.metadata.resource_version,
            (found.metadata.annotations or {}).get(INITIAL_EVENTS_END) == "true",
        )
    if event.type not in ("ADDED", "MODIFIED", "DELETED"):
        raise InvalidAnswer(f"an event of the unknown type {event.type[:40]!r}")
    return ObjectChange(resource.one(event.object), event.type == "DELETED", event.type == "ADDED")
