"""The fields of HTTP/2 messages. A header list is a head in canonical form or a ProtocolError. h2's
own rules accept the lists that we make of a head. A round trip loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.h2.fields import (
    Block,
    NeverIndexedField,
    field_pairs,
    onward_pairs,
    request_head,
    request_pairs,
    response_head,
    response_pairs,
    trailers,
)
from proxy.wire.messages import (
    CALLER,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
)
from tests.kit.http2 import GET, OK, POST, Pair

CONNECT: list[Pair] = [(b":method", b"CONNECT"), (b":authority", b"a:443")]
WEBSOCKET: list[Pair] = [(b":method", b"CONNECT"), *GET[1:], (b":protocol", b"websocket")]


def without(pairs: list[Pair], *names: bytes) -> list[Pair]:
    return [pair for pair in pairs if pair[0] not in names]


def replaced(pairs: list[Pair], name: bytes, value: bytes) -> list[Pair]:
    return [(n, value if n == name else v) for n, v in pairs]


def test_the_authority_becomes_the_host_field_in_front_of_the_others() -> None:
    head = request_head([*GET, (b"x", b"1"), (b"y", b"")])
    assert head == RequestHead(
        b"GET", b"/", Headers([(b"host", b"a"), (b"x", b"1"), (b"y", b"")]), b"2"
    )


def test_a_host_field_that_equals_the_authority_is_kept() -> None:
    head = request_head([*replaced(GET, b":authority", b"A:80"), (b"x", b"1"), (b"host", b"a:80")])
    assert head.headers.items == [(b"x", b"1"), (b"host", b"a:80")]


def test_a_host_field_will_do_for_the_authority() -> None:
    assert request_head([*without(GET, b":authority"), (b"host", b"a")]).authority == b"a"


def test_a_request_may_do_without_either() -> None:
    head = request_head(without(GET, b":authority"))
    assert head.authority is None
    assert request_head(request_pairs(head)) == head


def test_connect_has_the_authority_for_its_target() -> None:
    head = request_head(CONNECT)
    assert (head.method, head.target, head.protocol) == (b"CONNECT", b"a:443", None)


def test_an_extended_connect_has_a_path_and_a_protocol() -> None:
    head = request_head(WEBSOCKET)
    assert (head.method, head.target, head.protocol, head.headers.get(b"host")) == (
        b"CONNECT",
        b"/",
        b"websocket",
        b"a",
    )


def test_options_may_ask_for_everything() -> None:
    assert (
        request_head(replaced(replaced(GET, b":method", b"OPTIONS"), b":path", b"*")).target == b"*"
    )


def test_cookies_are_joined_and_a_secret_one_makes_all_secret() -> None:
    head = request_head([*GET, (b"cookie", b"a=1"), (b"x", b"1"), (b"cookie", b"b=2")])
    assert head.headers.items[1:] == [(b"cookie", b"a=1; b=2"), (b"x", b"1")]
    assert not isinstance(head.headers.items[1], NeverIndexedField)
    head = request_head([*GET, (b"cookie", b"a=1"), NeverIndexedField((b"cookie", b"b=2"))])
    assert isinstance(head.headers.items[1], NeverIndexedField)


def test_a_never_indexed_field_stays_never_indexed() -> None:
    head = request_head([*GET, NeverIndexedField((b"x-key", b"1"))])
    assert isinstance(request_pairs(head)[-1], NeverIndexedField)


MALFORMED = {
    "no method": without(GET, b":method"),
    "an empty method": replaced(GET, b":method", b""),
    "a method with a blank": replaced(GET, b":method", b"GET /x"),
    "no scheme": without(GET, b":scheme"),
    "another scheme": replaced(GET, b":scheme", b"ftp"),
    "no path": without(GET, b":path"),
    "an empty path": replaced(GET, b":path", b""),
    "a path with a blank": replaced(GET, b":path", b"/a b"),
    "a path that is a URI": replaced(GET, b":path", b"http://b/"),
    "a path beyond ASCII": replaced(GET, b":path", b"/\xff"),
    "a star that is not of OPTIONS": replaced(GET, b":path", b"*"),
    "an empty authority": replaced(GET, b":authority", b""),
    "an authority without a host": replaced(GET, b":authority", b":80"),
    "an authority with user information": replaced(GET, b":authority", b"u@a"),
    "an authority with a path": replaced(GET, b":authority", b"a/b"),
    "an authority of two ports": replaced(GET, b":authority", b"a:1:2"),
    "a Host that is no authority": [*without(GET, b":authority"), (b"host", b"a/b")],
    "an empty Host": [*without(GET, b":authority"), (b"host", b"")],
    "a Host that contradicts": [*GET, (b"host", b"b")],
    "two Hosts": [*GET, (b"host", b"a"), (b"host", b"a")],
    "a pseudo-field twice": [*GET, (b":path", b"/")],
    "a pseudo-field behind a field": [*GET[:3], (b"x", b"1"), GET[3]],
    "a pseudo-field behind a cookie": [*GET[:3], (b"cookie", b"1"), GET[3]],
    "an unknown pseudo-field": [*GET, (b":x", b"1")],
    "a pseudo-field of responses": [*GET, (b":status", b"200")],
    "an empty name": [*GET, (b"", b"1")],
    "a name in upper case": [*GET, (b"X", b"1")],
    "a name with a colon": [*GET, (b"x:", b"1")],
    "a name with a blank": [*GET, (b"x y", b"1")],
    "a name beyond ASCII": [*GET, (b"\xe4", b"1")],
    "a value with NUL": [*GET, (b"x", b"a\0b")],
    "a value with CR": [*GET, (b"x", b"a\rb")],
    "a value with LF": [*GET, (b"x", b"a\nb")],
    "a value with LF at its end": [*GET, (b"x", b"a\n")],
    "a value with another control byte": [*GET, (b"x", b"a\x7fb")],
    "a value with a blank in front": [*GET, (b"x", b" a")],
    "a value with a tab behind": [*GET, (b"x", b"a\t")],
    "Connection": [*GET, (b"connection", b"x")],
    "Keep-Alive": [*GET, (b"keep-alive", b"timeout=1")],
    "Proxy-Connection": [*GET, (b"proxy-connection", b"close")],
    "Transfer-Encoding": [*POST, (b"transfer-encoding", b"chunked")],
    "Upgrade": [*GET, (b"upgrade", b"h2c")],
    "another TE than trailers": [*GET, (b"te", b"gzip")],
    "TE of two members": [*GET, (b"te", b"trailers, gzip")],
    "two Content-Lengths": [*POST, (b"content-length", b"1"), (b"content-length", b"1")],
    "a Content-Length that is a list": [*POST, (b"content-length", b"1, 1")],
    "a Content-Length with a sign": [*POST, (b"content-length", b"+1")],
    "an empty Content-Length": [*POST, (b"content-length", b"")],
    "a Content-Length beyond counting": [*POST, (b"content-length", b"9" * 19)],
    "CONNECT with a path": [*CONNECT, (b":path", b"/")],
    "CONNECT with a scheme": [*CONNECT, (b":scheme", b"http")],
    "CONNECT without an authority": [CONNECT[0], (b"host", b"a:443")],
    "extended CONNECT without a path": without(WEBSOCKET, b":path"),
    "extended CONNECT without a scheme": without(WEBSOCKET, b":scheme"),
    "a protocol without CONNECT": replaced(WEBSOCKET, b":method", b"GET"),
}


@pytest.mark.parametrize("pairs", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_is_refused(pairs: list[Pair]) -> None:
    with pytest.raises(ProtocolError):
        request_head(pairs)


def test_cookies_that_are_empty_leave_no_blank_behind() -> None:
    for values in ([b"", b""], [b"a=b", b""], [b"", b"a=b", b""]):
        head = request_head([*GET, *[(b"cookie", value) for value in values]])
        assert head.headers.all(b"cookie") == [b"a=b" if b"a=b" in values else b""]
        assert request_head(request_pairs(head)) == head


def test_te_may_ask_for_trailers() -> None:
    assert request_head([*GET, (b"te", b"Trailers")]).headers.get(b"te") == b"Trailers"


def test_a_block_that_occurs_again_gives_an_equal_head_with_fields_of_its_own() -> None:
    block = Block([*OK, (b"x", b"1")])
    first, second = response_head(block), response_head(block)
    assert first == second == response_head(list(block))
    first.headers.remove(b"x")
    assert second.headers.get(b"x") == b"1"
    assert response_head(block) == second


def test_a_response_has_a_status_and_nothing_else_in_front() -> None:
    assert response_head([*OK, (b"x", b"1")]) == ResponseHead(
        200, Headers([(b"x", b"1")]), b"", b"2"
    )
    assert response_head([(b":status", b"103")]).informational


@pytest.mark.parametrize("status", [b"", b"101", b"20", b"2000", b"abc", b"099", b"600", b"+20"])
def test_a_response_with_another_status_is_refused(status: bytes) -> None:
    with pytest.raises(ProtocolError):
        response_head([(b":status", status)])


@pytest.mark.parametrize(
    "pairs",
    [[], [*OK, *OK], [*OK, (b":path", b"/")], [(b"x", b"1"), *OK], [*OK, (b"upgrade", b"x")]],
)
def test_a_malformed_response_is_refused(pairs: list[Pair]) -> None:
    with pytest.raises(ProtocolError):
        response_head(pairs)


@pytest.mark.parametrize(
    "pair",
    [(b":status", b"200"), (b":path", b"/"), (b"connection", b"x"), (b"X", b"1"), (b"x", b"\0")],
)
def test_malformed_trailers_are_refused(pair: Pair) -> None:
    with pytest.raises(ProtocolError):
        trailers([(b"a", b"b"), pair])


def test_trailers_are_fields() -> None:
    assert trailers([(b"grpc-status", b"0")]) == Headers([(b"grpc-status", b"0")])


NAME = (
    st.text("abcxyz-_0", min_size=1, max_size=8)
    .map(str.encode)
    .filter(lambda n: n not in (b"te", b"host", b"cookie"))
)
VALUE = st.binary(max_size=12).filter(
    lambda v: not any(b < 32 or b == 127 for b in v) and v == v.strip()
)
FIELDS = st.lists(st.tuples(NAME, VALUE), max_size=5)


@given(
    method=st.sampled_from([b"GET", b"POST", b"M-SEARCH"]),
    path=st.sampled_from([b"/", b"/a?b=c", b"//x"]),
    fields=FIELDS,
)
def test_a_request_is_the_same_there_and_back(
    method: bytes, path: bytes, fields: list[Pair]
) -> None:
    head = RequestHead(method, path, Headers([(b"host", b"a:80"), *fields]), b"2")
    assert request_head(request_pairs(head)) == head


@pytest.mark.parametrize("pairs", [CONNECT, WEBSOCKET])
def test_connect_is_the_same_there_and_back(pairs: list[Pair]) -> None:
    assert request_head(request_pairs(request_head(pairs))) == request_head(pairs)


@given(status=st.integers(100, 599).filter(lambda s: s != 101), fields=FIELDS)
def test_a_response_is_the_same_there_and_back(status: int, fields: list[Pair]) -> None:
    head = ResponseHead(status, Headers(fields), b"", b"2")
    assert response_head(response_pairs(head)) == head


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://b/x?y", b"/x?y"),
        (b"http://b", b"/"),
        (b"http://b?y", b"/?y"),
        (b"/x", b"/x"),
        (b"http://b?c://d/e", b"/?c://d/e"),
    ],
)
def test_an_absolute_target_is_taken_apart(target: bytes, path: bytes) -> None:
    pairs = dict(request_pairs(RequestHead(b"GET", target, Headers([(b"Host", b"a")]))))
    assert pairs[b":path"] == path
    assert pairs[b":authority"] == (b"b" if target.startswith(b"http") else b"a")


@pytest.mark.parametrize(
    ("target", "path"),
    [(b"*", b"*"), (b"http://b", b"*"), (b"http://b/", b"/"), (b"http://b?y", b"/?y")],
)
def test_options_for_the_whole_server_has_the_path_star(target: bytes, path: bytes) -> None:
    """RFC 9113 §8.3.1, and RFC 9112 §3.2.4 for the absolute form."""
    pairs = dict(request_pairs(RequestHead(b"OPTIONS", target, Headers([(b"Host", b"a")]))))
    assert pairs[b":path"] == path
    assert pairs[b":authority"] == (b"b" if b"//" in target else b"a")
    assert b"host" not in pairs


def test_what_belongs_to_an_http1_connection_does_not_go_out() -> None:
    headers = Headers(
        [
            (b"Connection", b"x"),
            (b"X-A", b"1"),
            (b"Transfer-Encoding", b"chunked"),
            (b"Upgrade", b"u"),
        ]
    )
    assert field_pairs(headers) == [(b"x-a", b"1")]


SIMPLE: list[Pair] = [
    (b"host", b"shop"),
    (b"x", b"y"),
    (b"connection", b"close"),
    (b"te", b"trailers"),
]
ONWARD: list[Pair] = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"shop"), (b":path", b"/a")]  # fmt: skip


def test_a_simple_request_goes_on_without_its_hop_by_hop_fields() -> None:
    head = RequestHead(b"GET", b"/a", Headers(SIMPLE), b"2")
    te = (b"te", b"trailers")
    assert onward_pairs(head, None) == [*ONWARD, (b"x", b"y"), te]
    assert onward_pairs(head, b"me") == [*ONWARD, (b"x", b"y"), (CALLER, b"me"), te]
    without = RequestHead(b"GET", b"/a", Headers(SIMPLE[:2]), b"2")
    assert onward_pairs(without, None) == [*ONWARD, (b"x", b"y")]
    clean = request_head([*ONWARD, (b"x", b"y")])
    assert clean.headers.clean
    assert onward_pairs(clean, None) == [*ONWARD, (b"x", b"y")]


@pytest.mark.parametrize(
    "head",
    [
        RequestHead(b"GET", b"/a", Headers(), b"2"),
        RequestHead(b"GET", b"/a", Headers([(b"x", b"y"), (b"host", b"shop")]), b"2"),
        RequestHead(b"OPTIONS", b"*", Headers(SIMPLE), b"2"),
        RequestHead(b"CONNECT", b"/a", Headers(SIMPLE), b"2", b"websocket"),
    ],
)
def test_a_request_that_is_not_simple_does_not_go_on_so(head: RequestHead) -> None:
    assert onward_pairs(head, None) is None
