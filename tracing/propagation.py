"""The trace context of a request, in whichever headers it came; and the same headers with our span in the caller's place.

The format that came is kept, and only what says "my span" is changed in it: whoever is behind us understands what was sent to us. In
what order formats are looked for decides nothing where all say the same; where they contradict each other the standard wins. Senders that
change over from one format to another send both: all that name the same trace are given our span, or those who read the other one
would take us out of the chain. Headers of another trace stay as they are, and so does everything that is not valid.

A span that is not recorded changes nothing: the header goes on with the caller's span, which is the last one that anybody will find. Only a
decision that those behind us could not know from it is written into it (sampling.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from tracing.b3 import MULTI, SINGLE, TRACE_ID, glimpse_multi, glimpse_single
from tracing.context import REPEATED, Field, Format, Glimpse, Places, TraceContext
from tracing.grpc_bin import GRPC
from tracing.jaeger import JAEGER, glimpse_jaeger
from tracing.w3c import USUAL, USUAL_SPAN, W3C, state_of, traceparent

FORMATS: tuple[Format, ...] = (W3C, GRPC, SINGLE, MULTI, JAEGER)
NAMES = frozenset(
    {b"traceparent", b"tracestate", b"grpc-trace-bin", b"b3", b"uber-trace-id"}
    | {b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"}
)
STANDARD = (W3C,)
# The standard's header among lines in lower case, if it is not the first.
_TRACEPARENT = b"\ntraceparent: "


@dataclass(slots=True)
class Carried:
    """A context as it came (ours, once it is written over), and the formats that carry it."""

    context: TraceContext
    formats: tuple[Format, ...]
    places: Places


def locate(fields: list[Field]) -> Places:
    """Where the trace headers stand in the fields of a request."""
    places: Places = {}
    for place, field in enumerate(fields):
        name = field[0].lower()
        if name in NAMES:
            places[name] = REPEATED if name in places else place
    return places


def glimpse(lines: bytes, lower: bytes, mentions: int) -> Glimpse | None:
    """The context of a request with these lines (`name: value`, each with its CRLF; `lower`: the same in lower case), where one format says
    it alone, in its usual form, and not in the first line, which nearly always is Host. `mentions`: how often they say "trace".
    Where that is no more than the format does itself, there is no other format. None: they have to be looked at longer."""
    if not mentions:
        return glimpse_single(lines, lower)
    at = lower.find(_TRACEPARENT)
    if at < 0:
        if lower.find(b"uber-trace-id:") >= 0:
            return glimpse_jaeger(lines, lower) if mentions == 1 else None
        several = lower.find(TRACE_ID)
        if mentions != (several >= 0) and (lower.find(b"traceparent:") >= 0 or lower.find(b"grpc-trace-bin:") >= 0):
            return None
        return glimpse_single(lines, lower) if several < 0 else glimpse_multi(lines, lower, several)
    match = USUAL.match(lines, at)
    if match is None or lower.find(b"b3:") >= 0:
        return None
    trace_id, span_id, sampled = match.groups()
    if mentions == 1:  # what B3 says in several headers says nothing without the trace's id
        return trace_id, span_id, sampled is not None, (), at + USUAL_SPAN, 0, 0
    state = state_of(lines, lower)
    if state is None or (mentions > 1 + len(state) and _several(lower)):
        return None
    return trace_id, span_id, sampled is not None, state, at + USUAL_SPAN, 0, 0


def _several(lower: bytes) -> bool:
    """Whether lines with a traceparent have another one, or a context in another format that says "trace"."""
    others = lower.find(b"grpc-trace-bin:") >= 0 or lower.find(b"x-b3-traceid:") >= 0 or lower.find(b"uber-trace-id:") >= 0
    return others or lower.count(b"traceparent:") > 1


def extract(fields: list[Field]) -> Carried | None:
    """The context of a request; None if there is no valid one."""
    places = locate(fields)
    return extract_at(places, fields) if places else None


def extract_at(places: Places, fields: list[Field]) -> Carried | None:
    """The same where it is known where the trace headers stand."""
    if len(places) == (b"traceparent" in places) + (b"tracestate" in places):  # as nearly always: nobody else has to be asked
        found = W3C.read(places, fields)
        return Carried(found, STANDARD, places) if found is not None else None
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
    return Carried(context, formats, places) if context is not None else None


def _same(one: bytes, other: bytes) -> bool:
    """The same trace; a system with ids of 64 bits knows the last half of a longer one."""
    if one == other:
        return True
    return one[16:] == other[16:] and one[16:] != b"" and b"0" * 16 in (one[:16], other[:16])


def replace(fields: list[Field], carried: Carried, child: TraceContext) -> None:
    """Write `child` over the context that was extracted from `fields`, in place. The places are looked for again, as others may have
    added fields since."""
    places = locate(fields)
    for written in carried.formats:
        written.write(places, fields, child)


def header(trace_id: bytes, span_id: bytes) -> Field:
    """The context of a recorded span, for a message of our own."""
    return (b"traceparent", traceparent(TraceContext(trace_id, span_id, sampled=True, random=True)))


def begin(fields: list[Field], root: TraceContext) -> None:
    """Write the context of a trace that begins here, in place. What is there of the same headers is not valid, and goes."""
    drop_standard(fields)
    fields.append((b"traceparent", traceparent(root)))


def drop_standard(fields: list[Field]) -> None:
    """Remove the standard's headers."""
    fields[:] = filter(lambda field: field[0].lower() not in (b"traceparent", b"tracestate"), fields)  # the same objects: messages._others
