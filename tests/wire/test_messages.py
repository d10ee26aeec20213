"""Fields and their lookup, the authority of a request, and the fields that end at a hop (RFC 9110
§7.6.1)."""

from __future__ import annotations

import pytest

from loopguard.l7 import HEADER
from proxy.wire.messages import (
    CALLER,
    END,
    HOP_BY_HOP,
    NEVER_NOMINATED,
    OVERRIDES,
    OWN,
    EndOfMessage,
    Field,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
    absolute_authority,
    origin_form,
    place,
    strip_hop_by_hop,
    upgrade_offer,
    wants_trailers,
)
from tracing.propagation import NAMES


def stripped(*fields: Field) -> list[Field]:
    headers = Headers(fields)
    strip_hop_by_hop(headers)
    return headers.items


def test_field_lookup_ignores_case_and_keeps_the_original_case() -> None:
    headers = Headers([(b"Host", b"a"), (b"X-A", b"1"), (b"x-a", b"2")])
    assert headers.get(b"host") == b"a"
    assert headers.get(b"x-a") == b"1"
    assert headers.all(b"x-a") == [b"1", b"2"]
    assert headers.get(b"y") is None
    assert headers.all(b"y") == []
    assert b"x-a" in headers
    assert b"y" not in headers
    assert len(headers) == 3
    assert list(headers) == headers.items
    assert repr(headers) == "Headers([(b'Host', b'a'), (b'X-A', b'1'), (b'x-a', b'2')])"


def test_fields_are_equal_as_a_recipient_sees_them() -> None:
    assert Headers([(b"Host", b"a")]) == Headers([(b"hOST", b"a")])
    assert Headers([(b"Host", b"a")]) != Headers([(b"Host", b"A")])
    assert Headers([(b"A", b"1"), (b"B", b"2")]) != Headers([(b"B", b"2"), (b"A", b"1")])
    assert Headers() != []
    with pytest.raises(TypeError):
        hash(Headers())


@pytest.mark.parametrize(("lines", "tokens"), [
    ([], []),
    ([b""], []),
    ([b"close"], [b"close"]),
    ([b" Keep-Alive ,\tX-A,, "], [b"keep-alive", b"x-a"]),
    ([b"a", b"b,c"], [b"a", b"b", b"c"]),
])  # fmt: skip
def test_the_members_of_a_list_are_collected_over_its_lines(
    lines: list[bytes], tokens: list[bytes]
) -> None:
    assert Headers([(b"Connection", line) for line in lines]).tokens(b"connection") == tokens


def test_fields_are_changed_in_their_place() -> None:
    headers = Headers([(b"A", b"1"), (b"B", b"2"), (b"a", b"3"), (b"C", b"4")])
    copy = headers.copy()
    headers.replace(b"a", b"9")
    assert headers.items == [(b"A", b"9"), (b"B", b"2"), (b"C", b"4")]
    headers.replace(b"D", b"5")
    headers.add(b"d", b"6")
    assert headers.items[3:] == [(b"D", b"5"), (b"d", b"6")]
    headers.remove(b"d", b"b")
    assert headers.items == [(b"A", b"9"), (b"C", b"4")]
    assert len(copy) == 4


def test_two_messages_do_not_share_their_fields() -> None:
    ResponseHead(200).headers.add(b"X", b"y")
    EndOfMessage().trailers.add(b"X", b"y")
    assert not ResponseHead(200).headers.items
    assert not END.trailers.items


@pytest.mark.parametrize(("target", "authority"), [
    (b"http://a", b"a"), (b"http://a/", b"a"), (b"http://a:80/x", b"a:80"), (b"https://[::1]:8443?x", b"[::1]:8443"),
    (b"ws://a.b-c_d", b"a.b-c_d"),
    (b"http://a#x", b"a"), (b"http://a?b@c", b"a"), (b"http://a/b@c", b"a"), (b"http://a:", b"a:"), (b"coap+tcp://a", b"a"),
    (b"http://%41", b"%41"),
    (b"http://", None), (b"http:///x", None), (b"http://?x", None), (b"://a", None), (b"http:a", None), (b"a", None), (b"a:80", None),
    (b"/x://a", None),
    (b"", None), (b"1http://a", None), (b"http://:80", None), (b"http://u@a", None), (b"http://u:p@a/", None), (b"http://@a", None),
    (b"http://a\\@b", None), (b"http://a\\b", None), (b"http://[::1", None), (b"http://::1", None), (b"http://a:b", None),
    (b"http://a:80:81", None),
    (b"http://a b", None), (b"http://a:123456", None),
])  # fmt: skip
def test_an_absolute_target_has_the_authority_or_none(
    target: bytes, authority: bytes | None
) -> None:
    assert absolute_authority(target) == authority


