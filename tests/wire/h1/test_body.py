"""Readers and writers of bodies. Each case is read whole, byte by byte, and with the next message
directly after it; the result must be the same. Bodies that both h11 and we accept have the same
result. The intended differences:

stricter    a bare CR or LF anywhere, control characters in extensions and trailers, folded
            trailers, more than 16 digits of a size, chunk-size lines over 1024 bytes, the trailer
            section's limits
looser      blanks between a size and its extensions (RFC 9112 §7.1.1 requires to accept them)
dropped     trailers that frame, route or authenticate (h11 returns them)
"""

from __future__ import annotations

import h11
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from proxy.wire.h1.body import (
    BodyReader,
    ChunkedReader,
    ChunkedWriter,
    CloseReader,
    CloseWriter,
    FixedReader,
    FixedWriter,
    Framing,
    Length,
    WriteError,
    request_length,
    response_length,
    writer,
)
from proxy.wire.h2.fields import trailers as trailers2
from proxy.wire.messages import (
    CALLER_FIELDS,
    END,
    OVERRIDES,
    EndOfMessage,
    Field,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
    may_trail,
)
from tests.kit.chunkings import byte_by_byte, cut, every_way

LIMIT, FIELDS = 200, 4

# (body, trailers, what is left over), or None as long as the end is missing, or the status of a
# refusal
Outcome = tuple[bytes, list[Field], bytes] | None | int


def chunked() -> ChunkedReader:
    return ChunkedReader(LIMIT, FIELDS)


def drain(reader: BodyReader, pieces: list[bytes]) -> Outcome:
    """Read to the end of the body, never looking at more than has arrived; what comes behind it is
    left over."""
    body, buffer = b"", b""
    for number, piece in enumerate(pieces):
        buffer += piece
        start = 0
        while True:
            try:
                found, start = reader.read(buffer, start)
            except ProtocolError as error:
                return error.status
            if isinstance(found, EndOfMessage):
                return body, found.trailers.items, buffer[start:] + b"".join(pieces[number + 1 :])
            if found is Signal.NEED_DATA:
                break
            assert isinstance(found, bytes)
            assert found, "an empty piece of a body"
            body += found
        buffer = buffer[start:]
    return None


NEXT = b"GET /next HTTP/1.1\r\n"

