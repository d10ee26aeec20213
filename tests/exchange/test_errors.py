"""Each error has the same form everywhere: a status, a Proxy-Status field that can be parsed, a
line of text. A truncated response reaches the client as a broken connection and never as a complete
message."""

from __future__ import annotations

import re

import pytest
import trio

from proxy.errors import (
    TABLE,
    ErrorAnswer,
    LoopDetected,
    NoEndpoint,
    NotAuthorised,
    PoolExhausted,
    RequestError,
    RequestTimeout,
    UpstreamClosed,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamTLSError,
    describe,
    known,
)
from proxy.exchange.layers import error_response
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed, ConnectionLost, TLSFailed
from proxy.wire.messages import ProtocolError
from tests.kit.hop import Settings, hop, through
from tests.kit.http import BROKEN, GET, OK, Message, Peer, answering, listen, origin

# A structured field's list of one item with parameters (RFC 8941 §3.1, RFC 9209 §2).
TOKEN = rb"[A-Za-z*][-!#$%&'*+.^_`|~0-9A-Za-z:/]*"
STRING = rb'"(?:[ !#-\[\]-~]|\\["\\])*"'
PROXY_STATUS = re.compile(
    rb"(%b|%b)((?:;[a-z*][-_.*a-z0-9]*=(?:%b|%b))*)" % (TOKEN, STRING, TOKEN, STRING)
)

WHERE = Address("10.0.0.1", 80)

ROWS = [
    (RequestError("why", 400), 400, "http_request_error"),
    (RequestError("why", 414), 414, "http_request_error"),
    (RequestTimeout("why"), 408, "http_request_error"),
    (NotAuthorised("why"), 403, "http_request_denied"),
    (LoopDetected("why", "self"), 508, "proxy_loop_detected"),
    (NoEndpoint("why"), 503, "destination_unavailable"),
    (PoolExhausted("why"), 503, "connection_limit_reached"),
    (UpstreamProtocolError("why"), 502, "http_protocol_error"),
    (UpstreamClosed("why"), 502, "connection_terminated"),
    (UpstreamTimeout("why"), 504, "http_response_timeout"),
    (UpstreamTLSError("why", "certificate"), 502, "tls_certificate_error"),
    (UpstreamTLSError("why", "protocol"), 502, "tls_protocol_error"),
    (UpstreamTLSError("why", "lost"), 502, "tls_protocol_error"),
    (TLSFailed("alert", "why"), 502, "tls_alert_received"),
    (TLSFailed("timeout", "why"), 504, "connection_timeout"),
    (ProtocolError("why", 431), 431, "http_request_error"),
    (ConnectionLost("why"), 502, "connection_terminated"),
    (ConnectFailed(WHERE, "refused", "why"), 502, "connection_refused"),
    (ConnectFailed(WHERE, "timeout", "why"), 504, "connection_timeout"),
    (ConnectFailed(WHERE, "unreachable", "why"), 502, "destination_ip_unroutable"),
    (ConnectFailed(WHERE, "reset", "why"), 502, "connection_terminated"),
    (ConnectFailed(WHERE, "other", "why"), 502, "connection_refused"),
]


def proxy_status(answer: Message) -> tuple[bytes, dict[bytes, bytes]]:
    """(the proxy's name, the parameters)"""
    value = answer.get(b"proxy-status")
    assert value is not None
    match = PROXY_STATUS.fullmatch(value)
    assert match is not None, value
    pairs = re.findall(rb";([^=]+)=(%b|%b)" % (TOKEN, STRING), match[2])
    return match[1], dict(pairs)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    ROWS,
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else str(v),
)
async def test_an_error_becomes_its_response(error: Exception, status: int, kind: str) -> None:
    async with hop(WHERE) as proxy:
        proxy.raises = error
        client = await proxy.connect()
        last = isinstance(error, NotAuthorised)
        for _ in range(
            1 if last else 2
        ):  # a response like any other: the connection stays, unless all requests on it are refused
            answer = await client.ask()
            assert answer.get(b"connection") == (b"close" if last else None)
            assert answer.status == status
            assert proxy_status(answer) == (
                b"test",
                {b"error": kind.encode(), b"details": b'"%b"' % str(error).encode()},
            )
            assert answer.body == f"{kind}: {error}\n".encode()
            assert answer.get(b"content-type") == b"text/plain; charset=utf-8"
            assert answer.get(b"date")
        assert proxy.ended[0].failure == describe(error).reason
        assert proxy.errors == []


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.reason)
def test_every_row_of_the_table_makes_a_response(row: ErrorAnswer) -> None:
    head, body = error_response(row, b"test", "why")
    assert PROXY_STATUS.fullmatch(head.headers.get(b"proxy-status") or b"")
    assert body.receive_nowait() == f"{row.proxy_status}: why\n".encode()
    assert 400 <= head.status < 600
    assert head.reason or head.status == 499  # which is for logs


