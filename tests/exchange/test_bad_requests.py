"""A request that cannot be read is answered and counted, and never reaches a server. The client
gets the response even if it keeps sending. A request that can be read has one meaning, whatever its
form."""

from __future__ import annotations

import pytest
import trio

from proxy.exchange.server_settings import ServerSettings
from proxy.wire.messages import Limits
from tests.kit.hop import Settings, hop, through
from tests.kit.http import GET, OK, POST, Message, Peer, answering, chunked, origin

BAD_BODY = b"POST / HTTP/1.1\r\nHost: a\r\n"
MALFORMED_REQUESTS = [
    (b"garbage\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", 400),
    (b"GET http://user@a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET nowhere HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET /a\tb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\n\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rContent-Length: 5\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\nGET /x", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n", 400),
    (BAD_BODY + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi", 400),
    (BAD_BODY + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 400),
    (BAD_BODY + b"Content-Length: 2, 2\r\n\r\nhi", 400),
    (BAD_BODY + b"Content-Length: +2\r\n\r\nhi", 400),
    (BAD_BODY + b"Content-Length: 0x2\r\n\r\nhi", 400),
    (BAD_BODY + b"Content-Length: 99999999999999999999\r\n\r\nhi", 400),
    (BAD_BODY + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (BAD_BODY + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n", 400),
    (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (BAD_BODY + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    (BAD_BODY + b"Transfer-Encoding: chunked, gzip\r\n\r\n", 400),
    (BAD_BODY + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    (b"CONNECT /path HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", 400),
    (b"GET /" + b"x" * 2000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 5000 + b"\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: x\r\n" * 50 + b"\r\n", 431),
]
TIGHT = Settings(server=ServerSettings(limits=Limits(head=4096, target=1024, fields=32)))


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    MALFORMED_REQUESTS,
    ids=lambda v: repr(v[:70]) if isinstance(v, bytes) else str(v),
)
async def test_a_request_that_cannot_be_read_is_answered_and_counted_and_goes_no_further(
    request_bytes: bytes, status: int
) -> None:
    async with origin(answering()) as server, hop(server.address, TIGHT) as proxy:
        client = await proxy.connect()
        await client.send(request_bytes + GET)
        answer = await client.response()
        assert answer.status == status
        assert b"error=http_request_error" in (answer.get(b"proxy-status") or b"")
        assert answer.get(b"connection") == b"close"
        assert await client.rest() == b""  # what followed it was not read as a request
        assert server.opened == 0
        assert [(e.status, e.failure) for e in proxy.ended] == [(status, "bad_request")]
        assert proxy.errors == []


async def test_so_is_one_that_follows_a_good_one() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, proxy):
        await client.send(
            b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + b"GET / HTTP/1.1\nHost: a\n\n" + GET
        )
        assert (await client.response("HEAD")).status == 200
        answer = await client.response()
        assert answer.status == 400
        assert answer.body  # it is not a response to a HEAD any more
        assert await client.rest() == b""
        assert len(received) == 1
        assert len(proxy.ended) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\n",
        b"-1\r\n",
        b"5\r\nhelloX\r\n",
        b"5\nhello\n",
        b"0x5\r\nhello\r\n",
        b"5;" + b"x" * 3000,
        b"0\r\nBad Trailer: x\r\n\r\n",
    ],
    ids=lambda b: repr(b[:20]),
)
async def test_a_bad_chunk_in_a_request_is_a_400(body: bytes) -> None:
    async with origin(answering()) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        await client.send(BAD_BODY + b"Transfer-Encoding: chunked\r\n\r\n" + body + GET)
        assert (await client.response()).status == 400
        assert await client.rest() == b""
        assert proxy.ended[0].failure == "bad_request"


async def test_a_bad_chunk_that_comes_late_is_a_400_too_and_the_server_sees_a_broken_request() -> (
    None
):
    broken = trio.Event()

    async def script(peer: Peer) -> None:
        assert await peer.until(b"5\r\nhello\r\n")
        assert await peer.ended()
        broken.set()

    async with through(script) as (client, _):
        await client.send(BAD_BODY + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await trio.sleep(0.01)
        await client.send(b"zz\r\n")
        assert (await client.response()).status == 400
        with trio.fail_after(30):
            await broken.wait()


async def test_a_request_that_ends_early_is_a_400() -> None:
    async def script(peer: Peer) -> None:
        await peer.rest()

    for sent in (b"GET / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe"):
        async with through(script) as (client, _):
            await client.send(sent)
            await client.eof()
            assert (await client.response()).status == 400
            assert await client.ended()


async def test_a_response_is_not_destroyed_by_further_bytes_of_the_client() -> None:
    """Closing with unread bytes would make the kernel send a reset, which destroys the response at
    the client."""
    async with origin(answering()) as server, hop(server.address, TIGHT) as proxy:
        for _ in range(10):
            client = await proxy.connect()
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 300_000)
            await trio.sleep(0.002)
            await client.send(b"y" * 300_000)
            assert (await client.response()).status == 431
            client.close()


async def test_neither_is_the_last_answer_by_requests_that_are_not_served_any_more() -> None:
    async with through(answering()) as (client, _):
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        for _ in range(20):
            await client.send(GET)
            await trio.lowlevel.checkpoint()
        assert (await client.response()).body == b"ok"
        assert await client.rest() == b""


async def test_a_client_that_leaves_within_its_request_is_not_a_bad_request() -> None:
    async def script(peer: Peer) -> None:
        await peer.rest()

    async with through(script) as (client, proxy):
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe")
        await trio.sleep(0.01)
        client.reset()
        await proxy.gone()
        assert [(e.status, e.failure) for e in proxy.ended] == [(None, "client_gone")]
        assert proxy.errors == []
        assert proxy.pool.counts() == (0, 0)


async def test_a_client_that_leaves_within_its_response_frees_the_server() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        await peer.flood()

    async with through(script) as (client, proxy):
        await client.send(GET)
        await client.head()
        client.reset()
        await proxy.gone()
        assert [(e.status, e.failure) for e in proxy.ended] == [(200, "client_gone")]
        assert proxy.pool.counts() == (0, 0)


async def test_one_bad_client_does_not_disturb_another() -> None:
    async with origin(answering()) as server, hop(server.address) as proxy:
        good = await proxy.connect()
        for request_bytes, _ in MALFORMED_REQUESTS:
            bad = await proxy.connect()
            await bad.send(request_bytes)
            assert (await good.ask(POST, "POST")).body == b"ok"
            bad.reset()


# The same request by both paths


UNUSUAL = [
    b"GET / HTTP/1.1\r\nHost:a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a \r\n\r\n",
    b"GET / HTTP/1.1\r\nHost:\ta\t\r\n\r\n",
    b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, keep-alive\r\n\r\n",
    b"GET / HTTP/1.1\r\nTE: gzip\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nKeep-Alive: 1\r\nHost: a\r\nProxy-Connection: keep-alive\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
]


@pytest.mark.parametrize("request_bytes", UNUSUAL, ids=repr)
async def test_an_unusual_request_gives_the_bytes_that_a_usual_one_gives(
    request_bytes: bytes,
) -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        heads.append(await peer.head())
        await peer.send(OK)
        await peer.rest()

    async with through(script) as (client, _):
        assert (await client.ask(request_bytes)).body == b"ok"
    assert heads == [GET]


async def test_an_unusual_response_gives_the_bytes_that_a_usual_one_gives() -> None:
    for response in (
        b"HTTP/1.1 200 OK\r\nContent-Length:2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2 \r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        (
            b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nConnection: Keep-Alive\r\nContent-Length:"
            b" 2\r\n\r\nok"
        ),
    ):
        async with through(answering(response)) as (client, _):
            await client.send(GET)
            assert await client.exactly(len(OK)) == OK


async def test_chunk_extensions_end_at_this_hop() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        assert await peer.until(b"0\r\n\r\n") == chunked(b"ab")
        await peer.send(OK)
        await peer.rest()

    async with through(script) as (client, _):
        await client.send(
            BAD_BODY + b'Transfer-Encoding: Chunked\r\n\r\n2 ;a="b"\r\nab\r\n000;x\r\n\r\n'
        )
        assert (await client.response()).body == b"ok"