@pytest.mark.parametrize(("method", "target", "authority"), [
    (b"GET", b"/x", b"host"), (b"OPTIONS", b"*", b"host"), (b"GET", b"http://other:1/x", b"other:1"), (b"CONNECT", b"db:5432", b"db:5432"),
])  # fmt: skip
def test_a_request_is_for_its_target_before_its_host(
    method: bytes, target: bytes, authority: bytes
) -> None:
    assert RequestHead(method, target, Headers([(b"Host", b"host")])).authority == authority


def test_a_request_without_a_host_has_no_authority() -> None:
    assert RequestHead(b"GET", b"/", Headers(), b"1.0").authority is None


@pytest.mark.parametrize(
    ("status", "informational"),
    [(99, False), (100, True), (101, False), (103, True), (199, True), (200, False), (304, False)],
)
def test_an_informational_response_is_one_that_another_one_follows(
    status: int, informational: bool
) -> None:
    assert ResponseHead(status).informational is informational


def test_a_refusal_is_the_clients_fault_unless_it_says_otherwise() -> None:
    assert ProtocolError("x").status == 400
    assert ProtocolError("x", 431).status == 431


# The end of a hop...


@pytest.mark.parametrize(
    "name",
    [b"Connection", b"KEEP-ALIVE", b"proxy-connection", b"TE", b"Transfer-Encoding", b"Upgrade"],
)
def test_what_speaks_of_one_connection_does_not_go_on(name: bytes) -> None:
    assert stripped((b"A", b"1"), (name, b"x"), (b"B", b"2"), (name.lower(), b"y")) == [
        (b"A", b"1"),
        (b"B", b"2"),
    ]
    assert name.lower() in HOP_BY_HOP


@pytest.mark.parametrize(
    "connection", [b"X-Secret", b"x-secret, close", b"close , X-SECRET,", b",,x-secret"]
)
def test_what_connection_names_does_not_go_on(connection: bytes) -> None:
    assert stripped(
        (b"Host", b"a"), (b"Connection", connection), (b"X-Secret", b"1"), (b"X-Secret-2", b"2")
    ) == [
        (b"Host", b"a"),
        (b"X-Secret-2", b"2"),
    ]


def test_all_connection_lines_count() -> None:
    assert stripped(
        (b"A", b"1"), (b"Connection", b"a"), (b"B", b"2"), (b"connection", b"b"), (b"C", b"3")
    ) == [(b"C", b"3")]


@pytest.mark.parametrize("name", sorted(NEVER_NOMINATED))
def test_what_a_message_means_cannot_be_taken_from_it_by_naming_it(name: bytes) -> None:
    assert stripped((name.title(), b"x"), (b"Connection", b"close, " + name.upper())) == [
        (name.title(), b"x")
    ]


@pytest.mark.parametrize("name", [HEADER, b"isthmus-of-the-future"])
def test_no_field_of_ours_can_be_taken_off_by_naming_it(name: bytes) -> None:
    assert stripped(
        (b"Host", b"a"), (name, b"x"), (b"Connection", name + b", x-y"), (b"X-Y", b"1")
    ) == [(b"Host", b"a"), (name, b"x")]


def test_connection_cannot_remove_fields_of_the_proxy_or_of_a_trace() -> None:
    assert HEADER.startswith(OWN)
    assert CALLER.startswith(OWN)
    assert all(name.startswith(OWN) for name in OVERRIDES)
    assert NAMES <= NEVER_NOMINATED


def test_the_framing_cannot_be_kept_by_naming_it() -> None:
    assert (
        stripped(
            (b"Connection", b"transfer-encoding, connection, te"),
            (b"Transfer-Encoding", b"chunked"),
            (b"TE", b"gzip"),
        )
        == []
    )


