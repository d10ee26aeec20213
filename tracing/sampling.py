"""Whether a trace is recorded, and the ids of what is.

Who began the trace has decided for all of it: a proxy that follows keeps whole traces whole. Where nobody has (no context, or one that
leaves it open), the trace id is held against the ratio, as OpenTelemetry's TraceIdRatioBased does; so all proxies with the same ratio
decide alike without asking each other. Ratio 0, the default, means that this proxy begins no traces.

A proxy that does not follow stands where strangers come in, and decides for all behind it: a *no* against a caller's *yes* is passed on, or
each of those would record what this one was told to keep out. A decision is changed together with the span's id (W3C, section 3.4).

Ids are random and need not be secret: one generator, seeded by the system, is fifteen times cheaper than asking the system for each.
"""

from __future__ import annotations

import random
from binascii import hexlify
from dataclasses import dataclass

from tracing.context import REPEATED, Field, TraceContext
from tracing.propagation import Carried, begin, drop_standard, extract, extract_at, glimpse, locate, replace
from tracing.w3c import traceparent

_RATIO_BITS = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """`ratio`: which part of the traces without a decision is recorded, from 0 to 1. `follow`: the caller's decision counts."""

    ratio: float = 0.0
    follow: bool = True

    def records(self, trace_id: bytes) -> bool:
        """Whether a trace that nobody has decided upon is recorded."""
        return int(trace_id[16:], 16) < int(self.ratio * 2**_RATIO_BITS)


@dataclass(slots=True)
class Trace:
    """What a request has of a trace. Where it is `sampled` the ids are those of our span, `parent` is the caller's (b"": it is the first
    one), and the request's headers say so; otherwise they are the caller's, for the log."""

    sampled: bool
    trace_id: bytes
    span_id: bytes
    parent: bytes = b""
    state: tuple[bytes, ...] = ()


class Tracer:
    """Decides and draws ids for one kind of listener. Nothing in it waits, and nothing is kept per request."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._begins = sampling.ratio > 0
        self._bits = random.Random().getrandbits  # noqa: S311  (seeded from the system; not a secret)

    def span_id(self) -> bytes:
        """A new id, which is not zero."""
        return hexlify((self._bits(64) or 1).to_bytes(8, "big"))

    def begin(self, fields: list[Field]) -> Trace | None:
        """The trace of a request with these header fields, which are rewritten in place where a span of ours is to be recorded, or where
        this proxy has decided for a trace that begins here. None: there is no trace."""
        places = locate(fields)
        if not places:
            return self._root(fields) if self._begins else None
        if places.get(b"traceparent") == REPEATED:
            return self._begin_anew(fields)
        carried = extract_at(places, fields)
        if carried is None:
            return self._root(fields) if self._begins else None
        return self._go_on(fields, carried)

    def _begin_anew(self, fields: list[Field]) -> Trace | None:
        """Several traceparents are none (W3C, section 3.2), and whoever comes next might take one or the other of them for the caller's. So
        exactly one goes on: that of the context in another format, or of a trace that begins here."""
        drop_standard(fields)
        carried = extract(fields)
        if carried is None:
            return self._root(fields)
        if not carried.context.trace_id:
            return self._go_on(fields, carried)
        fields.append((b"traceparent", traceparent(carried.context)))
        return self.begin(fields)

    def _go_on(self, fields: list[Field], carried: Carried) -> Trace | None:
        """The trace of a request that came with a context."""
        context = carried.context
        trace_id = context.trace_id or b"%032x" % (self._bits(128) or 1)
        sampled = context.sampled
        decided = sampled if sampled is not None and self._sampling.follow else self._sampling.records(trace_id)
        if not decided:
            span_id = context.span_id
            if sampled or (sampled is None and self._begins):
                span_id = span_id and self.span_id()
                refusal = TraceContext(context.trace_id, span_id, False, context.random, parent=context.span_id)
                replace(fields, carried, refusal)
            return Trace(False, context.trace_id, span_id) if span_id else None
        caller, span_id = context.span_id, self.span_id()
        # From here on the context is ours.
        context.trace_id, context.span_id, context.parent, context.sampled = trace_id, span_id, caller, True
        for written in carried.formats:
            written.write(carried.places, fields, context)
        return Trace(True, trace_id, span_id, caller, context.state)

    def glance(self, lines: bytes) -> tuple[Trace | None, bytes] | None:
        """What `begin` would find for a request with these lines of header fields, and the lines as they go on then, for the commonest
        ones; None: it has to be asked."""
        lower = lines.lower()
        mentions = lower.count(b"trace")
        if not mentions and lower.find(b"b3") < 0:  # one of them is in the name of each header
            return None if self._begins else (None, lines)
        found = glimpse(lines, lower, mentions) if self._sampling.follow else None
        if found is None:
            return None
        trace_id, caller, sampled, state, place, parent, width = found
        if not sampled:
            return Trace(False, trace_id, caller), lines
        span_id = hexlify((self._bits(64) or 1).to_bytes(8, "big"))
        lines = lines[:place] + span_id + lines[place + 16 :]
        if parent:
            lines = lines[:parent] + caller + lines[parent + width :]
        return Trace(True, trace_id, span_id, caller, state), lines

    def next_glance(self, trace: Trace, lines: bytes, parent: bytes) -> bytes | None:
        """What `next_attempt` would make of lines whose context was seen at a glance. None: it was not."""
        lower = lines.lower()
        found = glimpse(lines, lower, lower.count(b"trace"))
        if found is None:
            return None
        trace.span_id = span_id = self.span_id()
        place, shown, width = found[4:]
        lines = lines[:place] + span_id + lines[place + 16 :]
        return lines[:shown] + parent + lines[shown + width :] if shown else lines

    def connection(self) -> Trace | None:
        """The trace of a connection in which nothing can carry one; None: it has none."""
        if not self._begins:
            return None
        trace_id = b"%032x" % (self._bits(128) or 1)
        return Trace(True, trace_id, self.span_id()) if self._sampling.records(trace_id) else None

    def next_attempt(self, trace: Trace, fields: list[Field], parent: bytes) -> None:
        """The request is sent once more: give it a span of its own under `parent`, beside the last one."""
        trace.span_id = self.span_id()
        carried = extract(fields)  # what we have written for the attempt before, in the formats that it came in
        if carried is None:
            begin(fields, TraceContext(trace.trace_id, trace.span_id, sampled=True, random=True))
            return
        context = carried.context
        context.span_id, context.parent = trace.span_id, parent
        for written in carried.formats:
            written.write(carried.places, fields, context)

    def _root(self, fields: list[Field]) -> Trace:
        trace_id = b"%032x" % (self._bits(128) or 1)
        sampled = self._sampling.records(trace_id)
        # A no is passed on too, or the next proxy would draw lots again.
        root = TraceContext(trace_id, self.span_id(), sampled, random=True)
        begin(fields, root)
        return Trace(sampled, trace_id, root.span_id)
