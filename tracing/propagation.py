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

from tracing.b3 import MULTI, SINGLE
from tracing.context import NO_SPAN, NO_TRACE, REPEATED, Field, Format, Places, TraceContext
from tracing.grpc_bin import GRPC
from tracing.w3c import USUAL, W3C, traceparent

FORMATS: tuple[Format, ...] = (W3C, GRPC, SINGLE, MULTI)
NAMES = frozenset(
    {b"traceparent", b"tracestate", b"grpc-trace-bin", b"b3"}
    | {b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"}
)
STANDARD = (W3C,)


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


def mentioned(lower: bytes) -> bool:
    """Whether there may be trace headers among these lines, which are in lower case: quicker than to look for them, and right where it says
    no."""
    return b"trace" in lower or b"b3" in lower


def usual(lines: bytes, lower: bytes) -> tuple[bytes, bytes, bytes, int] | None:
    """The context of a request with these lines (`name: value`, each with its CRLF; `lower`: the same in lower case), where the standard's
    header says it alone and in its usual form: trace, span, flags, and where the span stands. None: more has to be looked at."""
    match = USUAL.search(lines)
    if match is None or lower.count(b"traceparent:") > 1 or b"b3:" in lower or b"x-b3-" in lower or b"grpc-trace-bin:" in lower:
        return None
    trace_id, span_id, flags = match.groups()
    return (trace_id, span_id, flags, match.start(2)) if trace_id != NO_TRACE and span_id != NO_SPAN else None


def extract(fields: list[Field]) -> Carried | None:
    """The context of a request; None if there is no valid one."""
    places = locate(fields)
    if not places:
        return None
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
    fields[:] = [field for field in fields if field[0].lower() not in (b"traceparent", b"tracestate")]
    fields.append((b"traceparent", traceparent(root)))
