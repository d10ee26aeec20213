"""HPACK with a memory in front. It never differs from the library alone: what we encode a plain
decoder reads, what a plain encoder writes we read, over any sequence of blocks, table sizes and
evictions; and the memory stays small."""

from __future__ import annotations

from collections.abc import Sequence

import hpack
import pytest
from hpack.hpack import encode_integer
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.h2.fields import Pair, Secret
from proxy.wire.h2.frames import Code, ConnectionFault
from proxy.wire.h2.hpack import _REMEMBERED, Decoder, Encoder
from tests.kit.http2 import literal

# Few names and values, so that blocks repeat; some so large that the table holds few of them, or
# none.
NAMES = st.sampled_from(
    [
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
)
VALUES = st.sampled_from(
    [
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
)
FIELD = st.tuples(NAMES, VALUES)
BLOCK = st.lists(FIELD, max_size=6)
SIZES = st.sampled_from([0, 31, 64, 100, 1000, 3000, 4096, 10000])


def plain(pairs: Sequence[tuple[bytes, bytes]]) -> list[Pair]:
    return [(bytes(name), bytes(value)) for name, value in pairs]


def table(coder: hpack.Encoder | hpack.Decoder) -> list[tuple[bytes, bytes]]:
    return plain(list(coder.header_table.dynamic_entries))


@settings(max_examples=300)
@given(steps=st.lists(st.one_of(BLOCK, BLOCK.map(lambda block: block * 2), SIZES), max_size=25))
def test_a_plain_decoder_and_our_own_read_what_we_encode(steps: list[list[Pair] | int]) -> None:
    encoder, decoder, ours = Encoder(), hpack.Decoder(max_header_list_size=10**6), Decoder(10**6)
    for step in steps:
        if isinstance(step, int):
            encoder.resize(step)
            # The decoder refuses a block that does not begin with what it has to say of the sizes.
            decoder.max_allowed_table_size = step
            continue
        block = encoder.encode(step)
        assert plain(list(decoder.decode(block, raw=True))) == step
        assert ours.decode(block) == step
        assert table(decoder) == table(encoder._hpack) == table(ours._hpack)
        assert encoder._held <= _REMEMBERED


@settings(max_examples=300)
@given(steps=st.lists(st.one_of(BLOCK, SIZES, st.tuples(BLOCK, st.booleans())), max_size=25))
def test_we_read_what_a_plain_encoder_writes_as_a_plain_decoder_does(
    steps: list[list[Pair] | int | tuple[list[Pair], bool]],
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
            ):  # the same size twice, and the library forgets to tell the other
                encoder.header_table_size = min(step, 4096)
            continue
        pairs, secret = step if isinstance(step, tuple) else (step, False)
        block = encoder.encode([(*pair, secret) for pair in pairs])
        read = ours.decode(block)
        assert read is not None
        assert list(read) == plain(list(theirs.decode(block, raw=True))) == pairs
        assert table(ours._hpack) == table(theirs)
        assert ours._held <= _REMEMBERED


def representation(first: int, more: bytes, name: bytes, value: bytes) -> bytes:
    """Of any kind; `more` continues an index that does not fit into `first`, and strings have
    lengths that need one, two or three bytes."""
    if first >= 0x80 or first & 0xE0 == 0x20:
        return bytes([first]) + more
    index = first & (0x3F if first & 0x40 else 0x0F)
    sized = [bytes(encode_integer(len(text), 7)) + text for text in (name, value)]
    return bytes([first]) + more + (sized[1] if index else sized[0] + sized[1])


REPRESENTATION = st.builds(
    representation,
    st.one_of(
        st.integers(0, 255),
        st.sampled_from([0x00, 0x10, 0x0F, 0x1F, 0x01, 0x40, 0x82, 0xBE, 0xBF, 0xFF]),
    ),
    st.one_of(st.just(b""), st.binary(max_size=2)),
    st.sampled_from([b"", b"a", b"cookie"]),
    st.one_of(
        st.binary(max_size=4),
        st.sampled_from([126, 127, 128, 254, 255, 300, 16509, 16512]).map(bytes),
    ),
)


@settings(max_examples=600, deadline=None)
@given(
    blocks=st.lists(
        st.one_of(st.binary(max_size=12), st.lists(REPRESENTATION, max_size=4).map(b"".join)),
        max_size=12,
    )
)
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
        assert [isinstance(field, Secret) for field in read] == [
            not field.indexable for field in expected
        ]
        assert table(ours._hpack) == table(theirs)


def test_a_field_that_came_as_a_secret_goes_on_as_one_also_if_the_same_one_is_remembered_as_none() -> (
    None
):
    encoder, decoder = Encoder(), Decoder(1000)
    for _ in range(3):
        encoder.encode([(b"x-a", b"1")])
    (field,) = decoder.decode(literal([(b"x-a", b"1")], 0x10)) or ()
    assert isinstance(field, Secret)
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


def test_the_smallest_and_the_last_table_size_are_told_however_many_came() -> None:
    encoder = Encoder()
    encoder.encode([(b"x-a", b"1")])
    for _ in range(10000):
        for size in (4096, 50, 0, 200, 200):
            encoder.resize(size)
    assert encoder.encode([]) == b"\x20" + b"\x3f" + bytes([200 - 31 - 128 + 128, 1])
    assert encoder.encode([]) == b""


def test_a_table_size_that_was_there_before_is_not_told() -> None:
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
    """Cookies are joined: a reference of one byte is as long as what it stands for."""
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


def test_a_list_over_the_limit_is_none_and_the_table_goes_on() -> None:
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


SIZED = st.tuples(
    st.sampled_from([b"a", b"cookie", b"x-long", b":path", b"age"]), st.integers(0, 3000)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(SIZED, max_size=12), st.integers(0, 12000)), max_size=12))
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
