"""Tunnels within streams: CONNECT (RFC 9113 §8.5) and extended CONNECT (RFC 8441). Each direction
ends by itself."""

from __future__ import annotations

import pytest
import trio

from tests.kit.http import Peer, origin
from tests.kit.http2_hop import Settings2, hop2, through2
from tests.kit.http2_peers import (
    EXTENDED,
    OK,
    WEBSOCKET,
    Answer,
    Pair,
    Peer2,
    answering2,
    only2,
    speaking,
)

CONNECT: list[Pair] = [(b":method", b"CONNECT"), (b":authority", b"far:443")]


async def _accepts(peer: Peer2, number: int, message: Answer) -> None:
    """Send hello, wait for the end of the client's direction, send how much arrived, end."""
    peer.h2.send_headers(number, OK)
    await peer.send(number, b"hello")
    while number not in peer.ended:
        async with peer.moved:
            await peer.moved.wait()
    await peer.send(number, b"%d" % len(message.body), end=True)


@pytest.mark.parametrize("head", [CONNECT, WEBSOCKET], ids=["plain", "extended"])
async def test_a_tunnel_carries_both_directions_and_each_end_by_itself(head: list[Pair]) -> None:
    received: list[Answer] = []

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        received.append(message)
        await _accepts(peer, number, message)

    async with through2(answering2(respond, early=True), server=EXTENDED) as (client, proxy):
        number = await client.request(head, end=False)
        while client.messages.get(number, Answer()).body != b"hello":
            client.credit(await client.read())
        await client.send(number, b"x" * 30_000)
        await client.send(number, b"", end=True)
        answer = await client.message(number)
        assert (answer.status, answer.body, answer.reset) == (200, b"hello30000", None)
        await proxy.idle()
        assert proxy.ended[0].failure is None
    assert {pair for pair in received[0].headers if pair[0].startswith(b":")} == set(head)


async def test_a_server_that_does_not_know_extended_connect_is_not_asked() -> None:
    told: list[int] = []

    async def script(peer: Peer2) -> None:
        told.extend(peer.opened_by_peer)
        await answering2()(peer)

    async with origin(only2(script)) as up, hop2(up.address) as proxy:
        client = await proxy.connect2()
        number = await client.request(WEBSOCKET, end=False)
        while number not in client.ended:
            client.credit(await client.read())
        answer = client.messages[number]
        assert answer.status == 501
        assert b"RFC 8441" in answer.body
        assert told == []
        assert (await client.ask()).body == b"ok"
        assert proxy.ended[0].failure == "upgrade_failed"
        assert proxy.dialled == 2, "it might have accepted it by HTTP/1.1"


async def test_connect_of_http2_to_http1_and_back() -> None:
    async def far(peer: Peer) -> None:
        assert (await peer.head()).startswith(b"CONNECT far:443 HTTP/1.1\r\n")
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        assert await peer.rest() == b"all"
        await peer.send(b"bye")

    async with origin(far) as up, hop2(up.address, settings=Settings2(up=b"1.1")) as proxy:
        client = await proxy.connect2()
        number = await client.request(CONNECT, end=False)
        while not client.messages.get(number, Answer()).headers:
            await client.read()
        await client.send(number, b"all", end=True)
        assert (await client.message(number)).body == b"hellobye"

    async with origin(speaking(answering2(_accepts, early=True))) as up, hop2(up.address) as proxy:
        peer = await proxy.connect()
        await peer.send(b"CONNECT far:443 HTTP/1.1\r\nHost: far:443\r\n\r\n")
        assert b" 200 " in await peer.head()
        await peer.exactly(5)
        await peer.send(b"12345")
        await peer.eof()
        assert await peer.rest() == b"5"


async def test_a_tunnel_that_is_reset_is_reset_on_the_other_side() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, OK)
        await peer.reset(number, 2)

    async with through2(answering2(respond, early=True), server=EXTENDED) as (client, proxy):
        number = await client.request(CONNECT, end=False)
        with trio.fail_after(30):
            while number not in client.ended:
                await client.read()
        assert client.messages[number].reset is not None
        await proxy.idle()


async def test_a_connect_that_is_declined_is_an_ordinary_response() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, [(b":status", b"405")])
        await peer.send(number, b"no", end=True)

    async with through2(answering2(respond, early=True), server=EXTENDED) as (client, proxy):
        number = await client.request(CONNECT, end=False)
        answer = await client.message(number)
        assert (answer.status, answer.body) == (405, b"no")
        await proxy.idle()