GOOD = {
    "nothing": (b"0\r\n\r\n", b"", []),
    "one chunk": (b"5\r\nhello\r\n0\r\n\r\n", b"hello", []),
    "two chunks": (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world", []),
    "sizes in either case": (
        b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n",
        b"01234567890123456789",
        [],
    ),
    "leading zeros": (b"0005\r\nhello\r\n000\r\n\r\n", b"hello", []),
    "sixteen digits": (b"0000000000000005\r\nhello\r\n0\r\n\r\n", b"hello", []),
    "line ends in the data": (b"4\r\n\r\n\r\n\r\n1\r\n\n\r\n0\r\n\r\n", b"\r\n\r\n\n", []),
    "an extension": (b"5;a=b\r\nhello\r\n0;c\r\n\r\n", b"hello", []),
    "an extension with quotes and bytes": (b'5;a="b;c \xe9"\r\nhello\r\n0\r\n\r\n', b"hello", []),
    "blanks around extensions": (b"5 ; a = b \r\nhello\r\n0 \t\r\n\r\n", b"hello", []),
    "a trailer": (b"0\r\nGrpc-Status: 0\r\n\r\n", b"", [(b"Grpc-Status", b"0")]),
    "trailers with odd blanks": (
        b"0\r\nA:b\r\nC: \t d e \t\r\nF:\r\n\r\n",
        b"",
        [(b"A", b"b"), (b"C", b"d e"), (b"F", b"")],
    ),
    "trailers that are dropped": (
        b"0\r\nContent-Length: 9\r\nHost: b\r\nTransfer-Encoding: x\r\nX: y\r\n\r\n",
        b"",
        [(b"X", b"y")],
    ),
    "a long extension": (b"5;" + b"x" * 1022 + b"\r\nhello\r\n0\r\n\r\n", b"hello", []),
    "a trailer just within the limit": (
        b"0\r\nX: " + b"y" * (LIMIT - 5) + b"\r\n\r\n",
        b"",
        [(b"X", b"y" * (LIMIT - 5))],
    ),
}

BAD = {
    "a size that is none": (b"x\r\n", 400),
    "an empty size": (b"\r\n\r\n", 400),
    "a negative size": (b"-1\r\n\r\n", 400),
    "a signed size": (b"+1\r\nx\r\n", 400),
    "a size with 0x": (b"0x1\r\nx\r\n", 400),
    "a size with a separator": (b"1_0\r\n", 400),
    "a size behind a blank": (b" 1\r\nx\r\n", 400),
    "a size with a blank inside": (b"1 0\r\nx\r\n", 400),
    "a quoted size": (b'"1"\r\nx\r\n', 400),
    "seventeen digits": (b"00000000000000001\r\nx\r\n", 400),
    "a size with a bare LF": (b"1\nx\r\n0\r\n\r\n", 400),
    "a size with a bare CR": (b"1\rx\r\n0\r\n\r\n", 400),
    "a size with two CRs": (b"1\r\r\nx\r\n0\r\n\r\n", 400),
    "an extension with a bare LF": (b"1;a\nb\r\nx\r\n0\r\n\r\n", 400),
    "an extension with a bare CR": (b"1;a\rb\r\nx\r\n0\r\n\r\n", 400),
    "an extension with a NUL": (b"1;\x00\r\nx\r\n0\r\n\r\n", 400),
    "an extension too long": (b"1;" + b"x" * 1023 + b"\r\nx\r\n0\r\n\r\n", 400),
    "an extension without an end": (b"1;" + b"x" * 5000, 400),
    "a chunk longer than its size": (b"1\r\nxy\r\n0\r\n\r\n", 400),
    "a chunk shorter than its size": (b"3\r\nx\r\n0\r\n\r\n", 400),
    "a chunk that ends in LF": (b"1\r\nx\n0\r\n\r\n", 400),
    "a chunk that ends in CR": (b"1\r\nx\r0\r\n\r\n", 400),
    "a chunk that ends in an empty line too many": (b"1\r\nx\r\n\r\n0\r\n\r\n", 400),
    "an end that is LF": (b"0\r\n\n", 400),
    "an end that is CR and more": (b"0\r\n\rx", 400),
    "a trailer without a colon": (b"0\r\nx\r\n\r\n", 400),
    "a trailer without a name": (b"0\r\n: x\r\n\r\n", 400),
    "a trailer with a blank before the colon": (b"0\r\nx : y\r\n\r\n", 400),
    "a trailer that is folded": (b"0\r\nx: y\r\n z\r\n\r\n", 400),
    "a trailer with a bare LF": (b"0\r\nx: y\nz: a\r\n\r\n", 400),
    "a trailer with a bare CR": (b"0\r\nx: y\rz: a\r\n\r\n", 400),
    "a trailer with a NUL": (b"0\r\nx: \x00\r\n\r\n", 400),
    "a trailer with a control character": (b"0\r\nx: a\x01b\r\n\r\n", 400),
    "a dropped trailer that is malformed": (b"0\r\nhost: a\x00b\r\n\r\n", 400),
    "too many trailers": (b"0\r\n" + b"X: y\r\n" * (FIELDS + 1) + b"\r\n", 431),
    "trailers too long": (b"0\r\n" + (b"X: " + b"y" * 90 + b"\r\n") * 3 + b"\r\n", 431),
    "a trailer too long": (b"0\r\nX: " + b"y" * (LIMIT - 4) + b"\r\n\r\n", 431),
    "a trailer without an end": (b"0\r\nX: " + b"y" * 5000, 431),
    "dropped trailers without an end": (b"0\r\n" + b"Host: a\r\n" * 1000, 431),
}


@pytest.mark.parametrize("behind", [b"", NEXT, b"\r\n", b"\x00"])
@pytest.mark.parametrize(("data", "body", "trailers"), GOOD.values(), ids=GOOD)
def test_good_chunks_are_read_however_they_come(
    data: bytes, body: bytes, trailers: list[Field], behind: bytes
) -> None:
    assert every_way(data + behind, lambda pieces: drain(chunked(), pieces)) == (
        body,
        trailers,
        behind,
    )


@pytest.mark.parametrize(("data", "body", "trailers"), GOOD.values(), ids=GOOD)
def test_chunks_are_not_at_their_end_before_the_last_byte(
    data: bytes, body: bytes, trailers: list[Field]
) -> None:
    for length in range(len(data)):
        reader = chunked()
        assert drain(reader, [data[:length]]) is None
        with pytest.raises(ProtocolError, match="in the middle of a chunked body"):
            reader.end()


@pytest.mark.parametrize(("data", "status"), BAD.values(), ids=BAD)
def test_bad_chunks_are_refused_however_they_come(data: bytes, status: int) -> None:
    assert every_way(data, lambda pieces: drain(chunked(), pieces)) == status
    assert drain(chunked(), [data + NEXT]) == status


@pytest.mark.parametrize(("data", "refused_at"), [
    (b"xyz", b"x"), (b"5 x", b"5 x"), (b"5\nx", b"5\n"), (b"5\rx", b"5\rx"), (b"5;\x00", b"5;\x00"), (b"1\r\nxy", b"1\r\nxy"),
    (b"0\r\na\rb", b"0\r\na\rb"), (b"0\r\na\nb", b"0\r\na\n"), (b"123456789abcdef01", b"123456789abcdef01"),
])  # fmt: skip
def test_bad_chunks_are_refused_as_soon_as_it_is_certain(data: bytes, refused_at: bytes) -> None:
    refused = [
        length
        for length in range(len(data) + 1)
        if drain(chunked(), byte_by_byte(data[:length])) == 400
    ]
    assert refused[0] == len(refused_at)


def test_the_data_of_a_chunk_is_forwarded_before_the_chunk_is_complete() -> None:
    reader = chunked()
    assert reader.read(b"ffffffffffffffff\r\nab", 0) == (b"ab", 20)
    assert reader.read(b"c", 0) == (b"c", 1)
    assert reader.read(b"", 0) == (Signal.NEED_DATA, 0)


@pytest.mark.parametrize("behind", [b"", NEXT])
def test_a_counted_body_ends_where_it_was_said_to(behind: bytes) -> None:
    assert every_way(b"hello" + behind, lambda pieces: drain(FixedReader(5), pieces)) == (
        b"hello",
        [],
        behind,
    )
    assert FixedReader(0).read(behind, 0) == (END, 0)
    short = FixedReader(5)
    assert drain(short, [b"hell"]) is None
    with pytest.raises(ProtocolError, match="1 bytes before the end"):
        short.end()
    assert FixedReader(0).end() is END


def test_a_body_until_the_end_of_the_connection_takes_everything() -> None:
    reader = CloseReader()
    assert reader.read(b"head|body", 5) == (b"body", 9)
    assert reader.read(b"", 0) == (Signal.NEED_DATA, 0)
    assert reader.end() is END


def h11_reads(pieces: list[bytes]) -> Outcome:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.next_event()
    body = b""
    for number, piece in enumerate(pieces):
        connection.receive_data(piece)
        while True:
            try:
                found = connection.next_event()
            except h11.RemoteProtocolError as error:
                return error.error_status_hint
            if isinstance(found, h11.EndOfMessage):
                rest = connection.trailing_data[0] + b"".join(pieces[number + 1 :])
                return body, found.headers.raw_items(), rest
            if not isinstance(found, h11.Data):
                break
            body += found.data
    return None


# What frames, routes, authenticates or describes a message, or changes what is asked: RFC 9110
# §6.5.1, and all that is ours.
FORBIDDEN = [
    b"content-length", b"host", b"trailer", b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"www-authenticate",
    b"cache-control", b"expect", b"max-forwards", b"range", b"if-match", b"content-type", b"content-encoding", b"content-range",
    b"date", b"location", b"retry-after", b"vary", b"forwarded", b"x-forwarded-for", b"via", b"te",
    b"isthmus-hops", b"isthmus-of-the-future", *sorted(CALLER_FIELDS), *sorted(OVERRIDES),
]  # fmt: skip
# What only HTTP/1 may say at all.
CONNECTION = [b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"]
ALLOWED = [
    b"grpc-status",
    b"grpc-message",
    b"grpc-status-details-bin",
    b"digest",
    b"etag",
    b"server-timing",
    b"x-checksum",
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_field_that_has_no_business_in_trailers_is_dropped_in_both_versions(name: bytes) -> None:
    value = b"trailers" if name == b"te" else b"5"
    for spelled in (name, name.title(), name.upper()):
        found = drain(chunked(), [b"0\r\nA: b\r\n%b: %b\r\nC: d\r\n\r\n" % (spelled, value)])
        assert found == (b"", [(b"A", b"b"), (b"C", b"d")], b"")
    assert trailers2([(b"a", b"b"), (name, value), (name, value), (b"c", b"d")]).items == [
        (b"a", b"b"),
        (b"c", b"d"),
    ]


@pytest.mark.parametrize("name", CONNECTION)
def test_a_field_of_the_connection_is_dropped_from_trailers_or_makes_them_malformed(
    name: bytes,
) -> None:
    assert drain(chunked(), [b"0\r\nA: b\r\n%b: x\r\n\r\n" % name]) == (b"", [(b"A", b"b")], b"")
    with pytest.raises(ProtocolError):  # RFC 9113 §8.2.2
        trailers2([(b"a", b"b"), (name, b"x")])


def test_other_trailers_are_passed_on_in_both_versions() -> None:
    pairs = [(name, b"0") for name in ALLOWED[:FIELDS]]
    assert drain(chunked(), [b"0\r\n" + Headers(pairs).encode() + b"\r\n"]) == (b"", pairs, b"")
    assert trailers2([(name, b"0") for name in ALLOWED]).items == [(name, b"0") for name in ALLOWED]


@pytest.mark.parametrize("value", [b"a\x01b", b"\x00", b"a\x7f"])
def test_a_dropped_trailer_is_still_read_by_the_grammar(value: bytes) -> None:
    assert drain(chunked(), [b"0\r\nHost: %b\r\n\r\n" % value]) == 400
    with pytest.raises(ProtocolError):
        trailers2([(b"host", value)])


# Pieces of the chunked grammar, right and wrong ones, so that random sequences of them often mean
# something.
PIECES = [
    b"0",
    b"1",
    b"2",
    b"a",
    b"\r\n",
    b"\r\n",
    b"\r\n",
    b"x",
    b"yy",
    b"0\r\n\r\n",
    b"1\r\nx\r\n",
    b"2\r\nab\r\n",
    b";",
    b" ",
    b"\t",
    b"\n",
    b"\r",
]
PIECES += [
    b"X: y\r\n",
    b"X:\r\n",
    b"Content-Length: 5\r\n",
    b"0\r\n",
    b"00",
    b";a=b",
    b"\x00",
    b"\xff",
    b"\x0b",
    b":",
    b"1;x\r\ny\r\n",
    b"0\r\nA: b\r\n\r\n",
]


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    st.lists(st.integers(0, 100), max_size=5),
)
@example(b"1\r\nx\r\n0\r\n\r\n", [3])
def test_what_h11_accepts_too_it_reads_alike(data: bytes, places: list[int]) -> None:
    ours = drain(chunked(), [data])
    assert drain(chunked(), cut(data, places)) == ours
    assert drain(chunked(), byte_by_byte(data)) == ours
    theirs = h11_reads([data])
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        event("both accept")
        body, trailers, rest = theirs
        assert ours == (body, [t for t in trailers if may_trail(t[0].lower())], rest)
    elif isinstance(ours, tuple):
        # The two things that we take and h11 does not: blanks before an extension, and a length
        # among the trailers that we drop.
        event("only we accept")
        assert b" ;" in data or b"\t;" in data or b"Content-Length" in data
    else:
        event("we do not accept")


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60), st.lists(st.integers(0, 100), max_size=5))
def test_any_bytes_at_all_give_pieces_or_a_refusal(data: bytes, places: list[int]) -> None:
    assert drain(chunked(), cut(data, places)) == drain(chunked(), [data])


