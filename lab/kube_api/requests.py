"""A parsed request, the server's behaviour, and faults that replace an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from lab.kube_api.changes import matches_fields, matches_labels, without_owners
from lab.kube_api.store import Json, Problem


@dataclass(frozen=True, slots=True)
class Fault:
    """Replaces the answer to one request. `raw`: send these bytes; `hang`: send nothing; otherwise
    cut the connection, before the answer or `after` that many bytes of it. `only`: applies to
    requests whose target contains this.
    """

    raw: bytes = b""
    hang: bool = False
    after: int | None = None
    only: str = ""


def refuse(code: int, reason: str = "", retry_after: int | None = None, only: str = "") -> Fault:
    """An answer with an error."""
    body = json.dumps(Problem(code, reason, "as the test wants it").body).encode()
    more = f"Retry-After: {retry_after}\r\n" if retry_after is not None else ""
    head = (
        f"HTTP/1.1 {code} X\r\nConnection: close\r\nContent-Type:"
        f" application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    )
    return Fault(raw=head.encode() + body, only=only)


@dataclass(slots=True)
class Behaviour:
    """The server's behaviour. `streaming`: "yes", "refused" (422), or "unknown" (the parameter is
    ignored). `gone`: how an expired version is reported, "event" or "status". `tokens`: the
    accepted tokens (empty: all clients). `forbidden`: plurals that are answered with 403.
    """

    streaming: str = "yes"
    gone: str = "event"
    tokens: dict[str, Json] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    allowed: Callable[[Json], bool] = lambda _: True
    down: bool = False
    mute: bool = False  # watches stay open but send nothing more


@dataclass(frozen=True, slots=True)
class ApiRequest:
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
    return matches_labels(query.get("labelSelector", ""), labels) and matches_fields(
        query.get("fieldSelector", ""), item
    )


def view(item: Json, request: ApiRequest) -> Json:
    """An object in the form that was asked for."""
    if "PartialObjectMetadata" in request.accept:
        return {
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": item["metadata"],
        }
    return without_owners(item)
