"""One request and its response, as both sides see them through a proxy.

A message arrives as it was sent, whatever its framing, and a bodiless message stays one.
"""

from __future__ import annotations

import pytest
import trio

from tests.kit.hop import hop, through
from tests.kit.http import Message, Peer, answering, chunked, origin

HELLO = b"hello, world"


async def test_a_request_and_its_response_pass_unchanged() -> None:
    received: list[Message] = []
    request = b"GET /a?b=c HTTP/1.1\r\nHost: example.org\r\nX-One: 1\r\nx-Two: 2\r\n\r\n"
    async with through(
        answering(b"HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nX-Back: yes\r\n\r\nok", received)
    ) as (client, proxy):
        answer = await client.ask(request)
    assert received[0].start == (b"GET", b"/a?b=c")
    assert received[0].headers == [(b"host", b"example.org"), (b"x-one", b"1"), (b"x-two", b"2")]
    assert answer.start == (b"200", b"Fine")
    assert answer.headers == [(b"content-length", b"2"), (b"x-back", b"yes")]
    assert answer.body == b"ok"
    assert [e.status for e in proxy.ended] == [200]


async def test_names_keep_their_case() -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        heads.append(await peer.head())
        await peer.send(b"HTTP/1.1 200 OK\r\ncOntent-lEngth: 0\r\nX-oDd: 1\r\n\r\n")
        await peer.rest()

    async with through(script) as (client, _):
        await client.send(b"GET / HTTP/1.1\r\nhOST: a\r\nX-wEiRd: 1\r\n\r\n")
        answer = await client.head()
    assert heads == [b"GET / HTTP/1.1\r\nhOST: a\r\nX-wEiRd: 1\r\n\r\n"]
    assert answer == b"HTTP/1.1 200 OK\r\ncOntent-lEngth: 0\r\nX-oDd: 1\r\n\r\n"


async def test_one_connection_carries_many_exchanges() -> None:
    async with origin(answering()) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        for _ in range(20):
            assert (await client.ask()).body == b"ok"
        assert server.opened == 1
        assert len(proxy.ended) == 20


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            body = request.start[1] + request.body
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with through(script) as (client, proxy):
        requests = []
        for i in range(10):
            requests.append(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % i)
            requests.append(b"POST /p%d HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody" % i)
            requests.append(
                b"PUT /c%d HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % i
                + chunked(b"ab", b"c")
            )
        await client.send(b"".join(requests))
        await client.eof()
        for i in range(10):
            assert (await client.response()).body == b"/%d" % i
            assert (await client.response("POST")).body == b"/p%dbody" % i
            assert (await client.response("PUT")).body == b"/c%dabc" % i
        assert await client.ended()
        assert len(proxy.ended) == 30


@pytest.mark.parametrize(
    "body",
    [
        (b"Content-Length: 12\r\n\r\n" + HELLO),
        (b"Transfer-Encoding: chunked\r\n\r\n" + chunked(HELLO)),
        (b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*(HELLO[i : i + 1] for i in range(12)))),
    ],
    ids=["length", "chunked", "many chunks"],
)
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "byte by byte"])
async def test_bodies_arrive_in_both_directions(body: bytes, at_once: bool) -> None:
    received: list[Message] = []

    async def send(peer: Peer, data: bytes) -> None:
        for piece in [data] if at_once else [data[i : i + 1] for i in range(len(data))]:
            await peer.send(piece)
            await trio.lowlevel.checkpoint()

    async def script(peer: Peer) -> None:
        received.append(await peer.request())
        await send(peer, b"HTTP/1.1 200 OK\r\n" + body)
        await peer.rest()

    async with through(script) as (client, _):
        await send(client, b"POST / HTTP/1.1\r\nHost: a\r\n" + body)
        answer = await client.response("POST")
    framing = b"content-length" if body.startswith(b"Content") else b"transfer-encoding"
    for message in (received[0], answer):
        assert message.body == HELLO
        assert {name for name, _ in message.headers} & {
            b"content-length",
            b"transfer-encoding",
        } == {framing}


async def test_trailers_pass_both_ways() -> None:
    received: list[Message] = []
    body = chunked(b"x", trailers=b"X-Sum: 1\r\nX-More: 2\r\n")
    async with through(
        answering(
            b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n" + body,
            received,
        )
    ) as (client, _):
        answer = await client.ask(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body, "POST"
        )
    assert received[0].trailers == answer.trailers == [(b"x-sum", b"1"), (b"x-more", b"2")]
    assert answer.get(b"trailer") == b"X-Sum"


async def test_trailers_cannot_smuggle_fields_that_frame_or_route() -> None:
    received: list[Message] = []
    body = chunked(
        b"x",
        trailers=b"Content-Length: 5\r\nHost: evil\r\nTransfer-Encoding: chunked\r\nX-Good: 1\r\n",
    )
    async with through(answering(received=received)) as (client, _):
        await client.ask(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body, "POST"
        )
    assert received[0].trailers == [(b"x-good", b"1")]


@pytest.mark.parametrize(
    ("method", "response", "kept"),
    [
        (
            "HEAD",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
            [(b"content-length", b"1000")],
        ),
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n", []),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", []),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", []),
        ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", []),
        ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n", []),
        (
            "GET",
            b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n",
            [(b"content-length", b"1000")],
        ),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", [(b"content-length", b"0")]),
        (
            "GET",
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            [(b"content-length", b"0")],
        ),
    ],
)
async def test_a_response_without_a_body_gets_none_and_the_connection_stays(
    method: str, response: bytes, kept: list[tuple[bytes, bytes]]
) -> None:
    async with origin(answering(response)) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        for _ in range(3):
            answer = await client.ask(method.encode() + b" / HTTP/1.1\r\nHost: a\r\n\r\n", method)
            assert answer.headers == kept
            assert answer.body == b""
            assert not client.received
        assert server.opened == 1


@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE", b"OPTIONS"])
async def test_a_request_without_a_body_gets_no_framing(method: bytes) -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n", method.decode())
    assert received[0].headers == [(b"host", b"a")]


async def test_a_content_length_of_zero_is_kept() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", "POST")
    assert received[0].headers == [(b"host", b"a"), (b"content-length", b"0")]


async def test_a_close_delimited_response_becomes_chunks() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nall that ")
        await trio.sleep(0.01)
        await peer.send(b"there is")

    async with origin(script) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        for _ in range(2):  # the client's connection stays
            answer = await client.ask()
            assert answer.body == b"all that there is"
            assert answer.get(b"transfer-encoding") == b"chunked"
            assert answer.get(b"connection") is None
        assert server.opened == 2


async def test_a_server_of_http_1_0_is_understood() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with origin(script) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        for _ in range(2):
            assert (await client.ask()).body == b"ok"
        assert server.opened == 2
        assert proxy.pool.counts() == (0, 0)


async def test_a_connection_that_the_server_wants_closed_is_not_used_again() -> None:
    async with (
        origin(
            answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        ) as server,
        hop(server.address) as proxy,
    ):
        client = await proxy.connect()
        for _ in range(3):
            answer = await client.ask()
            # That field describes the server's connection to the proxy
            assert answer.get(b"connection") is None
        assert server.opened == 3