# Lengths...


def request(*headers: Field) -> RequestHead:
    return RequestHead(b"POST", b"/", Headers(headers))


def response(status: int, *headers: Field) -> ResponseHead:
    return ResponseHead(status, Headers(headers))


def test_the_head_of_a_request_says_how_long_its_body_is() -> None:
    assert request_length(request()) == 0
    assert request_length(request((b"content-LENGTH", b"7"))) == 7
    assert request_length(request((b"Transfer-Encoding", b"chunked"))) is Framing.CHUNKED


@pytest.mark.parametrize(("method", "status", "headers", "length"), [
    (b"GET", 200, [], Framing.CLOSE),
    (b"GET", 200, [(b"Content-Length", b"7")], 7),
    (b"GET", 200, [(b"transfer-encoding", b"chunked")], Framing.CHUNKED),
    (b"HEAD", 200, [(b"Content-Length", b"7")], 0),
    (b"HEAD", 200, [(b"transfer-encoding", b"chunked")], 0),
    (b"HEAD", 200, [], 0),
    (b"GET", 204, [(b"Content-Length", b"7")], 0),
    (b"GET", 304, [(b"transfer-encoding", b"chunked")], 0),
    (b"GET", 103, [(b"Content-Length", b"7")], 0),
    (b"GET", 101, [], 0),
    (b"CONNECT", 200, [(b"Content-Length", b"7")], 0),
    (b"CONNECT", 204, [], 0),
    (b"CONNECT", 407, [(b"Content-Length", b"7")], 7),
    (b"CONNECT", 502, [], Framing.CLOSE),
])  # fmt: skip
def test_the_head_of_a_response_and_its_request_say_how_long_its_body_is(
    method: bytes, status: int, headers: list[Field], length: Length
) -> None:
    assert response_length(method, response(status, *headers)) == length