async def test_head_gets_an_error_without_a_body() -> None:
    async with hop(WHERE) as proxy:
        proxy.raises = NoEndpoint("why")
        client = await proxy.connect()
        for _ in range(2):
            assert (await client.ask(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HEAD")).status == 503
            assert not client.received


async def test_an_unauthorised_client_gets_only_the_kind_of_error() -> None:
    async with hop(WHERE, Settings(open_to=False)) as proxy:
        proxy.raises = ConnectFailed(WHERE, "refused", "secret")
        answer = await (await proxy.connect()).ask()
    assert proxy_status(answer) == (b"test", {b"error": b"connection_refused"})
    assert answer.body == b"connection_refused\n"


async def test_a_fault_of_our_own_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with hop(WHERE) as proxy:
        proxy.raises = ZeroDivisionError("oops")
        assert not known(proxy.raises)
        client = await proxy.connect()
        assert (await client.ask()).status == 500
        proxy.raises = NoEndpoint("why")
        assert (await client.ask()).status == 503
    assert "internal error while handling a request" in caplog.text


@pytest.mark.parametrize("name", [b"pod.ns.outbound", b"1pod", b'a"b', b""])
def test_any_name_and_detail_make_a_field_that_can_be_parsed(name: bytes) -> None:
    detail = 'quote " backslash \\ line\r\nSet-Cookie: a=b ü \x00' + "x" * 2000
    head, _ = error_response(describe(NoEndpoint("x")), name, detail)
    value = head.headers.get(b"proxy-status")
    assert value is not None
    assert PROXY_STATUS.fullmatch(value), value
    assert len(value) < 1200


# Connecting


async def test_a_server_that_is_not_there_is_a_502() -> None:
    with listen() as closed:
        address = Address.of(closed.getsockname())
    async with hop(address) as proxy:
        answer = await (await proxy.connect()).ask()
        assert answer.status == 502
        assert proxy_status(answer)[1][b"error"] == b"connection_refused"
        assert proxy.ended[0].attempts == 0


async def test_a_server_that_does_not_answer_the_connection_is_a_504() -> None:
    with listen() as deaf:
        deaf.listen(0)  # one connection fits, further ones get no answer
        address = Address.of(deaf.getsockname())
        async with hop(address, Settings(dial_timeout=0.05)) as proxy:
            clients = [await proxy.connect() for _ in range(3)]
            for client in clients:
                await client.send(GET)
            answer = await clients[-1].response()
            assert answer.status == 504
            assert proxy_status(answer)[1][b"error"] == b"connection_timeout"


# Responses that break off


CUT = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n01234",
    "nothing of the body": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
    "in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n01234",
    "between chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n",
    "before the end of trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n0\r\nX: 1\r\n"
    ),
    "close-delimited": b"HTTP/1.1 200 OK\r\n\r\n01234",
}


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize(
    ("cut", "reset"),
    [(cut, reset) for cut in CUT for reset in (True, False) if reset or cut != "close-delimited"],
)
async def test_a_response_that_breaks_off_never_looks_complete(
    cut: str, reset: bool, version: bytes
) -> None:
    passed_on = trio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CUT[cut])
        await passed_on.wait()
        if reset:
            peer.reset()

    async with through(script) as (client, proxy):
        await client.send(b"GET / HTTP/%b\r\nHost: a\r\n\r\n" % version)
        await client.head()
        passed_on.set()
        with pytest.raises(
            trio.BrokenResourceError
        ):  # in HTTP/1.0 a clean end would be the end of the message
            await client.rest()
        await proxy.gone()
        assert [(e.status, e.failure) for e in proxy.ended] == [(200, "upstream_closed")]
        assert proxy.pool.counts() == (0, 0)


@pytest.mark.parametrize("cut", CUT)
async def test_neither_does_one_that_breaks_off_at_once(cut: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CUT[cut])
        peer.reset()

    async with through(script) as (client, _):
        with pytest.raises(BROKEN):
            await client.ask()


async def test_a_bad_chunk_in_a_response_breaks_the_connection() -> None:
    async with through(
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n")
    ) as (client, _):
        with pytest.raises(BROKEN):
            await client.ask()


MALFORMED_RESPONSES = [
    b"garbage\r\n\r\n",
    b"\x16\x03\x01\x00\x02\x02\x28",
    b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX Y : a\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: a\x01b\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000,
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
]


@pytest.mark.parametrize("response", MALFORMED_RESPONSES, ids=lambda r: repr(r[:50]))
async def test_a_response_that_is_not_http_is_a_502_and_its_connection_is_dropped(
    response: bytes,
) -> None:
    async with through(answering(response)) as (client, proxy):
        answer = await client.ask()
        assert answer.status == 502
        assert proxy_status(answer)[1][b"error"] == b"http_protocol_error"
        assert proxy.pool.counts() == (0, 0)
        assert proxy.ended[0].failure == "upstream_protocol"


async def test_bytes_after_a_response_are_not_taken_for_the_next_one() -> None:
    async with (
        origin(answering(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")) as server,
        hop(server.address) as proxy,
    ):
        client = await proxy.connect()
        for _ in range(3):
            assert (await client.ask()).body == b"ok"
        assert server.opened == 3
