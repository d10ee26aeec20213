"""Limits that a request sets for itself by header, if the service's policy allows it (`overrides:
true`).

    isthmus-timeout            maximum time of the whole request (policy.timeouts.request)
    isthmus-response-timeout   maximum time to the response head (policy.timeouts.response_head)
    isthmus-attempt-timeout    maximum time of an attempt (policy.retries.attempt_timeout)
    isthmus-retry-limit        maximum number of retries (policy.retries.limit)
    isthmus-retry-statuses     statuses to retry: `503, 5xx` (policy.retries.statuses)
    isthmus-retry-grpc         gRPC statuses to retry: `unavailable, 8` (policy.retries.grpc)

The values have the format of the directory, lists are separated by commas. Only the proxy beside
the application reads these headers. No proxy forwards them (wire/messages.py), so a peer cannot set
limits in another proxy. If the policy does not allow them, the proxy ignores them."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import msgspec

from proxy.directory.policy import Policy, Retries, Timeouts
from proxy.errors import RequestError
from proxy.settings.declare import Shape, shape
from proxy.settings.decode import leaf
from proxy.wire.messages import Headers

_PLACES: dict[bytes, tuple[str, type[msgspec.Struct], str]] = {
    b"isthmus-timeout": ("timeouts", Timeouts, "request"),
    b"isthmus-response-timeout": ("timeouts", Timeouts, "response_head"),
    b"isthmus-attempt-timeout": ("retries", Retries, "attempt_timeout"),
    b"isthmus-retry-limit": ("retries", Retries, "limit"),
    b"isthmus-retry-statuses": ("retries", Retries, "statuses"),
    b"isthmus-retry-grpc": ("retries", Retries, "grpc"),
}


def _shape(struct: type[msgspec.Struct], field: str) -> Shape:
    return shape(get_type_hints(struct, include_extras=True)[field])


_SHAPES = {name: _shape(struct, field) for name, (_, struct, field) in _PLACES.items()}


def overridden(policy: Policy, headers: Headers) -> Policy:
    """`policy` with the limits that the request sets. Raises RequestError with the name of the
    header and the expected value."""
    changes: dict[str, dict[str, Any]] = {}
    for name, value in headers.items:
        if (place := _PLACES.get(lower := name.lower())) is not None:
            try:
                found = _value(value.decode("ascii"), _SHAPES[lower])
            except ValueError as error:
                raise RequestError(f"{lower.decode()}: {error}") from error
            changes.setdefault(place[0], {})[place[2]] = found
    if not changes:
        return policy
    parts = {
        part: msgspec.structs.replace(getattr(policy, part), **fields)
        for part, fields in changes.items()
    }
    return msgspec.structs.replace(policy, **parts)


def _value(text: str, form: Shape) -> object:
    if form.type is int:
        return leaf(
            int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text, form
        )
    if form.type is float:
        return leaf(text, form)
    element = shape(get_args(form.type)[0])
    words = [word.strip() for word in text.split(",")]
    if form.most is not None and len(words) > form.most:
        raise ValueError(f"at most {form.most} elements, found {len(words)}")
    return tuple(
        leaf(int(word) if word.isascii() and word.isdigit() and len(word) < 4 else word, element)
        for word in words
        if word
    )
