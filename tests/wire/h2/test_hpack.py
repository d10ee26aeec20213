"""HPACK with a cache in front. It never differs from the library alone: a plain decoder reads what
we encode, and we read what a plain encoder writes, over any sequence of blocks, table sizes and
evictions. The cache stays small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import hpack
import pytest
from hpack import huffman_table
from hpack.hpack import encode_integer
from hypothesis import given, settings

from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.h2.fields import NeverIndexedField, Pair
from proxy.wire.h2.frames import Code, ConnectionFault
from proxy.wire.h2.hpack import _REMEMBERED, Decoder, Encoder
from tests.kit.drawn import Choices, drawn
from tests.kit.http2 import literal

# Few names and values, so that blocks repeat; some so large that the table holds few of them, or
# none.
NAMES = [
    b":method",
    b":path",
    b"authorization",
    b"cookie",
    b"content-length",
    b"x-a",
    b"x-b",
    b"accept",
    b"traceparent",
    b"x-request-id",
]
VALUES = [
    b"",
    b"1",
    b"2",
    b"GET",
    b"/",
    b"gzip, deflate",
    b"v" * 30,
    b"w" * 900,
    b"x" * 3000,
    b"y" * 5000,
]
SIZES = [0, 31, 64, 100, 1000, 3000, 4096, 10000]


def fields(choices: Choices) -> list[Pair]:
    return choices.some(6, lambda: (choices.of(NAMES), choices.of(VALUES)))


@pytest.fixture(scope="module", autouse=True)
def huffman_once() -> Iterator[None]:
    """The Huffman code of the library takes milliseconds for a long string, and these tests use few
    long ones. So each is coded once."""
    coder = hpack.Encoder().huffman_coder
    encode, decode = lru_cache(coder.encode), lru_cache(huffman_table.decode_huffman)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(coder), "encode", lambda _, text: encode(text))
        patch.setattr(hpack.hpack, "decode_huffman", decode)
        yield


def plain(pairs: Sequence[tuple[bytes, bytes]]) -> list[Pair]:
    return [(bytes(name), bytes(value)) for name, value in pairs]


def table(coder: hpack.Encoder | hpack.Decoder) -> list[tuple[bytes, bytes]]:
    return plain(list(coder.header_table.dynamic_entries))


def step(choices: Choices) -> list[Pair] | int:
    match choices.below(3):
        case 0:
            return choices.of(SIZES)
        case 1:
            return fields(choices)
        case _:
            return fields(choices) * 2


@settings(max_examples=300)
@given(steps=drawn(200, lambda choices: choices.few(25, lambda: step(choices))))
def test_a_plain_decoder_and_our_own_read_what_we_encode(steps: list[list[Pair] | int]) -> None:
    encoder, decoder, ours = Encoder(), hpack.Decoder(max_header_list_size=10**6), Decoder(10**6)
    for step in steps:
        if isinstance(step, int):
            encoder.resize(step)
            # The decoder refuses a block that does not start with the size updates that it needs.
            decoder.max_allowed_table_size = step
            continue
        block = encoder.encode(step)
        assert plain(list(decoder.decode(block, raw=True))) == step
        assert ours.decode(block) == step
        assert table(decoder) == table(encoder._hpack) == table(ours._hpack)
        assert encoder._held <= _REMEMBERED


def step_of_a_peer(choices: Choices) -> tuple[list[Pair], bool] | int:
    """A table size, or a block, and whether its fields are secret."""
    if choices.below(3) == 0:
        return choices.of(SIZES)
    return fields(choices), choices.below(4) == 1


@settings(max_examples=300)
@given(steps=drawn(200, lambda choices: choices.few(25, lambda: step_of_a_peer(choices))))
def test_we_read_what_a_plain_encoder_writes_as_a_plain_decoder_does(
    steps: list[int | tuple[list[Pair], bool]],
) -> None:
    encoder, ours, theirs = (
        hpack.Encoder(),
        Decoder(10**5),
        hpack.Decoder(max_header_list_size=10**6),
    )
    for step in steps:
        if isinstance(step, int):
            if (
                min(step, 4096) != encoder.header_table_size
            ):  # the same size twice, and the library does not send the second
                encoder.header_table_size = min(step, 4096)
            continue
        pairs, secret = step
        block = encoder.encode([(*pair, secret) for pair in pairs])
        read = ours.decode(block)
        assert read is not None
        assert list(read) == plain(list(theirs.decode(block, raw=True))) == pairs
        assert table(ours._hpack) == table(theirs)
        assert ours._held <= _REMEMBERED


def representation(first: int, more: bytes, name: bytes, value: bytes) -> bytes:
    """Of any kind; `more` continues an index that does not fit into `first`, and strings have
    lengths of one, two or three bytes."""
    if first >= 0x80 or first & 0xE0 == 0x20:
        return bytes([first]) + more
    index = first & (0x3F if first & 0x40 else 0x0F)
    sized = [bytes(encode_integer(len(text), 7)) + text for text in (name, value)]
    return bytes([first]) + more + (sized[1] if index else sized[0] + sized[1])


FIRST = [0x00, 0x10, 0x0F, 0x1F, 0x01, 0x40, 0x82, 0xBE, 0xBF, 0xFF]
LENGTHS = [126, 127, 128, 254, 255, 300, 16509, 16512]


def any_representation(choices: Choices) -> bytes:
    return representation(
        choices.of(FIRST) if choices.below(2) else choices.below(256),
        choices.binary(2) if choices.below(2) else b"",
        choices.of([b"", b"a", b"cookie"]),
        bytes(choices.of(LENGTHS)) if choices.below(2) else choices.binary(4),
    )


def any_block(choices: Choices) -> bytes:
    if choices.below(2) == 0:
        return choices.binary(12)
    return b"".join(choices.some(4, lambda: any_representation(choices)))


@settings(max_examples=600, deadline=None)
@given(blocks=drawn(160, lambda choices: choices.some(12, lambda: any_block(choices))))
def test_any_bytes_are_read_as_a_plain_decoder_reads_them(blocks: list[bytes]) -> None:
    ours, theirs = Decoder(10**6), hpack.Decoder(max_header_list_size=4 * 10**6)
    for block in blocks * 2:
        try:
            expected = list(theirs.decode(block, raw=True))
        except hpack.HPACKError:
            with pytest.raises(ConnectionFault) as caught:
                ours.decode(block)
            assert caught.value.code is Code.COMPRESSION_ERROR
            return
        read = ours.decode(block)
        assert read is not None
        assert list(read) == plain(expected)
        assert [isinstance(field, NeverIndexedField) for field in read] == [
            not field.indexable for field in expected
        ]
        assert table(ours._hpack) == table(theirs)


def test_a_never_indexed_field_stays_so_even_if_the_same_field_is_in_the_table() -> None:
    encoder, decoder = Encoder(), Decoder(1000)
    for _ in range(3):
        encoder.encode([(b"x-a", b"1")])
    (field,) = decoder.decode(literal([(b"x-a", b"1")], 0x10)) or ()
    assert isinstance(field, NeverIndexedField)
    assert field == (b"x-a", b"1")
    assert encoder.encode([field]) == literal([(b"x-a", b"1")], 0x10)
    assert encoder.encode([(b"x-a", b"1")]) == b"\xbe"


@pytest.mark.parametrize(
    "field",
    [
        (b"authorization", b"Bearer " + b"t" * 800),
        (b"proxy-authorization", b"Basic YTpi"),
        (b"cookie", b"id=0123456789"),
    ],
)
def test_what_could_be_guessed_is_never_put_into_a_table(field: Pair) -> None:
    encoder, decoder = Encoder(), hpack.Decoder()
    for _ in range(2):
        (read,) = decoder.decode(encoder.encode([field]), raw=True)
        assert isinstance(read, hpack.NeverIndexedHeaderTuple)
        assert not decoder.header_table.dynamic_entries


def test_a_long_cookie_is_put_into_the_table() -> None:
    encoder = Encoder()
    first = encoder.encode([(b"cookie", b"c" * 40)])
    assert encoder.encode([(b"cookie", b"c" * 40)]) == b"\xbe" != first


@pytest.mark.parametrize("name", [b":path", b"content-length", b"traceparent", b"grpc-timeout"])
def test_what_is_hardly_ever_sent_twice_leaves_the_table_alone(name: bytes) -> None:
    encoder = Encoder()
    encoder.encode([(b"x-a", b"1")])
    for number in range(1000):
        encoder.encode([(name, b"/%d" % number), (b"x-a", b"1")])
    assert len(encoder._hpack.header_table.dynamic_entries) == 1
    assert encoder._held <= _REMEMBERED


def test_the_path_of_the_static_table_is_an_index() -> None:
    assert (
        Encoder().encode([(b":path", b"/"), (b":method", b"POST"), (b":status", b"404")])
        == b"\x84\x83\x8d"
    )


def test_only_the_smallest_and_the_last_table_size_are_sent() -> None:
    encoder = Encoder()
    encoder.encode([(b"x-a", b"1")])
    for _ in range(10000):
        for size in (4096, 50, 0, 200, 200):
            encoder.resize(size)
    assert encoder.encode([]) == b"\x20" + b"\x3f" + bytes([200 - 31 - 128 + 128, 1])
    assert encoder.encode([]) == b""


def test_an_unchanged_table_size_is_not_sent() -> None:
    encoder = Encoder()
    encoder.resize(4096)
    encoder.resize(8192)  # more than we use
    assert encoder.encode([]) == b""


def test_the_memory_of_a_decoder_is_bounded_whatever_is_sent() -> None:
    decoder = Decoder(65536)
    for number in range(6000):
        decoder.decode(literal([(b"n", b"%d" % number)]) + b"\x82" * (number % 60))
        assert decoder._held <= _REMEMBERED
    decoder.decode(b"\x82" * 1000)
    assert b"\x82" * 1000 not in decoder._known


def test_what_a_block_becomes_is_bounded_too() -> None:
    """Cookies are joined: a reference of one byte becomes as long as its entry."""
    decoder = Decoder(65536)
    decoder.decode(b"\x60" + bytes(encode_integer(3000, 7)) + b"c" * 3000)
    for number in range(100):
        decoder.decode(literal([(b"n", b"%d" % number)]) + b"\xbe" * 10)
    held = [pairs for pairs in decoder._known.values() if len(pairs) > 2]
    assert sum(len(value) for pairs in held for _, value in pairs) <= _REMEMBERED


def test_a_block_is_remembered_and_forgotten_with_the_table_that_it_was_read_by() -> None:
    decoder = Decoder(1000)
    decoder.decode(b"\x40\1a\1b")
    assert decoder.decode(b"\xbe") == [(b"a", b"b")]
    assert b"\xbe" in decoder._known
    decoder.decode(b"\x40\1c\1d")
    assert decoder.decode(b"\xbe") == [(b"c", b"d")]


def test_a_list_over_the_limit_is_dropped_and_the_table_stays_in_step() -> None:
    decoder = Decoder(200)
    assert decoder.decode(literal([(b"n", b"v" * 100)] * 3)) is None
    assert decoder.decode(b"\x40\1a\1b") == [(b"a", b"b")]
    assert decoder.decode(b"\xbe") == [(b"a", b"b")]


def test_a_bomb_ends_before_it_has_grown() -> None:
    # One entry of nearly the whole table, then a reference to it in every byte: 64 KiB that would
    # be 256 MiB.
    decoder = Decoder(65536)
    decoder.decode(b"\x40\1a" + bytes(encode_integer(4000, 7)) + b"v" * 4000)
    with pytest.raises(ConnectionFault) as caught:
        decoder.decode(b"\xbe" * 65536)
    assert caught.value.code is Code.ENHANCE_YOUR_CALM


def test_a_list_that_is_refused_leaves_encoder_and_decoder_in_step() -> None:
    """What the refused block has put into the table is not in the decoder's."""
    encoder, decoder = Encoder(), Decoder(65536)
    assert decoder.decode(encoder.encode([(b"x-one", b"1" * 40)])) is not None
    with pytest.raises(HeadTooLarge, match=f"of {3 * 47 + 32 + 1 + 5000} bytes"):
        encoder.encode(
            [
                (b"x-one", b"1" * 10),
                (b"x-two", b"2" * 10),
                (b"x-new", b"3" * 10),
                (b"y", b"v" * 5000),
            ],
            4096,
        )
    for _ in range(2):
        pairs = [(b"x-two", b"2" * 10), (b"x-one", b"1" * 40), (b"x-new", b"3" * 10)]
        assert decoder.decode(encoder.encode(pairs)) == pairs


