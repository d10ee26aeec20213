"""W3C trace context: the `traceparent` and `tracestate` headers.

W3C Recommendation "Trace Context", level 1, with the random flag of level 2. A traceparent is
`version-traceid-parentid-flags`, in lower-case hexadecimal. Of a higher version, the first four
fields are used as in version 00 (section 3.2.4): a proxy that refused it would cut every trace when
applications upgrade. A header with any error counts as absent, because half a context would join
unrelated spans. The tracestate belongs to the tracing systems. It is forwarded byte for byte. It is
parsed only for the span, where it is cut to its limits. If it is malformed, the span omits it
completely (section 3.3.1.5), but keeps the traceparent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tracing.context import NO_SPAN, NO_TRACE, REPEATED, Field, Format, Places, TraceContext

SAMPLED = 0x01
RANDOM = 0x02
# Section 3.3.1.1: at most 32 members. Section 3.3.1.5: at least 512 characters must be kept. We
# keep 512, and drop whole members: first those over 128 characters, then from the end.
MOST_MEMBERS = 32
MOST_CHARACTERS = 512
LONG_MEMBER = 128
# A longer list is forwarded, but not shown on spans.
_LONGEST = 4096

# Of the flags, only the known bits may be used (section 3.2.4).
_FLAGS = {b"%02x" % bits: (bits & SAMPLED != 0, bits & RANDOM != 0) for bits in range(256)}
_BITS = {(True, False): b"01", (True, True): b"03", (False, False): b"00", (False, True): b"02"}
_PARENT = re.compile(
    rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z", re.DOTALL
)
# The header's line in its usual form, after another line: version 00 and known flags only. And the
# offset of the span id in it.
USUAL = re.compile(
    rb"\n.{11}: 00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-0(?:([13])|[02])\r\n"
)
USUAL_SPAN = len(b"\ntraceparent: 00-%b-" % NO_TRACE)
_STATE = b"\ntracestate: "
_KEY = re.compile(
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})\Z"
)
_VALUE = re.compile(r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]\Z")


def parse(traceparent: bytes) -> TraceContext | None:
    """Parse the header's value. None: it is not valid."""
    match = _PARENT.match(traceparent) or _PARENT.match(traceparent.strip(b" \t"))
    if match is None:
        return None
    version, trace, span, flags, rest = match.groups()
    if (
        trace == NO_TRACE
        or span == NO_SPAN
        or version == b"ff"
        or (rest is not None and version == b"00")
    ):
        return None
    return TraceContext(trace, span, *_FLAGS[flags])


def traceparent(context: TraceContext) -> bytes:
    """The header's value, always of version 00, with its flags (sampled, random)."""
    return b"00-%b-%b-%b" % (
        context.trace_id,
        context.span_id,
        _BITS[context.sampled is True, context.random],
    )


def _read(places: Places, fields: list[Field]) -> TraceContext | None:
    # More than one traceparent counts as none (section 3.2).
    place = places.get(b"traceparent", REPEATED)
    context = parse(fields[place][1]) if place != REPEATED else None
    if context is not None and b"tracestate" in places:
        context.state = _state(places, fields)
    return context


def _state(places: Places, fields: list[Field]) -> tuple[bytes, ...]:
    """The tracestate for the span. Empty if it is too long to wait in the queue."""
    place = places[b"tracestate"]
    every = place == REPEATED
    state = (
        tuple([value for name, value in fields if name.lower() == b"tracestate"])
        if every
        else (fields[place][1],)
    )
    return state if sum(map(len, state)) <= _LONGEST else ()


def _write(places: Places, fields: list[Field], child: TraceContext) -> None:
    place = places[b"traceparent"]
    fields[place] = (fields[place][0], traceparent(child))


W3C = Format("w3c", _read, _write)


def state_of(lines: bytes, lower: bytes) -> tuple[bytes, ...] | None:
    """Fast version of `_state` for lines that each end with CRLF (`lower`: in lower case).

    None: there is more than one tracestate, or it is in the first line.
    """
    begins = lower.find(_STATE) + len(_STATE)
    found = begins >= len(_STATE)
    if lower.count(_STATE[1:-1]) != found:
        return None
    ends = lines.index(b"\r", begins) if found else begins
    return (lines[begins:ends],) if 0 < ends - begins <= _LONGEST else ()


def parse_state(values: Iterable[bytes]) -> tuple[tuple[str, str], ...]:
    """Parse the members of a tracestate; several headers form one list (section 3.3.1.4).

    Empty if a member is malformed or repeated, or if there are more than 32.
    """
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
