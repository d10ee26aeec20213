"""HTTP is the same on both sides, whatever version each of them has: connection fields stay with
their connection, and everything else arrives. Peers are python-hyper's h2 and h11."""

from __future__ import annotations

import pytest
import trio

from proxy.exchange.server_settings import ServerSettings
from proxy.wire.messages import Limits
from tests.kit.http import OK as OK1
from tests.kit.http import Message, Peer, answering, chunked, echo, origin
from tests.kit.http2_hop import Settings2, hop2, through2
from tests.kit.http2_peers import (
    GET,
    OK,
    POST,
    Answer,
    Pair,
    Peer2,
    answering2,
    echo2,
    ok,
    speaking,
)

TO_HTTP1 = Settings2(up=b"1.1")


def fields(*pairs: Pair, base: list[Pair] = GET) -> list[Pair]:
    return [*base, *pairs]


async def _received_by_http1(
    request: list[Pair], body: bytes | None = None, trailers: list[Pair] | None = None
) -> Message:
    """The request as an HTTP/1 server gets it from an HTTP/2 client."""
    received: list[Message] = []
    async with origin(answering(OK1, received)) as up, hop2(up.address, settings=TO_HTTP1) as proxy:
        client = await proxy.connect2(checked=False)
        number = await client.request(request, end=body is None)
        if body is not None:
            await client.send(number, body, end=trailers is None)
        if trailers is not None:
            await client.trailers(number, trailers)
        answer = await client.message(number)
        assert answer.body == b"ok"
        assert answer.get(b"content-length") == b"2"
    return received[0]


async def _received_by_http2(request: bytes) -> Answer:
    """The request as an HTTP/2 server gets it from an HTTP/1 client."""
    received: list[Answer] = []

    async def note(peer: Peer2, number: int, message: Answer) -> None:
        received.append(message)
        await ok(peer, number, message)

    async with origin(speaking(answering2(note))) as up, hop2(up.address) as proxy:
        client = await proxy.connect()
        answer = await client.ask(request)
        assert (answer.start, answer.body) == ((b"200", b"OK"), b"ok")
    return received[0]


# HTTP/2 client, HTTP/1 server


async def test_authority_becomes_host_and_cookies_are_one_field() -> None:
    request = await _received_by_http1(
        fields((b"cookie", b"a=1"), (b"x-y", b"Z"), (b"cookie", b"b=2"))
    )
    assert request.start == (b"GET", b"/")
    assert request.get(b"host") == b"a"
    assert request.get(b"cookie") == b"a=1; b=2"
    assert request.get(b"x-y") == b"Z"
    assert request.get(b"transfer-encoding") is request.get(b"content-length") is None


async def test_a_request_that_names_no_authority_is_for_where_the_client_went() -> None:
    request = await _received_by_http1([pair for pair in GET if pair[0] != b":authority"])
    assert (request.get(b"host") or b"").startswith(b"127.0.0.1:")


async def test_te_trailers_follows_the_rules_of_http1() -> None:
    request = await _received_by_http1(fields((b"te", b"trailers")))
    assert request.get(b"te") == b"trailers"
    assert request.get(b"connection") == b"TE"


@pytest.mark.parametrize("length", [True, False], ids=["content-length", "chunked"])
async def test_a_body_of_http2_is_framed_as_http1_has_it(length: bool) -> None:
    body = b"x" * 40_000
    request = await _received_by_http1(
        fields(*([(b"content-length", b"40000")] if length else []), base=POST), body
    )
    assert request.body == body
    assert request.get(b"content-length") == (b"40000" if length else None)
    assert request.get(b"transfer-encoding") == (None if length else b"chunked")


async def test_a_request_s_trailers_reach_http1() -> None:
    request = await _received_by_http1(POST, b"body", [(b"x-sum", b"1")])
    assert request.body == b"body"
    assert request.trailers == [(b"x-sum", b"1")]


async def test_options_of_the_whole_server() -> None:
    assert (
        await _received_by_http1([(b":method", b"OPTIONS"), *GET[1:3], (b":path", b"*")])
    ).start == (
        b"OPTIONS",
        b"*",
    )


async def _answer(response: bytes, request: list[Pair] = GET) -> Answer:
    """A response of HTTP/1 as an HTTP/2 client gets it."""
    async with origin(answering(response)) as up, hop2(up.address, settings=TO_HTTP1) as proxy:
        client = await proxy.connect2()
        answer = await client.ask(request)
        assert (await client.ask(request)).headers == answer.headers
        assert up.opened == 1 or b"close" in response
    return answer


async def test_connection_fields_of_http1_are_not_forwarded() -> None:
    answer = await _answer(
        b"HTTP/1.1 200 Fine\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive:"
        b" timeout=5\r\nContent-Length: 2\r\nX-A: B\r\n\r\nok"
    )
    assert answer.headers == [(b":status", b"200"), (b"content-length", b"2"), (b"x-a", b"B")]


