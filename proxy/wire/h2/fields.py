"""The fields of HTTP/2 messages: decoded header lists to checked heads, and back (RFC 9113 §8).

The h2 library can check header lists too, but it ends the whole connection for a bad one. A
malformed message is an error of its stream only (§8.1.1). So this module checks, and raises
ProtocolError for that stream.

In the canonical form, the authority is the Host field (wire/messages.py). So `:authority` becomes
Host, before the other fields, when a head arrives; Host becomes `:authority` when it is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from proxy.wire.grammar import FIELD_VALUE, TARGET_CHAR
from proxy.wire.messages import (
    AUTHORITY,
    CALLER,
    HOP_BY_HOP,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
    may_trail,
    origin_form,
)

Pair = tuple[bytes, bytes]


class Block(list[Pair]):
    """A header list that occurs repeatedly, with the head that was parsed from it.

    Reusing the head costs a tenth of parsing it.
    """

    __slots__ = ("head",)

    def __init__(self, pairs: Iterable[Pair]) -> None:
        super().__init__(pairs)
        self.head: RequestHead | ResponseHead | None = None


class NeverIndexedField(tuple[bytes, bytes]):
    """A field that arrived as never-indexed, and must be forwarded as such (RFC 7541 §6.2.3).

    In Headers it behaves like any other field.
    """

    __slots__ = ()


# RFC 9113 §8.2.1: lower-case tokens.
_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-z]+")
_VALUE = re.compile(FIELD_VALUE)
_PATH = re.compile(rb"/" + TARGET_CHAR + rb"*")
_METHOD = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]{1,64}")
_AUTHORITY = re.compile(rb"(?!:|\Z)" + AUTHORITY)
_STATUS = re.compile(rb"[1-5][0-9][0-9]")

# §8.2.2: fields of an HTTP/1 connection are forbidden.
_CONNECTION_FIELDS = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_SCHEME = (b":scheme", b"http")
_TE = (b"te", b"trailers")  # the only value that HTTP/2 allows
_REQUEST_PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path", b":protocol"})
_RESPONSE_PSEUDO = frozenset({b":status"})
# Fields that need another check, or mean that the head is not clean.
_NOTED = HOP_BY_HOP | {b"cookie", b"host", b"content-length"}


def request_head(pairs: Iterable[Pair]) -> RequestHead:
    """The head of a request. Raises ProtocolError if the message is malformed."""
    if type(pairs) is not Block:
        return _request_head(pairs)
    if not isinstance(pairs.head, RequestHead):
        pairs.head = _request_head(pairs)
    head = pairs.head
    return RequestHead(head.method, head.target, _again(head.headers), b"2", head.protocol)


def _again(headers: Headers) -> Headers:
    copy = headers.copy()
    copy.clean = headers.clean
    return copy


def _request_head(pairs: Iterable[Pair]) -> RequestHead:
    pseudo, headers = _split(pairs, _REQUEST_PSEUDO)
    method = pseudo.get(b":method", b"")
    authority = pseudo.get(b":authority")
    host = headers.all(b"host") if not headers.clean else []
    if not _METHOD.fullmatch(method):
        raise ProtocolError("a request without a valid :method")
    named = authority if authority is not None or not host else host[0]
    # It is not an error if both are missing (§8.3.1): the listener knows the original destination.
    if named is not None and not _AUTHORITY.fullmatch(named):
        raise ProtocolError("a malformed :authority or Host")
    if len(host) > 1 or (host and named is not None and host[0].lower() != named.lower()):
        raise ProtocolError("the Host field contradicts :authority")
    protocol = pseudo.get(b":protocol")
    if method == b"CONNECT" and protocol is None:
        if authority is None or b":path" in pseudo or b":scheme" in pseudo:
            raise ProtocolError(
                "a CONNECT request must have :authority, and neither :path nor :scheme"
            )
        target = authority
    else:
        target = _target(method, pseudo, protocol)
    if authority is not None and not host:
        headers.items.insert(0, (b"host", authority))
    return RequestHead(method, target, headers, b"2", protocol)


def _target(method: bytes, pseudo: dict[bytes, bytes], protocol: bytes | None) -> bytes:
    path = pseudo.get(b":path", b"")
    if pseudo.get(b":scheme", b"").lower() not in (b"http", b"https"):
        raise ProtocolError("a request whose :scheme is neither http nor https")
    if not _PATH.fullmatch(path) and not (path == b"*" and method == b"OPTIONS"):
        raise ProtocolError("a request without a valid :path")
    if protocol is not None and method != b"CONNECT":
        raise ProtocolError(":protocol in a request that is not CONNECT (RFC 8441 §4)")
    return path


def response_head(pairs: Iterable[Pair]) -> ResponseHead:
    """The head of a response, possibly an informational one.

    Raises ProtocolError if it is malformed.
    """
    if type(pairs) is not Block:
        return _response_head(pairs)
    if not isinstance(pairs.head, ResponseHead):
        pairs.head = _response_head(pairs)
    return ResponseHead(pairs.head.status, _again(pairs.head.headers), b"", b"2")


def _response_head(pairs: Iterable[Pair]) -> ResponseHead:
    pseudo, headers = _split(pairs, _RESPONSE_PSEUDO)
    status = pseudo.get(b":status", b"")
    if not _STATUS.fullmatch(status) or status == b"101":  # §8.6: HTTP/2 does not support 101
        raise ProtocolError("a response without a valid :status")
    return ResponseHead(int(status), headers, b"", b"2")


def trailers(pairs: Iterable[Pair]) -> Headers:
    """A trailer section. Raises ProtocolError for a pseudo-field in it (§8.1).

    Fields that must not be trailers are dropped, as in HTTP/1.
    """
    kept = []
    for pair in pairs:
        if may_trail(pair[0]) or pair[0] in _CONNECTION_FIELDS:
            kept.append(pair)
        elif not _VALUE.fullmatch(pair[1]):
            raise ProtocolError("a field value has forbidden bytes")
    return _split(kept, frozenset())[1]


def _split(pairs: Iterable[Pair], allowed: frozenset[bytes]) -> tuple[dict[bytes, bytes], Headers]:
    pseudo: dict[bytes, bytes] = {}
    fields: list[Pair] = []
    noted: list[Pair] = []
    for pair in pairs:
        name, value = pair
        if not _VALUE.fullmatch(value):
            raise ProtocolError("a field value has forbidden bytes")
        if name[:1] == b":":
            if name not in allowed or name in pseudo or fields:
                raise ProtocolError("a pseudo-field is unknown, repeated, or after other fields")
            pseudo[name] = value
        elif (
            not _NAME.fullmatch(name)
            or name in _CONNECTION_FIELDS
            or (name == b"te" and value.lower() != b"trailers")
        ):
            raise ProtocolError(
                f"the field {name[:64].decode('latin-1')!r} is not allowed in HTTP/2"
            )
        else:
            if name in _NOTED:
                noted.append(pair)
            fields.append(pair)
    headers = Headers(fields)
    headers.clean = not noted
    if noted:
        _look_again(headers, noted)
    return pseudo, headers


def _look_again(headers: Headers, noted: list[Pair]) -> None:
    cookies = [pair for pair in noted if pair[0] == b"cookie"]
    if len(cookies) > 1:
        _join(headers, cookies)
    lengths = [value for name, value in noted if name == b"content-length"]
    if len(lengths) > 1 or (lengths and not (lengths[0].isdigit() and len(lengths[0]) < 19)):
        raise ProtocolError("the Content-Length is repeated, or not a number")
    if lengths and lengths[0][:1] == b"0" != lengths[0]:  # as in HTTP/1: Headers.write_length
        headers.items = [
            _shortened(pair) if pair[0] == b"content-length" else pair for pair in headers.items
        ]


def _shortened(pair: Pair) -> Pair:
    """A Content-Length without leading zeros."""
    short = (pair[0], b"%d" % int(pair[1]))
    return NeverIndexedField(short) if isinstance(pair, NeverIndexedField) else short


def _join(headers: Headers, cookies: list[Pair]) -> None:
    """Join several cookie fields into one.

    They are split for better compression; outside HTTP/2 they must be one field (§8.2.3). Empty
    ones are omitted, because the result could then end with a space, which is forbidden.
    """
    joined = b"; ".join([value for _, value in cookies if value])
    headers.replace(b"cookie", joined)
    if any(isinstance(pair, NeverIndexedField) for pair in cookies):
        headers.items = [
            NeverIndexedField(pair) if pair[0] == b"cookie" else pair for pair in headers.items
        ]


def request_pairs(head: RequestHead) -> list[Pair]:
    """The header list of a request whose hop-by-hop fields have been stripped."""
    # Extended CONNECT has a path in :path, and the authority in :authority, like other requests.
    authority = (head.authority if head.protocol is None else head.headers.get(b"host")) or b""
    if head.method == b"CONNECT" and head.protocol is None:
        pseudo = [(b":method", b"CONNECT"), (b":authority", head.target)]
    else:
        pseudo = [(b":method", head.method), _SCHEME, (b":path", origin_form(head))]
        if authority:
            pseudo.insert(2, (b":authority", authority))
        if head.protocol is not None:
            pseudo.append((b":protocol", head.protocol))
    return pseudo + field_pairs(head.headers, without=b"host")


def onward_pairs(head: RequestHead, caller: bytes | None) -> list[Pair] | None:
    """The header list of a request that arrived by HTTP/2 and is forwarded by HTTP/2.

    The hop-by-hop fields are removed, and the field for `caller` is added. None: the request is not
    simple enough; use `request_pairs`.
    """
    items = head.headers.items
    if (
        not items
        or items[0][0] != b"host"
        or not head.target.startswith(b"/")
        or head.protocol is not None
    ):
        return None
    pairs = [
        (b":method", head.method),
        _SCHEME,
        (b":authority", items[0][1]),
        (b":path", head.target),
    ]
    trailers = False
    if head.headers.clean:
        pairs += items[1:]
    else:
        pairs += [item for item in items[1:] if item[0] not in HOP_BY_HOP]
        trailers = _TE in items or any(item[0] == b"te" for item in items)
    if caller is not None:
        pairs.append((CALLER, caller))
    if trailers:
        pairs.append(_TE)
    return pairs


def response_pairs(head: ResponseHead) -> list[Pair]:
    """The header list of a response."""
    if head.headers.clean and head.version == b"2":
        return [(b":status", b"%d" % head.status), *head.headers.items]
    return [(b":status", b"%d" % head.status), *field_pairs(head.headers)]


def field_pairs(headers: Headers, without: bytes = b"") -> list[Pair]:
    """The fields with names in lower case, without the fields of an HTTP/1 connection."""
    pairs = []
    for item in headers.items:
        name = item[0]
        lower = name.lower()
        if lower != without and lower not in _CONNECTION_FIELDS:
            pairs.append(item if lower == name else (lower, item[1]))
    return pairs
