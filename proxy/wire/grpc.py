"""What a proxy has to know of gRPC: deadlines and statuses (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import re

from proxy.wire.messages import Headers

# TimeoutValue is a positive integer of at most eight digits.
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MOST = 10**8


def parse_timeout(value: bytes) -> float | None:
    """Seconds of a `grpc-timeout`; None: it is none."""
    match = _TIMEOUT.fullmatch(value)
    return int(match[1]) * _SECONDS[match[2]] if match is not None else None


def write_timeout(seconds: float) -> bytes:
    """A `grpc-timeout` of at most so many seconds, as exact as it can be."""
    for unit in (b"u", b"m", b"S"):
        if (count := int(max(0.0, seconds) / _SECONDS[unit])) < _MOST:
            return b"%d%s" % (count, unit)
    return b"%dS" % (_MOST - 1)


def status(head: Headers, trailers: Headers) -> int | None:
    """The status of a call that has ended: in the trailers, or in the head of a response that has nothing else; None: there is none."""
    return code(trailers.get(b"grpc-status") or head.get(b"grpc-status"))


def code(value: bytes | None) -> int | None:
    """The number in a `grpc-status`; None: it is none."""
    return int(value) if value is not None and value.isdigit() and len(value) < 4 else None
