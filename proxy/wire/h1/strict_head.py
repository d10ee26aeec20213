"""Heads that fast_head.py declined. Ambiguous ones are refused; h11 parses the rest.

h11 follows RFC 9112 with a few leniencies. They are fine for an endpoint, but dangerous for a
proxy: the next reader may see the boundaries of the message elsewhere (request smuggling). h11
accepts a bare LF as a line end, unfolds folded lines, merges equal Content-Lengths, and prefers
Transfer-Encoding if both are given. This module refuses all of these first, on the bytes.
"""

from __future__ import annotations

import re
from typing import NoReturn

import h11

from proxy.wire.grammar import CONTROL, TARGET_CHAR, TOKEN
from proxy.wire.h1 import head_faults
from proxy.wire.messages import (
    AUTHORITY,
    HOST,
    Headers,
    Limits,
    ProtocolError,
    RequestHead,
    ResponseHead,
)

# Line ends other than CRLF (RFC 9112 §2.2), folded lines (§5.2), and NUL: readers are known to
# treat each of them differently. And the other control characters: h11 accepts them, but HTTP/2
# peers do not.
_AMBIGUOUS = re.compile(
    rb"(?P<lf>(?<!\r)\n)|(?P<cr>\r(?!\n))|(?P<fold>\r\n[ \t])|(?P<nul>\x00)|(?P<control>(?![\r\n])"
    + CONTROL
    + rb")"
)
_REASONS = {
    "lf": "a line in the head ends with a bare LF",
    "cr": "a bare CR in the head",
    "fold": "a folded field line (obs-fold)",
    "nul": "a NUL in the head",
    "control": "a control character in the head",
}
_BLANK_BEFORE_COLON = re.compile(rb"\r\n[^\r\n:]*[ \t]:")
_BLANKS_BEHIND_NAME = re.compile(rb"(\r\n[^\r\n: \t]+)[ \t]+:")

# The complete lines of an incomplete head. Accepts all that h11 could still accept, and slightly
# more.
_REQUEST_SO_FAR = re.compile(
    TOKEN + rb" " + TARGET_CHAR + rb"++ HTTP/[0-9]\.[0-9]\r\n(?:" + TOKEN + rb":[^\r\n]*+\r\n)*+"
)
_RESPONSE_SO_FAR = re.compile(
    rb"HTTP/[0-9]\.[0-9] [0-9]{3}(?: [^\r\n]*+)?\r\n(?:" + TOKEN + rb"[ \t]*+:[^\r\n]*+\r\n)*+"
)

_HOST = re.compile(AUTHORITY)
# transfer-coding (RFC 9112 §7), its parameters included.
_CODING = re.compile(TOKEN + rb"(?:[ \t]*;[ \t!-~\x80-\xff]*)?")
_CONNECT_TARGET = re.compile(rb"(?!:)" + HOST + rb":[0-9]{1,5}")

# A response is parsed without its request. With this one sent first, h11 accepts any status,
# including 101.
_ANY_REQUEST = h11.Request(
    method="GET", target="/", headers=[("Host", "h"), ("Connection", "upgrade"), ("Upgrade", "any")]
)


def check_bytes(head: bytes, start: int = 0, *, complete: bool) -> None:
    """Raise ProtocolError for bytes from `start` on that readers interpret differently.

    An incomplete head may end with the CR of a CRLF whose LF has not arrived.
    """
    found = _AMBIGUOUS.search(head, start)
    if found is not None and (complete or found.lastgroup != "cr" or found.end() < len(head)):
        where = head_faults.control(head) if complete and found.lastgroup == "control" else None
        raise ProtocolError(where or _REASONS[found.lastgroup or "nul"])


def _check_blanks(lines: bytes) -> None:
    """Raise ProtocolError for white space before a colon in a request.

    Readers disagree about the name of such a field (RFC 9112 §5.1).
    """
    if _BLANK_BEFORE_COLON.search(lines):
        raise ProtocolError("white space before the colon of a field line")


def check_lines(lines: bytes, *, request: bool) -> None:
    """Raise ProtocolError if no further line can make an incomplete head valid.

    `lines`: the complete lines of it. Without this check the peer might never send the rest,
    because it waits for the answer.
    """
    if request:
        _check_blanks(lines)
    if not (_REQUEST_SO_FAR if request else _RESPONSE_SO_FAR).fullmatch(lines):
        raise ProtocolError(
            head_faults.lines(lines, request=request) or "a line of the head cannot be parsed"
        )


def check_size(head: bytes, limits: Limits, *, request: bool) -> None:
    """Raise ProtocolError with 414 for a target over its limit, 431 for a head over its limit.

    The head may be incomplete.
    """
    if request:
        line = head.split(b"\r\n", 1)[0]
        target = line.partition(b" ")[2].partition(b" ")[0]
        if len(target) > limits.target:
            raise ProtocolError(f"the request target is longer than {limits.target} bytes", 414)
    if len(head) > limits.head:
        raise ProtocolError(f"the head is longer than {limits.head} bytes", 431)
    if head.count(b"\r\n") > limits.fields + 2:
        raise ProtocolError(f"the head has more than {limits.fields} fields", 431)


