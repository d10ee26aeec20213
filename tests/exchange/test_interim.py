"""What comes before the final response, and responses that come before the request is complete."""

from __future__ import annotations

import trio

from proxy.exchange.server_settings import ServerSettings
from tests.kit.hop import Settings, through
from tests.kit.http import GET, OK, Peer


async def test_early_hints_are_passed_on_before_the_response() -> None:
    seen = trio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n")
        await seen.wait()
        await peer.send(b"HTTP/1.1 102 Processing\r\n\r\n" + OK)
        await peer.rest()

    async with through(script) as (client, _):
        await client.send(GET)
        assert await client.head() == b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"
        seen.set()
        answer = await client.response()
    assert (answer.interim, answer.body) == ([102], b"ok")


EXPECTING = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"


async def test_the_server_sends_continue_and_gets_the_body() -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        for _ in range(2):
            heads.append(await peer.head())
            assert not peer.received
            await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert await peer.exactly(5) == b"hello"
            await peer.send(OK)
        await peer.rest()

    async with through(script) as (client, _):
        for _ in range(2):
            await client.send(EXPECTING)
            assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
            answer = await client.ask(b"hello", "POST")
            assert answer.body == b"ok"
            assert answer.get(b"connection") is None
    assert b"Expect: 100-continue" in heads[0]


async def test_the_server_refuses_without_reading_and_the_response_announces_the_close() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno")
        await peer.rest()

    async with through(script) as (client, proxy):
        answer = await client.ask(EXPECTING, "POST")
        assert (answer.status, answer.body) == (417, b"no")
        assert answer.get(b"connection") == b"close"  # a late body would look like the next request
        assert await client.ended()
        assert proxy.pool.counts() == (0, 0)


async def test_a_server_that_ignores_expect_gets_the_body_that_the_client_sends_anyway() -> None:
    async def script(peer: Peer) -> None:
        assert (await peer.request()).body == b"hello"
        await peer.send(OK)
        await peer.rest()

    async with through(script) as (client, _):
        await client.send(EXPECTING)
        await trio.sleep(0.03)
        answer = await client.ask(b"hello", "POST")
    assert answer.body == b"ok"
    assert answer.interim == []


# Answers that come before the request is complete


async def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(
            b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig"
        )

    async with through(script, Settings(server=ServerSettings(linger_timeout=0.5))) as (
        client,
        proxy,
    ):
        await client.send(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 1000
        )
        answer = await client.response("POST")
        assert (answer.status, answer.body) == (413, b"big")
        await client.flood()
        await proxy.gone()
        assert [e.failure for e in proxy.ended] == [None]


async def test_a_short_rest_of_a_request_is_read_to_keep_the_connection() -> None:
    async def script(peer: Peer) -> None:
        if b"/early" in await peer.head():
            await peer.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        else:
            await peer.send(OK)
        await peer.rest()

    async with through(script) as (client, proxy):
        await client.send(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n01234")
        assert (await client.response("POST")).status == 403
        await client.send(b"56789" + GET)
        assert (await client.response()).body == b"ok"
        assert len(proxy.ended) == 2


async def test_a_response_streams_while_the_request_continues() -> None:
    """Each piece is answered before the next one is sent."""

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for i in range(5):
            assert await peer.until(b"\r\n") == b"1\r\n"
            assert await peer.until(b"\r\n") == b"%d\r\n" % i
            await peer.send(b"1\r\n%d\r\n" % i)
        assert await peer.until(b"\r\n\r\n") == b"0\r\n\r\n"
        await peer.send(b"0\r\n\r\n")
        await peer.rest()

    async with through(script) as (client, _):
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"200 OK" in await client.head()
        for i in range(5):
            await client.send(b"1\r\n%d\r\n" % i)
            assert await client.until(b"\r\n") == b"1\r\n"
            assert await client.until(b"\r\n") == b"%d\r\n" % i
        await client.send(b"0\r\n\r\n")
        assert await client.until(b"\r\n\r\n") == b"0\r\n\r\n"
