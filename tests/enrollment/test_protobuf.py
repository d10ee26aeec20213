"""The reader of protobuf: what was encoded is read, unknown fields are read past, and no input does
anything else than give fields or raise InvalidProtobuf."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.enrollment.protobuf import InvalidProtobuf, fields, octets, text
from tests.kit.workload_api import field, varint

NUMBERS = st.integers(1, 2**29 - 1)
VALUES = st.binary(max_size=200) | st.integers(0, 2**64 - 1)


@pytest.mark.no_cover
@given(st.lists(st.tuples(NUMBERS, VALUES), max_size=10))
def test_fields_are_read_as_they_were_written(found: list[tuple[int, bytes | int]]) -> None:
    assert list(fields(b"".join(field(*one) for one in found))) == found


@pytest.mark.no_cover
@given(st.binary(max_size=300))
def test_any_bytes_are_fields_or_a_mistake(data: bytes) -> None:
    read = 0
    try:
        for number, value in fields(data):
            assert 1 <= number < 2**29
            read += 1 + (len(value) if isinstance(value, bytes) else 1)
    except InvalidProtobuf:
        pass
    assert read <= len(data)


@pytest.mark.no_cover
@given(st.lists(st.tuples(NUMBERS, VALUES), min_size=1, max_size=4), st.data())
def test_a_cut_message_never_gives_other_fields(
    found: list[tuple[int, bytes | int]], draw: st.DataObject
) -> None:
    whole = b"".join(field(*one) for one in found)
    cut = whole[: draw.draw(st.integers(0, len(whole) - 1))]
    read: list[tuple[int, bytes | int]] = []
    with suppress(InvalidProtobuf):
        read.extend(fields(cut))
    assert read == found[: len(read)]
    assert len(read) < len(found)


def test_numbers_of_a_fixed_size_are_read() -> None:
    assert list(fields(b"\x09" + bytes([1, *bytes(7)]) + b"\x15" + bytes([0, 1, 0, 0]))) == [
        (1, 1),
        (2, 256),
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x08", "ends within a number"),
        (b"\x08" + b"\xff" * 10, "more than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "more than 64 bits"),
        (b"\x0a\x05abcd", "field 1 is longer than its message"),
        (b"\x09abc", "field 1 is longer than its message"),
        (b"\x0a" + varint(2**63) + b"x", "field 1 is longer than its message"),
        (b"\x0b", "field 1 has the encoding 3"),
        (b"\x00\x00", "a field has the number 0"),
        (varint(2**32), "a field has the number 536870912"),
    ],
)
def test_a_mistake_is_named(data: bytes, words: str) -> None:
    with pytest.raises(InvalidProtobuf, match=words):
        list(fields(data))


def test_a_value_of_another_type_than_the_schema_has_is_a_mistake() -> None:
    assert octets(1, b"x") == b"x"
    assert text(1, "ä".encode()) == "ä"
    with pytest.raises(InvalidProtobuf, match="field 7 has a number instead of bytes"):
        octets(7, 5)
    with pytest.raises(InvalidProtobuf, match="the text of field 7 is not UTF-8"):
        text(7, b"\xff")