@pytest.mark.parametrize(("te", "wanted"), [
    ([b"trailers"], True), ([b"Trailers"], True), ([b"gzip, trailers"], True), ([b"gzip", b"trailers"], True), ([b"trailers;q=0.5"], True),
    ([b"trailers ; q=1"], True), ([], False), ([b"gzip"], False), ([b"trailersx"], False), ([b"gzip;trailers"], False),
])  # fmt: skip
def test_a_client_that_wants_trailers_says_so(te: list[bytes], wanted: bool) -> None:
    assert wants_trailers(Headers([(b"TE", line) for line in te])) is wanted


@pytest.mark.parametrize(("connection", "upgrade", "offer"), [
    (b"Upgrade", [b"websocket"], b"websocket"),
    (b"keep-alive, upgrade", [b"WebSocket"], b"WebSocket"),
    (b"upgrade", [b"a/1, b", b"c"], b"a/1, b, c"),
    (b"upgrade", [b"h2c"], None),
    (b"upgrade, HTTP2-Settings", [b"H2C"], None),
    (b"upgrade", [b"h2c, websocket"], b"websocket"),
    (b"upgrade", [b"websocket ,\th2c"], b"websocket"),
    (b"upgrade", [b"h2c/1"], None),
    (b"upgrade", [b"websocket", b"h2c"], b"websocket"),
    (b"upgrade", [b"", b" , "], None),
    (b"upgrade", [], None),
    (b"keep-alive", [b"websocket"], None),
    (b"upgrades", [b"websocket"], None),
])  # fmt: skip
def test_an_upgrade_is_forwarded_unless_it_is_http2(
    connection: bytes, upgrade: list[bytes], offer: bytes | None
) -> None:
    headers = Headers([(b"Connection", connection), *((b"Upgrade", line) for line in upgrade)])
    assert upgrade_offer(headers) == offer


@pytest.mark.parametrize(
    ("method", "target", "origin"),
    [
        (b"GET", b"/a?b", b"/a?b"),
        (b"GET", b"http://c.east", b"/"),
        (b"GET", b"http://c.east?b", b"/?b"),
        (b"GET", b"http://c.east/a//b?http://x", b"/a//b?http://x"),
        (b"OPTIONS", b"http://c.east:80", b"*"),
        (b"OPTIONS", b"*", b"*"),
    ],
)
def test_the_origin_form_is_what_is_left_without_scheme_and_authority(
    method: bytes, target: bytes, origin: bytes
) -> None:
    assert origin_form(RequestHead(method, target, Headers())) == origin


@pytest.mark.parametrize(
    "name",
    [
        b"isthmus-client-id",
        b"Isthmus-Client-Id",
        b"l5d-client-id",
        b"isthmus_client_id",
        b"L5D_client-ID",
        b"Isthmus.Client+Id",
    ],
)
def test_who_the_caller_is_does_not_pass_a_hop_in_any_spelling(name: bytes) -> None:
    headers = Headers([(name, b"forged"), (b"X-Other", b"kept")])
    strip_hop_by_hop(headers)
    assert headers.items == [(b"X-Other", b"kept")]


def test_lines_go_on_without_their_hop_by_hop_lines_and_stay_as_they_are() -> None:
    block = b"Host: a\r\nConnection: close\r\nX: y\r\n"
    headers = Headers.canonical(block, (b"Connection: close\r",))
    assert headers.onward().encode() == b"Host: a\r\nX: y\r\n"
    assert headers.encode() == block


@pytest.mark.parametrize("headers", [Headers([(b"A", b"b")]), Headers.canonical(b"A: b\r\n", ())])
def test_a_field_is_appended_to_fields_and_to_lines(headers: Headers) -> None:
    headers.append(b"C", b"d")
    assert headers.encode() == b"A: b\r\nC: d\r\n"
    assert headers.items == [(b"A", b"b"), (b"C", b"d")]


def test_the_place_of_a_field_is_that_of_the_first_one_and_0_is_none() -> None:
    lines = b"host: a\r\nx: y\r\nx: z\r\n"
    assert place(lines, b"\nhost: ") == lines.index(b"a")
    assert place(lines, b"\nx: ") == lines.index(b"y")
    assert place(lines, b"\nst: ") == 0
