"""W3C trace context: the `traceparent` and `tracestate` headers, parsed and made (W3C Recommendation "Trace Context", level 1,
with the random flag of level 2).

A traceparent is `version-traceid-parentid-flags`, in lower-case hexadecimal. Of a higher version than ours the first four fields are
used as if it were ours, as section 3.2.4 asks: a proxy that refused them would cut every trace when applications upgrade. A header
that is not right in any detail is treated as absent: half a context joins spans that do not belong together. The tracestate belongs to
the tracing systems; it is passed on, cut to its limits, and thrown away whole if it is malformed (section 3.3.1.5), never the
traceparent with it.

Everything here is pure; the random number comes from outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

SAMPLED = 0x01
RANDOM = 0x02
# Section 3.3.1.1: at most 32 members; section 3.3.1.5: at least 512 characters have to be passed on. We pass 512, dropping whole members,
# the long ones (over 128 characters) first, then from the end.
MOST_MEMBERS = 32
MOST_CHARACTERS = 512
LONG_MEMBER = 128

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z", re.DOTALL)
_KEY = re.compile(r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})\Z")
_VALUE = re.compile(r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]\Z")
_NO_TRACE, _NO_SPAN = b"0" * 32, b"0" * 16


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where a request is in its trace: 16 bytes of trace id, 8 of span id (the caller's span, or ours after `child`), the flags."""

    trace_id: bytes
    span_id: bytes
    flags: int = 0
    state: tuple[tuple[str, str], ...] = ()

    @property
    def sampled(self) -> bool:
        return bool(self.flags & SAMPLED)

    def child(self, random: Callable[[int], bytes]) -> TraceContext:
        """The same trace, under a new span id from `random(8)`; zeros, which are no id, are drawn again."""
        span_id = random(8)
        while not any(span_id):
            span_id = random(8)
        return replace(self, span_id=span_id)

    def traceparent(self) -> bytes:
        """The header's value, always of version 00, with the flags that version knows (sampled, random)."""
        flags = self.flags & (SAMPLED | RANDOM)
        return b"00-%s-%s-%02x" % (self.trace_id.hex().encode(), self.span_id.hex().encode(), flags)

    def tracestate(self) -> bytes:
        """The header's value; empty when there is nothing to send."""
        return ",".join(f"{key}={value}" for key, value in self.state).encode("ascii")


def parse(traceparent: Iterable[bytes], tracestate: Iterable[bytes] = ()) -> TraceContext | None:
    """The context in the values of the headers of both names, in the order they came; None when there is no valid one.

    More than one traceparent is none (section 3.2); several tracestate headers are one list (section 3.3.1.4).
    """
    values = list(traceparent)
    if len(values) != 1 or (match := _PARENT.match(values[0].strip(b" \t"))) is None:
        return None
    version, trace, span, flags, rest = match.groups()
    if version == b"ff" or trace == _NO_TRACE or span == _NO_SPAN or (version == b"00" and rest is not None):
        return None
    # Of flags that this version does not define only the known bits may be relied upon (section 3.2.4).
    known = int(flags, 16) & (SAMPLED | RANDOM)
    return TraceContext(bytes.fromhex(trace.decode()), bytes.fromhex(span.decode()), known, parse_state(tracestate))


def parse_state(values: Iterable[bytes]) -> tuple[tuple[str, str], ...]:
    """The members of a tracestate; none at all when one is malformed or repeated, or when there are more than 32."""
    members: dict[str, str] = {}
    for value in values:
        for raw in value.split(b","):
            text = raw.strip(b" \t")
            if not text:
                continue  # empty members are allowed
            key, equals, content = text.decode("latin-1").partition("=")
            if not equals or key in members or not _KEY.match(key) or not _VALUE.match(content):
                return ()
            members[key] = content
            if len(members) > MOST_MEMBERS:
                return ()
    return _cut(list(members.items()))


def _cut(members: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    def length(member: tuple[str, str]) -> int:
        return len(member[0]) + len(member[1]) + 2

    total = sum(map(length, members)) - 1
    for member in reversed([member for member in members if length(member) - 1 > LONG_MEMBER]):
        if total <= MOST_CHARACTERS:
            break
        members.remove(member)
        total -= length(member)
    while total > MOST_CHARACTERS:
        total -= length(members.pop())
    return tuple(members)
