"""gRPC deadlines and statuses (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import re

from proxy.wire.messages import Headers

# TimeoutValue is a positive integer of at most eight digits.
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MOST = 10**8


def parse_timeout(value: bytes) -> float | None:
    """Parse a `grpc-timeout` into seconds. None: the value is not valid."""
    match = _TIMEOUT.fullmatch(value)
    return int(match[1]) * _SECONDS[match[2]] if match is not None else None


def write_timeout(seconds: float) -> bytes:
    """Encode `seconds` as a `grpc-timeout`: rounded down, in the finest unit that fits."""
    for unit in (b"u", b"m", b"S"):
        if (count := int(max(0.0, seconds) / _SECONDS[unit])) < _MOST:
            return b"%d%s" % (count, unit)
    return b"%dS" % (_MOST - 1)


def status(head: Headers, trailers: Headers) -> int | None:
    """The status of a finished call. None: there is no status.

    It is in the trailers, or in the head of a Trailers-Only response.
    """
    return code(trailers.get(b"grpc-status") or head.get(b"grpc-status"))


def code(value: bytes | None) -> int | None:
    """Parse a `grpc-status`. None: the value is missing or not valid."""
    return int(value) if value is not None and value.isdigit() and len(value) < 4 else None
