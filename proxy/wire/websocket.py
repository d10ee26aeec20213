"""A WebSocket's opening handshake in both versions of HTTP: GET with Upgrade (RFC 6455 §4), and extended CONNECT (RFC 8441 §5).

    HTTP/1.1                                                HTTP/2
    GET /chat                                               :method CONNECT, :protocol websocket, :path /chat
    Connection: Upgrade, Upgrade: websocket                 -
    Sec-WebSocket-Key: <random>                             -
    Sec-WebSocket-Version, -Protocol, -Extensions, Origin   as they are
    101                                                     200
    Sec-WebSocket-Accept: <made from the key>               -

The key proves to an HTTP/1.1 client that its server has understood the handshake, and is no cache. Where a proxy translates, it is that
server, or that client: it makes the proof for the client's key, or draws a key and checks the proof.
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha1

from proxy.wire.messages import Headers, ProtocolError, RequestHead, ResponseHead, upgrade_offer

PROTOCOL = b"websocket"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
# 16 bytes in base64.
_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")
_VERSION = b"13"


def accept(key: bytes) -> bytes:
    """The Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455 §4.2.2)."""
    return b64encode(sha1(key + _GUID).digest())  # noqa: S324  # the RFC's; no secret depends on it


def key_of(request: RequestHead) -> bytes | None:
    """The key of a handshake of HTTP/1.1 that can be translated; None: it is none, or has a body, for which there would be no place."""
    headers = request.headers
    if headers.clean or headers.block is not None or request.method != b"GET" or request.version != b"1.1":
        return None
    offers = (upgrade_offer(headers) or b"").lower().split(b", ")
    keys = headers.all(b"sec-websocket-key")
    if PROTOCOL not in offers or len(keys) != 1 or not _KEY.fullmatch(keys[0]):
        return None
    bodiless = (headers.get(b"content-length") or b"0") == b"0" and b"transfer-encoding" not in headers
    return keys[0] if bodiless else None


def asks(request: RequestHead) -> bool:
    """Whether this is an extended CONNECT for a WebSocket."""
    return request.protocol is not None and request.protocol.lower() == PROTOCOL


def extends(request: RequestHead) -> bool:
    """Whether this is an extended CONNECT, or becomes one where it goes on by HTTP/2."""
    return request.protocol is not None or key_of(request) is not None


def to_connect(request: RequestHead) -> RequestHead:
    """A handshake of HTTP/1.1 (`key_of`) as extended CONNECT."""
    headers = Headers(request.headers.items)
    headers.remove(b"connection", b"upgrade", b"sec-websocket-key", b"content-length")
    return RequestHead(b"CONNECT", request.target, headers, b"2", PROTOCOL)


def to_get(request: RequestHead, key: bytes) -> RequestHead:
    """An extended CONNECT for a WebSocket (`asks`) as a handshake of HTTP/1.1 with this key."""
    headers = Headers(request.headers.items)
    headers.remove(b"connection", b"upgrade", b"sec-websocket-key", b"content-length")
    headers.items += [(b"Connection", b"Upgrade"), (b"Upgrade", PROTOCOL), (b"Sec-WebSocket-Key", key)]
    if b"sec-websocket-version" not in headers:
        headers.items.append((b"Sec-WebSocket-Version", _VERSION))
    return RequestHead(b"GET", request.target, headers)


def to_101(response: ResponseHead, key: bytes) -> ResponseHead:
    """A 2xx to the extended CONNECT as the answer to the client's handshake with this key."""
    headers = Headers(response.headers.items)
    headers.remove(b"content-length", b"sec-websocket-accept")
    headers.items += [(b"Connection", b"Upgrade"), (b"Upgrade", PROTOCOL), (b"Sec-WebSocket-Accept", accept(key))]
    return ResponseHead(101, headers, b"Switching Protocols")


def to_200(response: ResponseHead, key: bytes) -> ResponseHead:
    """A 101 as the answer to an extended CONNECT. Raises ProtocolError if it is not the answer to a handshake with this key."""
    if (upgrade_offer(response.headers) or b"").lower() != PROTOCOL:
        raise ProtocolError("a 101 response to a WebSocket's handshake that switches to something else")
    if response.headers.all(b"sec-websocket-accept") != [accept(key)]:
        raise ProtocolError("a 101 response to a WebSocket's handshake without its Sec-WebSocket-Accept")
    headers = Headers(response.headers.items)
    headers.remove(b"connection", b"upgrade", b"sec-websocket-accept", b"content-length")
    return ResponseHead(200, headers, b"OK")
