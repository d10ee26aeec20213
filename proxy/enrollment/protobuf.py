"""A reader of protobuf messages: what the SPIFFE Workload API needs, and no more.

A message is a sequence of fields. Each has a number and one of four encodings (wire types): varint,
64 bits, length and bytes, 32 bits. The reader does not know the schema. The caller takes the
numbers that it knows and skips the others, so a server can add fields. Groups are an encoding that
proto3 does not have; they are refused.

The input comes from another process. Nothing here allocates more than the input has, and each loop
advances in it.
"""

from __future__ import annotations

from collections.abc import Iterator

# https://protobuf.dev/programming-guides/encoding
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# 64 bits in groups of seven
_MAX_VARINT_BYTES = 10
_MAX_FIELD_NUMBER = (1 << 29) - 1


class InvalidProtobuf(ValueError):
    """The bytes are not a protobuf message. The text says what is wrong, never with contents."""


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a message, in order: number, and bytes or a number without sign. Raises
    InvalidProtobuf when it arrives at a mistake.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if not 1 <= number <= _MAX_FIELD_NUMBER:
            raise InvalidProtobuf(f"a field has the number {number}")
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise InvalidProtobuf(f"field {number} has the encoding {kind}")
        if size > end - at:
            raise InvalidProtobuf(f"field {number} is longer than its message")
        piece = data[at : at + size]
        at += size
        yield number, piece if kind == _BYTES else int.from_bytes(piece, "little")


def octets(number: int, value: bytes | int) -> bytes:
    """The value of a field that has bytes by its schema. Raises InvalidProtobuf."""
    if not isinstance(value, bytes):
        raise InvalidProtobuf(f"field {number} has a number instead of bytes")
    return value


def text(number: int, value: bytes | int) -> str:
    """The value of a field that has text by its schema. Raises InvalidProtobuf."""
    try:
        return octets(number, value).decode()
    except UnicodeDecodeError:
        raise InvalidProtobuf(f"the text of field {number} is not UTF-8") from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, and the place behind it."""
    value = 0
    for count, octet in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (octet & 0x7F) << (7 * count)
        if octet < 0x80:
            if value >> 64:
                break
            return value, at + count + 1
    if len(data) - at >= _MAX_VARINT_BYTES:
        raise InvalidProtobuf("a number has more than 64 bits")
    raise InvalidProtobuf("the message ends within a number")
