"""The output for a chunked body is that of the ordinary path's reader and writer, whatever pieces
are read."""

from __future__ import annotations

import pytest

from proxy.fastpath.chunked_body import ChunkedTranscoder
from proxy.wire.messages import Limits, ProtocolError
from tests.kit.http import chunked

BODY = chunked(b"hello", b"x" * 300, trailers=b"X-Sum: 1\r\nHost: dropped\r\n")
ONWARD = chunked(b"hello", b"x" * 300, trailers=b"X-Sum: 1\r\n")


def test_whole_with_what_follows_it() -> None:
    chunks = ChunkedTranscoder(Limits())
    chunks.pass_on(BODY + b"behind")
    assert chunks.error is None
    assert (chunks.size, chunks.out) == (305, ONWARD)
    assert (chunks.ended, chunks.left) == (True, b"behind")


def test_byte_by_byte_each_byte_is_forwarded_at_once() -> None:
    chunks = ChunkedTranscoder(Limits())
    out, size = b"", 0
    for number in range(len(BODY)):
        assert not chunks.ended
        chunks.pass_on(BODY[number : number + 1])
        assert chunks.error is None
        size += chunks.size
        out += chunks.out
        assert len(chunks.left) < 32
    assert (size, chunks.ended, chunks.left) == (305, True, b"")
    assert (
        out
        == b"".join(
            chunked(b"%c" % byte).removesuffix(b"0\r\n\r\n") for byte in b"hello" + b"x" * 300
        )
        + ONWARD[-15:]
    )


@pytest.mark.parametrize(
    "spoiled",
    [b"5\r\nhello!\r\n", b"-1\r\n", b"5\nhello\r\n", b"0\r\nX: \x00\r\n\r\n", b"1" * 2000],
)
def test_a_bad_chunk_is_refused_and_the_data_before_it_is_forwarded(spoiled: bytes) -> None:
    chunks = ChunkedTranscoder(Limits())
    chunks.pass_on(b"3\r\nabc\r\n")
    assert (chunks.out, chunks.error) == (b"3\r\nabc\r\n", None)
    chunks.pass_on(b"3\r\ndef\r\n" + spoiled)
    assert isinstance(chunks.error, ProtocolError)
    whole = spoiled == b"5\r\nhello!\r\n"
    assert chunks.out == b"3\r\ndef\r\n" + (b"5\r\nhello\r\n" if whole else b"")
