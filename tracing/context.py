"""The trace context of a request, independent of the header format.

Ids are stored as in most headers, in lower-case hexadecimal: they are forwarded in a header of the
same kind, and no code needs the number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Field = tuple[bytes, bytes]
# The positions of the trace headers: lower-case name -> index into the fields, or REPEATED.
Places = dict[bytes, int]
REPEATED = -1

# The result of a fast parser, for lines that each end with CRLF: trace id, the caller's span id,
# whether the trace is recorded, tracestate, offset of the span id in the lines, offset of the
# parent id (0: the header has none), and length of the parent id in bytes.
RecognisedContext = tuple[bytes, bytes, bool, tuple[bytes, ...], int, int, int]

NO_TRACE, NO_SPAN = b"0" * 32, b"0" * 16


@dataclass(slots=True)
class TraceContext:
    """The trace, the caller's span, and whether the trace is recorded.

    `trace_id` has 32 digits, or none: then the header only says whether to record a new trace, and
    `span_id` is empty too. `sampled` is None if the caller leaves the decision to the receiver.
    `parent` is the parent of a span of this proxy; it is not used for a caller's span.
    """

    trace_id: bytes
    span_id: bytes
    sampled: bool | None
    random: bool = False  # the trace id is random in its last 7 bytes (W3C level 2)
    debug: bool = False  # B3: always record
    state: tuple[bytes, ...] = ()  # the values of the tracestate headers, as they arrived
    parent: bytes = b""


@dataclass(frozen=True, slots=True)
class Format:
    """A header format for contexts.

    `read(places, fields)` returns the context, or None if there is no valid one. `write(places,
    fields, child)` replaces what `read` has found by `child`, in place.
    """

    name: str
    read: Callable[[Places, list[Field]], TraceContext | None]
    write: Callable[[Places, list[Field], TraceContext], None]


def value_at(places: Places, fields: list[Field], name: bytes) -> bytes | None:
    """The value of the only field with this name. None: there is none, or more than one."""
    place = places.get(name)
    return fields[place][1] if place is not None and place != REPEATED else None


def put(places: Places, fields: list[Field], name: bytes, value: bytes) -> None:
    """Set the value of a field and keep the case of its name. Append the field if it is missing.

    Repeated fields are ambiguous, so they stay unchanged.
    """
    place = places.get(name)
    if place is None:
        places[name] = len(fields)
        fields.append((name, value))
    elif place != REPEATED:
        fields[place] = (fields[place][0], value)
