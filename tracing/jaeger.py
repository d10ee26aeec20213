"""`uber-trace-id`, Jaeger's own header (jaegertracing.io, Client Libraries, Propagation Format).

    uber-trace-id: {trace-id}:{span-id}:{parent-span-id}:{flags}

All four are hexadecimal numbers. Ids may lack leading zeros; a trace id has up to 128 bits, the
others 64. A parent of 0 means that the span is a root. Flags: 1 is sampled, 2 is debug (always
record), and the others are forwarded. Some clients percent-encode the colons. The trace id, the
other flags and the form of the colons are forwarded unchanged.
"""

from __future__ import annotations

import re

from tracing.context import (
    NO_SPAN,
    NO_TRACE,
    Field,
    Format,
    Places,
    RecognisedContext,
    TraceContext,
    put,
    value_at,
)

NAME = b"uber-trace-id"
SAMPLED, DEBUG = 0x01, 0x02

_VALUE = re.compile(
    rb"([0-9a-fA-F]{1,32})(:|%3[Aa])([0-9a-fA-F]{1,16})\2([0-9a-fA-F]{1,16})\2([0-9a-fA-F]{1,2})\Z"
)
# The header's line in its usual form, after another line.
_USUAL = re.compile(
    rb"\n.{13}: (?!0+:)([0-9a-f]{1,32}):(?!0{16}:)([0-9a-f]{16}):(0|[0-9a-f]{16}):([01])\r\n"
)
_LINE = b"\n" + NAME + b": "


def _match(places: Places, fields: list[Field]) -> re.Match[bytes] | None:
    value = value_at(places, fields, NAME)
    return _VALUE.match(value.strip(b" \t")) if value is not None else None


def _read(places: Places, fields: list[Field]) -> TraceContext | None:
    match = _match(places, fields)
    if match is None:
        return None
    trace, span, flags = (
        match[1].lower().rjust(32, b"0"),
        match[3].lower().rjust(16, b"0"),
        int(match[5], 16),
    )
    if trace == NO_TRACE or span == NO_SPAN:
        return None
    return TraceContext(trace, span, flags & (SAMPLED | DEBUG) != 0, debug=flags & DEBUG != 0)


def _write(places: Places, fields: list[Field], child: TraceContext) -> None:
    match = _match(places, fields)
    if match is None:
        return
    trace, colon, _, parent, came = match.groups()
    flags = int(came, 16)
    flags = flags | SAMPLED if child.sampled else flags & ~(SAMPLED | DEBUG)
    written = b"%x" % flags
    put(
        places,
        fields,
        NAME,
        colon.join((trace, child.span_id, child.parent or parent, written.rjust(len(came), b"0"))),
    )


JAEGER = Format("uber-trace-id", _read, _write)


def recognise_jaeger(lines: bytes, lower: bytes) -> RecognisedContext | None:
    """Fast version of `_read` for the usual form of the header.

    The lines must have no other context whose format has "trace" in its name. `lower`: the lines in
    lower case. None: the caller must use the complete parser.
    """
    at = lower.find(_LINE)
    match = _USUAL.match(lines, at) if at >= 0 else None
    if match is None or lower.find(b"b3:") >= 0 or lower.find(b"x-b3-") >= 0:
        return None
    trace, span, parent, flag = match.groups()
    return (
        trace.rjust(32, b"0"),
        span,
        flag == b"1",
        (),
        match.start(2),
        match.start(3),
        len(parent),
    )
