"""Reads the trace context of a request in any of the header formats, and writes ours in its place.

The format that arrived is kept, and only the caller's span id is replaced, so the next hop
understands what was sent to us. If the formats agree, their order has no effect. If they
contradict, the standard wins. Senders that migrate between two formats send both: our span is
written into all that have the same trace. Otherwise readers of the other format would not see our
span in the chain. Headers of another trace stay unchanged, and so do invalid ones.

A span that is not recorded changes nothing: the header keeps the caller's span, which is the last
one that exists. Only a decision that the next hops cannot derive from it is written (sampling.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from tracing.b3 import MULTI, SINGLE, TRACE_ID, recognise_multi, recognise_single
from tracing.context import REPEATED, Field, Format, Places, RecognisedContext, TraceContext
from tracing.grpc_bin import GRPC
from tracing.jaeger import JAEGER, recognise_jaeger
from tracing.w3c import USUAL, USUAL_SPAN, W3C, state_of, traceparent

FORMATS: tuple[Format, ...] = (W3C, GRPC, SINGLE, MULTI, JAEGER)
NAMES = frozenset(
    {b"traceparent", b"tracestate", b"grpc-trace-bin", b"b3", b"uber-trace-id"}
    | {b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"}
)
STANDARD = (W3C,)
# The standard header in lines in lower case, if it is not in the first line.
_TRACEPARENT = b"\ntraceparent: "


@dataclass(slots=True)
class ExtractedContext:
    """A context (replaced by ours after the write), and the formats that carry it."""

    context: TraceContext
    formats: tuple[Format, ...]
    places: Places


def locate(fields: list[Field]) -> Places:
    """The positions of the trace headers in the fields of a request."""
    places: Places = {}
    for place, field in enumerate(fields):
        name = field[0].lower()
        if name in NAMES:
            places[name] = REPEATED if name in places else place
    return places


def recognise(lines: bytes, lower: bytes, mentions: int) -> RecognisedContext | None:
    """Fast parser for a context in one format only, in its usual form. None: use `extract`.

    `lines`: `name: value`, each with CRLF. `lower`: the same in lower case. The header must not be
    in the first line, which is usually Host. `mentions`: how often `lower` has "trace". If this is
    as often as the format itself needs, there is no other format.
    """
    if not mentions:
        return recognise_single(lines, lower)
    at = lower.find(_TRACEPARENT)
    if at < 0:
        if lower.find(b"uber-trace-id:") >= 0:
            return recognise_jaeger(lines, lower) if mentions == 1 else None
        several = lower.find(TRACE_ID)
        if mentions != (several >= 0) and (
            lower.find(b"traceparent:") >= 0 or lower.find(b"grpc-trace-bin:") >= 0
        ):
            return None
        return (
            recognise_single(lines, lower)
            if several < 0
            else recognise_multi(lines, lower, several)
        )
    match = USUAL.match(lines, at)
    if match is None or lower.find(b"b3:") >= 0:
        return None
    trace_id, span_id, sampled = match.groups()
    if mentions == 1:  # without a trace id, other headers of B3 have no meaning
        return trace_id, span_id, sampled is not None, (), at + USUAL_SPAN, 0, 0
    state = state_of(lines, lower)
    if state is None or (mentions > 1 + len(state) and _several(lower)):
        return None
    return trace_id, span_id, sampled is not None, state, at + USUAL_SPAN, 0, 0


def _several(lower: bytes) -> bool:
    """Whether lines with a traceparent have a second one, or another format with "trace"."""
    others = (
        lower.find(b"grpc-trace-bin:") >= 0
        or lower.find(b"x-b3-traceid:") >= 0
        or lower.find(b"uber-trace-id:") >= 0
    )
    return others or lower.count(b"traceparent:") > 1


def extract(fields: list[Field]) -> ExtractedContext | None:
    """Return the context of a request. None: there is no valid one."""
    places = locate(fields)
    return extract_at(places, fields) if places else None


def extract_at(places: Places, fields: list[Field]) -> ExtractedContext | None:
    """Return the context of a request with these positions of the trace headers, or None."""
    if len(places) == (b"traceparent" in places) + (b"tracestate" in places):  # the usual case
        found = W3C.read(places, fields)
        return ExtractedContext(found, STANDARD, places) if found is not None else None
    context: TraceContext | None = None
    formats: tuple[Format, ...] = ()
    for candidate in FORMATS:
        found = candidate.read(places, fields)
        if found is None:
            continue
        if context is None:
            context, formats = found, (candidate,)
        elif _same(context.trace_id, found.trace_id):
            formats = (*formats, candidate)
    return ExtractedContext(context, formats, places) if context is not None else None


def _same(one: bytes, other: bytes) -> bool:
    """Whether the trace ids are equal. A system with 64-bit ids knows only the last half."""
    if one == other:
        return True
    return one[16:] == other[16:] and one[16:] != b"" and b"0" * 16 in (one[:16], other[:16])


def replace(fields: list[Field], carried: ExtractedContext, child: TraceContext) -> None:
    """Replace the context that was extracted from `fields` by `child`, in place.

    The positions are determined again, because fields may have been added since.
    """
    places = locate(fields)
    for written in carried.formats:
        written.write(places, fields, child)


def header(trace_id: bytes, span_id: bytes) -> Field:
    """The header with the context of a recorded span, for a message of our own."""
    return (b"traceparent", traceparent(TraceContext(trace_id, span_id, sampled=True, random=True)))


def begin(fields: list[Field], root: TraceContext) -> None:
    """Write the context of a new trace, in place.

    Existing headers of the standard are invalid here.
    """
    drop_standard(fields)
    fields.append((b"traceparent", traceparent(root)))


def drop_standard(fields: list[Field]) -> None:
    """Remove the headers of the standard, in place."""
    fields[:] = filter(
        lambda field: field[0].lower() not in (b"traceparent", b"tracestate"), fields
    )  # the same objects: messages._others
