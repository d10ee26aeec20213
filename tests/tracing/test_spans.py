"""The span of a record: names and attributes by the conventions; nothing in it that may be a
secret; an error where the conventions define one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracing.records import SPAN, TRACE, Agreed, At, connection, grpc, http
from tracing.attributes import GRPC_CODES
from tracing.spans import LONGEST, Record, describe, redacted


def test_a_servers_span_has_what_the_conventions_ask_for() -> None:
    found = describe(
        http(
            agent=b"curl/8",
            identity="spiffe://a/ns/b/sa/c",
            tls=Agreed(),
            request_bytes=5,
            response_bytes=7,
        )
    )
    assert (found.name, found.error) == ("GET", None)
    assert found.events == [("isthmus.response.head", 2_000, {"http.response.status_code": 200})]
    assert found.attributes == {
        "http.request.method": "GET", "url.scheme": "http", "url.path": "/a", "http.response.status_code": 200,
        "server.address": "shop", "server.port": 8080, "client.address": "10.0.0.1", "client.port": 40000,
        "network.peer.address": "10.0.0.1", "network.peer.port": 40000, "network.transport": "tcp",
        "network.protocol.name": "http", "network.protocol.version": "1.1", "user_agent.original": "curl/8",
        "http.request.body.size": 5, "http.response.body.size": 7, "tls.established": True, "tls.protocol.name": "tls",
        "tls.protocol.version": "1.3", "tls.cipher": "TLS_AES_128_GCM_SHA256", "tls.curve": "X25519MLKEM768", "tls.resumed": False,
        "tls.next_protocol": "h2", "isthmus.direction": "inbound", "isthmus.destination": "10.0.0.2:8080",
        "isthmus.peer.identity": "spiffe://a/ns/b/sa/c",
    }  # fmt: skip


def test_a_clients_span_has_the_url_and_the_endpoint() -> None:
    found = describe(
        http("client", attempt=2, service="default/shop", chosen="east/default/shop-v2")
    )
    assert found.attributes["url.full"] == "http://shop:8080/a"
    assert found.attributes["http.request.resend_count"] == 2
    assert found.attributes["network.peer.address"] == "10.0.0.1"
    assert [found.attributes[f"isthmus.{name}"] for name in ("service", "cluster", "split.backend", "gateway")] == [
        "default/shop", "east", "east/default/shop-v2", True,
    ]  # fmt: skip
    at_home = describe(http("client", service="default/shop", chosen="default/shop")).attributes
    assert at_home["isthmus.service"] == "default/shop"
    assert not {"isthmus.cluster", "isthmus.split.backend", "isthmus.gateway"} & set(at_home)
    assert not {"url.path", "client.address", "user_agent.original"} & set(found.attributes)


@pytest.mark.parametrize(
    ("kind", "alpn", "version"),
    [("client", b"h2", "2"), ("client", b"", "1.1"), ("server", b"h2", "1.1")],
)
def test_a_clients_span_has_the_version_of_its_own_connection(
    kind: str, alpn: bytes, version: str
) -> None:
    found = describe(http(kind, version=b"1.1", tls=Agreed(alpn=alpn)))
    assert found.attributes["network.protocol.version"] == version


SECRETS = ("hunter2", "tok3n")


@pytest.mark.parametrize("kind", ["server", "client"])
@pytest.mark.parametrize(
    ("target", "authority"),
    [
        (b"/a?password=hunter2&t=tok3n", b"shop"),
        (b"http://joe:hunter2@shop/a?t=tok3n#hunter2", b"joe:hunter2@shop:80"),
        (b"/a#tok3n?hunter2", b"joe:hunter2@shop"),
        (b"joe:hunter2@shop:443", b"joe:hunter2@shop:443"),
        (b"http://joe:hunter2@shop?t=tok3n", b"@hunter2@shop"),
        (b"https://tok3n@[::1]:8/a", b"tok3n@[::1]:8"),
    ],
)
def test_queries_and_user_information_do_not_leak(
    kind: str, target: bytes, authority: bytes
) -> None:
    for record in (
        http(kind, target=target, authority=authority),
        grpc(kind, target=target, authority=authority),
    ):
        shown = repr(describe(record))
        assert not [secret for secret in SECRETS if secret in shown]


def test_the_query_is_shown_where_that_is_configured_but_not_what_is_known_to_be_a_signature() -> (
    None
):
    target = b"/a?color=blue&sig=hunter2&X-Amz-Signature=hunter2"
    assert (
        describe(http(target=target), query=True).attributes["url.query"]
        == "color=blue&sig=REDACTED&X-Amz-Signature=REDACTED"
    )
    url = describe(http("client", target=target), query=True).attributes["url.full"]
    assert url == "http://shop:8080/a?color=blue&sig=REDACTED&X-Amz-Signature=REDACTED"


@given(st.text())
def test_a_query_without_secrets_is_shown_as_it_is(query: str) -> None:
    assert (
        redacted(query) == query
        or "sig" in query
        or "Signature" in query
        or "AWSAccessKeyId" in query
        or "X-Amz" in query
    )


def test_an_unknown_method_does_not_become_a_name() -> None:
    found = describe(http(method=b"BREW"))
    shown = (
        found.attributes["http.request.method"],
        found.attributes["http.request.method_original"],
    )
    assert (found.name, *shown) == ("HTTP", "_OTHER", "BREW")


@pytest.mark.parametrize(
    ("kind", "status", "error"),
    [
        ("server", 200, None),
        ("server", 404, None),
        ("server", 500, "500"),
        ("client", 302, None),
        ("client", 404, "404"),
    ],
)
def test_which_statuses_are_errors_depends_on_the_side(
    kind: str, status: int, error: str | None
) -> None:
    found = describe(http(kind, status=status))
    assert found.attributes.get("error.type") == error
    assert (found.error is None) == (error is None)
    assert found.error in (None, "")  # the status code is enough


@pytest.mark.parametrize("kind", ["server", "client"])
@pytest.mark.parametrize("number", range(17))
def test_a_grpc_call_is_named_by_its_method_and_judged_by_its_status(
    kind: str, number: int
) -> None:
    code = GRPC_CODES[number]
    found = describe(grpc(kind, grpc_status=b"%d" % number))
    assert found.attributes["rpc.system.name"] == "grpc"
    assert found.attributes["rpc.response.status_code"] == code
    servers = {
        "UNKNOWN",
        "DEADLINE_EXCEEDED",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
    }
    failed = code != "OK" if kind == "client" else code in servers
    assert found.attributes.get("error.type") == (code if failed else None)
    assert not {"http.request.method", "url.path", "http.response.status_code"} & set(
        found.attributes
    )
    if code == "UNIMPLEMENTED":  # any text is a valid method
        assert (
            found.name,
            found.attributes["rpc.method"],
            found.attributes["rpc.method_original"],
        ) == ("grpc", "_OTHER", "shop.Stock/Get")
    else:
        assert (found.name, found.attributes["rpc.method"]) == ("shop.Stock/Get", "shop.Stock/Get")


@pytest.mark.parametrize("status", [b"", b"99", b"x", b"-1", b"17", "\u0661".encode()])
def test_a_grpc_status_that_is_none_is_unknown(status: bytes) -> None:
    assert describe(grpc(grpc_status=status)).attributes["rpc.response.status_code"] == "UNKNOWN"


def test_a_grpc_call_that_something_else_answered_shows_the_http_status() -> None:
    assert (
        describe(grpc(grpc_status=None, status=502)).attributes["http.response.status_code"] == 502
    )


def test_a_failure_of_the_proxy_is_an_error_with_its_reason_and_message() -> None:
    status = b"web.default.outbound;error=connection_refused"
    found = describe(
        http(
            "client",
            status=502,
            failure="connect_refused",
            words="10.0.0.1:80 refused",
            proxy_status=status,
        )
    )
    assert (found.attributes["error.type"], found.error) == (
        "connect_refused",
        "10.0.0.1:80 refused",
    )
    assert found.attributes["isthmus.proxy_status"] == status.decode()


def test_messages_that_may_quote_a_peer_are_not_shown() -> None:
    found = describe(http(failure="bad_request", words="bad header line b'Authorization: hunter2'"))
    assert (found.attributes["error.type"], found.error) == ("bad_request", "")
    assert "hunter2" not in repr(found)


def test_a_loop_is_an_event_with_its_cycle() -> None:
    found = describe(
        http(
            status=508, failure="loop", loop="token", words="x", cycle="west/a -> east/b -> west/a"
        )
    )
    assert (
        "isthmus.loop",
        3_000,
        {"isthmus.loop.kind": "token", "isthmus.loop.cycle": "west/a -> east/b -> west/a"},
    ) in found.events
    assert found.error == "x"


def test_a_connection_has_its_bytes_and_what_it_looked_like() -> None:
    found = describe(connection())
    assert found.name == "TCP"
    assert found.attributes["isthmus.destination"] == "[fd00::2]:5432"
    assert (found.attributes["isthmus.bytes.read"], found.attributes["isthmus.bytes.written"]) == (
        10,
        20,
    )
    assert found.attributes["isthmus.detected"] == "silent"
    assert (
        describe(connection(failure="loop", loop="own_port", words="w")).events[0][0]
        == "isthmus.loop"
    )


def test_an_address_of_ip_version_6_is_written_as_in_a_url() -> None:
    found = describe(http("client", authority=b"[fd00::1]:81", peer=At("fd00::1", 81)))
    assert found.attributes["url.full"] == "http://[fd00::1]:81/a"
    assert (found.attributes["server.address"], found.attributes["server.port"]) == ("fd00::1", 81)


@given(
    st.sampled_from(["server", "client"]),
    st.sampled_from([http, grpc]),
    st.binary(max_size=3000),
    st.binary(max_size=3000),
)
def test_any_request_has_a_description_and_no_value_of_it_is_long(
    kind: str, make: Callable[..., Record], text: bytes, host: bytes
) -> None:
    found = describe(
        make(
            kind,
            target=text,
            authority=host or None,
            method=text,
            agent=text,
            status=len(text) % 1000,
        ),
        query=True,
    )
    assert found.name
    assert all(
        value <= 2**63 if isinstance(value, int) else len(str(value)) <= 2 * LONGEST + 300
        for value in found.attributes.values()
    )


def test_what_is_not_known_of_a_request_is_left_out() -> None:
    found = describe(
        http(peer=None, destination=None, authority=None, version=b"", status=0, head_at=0)
    )
    assert found.name == "GET"
    assert found.events == []
    assert set(found.attributes) == {
        "http.request.method", "url.scheme", "url.path", "network.transport", "isthmus.direction", "tls.established",
        "http.request.body.size", "http.response.body.size",
    }  # fmt: skip


def test_without_an_authority_the_server_is_the_original_destination() -> None:
    found = describe(http(authority=None)).attributes
    assert (found["server.address"], found["server.port"]) == ("10.0.0.2", 8080)


def test_a_record_of_no_kind_is_a_connection_without_bytes() -> None:
    found = describe(Record("server", TRACE, SPAN))
    assert found.name == "TCP"
    assert set(found.attributes) == {"network.transport", "isthmus.direction", "tls.established"}


def test_a_connection_whose_protocol_was_not_looked_for_does_not_say_one() -> None:
    found = describe(connection(protocol=""))
    assert "isthmus.detected" not in found.attributes
    assert found.attributes["isthmus.bytes.read"] == 10
