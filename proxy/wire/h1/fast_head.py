"""A fast parser for common HTTP/1 heads. It either accepts a head completely or declines it.

It is not a second complete parser. h11 is the authority on the meaning of a head, and needs 50-60
µs for one. Nearly all real heads are written in one canonical way, which is a regular language, so
regular expressions recognise them in 2-4 µs. This parser declines everything else: HTTP/1.0, folded
lines, non-ASCII bytes, Expect, Upgrade, chunked requests, two Host fields, unusual white space,
anything too long. Then strict_head.py decides from the same bytes.

Apart from their first line, most heads repeat: a client sends the same fields with each request,
and a server sends the same fields until the second changes. Therefore the result for a block of
fields is cached, and found again in 0.2 µs. It depends only on these bytes
(docs/decisions/34-field-block-cache.md).

The invariant, which tests/wire/h1/test_fast_head.py checks with mutated heads and all ways to split
them: if this parser accepts a head, h11 accepts it too, with the same meaning.

An accepted head needs no further decision: HTTP/1.1, keep-alive, exactly one Host, at most one
Content-Length, no transfer coding, and no hop-by-hop field except `Connection: keep-alive`, which
has no effect. A response may also have `Transfer-Encoding: chunked` without a Content-Length. A
request with Transfer-Encoding is always declined.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from proxy.wire.grammar import PLAIN_VALUE, TARGET_CHAR, TOKEN
from proxy.wire.h1.body import Framing, Length
from proxy.wire.messages import (
    AUTHORITY,
    CALLER_FIELDS,
    CALLER_PATTERN,
    FAILURE,
    OVERRIDES,
    Headers,
    Limits,
    RequestHead,
    ResponseHead,
)

_REQUEST = re.compile(rb"([A-Z]{1,24}) (/" + TARGET_CHAR + rb"*+) HTTP/1\.1\r\n")
_RESPONSE = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ((?:" + PLAIN_VALUE + rb")?)\r\n")
_FIELDS = re.compile(rb"(?:" + TOKEN + rb": " + PLAIN_VALUE + rb"\r\n)*+\r\n")

# Fields that affect a decision: each is accepted in one form only. Lines with FAILURE or one of
# _STRIPPED always end at this hop.
_JUDGED = frozenset(
    {
        b"host",
        b"connection",
        b"content-length",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
        b"te",
        b"trailer",
        b"keep-alive",
    }
    | {b"proxy-connection", b"http2-settings", b"max-forwards", FAILURE}
)
_STRIPPED = CALLER_FIELDS | OVERRIDES
# Most heads have one or two of these lines. The expression starts with the newline before the line,
# which the regex engine finds quickly, and rejects most lines by their first letter (0.5 µs
# instead of 1.1).
_DECISIVE = re.compile(
    rb"\n(?=[%b])(((?i:%b)): ([^\r]*)\r)"
    % (
        bytes(
            sorted(
                {letter for name in _JUDGED | _STRIPPED for letter in (name[0], name.upper()[0])}
            )
        ),
        b"|".join([*map(re.escape, sorted(_JUDGED | OVERRIDES)), CALLER_PATTERN]),
    )
)
_HOST = re.compile(AUTHORITY)
# As many digits as fit a signed 64-bit integer with a margin; h11 accepts 20. No leading zero: such
# a value is for strict_head.py.
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")

_BODILESS = (b"204", b"304")

# The number of cached blocks, and the longest one in bytes. Usually 1 MiB in total, at most 3.
_KEPT: Final = 512
_LONGEST: Final = 1024


class _Fields:
    """The result for a block of fields. It is cached and shared: read only.

    `lines`: the block without the empty line at its end. `hosts`: the number of Host fields.
    `length`: the framing of the body. `ending`: the hop-by-hop lines, each including its CR.
    """

    __slots__ = ("ending", "hosts", "length", "lines")

    def __init__(
        self, lines: bytes, hosts: int, length: Length | None, ending: list[bytes]
    ) -> None:
        self.lines = lines
        self.hosts = hosts
        self.length = length
        self.ending = ending

    def exceed(self, most: int) -> bool:
        """Whether the block has more than `most` fields.

        A field line has at least 6 bytes, so a short block needs no count.
        """
        return len(self.lines) > 6 * most and self.lines.count(b"\n") > most


def _read(block: bytes) -> _Fields | None:
    """Parse all fields of a head and the empty line after them. None: declined."""
    if not _FIELDS.fullmatch(block):
        return None
    hosts = 0
    length: Length | None = None
    ending: list[bytes] = []
    for line, spelled, value in _DECISIVE.findall(b"\n" + block):
        name = spelled.lower()
        if name == b"host" and _HOST.fullmatch(value):
            hosts += 1
        elif name in _STRIPPED or (name == b"connection" and value.lower() == b"keep-alive"):
            ending.append(line)
        elif name == b"content-length" and length is None and _LENGTH.fullmatch(value):
            length = int(value)
        elif name == b"transfer-encoding" and length is None and value == b"chunked":
            length = Framing.CHUNKED
            ending.append(line)
        else:
            return None
    return _Fields(block[:-2], hosts, length, ending)


_known = lru_cache(_KEPT)(_read)


def _fields(block: bytes) -> _Fields | None:
    return _known(block) if len(block) <= _LONGEST else _read(block)


def forget() -> None:
    """Clear the cache.

    The caller does this every few seconds, so credentials of clients do not stay in memory longer.
    """
    _known.cache_clear()


def recognise_request(head: bytes, limits: Limits) -> tuple[RequestHead, int] | None:
    """Parse a complete head, including its empty line, into (head, length of the body).

    None: declined.
    """
    match = _REQUEST.match(head)
    if match is None or len(head) > limits.head:
        return None
    method, target = match.groups()
    fields = _fields(head[match.end() :])
    if (
        fields is None
        or fields.hosts != 1
        or fields.exceed(limits.fields)
        or len(target) > limits.target
        or method == b"CONNECT"
    ):
        return None
    length = fields.length or 0
    if not isinstance(length, int):
        return None
    return RequestHead(method, target, Headers.canonical(fields.lines, fields.ending)), length


def recognise_response(head: bytes, limits: Limits) -> tuple[ResponseHead, Length] | None:
    """Parse a complete response head into (head, framing of the body). None: declined.

    The head must give the framing. Whether a body really follows also depends on the request (HEAD,
    304); the caller decides this.
    """
    match = _RESPONSE.match(head)
    if match is None or len(head) > limits.head:
        return None
    status, reason = match.groups()
    fields = _fields(head[match.end() :])
    if fields is None or fields.exceed(limits.fields):
        return None
    length = fields.length
    if not isinstance(length, int) and (length is None) is not (status in _BODILESS):
        return None
    return ResponseHead(
        int(status), Headers.canonical(fields.lines, fields.ending), reason
    ), length or 0


def encode_request(head: RequestHead) -> bytes:
    """Encode the head of a request.

    Nothing is checked: the parser or the creator has checked it.
    """
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (head.method, head.target, head.headers.encode())


def encode_response(head: ResponseHead) -> bytes:
    """Encode the head of a response, including its empty line. Nothing is checked."""
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, head.headers.encode())
