"""The strict recogniser of common HTTP/1 heads: a small language, accepted completely or declined without an opinion.

It is not a second parser. h11 is the authority on what a head means; it takes 50-60 µs for one. Nearly all heads that are met in
practice are written in one canonical way, and that way is a regular language: regular expressions say yes in 2-4 µs.
Whatever it does not know (HTTP/1.0, folded lines, bytes outside ASCII, Expect, Upgrade, requests in chunks, two Hosts, blanks in
unusual places, anything too long) it declines, and strict_head.py decides from the same bytes.

Most heads have been here before, but for their first line: a client says the same of itself in each request, and a server answers with the
same fields for as long as a second lasts. What was found out about a block of fields is kept for a while, and found again in 0.2 µs. It
depends on nothing but these bytes (docs/decisions/34-field-block-cache.md).

The law, which tests/wire/h1/test_fast_head.py holds over mutated heads and all chunkings: if it accepts, h11 accepts, and means the same.

The accepted language is chosen so that an accepted head needs no judgement: HTTP/1.1, keep-alive, exactly one Host, at most one
Content-Length, no transfer coding, no field that belongs to the hop but the meaningless `Connection: keep-alive`. A response may be
`Transfer-Encoding: chunked` and say nothing else of its length; whatever a request says of that is for those who judge.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from proxy.wire.grammar import PLAIN_VALUE, TARGET_CHAR, TOKEN
from proxy.wire.h1.body import Framing, Length
from proxy.wire.messages import AUTHORITY, CALLER_FIELDS, CALLER_PATTERN, FAILURE, OVERRIDES, Headers, Limits, RequestHead, ResponseHead

_REQUEST = re.compile(rb"([A-Z]{1,24}) (/" + TARGET_CHAR + rb"*+) HTTP/1\.1\r\n")
_RESPONSE = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ((?:" + PLAIN_VALUE + rb")?)\r\n")
_FIELDS = re.compile(rb"(?:" + TOKEN + rb": " + PLAIN_VALUE + rb"\r\n)*+\r\n")

# The fields that a decision hangs on: these are let through in one form, and lines of those end at this hop whatever they say.
_JUDGED = frozenset(
    {b"host", b"connection", b"content-length", b"transfer-encoding", b"upgrade", b"expect", b"te", b"trailer", b"keep-alive"}
    | {b"proxy-connection", b"http2-settings", b"max-forwards", FAILURE}
)
_STRIPPED = CALLER_FIELDS | OVERRIDES
# Most heads have one or two of them. A line is looked for by the newline before it, which the engine finds quickly, and passed over by its
# first letter (0.5 µs for 1.1).
_DECISIVE = re.compile(
    rb"\n(?=[%b])(((?i:%b)): ([^\r]*)\r)"
    % (
        bytes(sorted({letter for name in _JUDGED | _STRIPPED for letter in (name[0], name.upper()[0])})),
        b"|".join([*map(re.escape, sorted(_JUDGED | OVERRIDES)), CALLER_PATTERN]),
    )
)
_HOST = re.compile(AUTHORITY)
# As many digits as fit a signed 64-bit integer with room to spare; h11 stops at 20. No leading zero: there it would need an opinion.
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")

_BODILESS = (b"204", b"304")

# Blocks that are kept, and the length (bytes) of the longest: a megabyte, as a rule, and three at most.
_KEPT: Final = 512
_LONGEST: Final = 1024


class _Fields:
    """What is found out about a block of fields: `lines` is the block without the empty line at its end, `hosts` says how many of them are
    Host, `length` how the body is delimited; `ending` has the lines that belong to the hop, to their CR. It is shared: read only."""

    __slots__ = ("ending", "hosts", "length", "lines")

    def __init__(self, lines: bytes, hosts: int, length: Length | None, ending: list[bytes]) -> None:
        self.lines = lines
        self.hosts = hosts
        self.length = length
        self.ending = ending

    def exceed(self, most: int) -> bool:
        """Whether there are more than `most`. None has less than six bytes, so they are seldom counted."""
        return len(self.lines) > 6 * most and self.lines.count(b"\n") > most


def _read(block: bytes) -> _Fields | None:
    """All fields of a head, and the empty line behind them; None: declined."""
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
    """Keep nothing of what has come so far. To be called every few seconds: what clients say to show who they are stays no longer."""
    _known.cache_clear()


def recognise_request(head: bytes, limits: Limits) -> tuple[RequestHead, int] | None:
    """A whole head, from its first byte through the empty line -> (head, length of the body); None: declined."""
    match = _REQUEST.match(head)
    if match is None or len(head) > limits.head:
        return None
    method, target = match.groups()
    fields = _fields(head[match.end() :])
    if fields is None or fields.hosts != 1 or fields.exceed(limits.fields) or len(target) > limits.target or method == b"CONNECT":
        return None
    length = fields.length or 0
    if not isinstance(length, int):
        return None
    return RequestHead(method, target, Headers.canonical(fields.lines, fields.ending)), length


def recognise_response(head: bytes, limits: Limits) -> tuple[ResponseHead, Length] | None:
    """The same for a response that says how its body is delimited. Whether the body is really sent is the request's matter (HEAD, 304)."""
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
    return ResponseHead(int(status), Headers.canonical(fields.lines, fields.ending), reason), length or 0


def encode_request(head: RequestHead) -> bytes:
    """The head as bytes. Its parts come from a reader of this room, or were checked when they were made: nothing is checked here."""
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (head.method, head.target, head.headers.encode())


def encode_response(head: ResponseHead) -> bytes:
    """The bytes of a response's head, the empty line included."""
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, head.headers.encode())