SIZED = [b"a", b"cookie", b"x-long", b":path", b"age"]


def sized(choices: Choices) -> tuple[list[tuple[bytes, int]], int]:
    """The names of fields and the lengths of their values, and a limit."""
    found = choices.some(
        12, lambda: (choices.of(SIZED), choices.below(100 if choices.below(4) else 3001))
    )
    return found, choices.below(1500 if choices.below(2) else 12001)


@settings(max_examples=200, deadline=None)
@given(drawn(200, lambda choices: choices.some(12, lambda: sized(choices))))
def test_no_list_over_the_limit_is_encoded_and_none_below_it_is_refused(
    blocks: list[tuple[list[tuple[bytes, int]], int]],
) -> None:
    encoder, decoder = Encoder(), Decoder(2**20)
    for fields, limit in blocks:
        pairs = [(name, b"%d" % length * (length // 4)) for name, length in fields]
        size = sum(len(name) + len(value) + 32 for name, value in pairs)
        try:
            block = encoder.encode(pairs, limit)
        except HeadTooLarge:
            assert size > limit
        else:
            assert size <= limit
            decoded = decoder.decode(block)
            assert decoded is not None
            assert [tuple(pair) for pair in decoded] == pairs


def test_literals_are_read_with_indexes_and_lengths_of_any_size() -> None:
    decoder = Decoder(10**5)
    assert decoder.decode(b"\x04\1/") == [(b":path", b"/")]
    assert decoder.decode(b"\x0f\x0d\0015") == [(b"content-length", b"5")]
    decoder.decode(b"\x40\1a\1b")
    assert decoder.decode(b"\x0f\x2f\1c") == [(b"a", b"c")]  # the name is in the dynamic table
    for size in (126, 127, 128, 254, 255, 256, 1500, 16600):
        block = b"\0\1a" + bytes(encode_integer(size, 7)) + b"v" * size
        assert decoder.decode(block) == [(b"a", b"v" * size)]
    assert decoder.decode(b"\0\1a\x7f\0" + b"v" * 127) == [(b"a", b"v" * 127)]


def test_a_list_of_exactly_the_limit_is_encoded() -> None:
    encoder = Encoder()
    with pytest.raises(HeadTooLarge):
        encoder.encode([(b"x", b"1")], 33)
    assert Decoder(100).decode(encoder.encode([(b"x", b"1")], 34)) == [(b"x", b"1")]