async def test_chunks_become_data_and_their_trailers_stay_trailers() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await _answer(head + chunked(b"a" * 30_000, b"b", trailers=b"X-Sum: 7\r\n"))
    assert answer.body == b"a" * 30_000 + b"b"
    assert answer.trailers == [(b"x-sum", b"7")]
    assert answer.headers == [(b":status", b"200")]


async def test_a_response_that_ends_with_its_connection_ends_its_stream() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.0 200 OK\r\n\r\nall of it")

    async with origin(script) as up, hop2(up.address, settings=TO_HTTP1) as proxy:
        answer = await (await proxy.connect2()).ask()
    assert (answer.body, answer.reset) == (b"all of it", None)


@pytest.mark.parametrize(
    ("response", "method", "length"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HEAD", b"1000"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"GET", None),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n", b"GET", b"1000"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"GET", b"0"),
    ],
)
async def test_a_response_without_a_body(
    response: bytes, method: bytes, length: bytes | None
) -> None:
    answer = await _answer(response, [(b":method", method), *GET[1:]])
    assert (answer.body, answer.reset, answer.get(b"content-length")) == (b"", None, length)


async def test_interim_responses_come_first() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    answer = await _answer(early + early + OK1)
    assert answer.interim == [[(b":status", b"103"), (b"link", b"x")]] * 2
    assert answer.status == 200


async def test_an_unrequested_switch_of_protocols_is_an_error() -> None:
    answer = await _answer(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade, close\r\nUpgrade:"
        b" websocket\r\n\r\n"
    )
    assert answer.status == 502


# HTTP/1 client, HTTP/2 server


async def test_host_becomes_authority_and_connection_fields_go() -> None:
    request = await _received_by_http2(
        b"GET /p?q HTTP/1.1\r\nHost: shop:80\r\nConnection: keep-alive, X-Hop, TE\r\nX-Hop:"
        b" 1\r\nKeep-Alive: 5\r\nTE: trailers, gzip\r\nProxy-Connection: x\r\nCookie: a=1;"
        b" b=2\r\nX-Case: Kept\r\n\r\n"
    )
    pseudo = {
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", b"shop:80"),
        (b":path", b"/p?q"),
    }
    assert set(request.headers[:4]) == pseudo
    assert sorted(request.headers[4:]) == [
        (b"cookie", b"a=1; b=2"),
        (b"te", b"trailers"),
        (b"x-case", b"Kept"),
    ]


@pytest.mark.parametrize(
    ("start", "authority", "path"),
    [
        (b"GET http://other:81/x?y HTTP/1.1\r\nHost: a\r\n", b"other:81", b"/x?y"),
        (b"GET http://other HTTP/1.1\r\nHost: a\r\n", b"other", b"/"),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n", b"a", b"*"),
        (b"GET / HTTP/1.0\r\n", b"127.0.0.1", b"/"),
    ],
)
async def test_the_authority_of_an_http1_request(
    start: bytes, authority: bytes, path: bytes
) -> None:
    request = await _received_by_http2(start + b"\r\n")
    assert (request.get(b":authority") or b"").startswith(authority)
    assert request.get(b":path") == path
    assert request.get(b"host") is None


async def test_an_offer_of_h2c_is_not_passed_on() -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
    request = await _received_by_http2(b"GET / HTTP/1.1\r\nHost: a\r\n" + offer + b"\r\n")
    assert [name for name, _ in request.headers if not name.startswith(b":")] == []


@pytest.mark.parametrize("length", [True, False], ids=["content-length", "chunked"])
async def test_a_body_of_http1_and_its_trailers_reach_http2(length: bool) -> None:
    chunks = chunked(b"bo", b"dy", trailers=b"X-Sum: 1\r\n")
    framing = (
        b"Content-Length: 4\r\n\r\nbody"
        if length
        else b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    )
    request = await _received_by_http2(b"POST / HTTP/1.1\r\nHost: a\r\n" + framing)
    assert request.body == b"body"
    assert request.get(b"content-length") == (b"4" if length else None)
    assert request.get(b"transfer-encoding") is None
    assert request.trailers == ([] if length else [(b"x-sum", b"1")])


async def _answer1(
    response: list[Pair],
    body: bytes = b"",
    trailers: list[Pair] | None = None,
    method: bytes = b"GET",
) -> Message:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, [(b":status", b"103"), (b"link", b"x")])
        peer.h2.send_headers(number, response, end_stream=not body and not trailers)
        if body:
            await peer.send(number, body, end=trailers is None)
        if trailers:
            peer.h2.send_headers(number, trailers, end_stream=True)
        await peer.flush()

    async with origin(speaking(answering2(respond))) as up, hop2(up.address) as proxy:
        client = await proxy.connect()
        request = b"%b / HTTP/1.1\r\nHost: a\r\n\r\n" % method
        answer = await client.ask(request, method.decode())
        assert (
            await client.ask(request, method.decode())
        ).start == answer.start  # the client's connection is kept
        assert up.opened == 1
    assert answer.interim == [103]
    return answer


