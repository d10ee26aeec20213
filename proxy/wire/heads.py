"""The strict recogniser of common HTTP/1 heads: a small language, accepted completely or declined without an opinion.

It is not a second parser. h11 is the authority on what a head means; it takes 50-60 µs for one. Nearly all heads that are met in
practice are written in one canonical way, and that way is a regular language: one regular expression says yes in 6-11 µs.
Whatever it does not know (HTTP/1.0, folded lines, bytes outside ASCII, Expect, Upgrade, requests in chunks, two Hosts, blanks in
unusual places, anything too long) it declines, and strict.py decides from the same bytes.

The law, which tests/wire/test_heads.py holds over mutated heads and all chunkings: if it accepts, h11 accepts, and means the same.

The accepted language is chosen so that an accepted head needs no judgement: HTTP/1.1, keep-alive, exactly one Host, at most one
Content-Length, no transfer coding, no field that belongs to the hop but the meaningless `Connection: keep-alive`. A response may be
`Transfer-Encoding: chunked` and say nothing else of its length; whatever a request says of that is for those who judge.
"""

from __future__ import annotations

import re

from proxy.wire.bodies import Framing, Length
from proxy.wire.messages import AUTHORITY, STRIPPED, Headers, Limits, RequestHead, ResponseHead

# RFC 9110 §5.6.2 tchar, and field values of visible ASCII with inner blanks: a subset of §5.5. The quantifiers are possessive (a head
# that does not fit fails in one pass, without backtracking) but for the last, which must give back one visible byte.
_NAME = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]++"
_VALUE = rb"[!-~](?:[ -~\t]*[!-~])?"
_FIELDS = rb"((?:" + _NAME + rb": " + _VALUE + rb"\r\n)*+)\r\n"

_REQUEST = re.compile(rb"([A-Z]{1,24}) (/[!-~]*+) HTTP/1\.1\r\n" + _FIELDS)
_RESPONSE = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ([!-~](?:[ -~\t]*[!-~])?)?\r\n" + _FIELDS)

# The fields that a decision hangs on, picked out in one pass; most heads have one or two. A Host that is no authority is declined. A line
# is looked for by the newline before it, which the engine finds quickly, and passed over by its first letter (0.6 µs for 1.4).
_DECISIVE = re.compile(
    rb"(?i)\n(?=[cehikltpu])(?:(host): " + AUTHORITY + rb"\r|(content-length): ([^\r]*)|(" + STRIPPED + rb")|"
    rb"(transfer-encoding: (?-i:chunked)\r)|"
    rb"(host|connection|transfer-encoding|upgrade|expect|te|trailer|keep-alive|proxy-connection|http2-settings):)"
)
# As many digits as fit a signed 64-bit integer with room to spare; h11 stops at 20. No leading zero: there it would need an opinion.
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")

_BODILESS = (b"204", b"304")


def _decisive(head: bytes, start: int) -> tuple[int, Length | None, list[bytes]] | None:
    """(how many Hosts, how the body is delimited, the lines of fields that belong to the hop) of a head whose canonical field lines begin
    at `start`; None: declined."""
    hosts = 0
    ending: list[bytes] = []
    length: Length | None = None
    for host, _, digits, stripped, chunked, other in _DECISIVE.findall(head, start - 1):
        if host:
            hosts += 1
        elif other:
            return None
        elif stripped:
            ending.append(stripped)
        elif chunked:
            if length is not None:
                return None
            length = Framing.CHUNKED
            ending.append(chunked)
        else:
            if length is not None or not _LENGTH.fullmatch(digits):
                return None
            length = int(digits)
    return hosts, length, ending


def recognise_request(head: bytes, limits: Limits) -> tuple[RequestHead, int] | None:
    """A whole head, from its first byte through the empty line -> (head, length of the body); None: declined."""
    match = _REQUEST.fullmatch(head)
    if match is None or len(head) > limits.head:
        return None
    method, target, fields = match.groups()
    decisive = _decisive(head, match.start(3))
    if decisive is None or decisive[0] != 1 or len(target) > limits.target or method == b"CONNECT":
        return None
    length = decisive[1] or 0
    if not isinstance(length, int) or fields.count(b"\n") > limits.fields:
        return None
    return RequestHead(method, target, Headers.canonical(fields, decisive[2])), length


def recognise_response(head: bytes, limits: Limits) -> tuple[ResponseHead, Length] | None:
    """The same for a response that says how its body is delimited. Whether the body is really sent is the request's matter (HEAD, 304)."""
    match = _RESPONSE.fullmatch(head)
    if match is None or len(head) > limits.head:
        return None
    status, reason, fields = match.groups()
    decisive = _decisive(head, match.start(3))
    if decisive is None:
        return None
    length = decisive[1]
    if not isinstance(length, int) and (length is None) is not (status in _BODILESS):
        return None
    if fields.count(b"\n") > limits.fields:
        return None
    return ResponseHead(int(status), Headers.canonical(fields, decisive[2]), reason or b""), length or 0


def encode_request(head: RequestHead) -> bytes:
    """The head as bytes. Its parts come from a reader of this room, or were checked when they were made: nothing is checked here."""
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (head.method, head.target, head.headers.encode())


def encode_response(head: ResponseHead) -> bytes:
    """The bytes of a response's head, the empty line included."""
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, head.headers.encode())