def check_framing(headers: Headers, version: bytes) -> None:
    """Raise ProtocolError for a head whose framing is ambiguous or undefined (RFC 9112 §6.1, §6.3).

    If the last coding of a request is not chunked, its end cannot be determined: a server must
    answer 400 (§6.3). If chunked is the last coding and another one is below it, the message is
    valid, but we cannot decode it: 501 (§6.1).
    """
    codings = headers.all(b"transfer-encoding")
    lengths = headers.all(b"content-length")
    if len(lengths) > 1:
        raise ProtocolError("more than one Content-Length")
    if codings and lengths:
        raise ProtocolError("both Content-Length and Transfer-Encoding")
    if codings and version == b"1.0":
        raise ProtocolError("Transfer-Encoding in an HTTP/1.0 message")
    if lengths and not (lengths[0].isdigit() and len(lengths[0]) < 19):
        raise ProtocolError("a Content-Length that is not a number, or is too large")
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        _refuse_codings([name.strip().lower() for value in codings for name in value.split(b",")])


def _refuse_codings(names: list[bytes]) -> NoReturn:
    if names[-1] != b"chunked":
        raise ProtocolError(
            "Transfer-Encoding does not end with chunked, so the body has no known end"
        )
    if names.count(b"chunked") > 1:
        raise ProtocolError("Transfer-Encoding has chunked more than once")
    if not all(_CODING.fullmatch(name) for name in names[:-1]):
        raise ProtocolError("Transfer-Encoding is not a list of codings")
    raise ProtocolError("a transfer coding other than chunked", 501)


def _check_lengths(head: bytes) -> None:
    """Raise ProtocolError for more than one Content-Length, in lines or as a list.

    h11 merges equal ones silently.
    """
    if (
        sum(
            1 + values.count(b",")
            for values in re.findall(rb"(?i)\r\ncontent-length:([^\r]*)", head)
        )
        > 1
    ):
        raise ProtocolError("more than one Content-Length")


def _read(
    connection: h11.Connection, head: bytes, *, request: bool
) -> h11.Request | h11.Response | h11.InformationalResponse:
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        refused = _refused(head, error, request=request)
        error.__traceback__ = None  # a frame of h11 holds the error, and the error holds the frame
        raise refused from None
    if isinstance(event, (h11.Request, h11.Response, h11.InformationalResponse)):
        return event
    raise ProtocolError("the head ends before it is complete")


def _refused(head: bytes, error: h11.RemoteProtocolError, *, request: bool) -> ProtocolError:
    """Translate h11's error about a head into our own message."""
    words = head_faults.lines(head.removesuffix(b"\r\n"), request=request)
    if words is None:
        headers, version = (
            head_faults.fields(head),
            head.partition(b"\r\n")[0][-3:] if request else head[5:8],
        )
        words = head_faults.hosts(headers, version) if request else None
        try:
            _check_lengths(head)
            check_framing(headers, version)
        except ProtocolError as fault:
            return fault
    return ProtocolError(words or "the head cannot be parsed", error.error_status_hint)


def _checked(event: h11.Request | h11.Response | h11.InformationalResponse, head: bytes) -> Headers:
    headers = Headers(event.headers.raw_items())
    _check_lengths(head)
    check_framing(headers, bytes(event.http_version))
    headers.write_length()
    return headers


def decide_request(head: bytes, limits: Limits) -> RequestHead:
    """Parse a complete request head by h11. Raises ProtocolError (400, 414, 431, 501, 505)."""
    check_size(head, limits, request=True)
    check_bytes(head, complete=True)
    _check_blanks(head)
    event = _read(
        h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head), head, request=True
    )
    # For the type checker: a server connection returns nothing else first.
    if not isinstance(event, h11.Request):  # pragma: no cover
        raise ProtocolError("a request was expected")
    if event.http_version not in (b"1.0", b"1.1"):
        raise ProtocolError(f"HTTP/{event.http_version.decode('ascii')} is not supported", 505)
    request = RequestHead(
        bytes(event.method), bytes(event.target), _checked(event, head), bytes(event.http_version)
    )
    _check_target(request)
    return request


def _check_target(request: RequestHead) -> None:
    """Raise ProtocolError if the destination is missing or ambiguous (RFC 9112 §3.2)."""
    if b"#" in request.target:
        raise ProtocolError(head_faults.FRAGMENT)
    if not all(_HOST.fullmatch(value) for value in request.headers.all(b"host")):
        raise ProtocolError("the Host field is not host or host:port")
    if request.method == b"CONNECT":
        if not _CONNECT_TARGET.fullmatch(request.target):
            raise ProtocolError("the target of CONNECT is not host:port")
        if b"transfer-encoding" in request.headers or int(
            request.headers.get(b"content-length") or 0
        ):
            raise ProtocolError("CONNECT with a body")
    elif request.target[:1] not in (b"/", b"*") and request.authority is None:
        raise ProtocolError("the request target is neither a path nor an absolute URI")
    elif request.target.startswith(b"*") and (
        request.target != b"*" or request.method != b"OPTIONS"
    ):
        raise ProtocolError("the request target * is valid with OPTIONS only")


def decide_response(head: bytes, limits: Limits) -> ResponseHead:
    """Parse a complete response head by h11. Raises ProtocolError.

    White space before a colon is removed, as RFC 9112 §5.1 requires of a proxy: the client would
    refuse the response, or read the field as another one.
    """
    check_size(head, limits, request=False)
    check_bytes(head, complete=True)
    head = _BLANKS_BEHIND_NAME.sub(rb"\1:", head)
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=limits.head)
    connection.send(_ANY_REQUEST)
    event = _read(connection, head, request=False)
    # For the type checker: a client connection returns no request.
    if isinstance(event, h11.Request):  # pragma: no cover
        raise ProtocolError("a response was expected")
    if event.http_version not in (b"1.0", b"1.1"):
        raise ProtocolError(f"a response in HTTP/{event.http_version.decode('ascii')}")
    return ResponseHead(
        event.status_code, _checked(event, head), bytes(event.reason), bytes(event.http_version)
    )
