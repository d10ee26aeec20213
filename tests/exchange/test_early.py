"""Responses that come before the end of their request: the announced state of the connection holds,
and no other client is affected.

The rules (RFC 9112 §9.3, §9.6; RFC 9113 §8.1): where more of the request is to come than a proxy
reads to keep the connection, or where the amount is not known, the head says `Connection: close`,
and the rest is read and dropped until the client has noticed. Otherwise the connection stays,
however slowly the rest comes. In HTTP/2, only the stream ends."""

from __future__ import annotations

import contextlib

import h2.errors
import h2.events
import pytest
import trio

from proxy.errors import NoEndpoint
from proxy.exchange.server_settings import ServerSettings
from tests.kit.hop import Settings, hop, through
from tests.kit.http import GET, OK, Peer, answering, origin
from tests.kit.http2_hop import through2
from tests.kit.http2_peers import OK as HEAD
from tests.kit.http2_peers import POST, Answer, Peer2, answering2

FULL = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig"
MEGABYTE = 1 << 20


async def refusing(peer: Peer) -> None:
    """A server that refuses uploads by their head, reads them to their end, and keeps its
    connections as long as its clients do."""
    with contextlib.suppress(AssertionError):  # the client has ended the connection
        while True:
            head = await peer.head()
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or b"0")
            if b"/upload" in head:
                await peer.send(FULL)
            await peer.exactly(length)
            if b"/upload" not in head:
                await peer.send(OK)


def upload(size: int) -> bytes:
    return b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size


async def silent_refusal(peer: Peer) -> None:
    """A server that reads nothing after the head."""
    await peer.head()
    await peer.send(FULL)
    await trio.sleep_forever()


@pytest.mark.parametrize("kind", ["length", "chunks"])
async def test_the_head_announces_the_close_where_much_of_the_request_is_left(
    kind: str,
) -> None:
    framing = b"Content-Length: 3145728" if kind == "length" else b"Transfer-Encoding: chunked"
    async with through(silent_refusal) as (client, proxy):
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n" % framing)
        answer = await client.response("POST")
        assert (answer.status, answer.body, answer.get(b"connection")) == (413, b"big", b"close")
        assert await client.ended()
        client.close()
        await proxy.gone()


async def test_a_client_that_reads_after_its_upload_gets_the_response() -> None:
    async with origin(silent_refusal) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        with trio.fail_after(20):
            await client.send(upload(8 * MEGABYTE))
            for _ in range(8):  # more than a megabyte, which was the former limit
                await client.send(bytes(MEGABYTE))
            answer = await client.response("POST")
        assert (answer.status, answer.body, answer.get(b"connection")) == (413, b"big", b"close")


async def test_a_client_that_never_stops_sending_is_disconnected_after_the_linger_timeout() -> None:
    settings = Settings(server=ServerSettings(linger_timeout=0.3))
    async with origin(silent_refusal) as server, hop(server.address, settings) as proxy:
        client = await proxy.connect()
        await client.send(upload(1 << 40))
        with trio.fail_after(20):
            await client.flood()
        await proxy.gone()


async def test_a_short_rest_keeps_the_connection_however_slowly_it_comes() -> None:
    async with through(refusing) as (client, _):
        await client.send(upload(60_000))
        answer = await client.response("POST")
        assert (answer.status, answer.get(b"connection")) == (413, None)
        await trio.sleep(2.2)  # longer than the proxy reads from a connection that ends
        await client.send(bytes(60_000) + GET)
        assert (await client.response()).status == 200


@pytest.mark.parametrize(
    ("left", "connection"), [(0, None), (60_000, None), (3 * MEGABYTE, b"close")]
)
async def test_the_same_holds_for_responses_of_the_proxy(
    left: int, connection: bytes | None
) -> None:
    async with origin(answering()) as server, hop(server.address) as proxy:
        proxy.raises = NoEndpoint("no endpoint")
        client = await proxy.connect()
        await client.send(upload(left + 5) + b"12345")
        answer = await client.response("POST")
        assert (answer.status, answer.get(b"connection")) == (503, connection)
        if connection is None:
            proxy.raises = None
            await client.send(bytes(left) + GET)
            assert (await client.response()).body == b"ok"
        else:
            assert await client.ended()


async def test_other_clients_do_not_pay_for_refused_uploads_on_shared_connections() -> None:
    """Between two proxies, as between two sidecars."""
    statuses: list[int] = []
    async with (
        origin(refusing) as server,
        hop(server.address) as inner,
        hop(inner.address) as outer,
        trio.open_nursery() as nursery,
    ):

        async def uploads() -> None:
            for size in (100_000, 200_000, 400_000, MEGABYTE) * 5:
                client = await outer.connect()
                await client.send(upload(size) + bytes(size))
                assert (await client.response("POST")).status == 413
                client.close()

        async def posts() -> None:
            client = await outer.connect()
            for _ in range(70):
                answer = await client.ask(
                    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", "POST"
                )
                statuses.append(answer.status)

        nursery.start_soon(uploads)
        for _ in range(5):
            nursery.start_soon(posts)
    assert statuses == [200] * 350


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("size", [100_000, 4 * MEGABYTE])
async def test_the_answer_of_a_server_that_closes_within_the_upload_gets_through(
    size: int, reset: bool
) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(
            b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 30000\r\n\r\n"
            + b"x" * 30000
        )
        if reset:
            peer.reset()  # otherwise it closes with unread bytes, and the kernel resets

    async with origin(script) as server, hop(server.address) as proxy:
        for _ in range(10):
            client = await proxy.connect()
            with trio.fail_after(20):
                await client.send(upload(size) + bytes(size))
                answer = await client.response("POST")
            assert (answer.status, len(answer.body)) == (413, 30000)
            client.close()


async def test_an_expectation_without_a_body_keeps_the_connection() -> None:
    async with through(answering()) as (client, _):
        for _ in range(2):
            answer = await client.ask(b"GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n")
            assert (answer.status, answer.get(b"connection"), answer.interim) == (200, None, [])


async def test_in_http2_only_that_stream_ends_and_without_an_error() -> None:
    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        path = dict(message.headers)[b":path"]
        peer.h2.send_headers(number, [(b":status", b"413")] if path == b"/upload" else HEAD)
        await peer.send(number, b"ok", end=True)

    async with through2(answering2(respond, early=True)) as (client, proxy):
        for _ in range(100):  # more than the connection's window holds, unless it is enlarged
            number = await client.request([*POST[:3], (b":path", b"/upload")], end=False)
            await client.send(number, bytes(50_000))
            answer = await client.message(number)
            assert (answer.status, answer.body) == (413, b"ok")
            if answer.reset is None:
                answer.reset = int(
                    (await client.next(h2.events.StreamReset, number)).error_code or 0
                )
            assert answer.reset == h2.errors.ErrorCodes.NO_ERROR
            assert (await client.ask()).status == 200
        assert client.goaway is None
        assert not [ended.failure for ended in proxy.ended if ended.failure]
