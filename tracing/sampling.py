"""Decides whether a trace is recorded, and creates ids.

The sender that began a trace has decided for all of it. A proxy that follows this decision keeps
traces complete. Without a decision (no context, or one that leaves it open), the trace id is
compared with the ratio, like OpenTelemetry's TraceIdRatioBased. So all proxies with the same ratio
decide alike, without communication. Ratio 0, the default, means that this proxy begins no traces.

A proxy that does not follow is at the edge, where untrusted clients connect, and decides for all
hops after it. If it decides against recording, but the caller wanted it, the decision is forwarded.
Otherwise the next hops would record what this proxy is configured to exclude. A decision is changed
together with the span id (W3C, section 3.4).

Ids are random but not secret: one generator, seeded by the system, is fifteen times cheaper than a
system call for each id.
"""

from __future__ import annotations

import random
from binascii import hexlify
from dataclasses import dataclass

from tracing.context import REPEATED, Field, TraceContext
from tracing.propagation import (
    ExtractedContext,
    begin,
    drop_standard,
    extract,
    extract_at,
    locate,
    recognise,
    replace,
)
from tracing.w3c import traceparent

_RATIO_BITS = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """`ratio`: the part of undecided traces to record, 0 to 1. `follow`: follow the caller."""

    ratio: float = 0.0
    follow: bool = True

    def records(self, trace_id: bytes) -> bool:
        """Whether a trace without a decision is recorded."""
        return int(trace_id[16:], 16) < int(self.ratio * 2**_RATIO_BITS)


@dataclass(slots=True)
class Trace:
    """The trace of a request.

    If it is `sampled`, the ids are those of our span, `parent` is the caller's span (b"": none),
    and the request's headers have our span. Otherwise the ids are the caller's, for the log.
    """

    sampled: bool
    trace_id: bytes
    span_id: bytes
    parent: bytes = b""
    state: tuple[bytes, ...] = ()


class Tracer:
    """Decides and creates ids for one kind of listener. Never waits; no state per request."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._begins = sampling.ratio > 0
        self._bits = random.Random().getrandbits  # noqa: S311  (seeded from the system; not a secret)

    def span_id(self) -> bytes:
        """A new id, never zero."""
        return hexlify((self._bits(64) or 1).to_bytes(8, "big"))

    def begin(self, fields: list[Field]) -> Trace | None:
        """Return the trace of a request with these header fields; None: there is no trace.

        The fields are rewritten in place if our span is to be recorded, or if this proxy has
        decided about a new trace.
        """
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
        """Handle several traceparents, which count as none (W3C, section 3.2).

        The next hop might use any of them. So exactly one is forwarded: that of the context in
        another format, or of a new trace.
        """
        drop_standard(fields)
        carried = extract(fields)
        if carried is None:
            return self._root(fields)
        if not carried.context.trace_id:
            return self._go_on(fields, carried)
        fields.append((b"traceparent", traceparent(carried.context)))
        return self.begin(fields)

    def _go_on(self, fields: list[Field], carried: ExtractedContext) -> Trace | None:
        """Return the trace of a request that arrived with a context."""
        context = carried.context
        trace_id = context.trace_id or b"%032x" % (self._bits(128) or 1)
        sampled = context.sampled
        decided = (
            sampled
            if sampled is not None and self._sampling.follow
            else self._sampling.records(trace_id)
        )
        if not decided:
            span_id = context.span_id
            if sampled or (sampled is None and self._begins):
                span_id = span_id and self.span_id()
                refusal = TraceContext(
                    context.trace_id, span_id, False, context.random, parent=context.span_id
                )
                replace(fields, carried, refusal)
            return Trace(False, context.trace_id, span_id) if span_id else None
        caller, span_id = context.span_id, self.span_id()
        # From here on the context is ours.
        context.trace_id, context.span_id, context.parent, context.sampled = (
            trace_id,
            span_id,
            caller,
            True,
        )
        for written in carried.formats:
            written.write(carried.places, fields, context)
        return Trace(True, trace_id, span_id, caller, context.state)

    def glance(self, lines: bytes) -> tuple[Trace | None, bytes] | None:
        """Fast version of `begin` for the most common header lines. None: call `begin`.

        Returns the trace, and the lines to forward.
        """
        lower = lines.lower()
        mentions = lower.count(b"trace")
        if not mentions and lower.find(b"b3") < 0:  # every trace header's name has one
            return None if self._begins else (None, lines)
        found = recognise(lines, lower, mentions) if self._sampling.follow else None
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
        """Fast version of `next_attempt` for lines that `glance` can parse. None: it cannot."""
        lower = lines.lower()
        found = recognise(lines, lower, lower.count(b"trace"))
        if found is None:
            return None
        trace.span_id = span_id = self.span_id()
        place, shown, width = found[4:]
        lines = lines[:place] + span_id + lines[place + 16 :]
        return lines[:shown] + parent + lines[shown + width :] if shown else lines

    def connection(self) -> Trace | None:
        """The trace of a connection whose protocol cannot carry one. None: it is not recorded."""
        if not self._begins:
            return None
        trace_id = b"%032x" % (self._bits(128) or 1)
        return Trace(True, trace_id, self.span_id()) if self._sampling.records(trace_id) else None

    def next_attempt(self, trace: Trace, fields: list[Field], parent: bytes) -> None:
        """Give the next attempt of a request its own span under `parent`."""
        trace.span_id = self.span_id()
        carried = extract(fields)  # what we wrote for the previous attempt, in the original formats
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
        # A negative decision is forwarded too; otherwise the next proxy would decide again.
        root = TraceContext(trace_id, self.span_id(), sampled, random=True)
        begin(fields, root)
        return Trace(sampled, trace_id, root.span_id)
