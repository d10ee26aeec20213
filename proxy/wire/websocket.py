"""The WebSocket opening handshake in both HTTP versions, and the translation between them.

HTTP/1.1 uses GET with Upgrade (RFC 6455 §4). HTTP/2 uses extended CONNECT (RFC 8441 §5).

    HTTP/1.1                                      HTTP/2
    GET /chat                                     :method CONNECT, :protocol websocket, :path /chat
    Connection: Upgrade, Upgrade: websocket       -
    Sec-WebSocket-Key: <random>                   -
    Sec-WebSocket-Version, -Protocol, -Extensions, Origin    unchanged
    101                                           200
    Sec-WebSocket-Accept: <computed from the key> -

The key proves to an HTTP/1.1 client that the server understands the handshake and is not a cache. A
proxy that translates acts as that server or as that client: it computes the proof for the client's
key, or creates a key and checks the proof.
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
    return b64encode(sha1(key + _GUID).digest())  # noqa: S324  # as the RFC says; not for secrecy


def key_of(request: RequestHead) -> bytes | None:
    """The key of an HTTP/1.1 handshake that can be translated.

    None: the request is not such a handshake, or it has a body, which cannot be translated.
    """
    headers = request.headers
    if (
        headers.clean
        or headers.block is not None
        or request.method != b"GET"
        or request.version != b"1.1"
    ):
        return None
    offers = (upgrade_offer(headers) or b"").lower().split(b", ")
    keys = headers.all(b"sec-websocket-key")
    if PROTOCOL not in offers or len(keys) != 1 or not _KEY.fullmatch(keys[0]):
        return None
    bodiless = (
        headers.get(b"content-length") or b"0"
    ) == b"0" and b"transfer-encoding" not in headers
    return keys[0] if bodiless else None


def asks(request: RequestHead) -> bool:
    """Whether this is an extended CONNECT for a WebSocket."""
    return request.protocol is not None and request.protocol.lower() == PROTOCOL


def extends(request: RequestHead) -> bool:
    """Whether this is an extended CONNECT, or becomes one if it is forwarded by HTTP/2."""
    return request.protocol is not None or key_of(request) is not None


def to_connect(request: RequestHead) -> RequestHead:
    """Translate an HTTP/1.1 handshake (see `key_of`) to extended CONNECT."""
    headers = Headers(request.headers.items)
    headers.remove(b"connection", b"upgrade", b"sec-websocket-key", b"content-length")
    return RequestHead(b"CONNECT", request.target, headers, b"2", PROTOCOL)


def to_get(request: RequestHead, key: bytes) -> RequestHead:
    """Translate an extended CONNECT for a WebSocket (see `asks`) to an HTTP/1.1 handshake."""
    headers = Headers(request.headers.items)
    headers.remove(b"connection", b"upgrade", b"sec-websocket-key", b"content-length")
    headers.items += [
        (b"Connection", b"Upgrade"),
        (b"Upgrade", PROTOCOL),
        (b"Sec-WebSocket-Key", key),
    ]
    if b"sec-websocket-version" not in headers:
        headers.items.append((b"Sec-WebSocket-Version", _VERSION))
    return RequestHead(b"GET", request.target, headers)


def to_101(response: ResponseHead, key: bytes) -> ResponseHead:
    """Translate a 2xx to extended CONNECT into the 101 for the client's handshake with this key."""
    headers = Headers(response.headers.items)
    headers.remove(b"content-length", b"sec-websocket-accept")
    headers.items += [
        (b"Connection", b"Upgrade"),
        (b"Upgrade", PROTOCOL),
        (b"Sec-WebSocket-Accept", accept(key)),
    ]
    return ResponseHead(101, headers, b"Switching Protocols")


def to_200(response: ResponseHead, key: bytes) -> ResponseHead:
    """Translate a 101 to the response to an extended CONNECT.

    Raises ProtocolError if it does not accept the handshake with this key.
    """
    if (upgrade_offer(response.headers) or b"").lower() != PROTOCOL:
        raise ProtocolError("the 101 to a WebSocket handshake switches to another protocol")
    if response.headers.all(b"sec-websocket-accept") != [accept(key)]:
        raise ProtocolError("the 101 to a WebSocket handshake has no valid Sec-WebSocket-Accept")
    headers = Headers(response.headers.items)
    headers.remove(b"connection", b"upgrade", b"sec-websocket-accept", b"content-length")
    return ResponseHead(200, headers, b"OK")
