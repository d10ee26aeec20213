"""A request as the server sees it, what the server is like, and what may happen to a request instead of its answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from lab.kube_api.changes import matches_fields, matches_labels, shown
from lab.kube_api.store import Json, Problem


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one request instead of its answer. `raw`: these bytes; `hang`: nothing at all; else the connection is cut, before
    the answer, or after so many bytes of it (`after`). `only`: a part of the target that the request must have."""

    raw: bytes = b""
    hang: bool = False
    after: int | None = None
    only: str = ""


def refuse(code: int, reason: str = "", retry_after: int | None = None, only: str = "") -> Fault:
    """An answer with an error."""
    body = json.dumps(Problem(code, reason, "as the test wants it").body).encode()
    more = f"Retry-After: {retry_after}\r\n" if retry_after is not None else ""
    head = f"HTTP/1.1 {code} X\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return Fault(raw=head.encode() + body, only=only)


@dataclass(slots=True)
class Behaviour:
    """What the server is like. `streaming`: "yes", "refused" (422), or "unknown" (the parameter is ignored). `gone`: how a version that
    is too old is told, "event" or "status". `tokens`: who may come (none: everybody). `forbidden`: plurals that are answered by 403."""

    streaming: str = "yes"
    gone: str = "event"
    tokens: dict[str, Json] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    allowed: Callable[[Json], bool] = lambda _: True
    down: bool = False
    mute: bool = False  # watches say nothing any more, and stay open


@dataclass(frozen=True, slots=True)
class Asked:
    """A request."""

    method: str
    target: str
    path: str
    query: dict[str, str]
    accept: str
    kind: str
    token: str
    body: bytes


def selected(item: Json, query: dict[str, str]) -> bool:
    """Whether an object is one of those that a request is about."""
    labels = item["metadata"].get("labels") or {}
    return matches_labels(query.get("labelSelector", ""), labels) and matches_fields(query.get("fieldSelector", ""), item)


def view(item: Json, asked: Asked) -> Json:
    """An object in the form that was asked for."""
    if "PartialObjectMetadata" in asked.accept:
        return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}
    return shown(item)
