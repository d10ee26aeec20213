"""Where a request is in its trace, whatever the headers are called that say so.

Ids are kept as they travel in most headers, in lower-case hexadecimal: what comes in one header goes out in another of the same kind, and
nothing on the way needs the number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Field = tuple[bytes, bytes]
# Where the trace headers of a request stand: lower-case name -> index into its fields; REPEATED if there are several of that name.
Places = dict[bytes, int]
REPEATED = -1

# The same at a glance, for lines of which each ends with CRLF: the trace, the caller's span, whether the trace is recorded, the tracestate,
# where the span stands in the lines, and where its parent (0: the header has none), and how many bytes that has.
Glimpse = tuple[bytes, bytes, bool, tuple[bytes, ...], int, int, int]

NO_TRACE, NO_SPAN = b"0" * 32, b"0" * 16


@dataclass(slots=True)
class TraceContext:
    """The trace, the caller's span, and whether the trace is being recorded.

    `trace_id` has 32 digits, or none: then the header says only whether to record the trace that begins here. `sampled` is None where
    the caller leaves that to whoever comes next. `span_id` has none either where `trace_id` has none. `parent` is the parent of a span of
    this proxy's. For a caller's span it is not used.
    """

    trace_id: bytes
    span_id: bytes
    sampled: bool | None
    random: bool = False  # the trace id is random in its last 7 bytes (W3C level 2)
    debug: bool = False  # B3: recorded whatever it costs
    state: tuple[bytes, ...] = ()  # the values of the tracestate headers, as they came
    parent: bytes = b""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a context into headers.

    `read(places, fields)`: the context; None if there is none that is valid. `write(places, fields, context, child)`: `child` in the place
    of what `read` has found, in place.
    """

    name: str
    read: Callable[[Places, list[Field]], TraceContext | None]
    write: Callable[[Places, list[Field], TraceContext], None]


def value_at(places: Places, fields: list[Field], name: bytes) -> bytes | None:
    """The value of the one field of this name; None if there is none, or more than one."""
    place = places.get(name)
    return fields[place][1] if place is not None and place != REPEATED else None


def put(places: Places, fields: list[Field], name: bytes, value: bytes) -> None:
    """Give the field a new value, under the name it came with; add it if it is not there. Which of several is meant nobody can tell: they
    stay as they are."""
    place = places.get(name)
    if place is None:
        places[name] = len(fields)
        fields.append((name, value))
    elif place != REPEATED:
        fields[place] = (fields[place][0], value)
