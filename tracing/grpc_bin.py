"""`grpc-trace-bin`: the binary context of gRPC libraries with OpenCensus.

Source: census-instrumentation/opencensus-specs, encodings/BinaryEncoding.md. A version byte (0),
then fields. Each field is a byte for its number, then its value: 0, the trace id (16 bytes); 1, the
span id (8); 2, the options (1; the lowest bit is sampled). An unknown number ends the parsing, and
the fields before it count. The header's value is base64. gRPC's own libraries omit the padding and
accept both; we keep the form that arrived.
"""

from __future__ import annotations

import base64
import binascii

from tracing.context import Field, Format, Places, TraceContext, put, value_at

NAME = b"grpc-trace-bin"
_SIZES = {0: 16, 1: 8, 2: 1}
# A context of version 0 has 29 bytes. Later versions may append data, which is forwarded.
_LONGEST = 512


def _decode(value: bytes) -> bytearray | None:
    value = value.strip(b" \t")
    if len(value) > _LONGEST:
        return None
    try:
        return bytearray(
            base64.b64decode(
                value.rstrip(b"=") + b"=" * (-len(value.rstrip(b"=")) % 4), validate=True
            )
        )
    except binascii.Error:
        return None


def _offsets(data: bytearray) -> dict[int, int] | None:
    """The offset of each field's value. None: it is truncated, or not of version 0."""
    if data[:1] != b"\0":
        return None
    offsets: dict[int, int] = {}
    at = 1
    while at < len(data) and data[at] in _SIZES and data[at] not in offsets:
        number = data[at]
        if at + 1 + _SIZES[number] > len(data):
            return None
        offsets[number] = at + 1
        at += 1 + _SIZES[number]
    return offsets


def _read(places: Places, fields: list[Field]) -> TraceContext | None:
    value = value_at(places, fields, NAME)
    data = _decode(value) if value is not None else None
    offsets = _offsets(data) if data is not None else None
    if data is None or not offsets or 0 not in offsets or 1 not in offsets:
        return None
    trace, span = data[offsets[0] :][:16], data[offsets[1] :][:8]
    if not any(trace) or not any(span):
        return None
    sampled = 2 in offsets and data[offsets[2]] & 1 == 1
    return TraceContext(trace.hex().encode(), span.hex().encode(), sampled)


def _write(places: Places, fields: list[Field], child: TraceContext) -> None:
    value = value_at(places, fields, NAME) or b""
    data = _decode(value) or bytearray()
    offsets = _offsets(data) or {}
    data[offsets[1] : offsets[1] + 8] = bytes.fromhex(child.span_id.decode())
    if 2 in offsets:
        data[offsets[2]] = data[offsets[2]] & ~1 | bool(child.sampled)
    elif child.sampled:
        end = max(offset + _SIZES[number] for number, offset in offsets.items())
        data[end:end] = b"\x02\x01"
    written = base64.b64encode(data)
    put(
        places,
        fields,
        NAME,
        written if value.rstrip(b" \t").endswith(b"=") else written.rstrip(b"="),
    )


GRPC = Format("grpc-trace-bin", _read, _write)
