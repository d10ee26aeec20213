"""Upgrade and CONNECT: from the switch on, bytes pass as they are, in both directions, with
half-close; until then it is HTTP."""

from __future__ import annotations

import pytest
import trio

from tests.kit.hop import Settings, hop, through
from tests.kit.http import GET, Message, Peer, answering, origin

OFFER = (
    b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade:"
    b" websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
CONNECT = b"CONNECT db.example:5432 HTTP/1.1\r\nHost: db.example:5432\r\n\r\n"
CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "answer"), [(OFFER, SWITCH), (CONNECT, CONNECTED)], ids=["upgrade", "connect"]
)
@pytest.mark.parametrize("same_segment", [True, False])
async def test_after_the_switch_bytes_pass_as_they_are(
    request_bytes: bytes, answer: bytes, same_segment: bool
) -> None:
    heads: list[bytes] = []
    raw = bytes(range(256)) * 40

    async def script(peer: Peer) -> None:
        heads.append(await peer.head())
        if same_segment:
            await peer.send(answer + b"server first")
        else:
            await peer.send(answer)
            await trio.sleep(0.01)
            await peer.send(b"server first")
        assert await peer.exactly(12) == b"client first"
        assert await peer.exactly(len(raw)) == raw
        await peer.send(raw)
        assert await peer.rest() == b"last words"
        await peer.send(b"farewell")

    async with through(script) as (client, proxy):
        await client.send(request_bytes + (b"client first" if same_segment else b""))
        head = await client.head()
        if not same_segment:
            await client.send(b"client first")
        assert await client.exactly(12) == b"server first"
        await client.send(raw)
        assert await client.exactly(len(raw)) == raw
        await client.send(b"last words")
        await client.eof()
        assert await client.rest() == b"farewell"
        await proxy.gone()
        assert proxy.pool.counts() == (0, 0)
        assert [(e.status, e.failure) for e in proxy.ended] == [(int(answer.split()[1]), None)]
        assert proxy.errors == []
    assert head.split(b"\r\n")[0] == answer.split(b"\r\n")[0]
    assert sorted(head.split(b"\r\n")) == sorted(answer.split(b"\r\n"))
    assert sorted(heads[0].split(b"\r\n")) == sorted(request_bytes.split(b"\r\n"))


async def test_a_server_that_declines_the_upgrade_answers_as_usual() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        for request_bytes in (OFFER, OFFER, GET):
            assert (await client.ask(request_bytes)).body == b"ok"
    assert received[0].get(b"upgrade") == b"websocket"
    assert received[0].get(b"connection") == b"Upgrade"


@pytest.mark.parametrize(
    ("offer", "passed"),
    [(b"h2c", None), (b"H2C, websocket", b"websocket"), (b"websocket, h2c", b"websocket")],
)
async def test_h2c_is_never_offered_onward(offer: bytes, passed: bytes | None) -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings:"
            b" AA\r\nUpgrade: " + offer + b"\r\n\r\n"
        )
    assert received[0].get(b"upgrade") == passed
    assert received[0].get(b"http2-settings") is None


async def test_an_upgrade_that_connection_does_not_name_is_ignored() -> None:
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        await client.ask(b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n")
    assert received[0].get(b"upgrade") is None


async def test_an_unrequested_switch_is_a_502() -> None:
    for request_bytes in (
        GET,
        b"GET / HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ):
        async with through(answering(SWITCH)) as (client, _):
            assert (await client.ask(request_bytes)).status == 502


async def test_a_switch_before_the_request_was_complete_is_a_502() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        await peer.rest()

    async with through(script) as (client, _):
        await client.send(
            OFFER.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 100\r\n\r\n")
            + b"x"
        )
        assert (await client.response()).status == 502


async def test_connect_that_is_refused_is_an_ordinary_response() -> None:
    response = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno!"
    async with origin(answering(response)) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        for _ in range(2):
            await client.send(CONNECT)
            answer = await client.response()
            assert (answer.status, answer.body) == (403, b"no!")
        assert server.opened == 1


async def test_a_length_in_the_answer_to_connect_means_nothing() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: 1\r\n\r\nraw")
        await peer.rest()

    async with through(script) as (client, _):
        await client.send(CONNECT)
        assert await client.head() == b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\n"
        assert await client.exactly(3) == b"raw"


@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_reset_in_the_tunnel_reaches_the_other_side_as_one(who: str) -> None:
    broken = trio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH + b"x")
        if who == "server":
            await peer.exactly(1)
            peer.reset()
            return
        with pytest.raises(trio.BrokenResourceError):
            await peer.rest()
        broken.set()

    async with through(script) as (client, proxy):
        await client.send(OFFER)
        await client.head()
        await client.exactly(1)
        if who == "server":
            await client.send(b"y")
            with pytest.raises(trio.BrokenResourceError):
                await client.rest()
        else:
            client.reset()
            with trio.fail_after(30):
                await broken.wait()
        await proxy.gone()
        assert proxy.errors == []


async def test_an_idle_tunnel_ends_in_time() -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        await peer.rest()

    async with through(script, Settings(tunnel_idle=0.05)) as (client, proxy):
        await client.send(OFFER)
        await client.head()
        assert await client.ended()
        await proxy.gone()


async def test_after_a_tunnel_was_refused_the_connection_still_speaks_http() -> None:
    async with through(
        answering(
            b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n"
        )
    ) as (client, _):
        for _ in range(2):
            assert (await client.ask()).status == 426
