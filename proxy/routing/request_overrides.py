"""Limits that a request sets for itself, by header, where the policy of the service allows that (`overrides: true`).

    isthmus-timeout            of the whole request (policy.timeouts.request)
    isthmus-response-timeout   to the head of the response (policy.timeouts.response_head)
    isthmus-attempt-timeout    of an attempt (policy.retries.attempt_timeout)
    isthmus-retry-limit        how often it is tried again (policy.retries.limit)
    isthmus-retry-statuses     after which statuses: `503, 5xx` (policy.retries.statuses)
    isthmus-retry-grpc         after which gRPC statuses: `unavailable, 8` (policy.retries.grpc)

Values are written as in the directory, lists with commas. They are for the proxy beside the application alone: wire/messages.py has their
names among those that no proxy passes on, so a peer cannot set limits in another one's stead, and where they are not allowed they are not
looked at.
"""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import msgspec

from proxy.config.decode import Shape, leaf, shape
from proxy.directory.policy import Policy, Retries, Timeouts
from proxy.errors import RequestError
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
    """`policy` with what the request says itself. Raises RequestError that names the header and says what it expects."""
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
    parts = {part: msgspec.structs.replace(getattr(policy, part), **fields) for part, fields in changes.items()}
    return msgspec.structs.replace(policy, **parts)


def _value(text: str, form: Shape) -> object:
    if form.type is int:
        return leaf(int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text, form)
    if form.type is float:
        return leaf(text, form)
    element = shape(get_args(form.type)[0])
    words = [word.strip() for word in text.split(",")]
    if form.most is not None and len(words) > form.most:
        raise ValueError(f"at most {form.most} elements, found {len(words)}")
    return tuple(leaf(int(word) if word.isascii() and word.isdigit() and len(word) < 4 else word, element) for word in words if word)