async def test_http1_gets_the_usual_reason_a_length_or_chunks_and_trailers() -> None:
    answer = await _answer1([(b":status", b"404"), (b"content-length", b"4")], b"gone")
    assert (answer.start, answer.body, answer.get(b"content-length")) == (
        (b"404", b"Not Found"),
        b"gone",
        b"4",
    )
    answer = await _answer1([(b":status", b"299")], b"x" * 100_000, [(b"x-sum", b"1")])
    assert answer.start == (b"299", b"")
    assert answer.get(b"transfer-encoding") == b"chunked"
    assert answer.trailers == [(b"x-sum", b"1")]
    assert len(answer.body) == 100_000


@pytest.mark.parametrize(
    ("response", "method", "length"),
    [
        ([(b":status", b"200"), (b"content-length", b"1000")], b"HEAD", b"1000"),
        ([(b":status", b"204")], b"GET", None),
        ([(b":status", b"304"), (b"content-length", b"1000")], b"GET", b"1000"),
        ([(b":status", b"200")], b"GET", b"0"),
    ],
)
async def test_http1_gets_a_response_without_a_body(
    response: list[Pair], method: bytes, length: bytes | None
) -> None:
    answer = await _answer1(response, method=method)
    assert (answer.body, answer.get(b"content-length"), answer.get(b"transfer-encoding")) == (
        b"",
        length,
        None,
    )


# HTTP/2 on both sides


@pytest.mark.parametrize("size", [0, 1, 16384, 65535, 65536, 1_000_000])
async def test_a_body_goes_there_and_back_with_its_trailers(size: int) -> None:
    async with through2(answering2(echo2)) as (client, proxy):
        body = bytes(range(256)) * (size // 256 + 1)
        number = await client.request(POST, end=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.pump)
            await client.send(number, body[:size])
            await client.trailers(number, [(b"x-sum", b"1")])
            while number not in client.ended:
                async with client.moved:
                    await client.moved.wait()
            nursery.cancel_scope.cancel()
        answer = client.messages[number]
        assert (answer.status, answer.body == body[:size], answer.trailers) == (
            200,
            True,
            [(b"x-sum", b"1")],
        )
        assert (proxy.ended[0].request_bytes, proxy.ended[0].response_bytes) == (size, size)


async def test_expect_100_is_answered_by_the_server() -> None:
    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        assert message.get(b"expect") == b"100-continue"
        peer.h2.send_headers(number, [(b":status", b"100")])
        await peer.flush()
        while number not in peer.ended:
            async with peer.moved:
                await peer.moved.wait()
        peer.h2.send_headers(number, OK)
        await peer.send(number, message.body, end=True)

    async with through2(answering2(respond, early=True)) as (client, _):
        number = await client.request(fields((b"expect", b"100-continue"), base=POST), end=False)
        while not client.messages.get(number, Answer()).interim:
            await client.read()
        await client.send(number, b"now", end=True)
        assert (await client.message(number)).body == b"now"


async def test_requests_of_one_connection_go_to_different_endpoints_and_share_connections_with_others() -> (
    None
):
    def named(name: bytes) -> object:
        async def respond(peer: Peer2, number: int, _: Answer) -> None:
            peer.h2.send_headers(number, OK)
            await peer.send(number, name, end=True)

        return respond

    async with (
        origin(speaking(answering2(named(b"one")))) as one,  # type: ignore[arg-type]
        origin(speaking(answering2(named(b"two")))) as two,  # type: ignore[arg-type]
        hop2(one.address, two.address) as proxy,
    ):
        clients = [await proxy.connect2() for _ in range(5)]
        for client in clients:
            assert {(await client.ask()).body for _ in range(2)} == {b"one", b"two"}
        assert (one.opened, two.opened) == (1, 1)


async def test_an_echo_of_http1_through_http2_clients() -> None:
    async with origin(echo) as up, hop2(up.address, settings=TO_HTTP1) as proxy:
        client = await proxy.connect2()
        assert (await client.ask(POST, b"x" * 10_000)).body == b"x" * 10_000
        assert (
            await client.ask(fields((b"content-length", b"5"), base=POST), b"12345")
        ).body == b"12345"
        assert up.opened == 1


async def test_a_target_over_the_limit_is_answered_with_414_and_other_streams_go_on() -> None:
    limits = Limits(head=65536, target=1000, fields=100)
    settings = Settings2(server=ServerSettings(limits=limits))
    async with through2(answering2(), settings) as (client, proxy):
        long = await client.ask([*GET[:3], (b":path", b"/" + b"x" * 1000)])
        assert (long.status, long.reset) == (414, None)
        assert proxy.ended[0].failure == "bad_request"
        allowed = await client.ask([*GET[:3], (b":path", b"/" + b"x" * 999)])
        assert allowed.status == 200
