"""B3, Zipkin's trace headers, in both forms (openzipkin/b3-propagation).

Single: `b3: traceid-spanid[-sampled[-parentspanid]]`, or only the sampling state. Multi:
`X-B3-TraceId`, `X-B3-SpanId`, `X-B3-ParentSpanId`, `X-B3-Sampled`, `X-B3-Flags`. A trace id has 64
or 128 bits and keeps its width; the shorter one is the same number with leading zeros. The sampling
state is 1, 0, `d` (debug: always record; in the multi form `X-B3-Flags: 1`), or absent: the
receiver decides. Older senders write true and false.

A parent id is written only if one arrived. It becomes the caller's span id, because the proxy's own
id replaces that one.
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

_SINGLE = re.compile(
    rb"([0-9a-f]{16}|[0-9a-f]{32})-([0-9a-f]{16})(?:-([01d])(?:-[0-9a-f]{16})?)?\Z"
)
_TRACE = re.compile(rb"[0-9a-f]{16}(?:[0-9a-f]{16})?\Z")
_SPAN = re.compile(rb"[0-9a-f]{16}\Z")
# Both forms in their usual shape: with ids and a decision.
_USUAL = re.compile(
    rb"\n[Bb]3:"
    rb" (?!0+-)([0-9a-f]{32}|[0-9a-f]{16})-(?!0{16})([0-9a-f]{16})-([01d])(-[0-9a-f]{16})?\r\n"
)
_USUAL_TRACE = re.compile(rb"\n.{12}: (?!0+\r)([0-9a-f]{32}|[0-9a-f]{16})\r\n")
_USUAL_SPAN = re.compile(rb"\n.{11}: (?!0+\r)([0-9a-f]{16})\r\n")
TRACE_ID, _SPAN_ID, _PARENT_ID, _DECISION = (
    b"\nx-b3-traceid: ",
    b"\nx-b3-spanid: ",
    b"\nx-b3-parentspanid: ",
    b"\nx-b3-sampled: ",
)
_SAMPLED: dict[bytes, bool] = {b"1": True, b"0": False, b"true": True, b"false": False, b"d": True}


def _context(
    trace: bytes, span: bytes, sampled: bool | None, *, debug: bool
) -> TraceContext | None:
    trace = trace.rjust(32, b"0")
    if trace == NO_TRACE or span == NO_SPAN:
        return None
    return TraceContext(trace, span, sampled, debug=debug)


def _read_single(places: Places, fields: list[Field]) -> TraceContext | None:
    value = value_at(places, fields, b"b3")
    if value is None:
        return None
    value = value.strip(b" \t")
    if value in (b"0", b"1", b"d"):
        return TraceContext(b"", b"", _SAMPLED[value], debug=value == b"d")
    match = _SINGLE.match(value)
    if match is None:
        return None
    trace, span, state = match.groups()
    return _context(trace, span, None if state is None else _SAMPLED[state], debug=state == b"d")


def _write_single(places: Places, fields: list[Field], child: TraceContext) -> None:
    parts = (value_at(places, fields, b"b3") or b"").strip(b" \t").split(b"-")
    trace = parts[0] if len(parts) > 1 else child.trace_id
    state = b"d" if child.debug else {True: b"1", False: b"0", None: b""}[child.sampled]
    written = [trace, child.span_id] if child.span_id else []
    if state:
        written.append(state)
        if len(parts) > 3:
            written.append(child.parent or parts[3])
    put(places, fields, b"b3", b"-".join(written))


def _read_multi(places: Places, fields: list[Field]) -> TraceContext | None:
    trace, span = (
        value_at(places, fields, b"x-b3-traceid"),
        value_at(places, fields, b"x-b3-spanid"),
    )
    state, flags = (
        value_at(places, fields, b"x-b3-sampled"),
        value_at(places, fields, b"x-b3-flags"),
    )
    debug = flags is not None and flags.strip(b" \t") == b"1"
    sampled = True if debug else _SAMPLED.get((state or b"").strip(b" \t").lower())
    if b"x-b3-traceid" not in places and b"x-b3-spanid" not in places:
        return TraceContext(b"", b"", sampled, debug=debug) if sampled is not None else None
    if trace is None or span is None:
        return None  # one without the other, or repeated
    trace, span = trace.strip(b" \t"), span.strip(b" \t")
    if not _TRACE.match(trace) or not _SPAN.match(span):
        return None
    return _context(trace, span, sampled, debug=debug)


def _write_multi(places: Places, fields: list[Field], child: TraceContext) -> None:
    if child.span_id:
        if b"x-b3-traceid" not in places:
            put(places, fields, b"x-b3-traceid", child.trace_id)
        put(places, fields, b"x-b3-spanid", child.span_id)
    if child.parent and b"x-b3-parentspanid" in places:
        put(places, fields, b"x-b3-parentspanid", child.parent)
    if child.sampled is False and b"x-b3-flags" in places:
        put(places, fields, b"x-b3-flags", b"0")
    state = _SAMPLED.get((value_at(places, fields, b"x-b3-sampled") or b"").strip(b" \t").lower())
    if child.sampled is not None and not child.debug and state is not child.sampled:
        put(places, fields, b"x-b3-sampled", b"1" if child.sampled else b"0")


SINGLE = Format("b3", _read_single, _write_single)
MULTI = Format("b3multi", _read_multi, _write_multi)


def recognise_single(lines: bytes, lower: bytes) -> RecognisedContext | None:
    """Fast version of `_read_single` for the usual form of the header.

    The lines must have no context in another format. `lower`: the lines in lower case. None: the
    caller must use the complete parser.
    """
    at = lower.find(b"\nb3: ")
    match = _USUAL.match(lines, at) if at >= 0 else None
    if match is None or lower.count(b"b3:") > 1 or lower.find(b"x-b3-") >= 0:
        return None
    trace, span, state, parent = match.groups()
    return (
        trace.rjust(32, b"0"),
        span,
        state != b"0",
        (),
        match.start(2),
        match.start(4) + 1 if parent else 0,
        len(NO_SPAN),
    )


def recognise_multi(lines: bytes, lower: bytes, trace_at: int) -> RecognisedContext | None:
    """Fast version of `_read_multi` for the usual form of the headers.

    `trace_at`: the offset of TRACE_ID in `lower`. None: the caller must use the complete parser.
    """
    span_at, decision_at, parent_at = (
        lower.find(_SPAN_ID),
        lower.find(_DECISION),
        lower.find(_PARENT_ID),
    )
    if span_at < 0 or decision_at < 0 or lower.find(b"b3:") >= 0:
        return None
    # The count matches: no header is repeated, none is in the first line, and none is X-B3-Flags.
    if lower.count(b"x-b3-") != (3 if parent_at < 0 else 4):
        return None
    trace, span = _USUAL_TRACE.match(lines, trace_at), _USUAL_SPAN.match(lines, span_at)
    decision_at += len(_DECISION)
    decision = lines[decision_at : decision_at + 3]
    if trace is None or span is None or decision not in (b"1\r\n", b"0\r\n"):
        return None
    shown = 0
    if parent_at >= 0:
        shown = parent_at + len(_PARENT_ID)
        if lines.index(b"\r", shown) != shown + len(NO_SPAN):
            return None  # the value is not an id, so it cannot be replaced by one of equal length
    return (
        trace[1].rjust(32, b"0"),
        span[1],
        decision == b"1\r\n",
        (),
        span.start(1),
        shown,
        len(NO_SPAN),
    )