# Writers...


def test_each_length_has_its_writer() -> None:
    assert isinstance(writer(Framing.CHUNKED), ChunkedWriter)
    assert isinstance(writer(Framing.CLOSE), CloseWriter)
    assert writer(7) == FixedWriter(7)


def test_a_counted_body_is_written_to_the_byte() -> None:
    w = FixedWriter(5)
    assert w.data(b"hel") + w.data(b"lo") + w.data(b"") + w.end(Headers()) == b"hello"
    with pytest.raises(WriteError, match="2 bytes more"):
        FixedWriter(1).data(b"abc")
    with pytest.raises(WriteError, match="3 bytes fewer"):
        FixedWriter(3).end(Headers())


def test_nothing_written_is_not_the_end_of_chunks() -> None:
    assert ChunkedWriter().data(b"") == b""


def test_a_body_until_the_end_of_the_connection_is_written_as_it_is() -> None:
    w = CloseWriter()
    assert w.data(b"hello") + w.end(Headers()) == b"hello"


def test_the_last_chunk_has_the_trailers() -> None:
    w = ChunkedWriter()
    assert w.data(b"hello") + w.end(Headers()) == b"5\r\nhello\r\n0\r\n\r\n"
    assert w.end(Headers([(b"A", b"b"), (b"C", b"d")])) == b"0\r\nA: b\r\nC: d\r\n\r\n"


NAME = st.text("abcXYZ09-_.", min_size=1, max_size=8).map(lambda t: b"X-" + t.encode())
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=10).map(
    lambda t: t.strip().encode()
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.binary(max_size=40), max_size=6),
    st.lists(st.tuples(NAME, VALUE), max_size=FIELDS),
    st.lists(st.integers(0, 400), max_size=6),
)
def test_what_is_written_in_chunks_is_read_back_by_us_and_by_h11(
    pieces: list[bytes], trailers: list[Field], places: list[int]
) -> None:
    w = ChunkedWriter()
    data = b"".join([w.data(piece) for piece in pieces]) + w.end(Headers(trailers))
    expected = (b"".join(pieces), trailers, NEXT)
    assert drain(chunked(), cut(data + NEXT, places)) == expected
    assert h11_reads(cut(data + NEXT, places)) == expected
