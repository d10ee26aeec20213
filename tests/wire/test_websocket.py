"""A WebSocket's handshake, translated: the other version has the same information, and no field of
the first version is left."""

from __future__ import annotations

from base64 import b64encode

import pytest
import websockets.utils
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.h2.fields import field_pairs, request_pairs
from proxy.wire.messages import Field, Headers, ProtocolError, RequestHead, ResponseHead
from proxy.wire.websocket import accept, asks, extends, key_of, to_101, to_200, to_connect, to_get

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 §1.3
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
CONNECTION: list[Field] = [(b"Connection", b"keep-alive, Upgrade"), (b"Upgrade", b"WebSocket")]
REST: list[Field] = [
    (b"Sec-WebSocket-Version", b"13"),
    (b"Sec-WebSocket-Protocol", b"chat"),
    (b"Origin", b"http://a"),
]


def get(*fields: Field, method: bytes = b"GET", version: bytes = b"1.1") -> RequestHead:
    return RequestHead(method, b"/chat?x", Headers([(b"Host", b"a"), *fields]), version)


def connect(*fields: Field, protocol: bytes = b"websocket") -> RequestHead:
    return RequestHead(b"CONNECT", b"/chat?x", Headers([(b"host", b"a"), *fields]), b"2", protocol)


@given(st.binary(min_size=16, max_size=16))
def test_the_proof_is_that_of_the_standard_and_of_another_implementation(raw: bytes) -> None:
    assert accept(KEY) == ACCEPT
    key = b64encode(raw)
    assert accept(key) == websockets.utils.accept_key(key.decode()).encode()
    assert key_of(get(*CONNECTION, (b"Sec-WebSocket-Key", key))) == key


HANDSHAKE: list[Field] = [*CONNECTION, (b"Sec-WebSocket-Key", KEY)]
NONE = {
    "no offer": get((b"Sec-WebSocket-Key", KEY)),
    "an offer that Connection does not name": get(
        (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Key", KEY)
    ),
    "another offer": get(
        (b"Connection", b"upgrade"), (b"Upgrade", b"spdy/3.1"), (b"Sec-WebSocket-Key", KEY)
    ),
    "a longer name": get(
        (b"Connection", b"upgrade"), (b"Upgrade", b"websockets"), (b"Sec-WebSocket-Key", KEY)
    ),
    "no key": get(*CONNECTION),
    "two keys": get(*HANDSHAKE, (b"sec-websocket-key", KEY)),
    "a short key": get(*CONNECTION, (b"Sec-WebSocket-Key", KEY[4:])),
    "a key that is no base64 of 16 bytes": get(
        *CONNECTION, (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZR==")
    ),
    "a key that would end the field": get(*CONNECTION, (b"Sec-WebSocket-Key", KEY + b"\r\nx: y")),
    "another method": get(*HANDSHAKE, method=b"POST"),
    "HTTP/1.0": get(*HANDSHAKE, version=b"1.0"),
    "a body": get(*HANDSHAKE, (b"Content-Length", b"5")),
    "a body in chunks": get(*HANDSHAKE, (b"Transfer-Encoding", b"chunked")),
}


@pytest.mark.parametrize("request_", NONE.values(), ids=NONE)
def test_what_is_not_a_handshake_is_not_taken_for_one(request_: RequestHead) -> None:
    assert key_of(request_) is None
    assert not extends(request_)


@pytest.mark.parametrize("more", [[], [(b"Content-Length", b"0")]])
def test_get_becomes_connect(more: list[Field]) -> None:
    request = get(*HANDSHAKE, *REST, *more)
    assert key_of(request) == KEY
    assert extends(request)
    assert request_pairs(to_connect(request)) == [
        (b":method", b"CONNECT"),
        (b":scheme", b"http"),
        (b":authority", b"a"),
        (b":path", b"/chat?x"),
        (b":protocol", b"websocket"),
        *[(name.lower(), value) for name, value in REST],
    ]


def test_connect_becomes_get() -> None:
    request = connect(*REST, (b"sec-websocket-key", b"forged"), (b"content-length", b"0"))
    assert asks(request)
    assert extends(request)
    made = to_get(request, KEY)
    assert (made.method, made.target, made.version, made.protocol) == (
        b"GET",
        b"/chat?x",
        b"1.1",
        None,
    )
    assert made.headers.items == [
        (b"host", b"a"), *REST, (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Key", KEY)
    ]  # fmt: skip
    assert key_of(made) == KEY
    assert to_get(connect(), KEY).headers.get(b"sec-websocket-version") == b"13"


@pytest.mark.parametrize(
    ("protocol", "does"),
    [(b"websocket", True), (b"WebSocket", True), (b"connect-udp", False), (b"", False)],
)
def test_only_a_websocket_is_one(protocol: bytes, does: bool) -> None:
    assert asks(connect(protocol=protocol)) is does


def test_a_2xx_becomes_a_101_with_the_proof_for_the_client_s_key() -> None:
    head = to_101(
        ResponseHead(
            200,
            Headers([(b"sec-websocket-protocol", b"chat"), (b"content-length", b"0")]),
            b"",
            b"2",
        ),
        KEY,
    )
    assert (head.status, head.reason) == (101, b"Switching Protocols")
    assert head.headers.items == [
        (b"sec-websocket-protocol", b"chat"), (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Accept", ACCEPT)
    ]  # fmt: skip


def switched(*fields: Field, upgrade: bytes = b"websocket") -> ResponseHead:
    return ResponseHead(101, Headers([(b"Connection", b"upgrade"), (b"Upgrade", upgrade), *fields]))


def test_a_101_becomes_a_200_if_it_has_the_proof() -> None:
    head = to_200(
        switched(
            (b"Sec-WebSocket-Accept", ACCEPT),
            (b"Sec-WebSocket-Protocol", b"chat"),
            upgrade=b"WebSocket",
        ),
        KEY,
    )
    assert (head.status, field_pairs(head.headers)) == (200, [(b"sec-websocket-protocol", b"chat")])


@pytest.mark.parametrize("response", [
    switched(),
    switched((b"Sec-WebSocket-Accept", ACCEPT[::-1])),
    switched((b"Sec-WebSocket-Accept", ACCEPT), (b"Sec-WebSocket-Accept", ACCEPT)),
    switched((b"Sec-WebSocket-Accept", ACCEPT), upgrade=b"x"),
    ResponseHead(101, Headers([(b"Sec-WebSocket-Accept", ACCEPT)])),
])  # fmt: skip
def test_a_101_without_the_proof_is_a_fault_of_the_server_s(response: ResponseHead) -> None:
    with pytest.raises(ProtocolError):
        to_200(response, KEY)
