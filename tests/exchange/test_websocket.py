"""WebSockets between clients and servers of either version of HTTP, and other offers to upgrade
(RFC 9110 §7.8, RFC 6455, RFC 8441)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import websockets.sync.client
import websockets.sync.server
import wsproto
import wsproto.events
from wsproto.connection import Connection as WebSocket
from wsproto.connection import ConnectionType

from proxy.net.address import Address
from proxy.wire.websocket import accept
from tests.kit.dispatch import mesh, policy
from tests.kit.hop import through
from tests.kit.http import GET, Message, Peer, answering, origin
from tests.kit.http2_hop import Hop2, Settings2, hop2
from tests.kit.http2_peers import (
    EXTENDED,
    WEBSOCKET,
    Answer,
    Peer2,
    answering2,
    ok,
    only2,
    speaking,
)
from tests.kit.ports import free_port
from tests.kit.websocket_servers import first_only, hypercorn, listening

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
OFFER = (
    b"GET /chat HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade:"
    b" websocket\r\nSec-WebSocket-Key: " + KEY + b"\r\n"
)
HANDSHAKE = OFFER + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
TO_HTTP1 = Settings2(up=b"1.1")
TEXTS = ["hello", "ü" * 1000, "x" * 100_000]


# Real clients and servers, in all four combinations


@pytest.fixture(params=[b"1.1", b"2"], ids=["to HTTP/1", "to HTTP/2"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[bytes, Address]]:
    with first_only() if request.param == b"1.1" else hypercorn() as address:
        yield request.param, address


@asynccontextmanager
async def _hop(server: tuple[bytes, Address]) -> AsyncIterator[Hop2]:
    up, address = server
    await listening(address)
    async with hop2(address, settings=Settings2(up=up)) as proxy:
        yield proxy


async def test_a_client_of_http1(server: tuple[bytes, Address]) -> None:
    def run(address: Address) -> str | None:
        with websockets.sync.client.connect(
            f"ws://{address}/chat", open_timeout=30, proxy=None
        ) as connection:
            for text in TEXTS:
                connection.send(text)
                assert connection.recv(timeout=30) == text
            connection.send(b"\0\1\2")
            assert connection.recv(timeout=30) == b"\0\1\2"
            assert connection.response is not None
            return connection.response.headers.get("x-version")

    async with _hop(server) as proxy:
        assert await trio.to_thread.run_sync(run, proxy.address) == (
            None if server[0] == b"1.1" else "2"
        )
        await proxy.idle()
        await proxy.gone()
        assert [(e.status, e.failure) for e in proxy.ended] == [(101, None)]


async def test_a_client_of_http2(server: tuple[bytes, Address]) -> None:
    async with _hop(server) as proxy:
        client = await proxy.connect2()
        number = await client.request([*WEBSOCKET, (b"sec-websocket-version", b"13")], end=False)
        while not client.messages.get(number, Answer()).headers:
            await client.read()
        answer = client.messages[number]
        assert answer.status == 200
        assert answer.get(b"x-version") == (None if server[0] == b"1.1" else b"2")
        frames, received = WebSocket(ConnectionType.CLIENT), ""
        for text in TEXTS:
            await _say(client, number, frames.send(wsproto.events.TextMessage(text)))
            received = ""
            while received != text:
                while not answer.body:
                    client.credit(await client.read())
                    await client.flush()
                frames.receive_data(answer.body)
                answer.body = b""
                received += "".join(
                    event.data
                    for event in frames.events()
                    if isinstance(event, wsproto.events.TextMessage)
                )
        await _say(client, number, frames.send(wsproto.events.CloseConnection(1000)))
        await client.send(number, b"", end=True)
        await client.message(number)
        await proxy.idle()
        assert [(e.status, e.failure) for e in proxy.ended] == [(200, None)]


async def _say(client: Peer2, number: int, data: bytes) -> None:
    """Send and read at the same time. Otherwise both sides would wait for windows."""
    while data:
        room = client.h2.local_flow_control_window(number)
        await client.send(number, data[:room])
        data = data[room:]
        if data:
            client.credit(await client.read())
            await client.flush()


HAPROXY = """
defaults
  mode http
  timeout connect 20s
  timeout client 20s
  timeout server 20s
  timeout tunnel 20s
listen {name}
  bind 127.0.0.1:{port} {bind}
  server s {to} {server}
"""


@contextlib.contextmanager
def _haproxy(
    folder: Path, name: str, to: Address, *, bind: str = "", server: str = ""
) -> Iterator[Address]:
    port = free_port()
    (folder / f"{name}.cfg").write_text(
        HAPROXY.format(name=name, port=port, bind=bind, to=to, server=server)
    )
    with subprocess.Popen(
        [HAPROXY_PROGRAM or "haproxy", "-f", str(folder / f"{name}.cfg")], stderr=subprocess.DEVNULL
    ) as process:
        yield Address("127.0.0.1", port)
        process.terminate()


HAPROXY_PROGRAM = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.mark.real
@pytest.mark.skipif(HAPROXY_PROGRAM is None, reason="haproxy is not installed")
@pytest.mark.parametrize(
    "near", [True, False], ids=["asked by haproxy", "asked by a client of HTTP/1"]
)
@pytest.mark.parametrize("far", [True, False], ids=["to haproxy", "to a server of HTTP/1"])
async def test_haproxy_s_extended_connect(near: bool, far: bool, tmp_path: Path) -> None:
    """HAProxy translates, too: before the proxy from HTTP/1.1 to HTTP/2, and after it back."""

    def run(address: Address) -> None:
        with websockets.sync.client.connect(
            f"ws://{address}/chat", open_timeout=30, proxy=None
        ) as connection:
            for text in TEXTS:
                connection.send(text)
                assert connection.recv(timeout=30) == text

    with contextlib.ExitStack() as stack:
        up = stack.enter_context(first_only())
        if far:
            up = stack.enter_context(
                _haproxy(tmp_path, "far", up, bind="proto h2", server="proto h1")
            )
        async with _hop((b"2" if far else b"1.1", up)) as proxy:
            down = proxy.address
            if near:
                down = stack.enter_context(
                    _haproxy(tmp_path, "near", down, server="proto h2 ws h2")
                )
                await listening(down)
            await trio.to_thread.run_sync(run, down)
            await proxy.idle()
            tunnels = [e for e in proxy.ended if e.status is not None]
            assert [(e.status, e.failure) for e in tunnels] == [(200 if near else 101, None)]


# What the servers see, byte by byte


def _tunnel(received: list[Answer]) -> Callable[[Peer2, int, Answer], Awaitable[None]]:
    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        received.append(message)
        peer.h2.send_headers(number, [(b":status", b"200"), (b"sec-websocket-protocol", b"chat")])
        await peer.send(number, b"server first")
        while number not in peer.ended:
            async with peer.moved:
                await peer.moved.wait()
        await peer.send(number, message.body[::-1], end=True)

    return respond


async def test_the_handshake_of_http1_becomes_an_extended_connect() -> None:
    received: list[Answer] = []
    script = speaking(answering2(_tunnel(received), early=True), EXTENDED)
    async with origin(script) as up, hop2(up.address) as proxy:
        client = await proxy.connect()
        await client.send(HANDSHAKE)
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        lines = {line.lower() for line in head.split(b"\r\n")[1:] if line}
        assert lines == {
            b"connection: upgrade",
            b"upgrade: websocket",
            b"sec-websocket-protocol: chat",
            b"sec-websocket-accept: " + accept(KEY).lower(),
        }
        assert b"Sec-WebSocket-Accept: " + accept(KEY) in head
        assert await client.exactly(12) == b"server first"
        await client.send(b"abc")
        await client.eof()
        assert await client.rest() == b"cba"
        await proxy.gone()
    assert sorted(received[0].headers) == sorted(
        [*WEBSOCKET, (b"sec-websocket-version", b"13"), (b"sec-websocket-protocol", b"chat")]
    )


async def test_an_extended_connect_becomes_the_handshake_of_http1() -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        heads.append(await peer.head())
        key = next(
            line[19:]
            for line in heads[-1].split(b"\r\n")
            if line.startswith(b"Sec-WebSocket-Key: ")
        )
        await peer.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade:"
            b" WebSocket\r\nSec-WebSocket-Accept: %b\r\n\r\nserver first" % accept(key)
        )
        await peer.send((await peer.rest())[::-1])

    async with origin(script) as up, hop2(up.address, settings=TO_HTTP1) as proxy:
        client = await proxy.connect2()
        for _ in range(2):
            number = await client.request([*WEBSOCKET, (b"origin", b"http://a")], end=False)
            await client.send(number, b"abc", end=True)
            answer = await client.message(number)
            assert (answer.headers, answer.body, answer.reset) == (
                [(b":status", b"200")],
                b"server firstcba",
                None,
            )
        await proxy.idle()
    keys = set()
    for head in heads:
        start, *lines = head[:-4].split(b"\r\n")
        assert start == b"GET /chat HTTP/1.1"
        keys.add(lines[4])
        del lines[4]
        assert lines == [
            b"host: shop", b"origin: http://a", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"
        ]  # fmt: skip
    assert len(keys) == 2, "each handshake has a key of its own"


SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"


@pytest.mark.parametrize(
    ("response", "status", "reason"),
    [
        (SWITCHED + b"\r\n", 502, "upstream_protocol"),
        (SWITCHED + b"Sec-WebSocket-Accept: " + accept(KEY) + b"\r\n\r\n", 502, "upstream_protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 501, "upgrade_failed"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 501, "upgrade_failed"),
        (b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno", 426, None),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", 403, None),
    ],
)  # fmt: skip
async def test_an_extended_connect_is_a_tunnel_only_after_a_101_with_a_valid_accept_key(
    response: bytes, status: int, reason: str | None
) -> None:
    async with origin(answering(response)) as up, hop2(up.address, settings=TO_HTTP1) as proxy:
        client = await proxy.connect2()
        number = await client.request(WEBSOCKET, end=False)
        answer = await client.message(number)
        assert answer.status == status
        assert reason is not None or answer.body == b"no"
        await proxy.idle()
        assert [(e.status, e.failure) for e in proxy.ended] == [(status, reason)]


async def test_a_handshake_that_a_server_of_http2_refuses_is_an_ordinary_response() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(number, [(b":status", b"403")])
        await peer.send(number, b"no", end=True)

    async with (
        origin(speaking(answering2(respond, early=True), EXTENDED)) as up,
        hop2(up.address) as proxy,
    ):
        client = await proxy.connect()
        for _ in range(2):
            answer = await client.ask(HANDSHAKE)
            assert (answer.status, answer.body, answer.get(b"upgrade")) == (403, b"no", None)
        assert up.opened == 1


# A server of HTTP/2 that has not announced it


async def _both(peer: Peer) -> None:
    """A server that accepts both versions at one port, and WebSockets only in HTTP/1.1."""
    await peer.least(4)
    if peer.received.startswith(b"PRI "):
        await speaking(answering2())(peer)
        return
    head = await peer.head()
    key = re.search(rb"(?i)\r\nsec-websocket-key: ([^\r]*)", head)
    assert head.startswith(b"GET /chat HTTP/1.1\r\n")
    assert key is not None
    await peer.send(SWITCHED + b"Sec-WebSocket-Accept: " + accept(key[1]) + b"\r\n\r\n")
    await peer.send((await peer.rest())[::-1])


async def test_a_server_that_takes_websockets_only_in_http1_gets_them_so() -> None:
    async with origin(_both) as up, hop2(up.address) as proxy:
        second = await proxy.connect2()
        assert (await second.ask()).body == b"ok"
        number = await second.request(WEBSOCKET, end=False)
        await second.send(number, b"abc", end=True)
        answer = await second.message(number)
        assert (answer.status, answer.body) == (200, b"cba")
        first = await proxy.connect()
        await first.send(HANDSHAKE)
        assert b"Sec-WebSocket-Accept: " + accept(KEY) in await first.head()
        await first.send(b"abc")
        await first.eof()
        assert await first.rest() == b"cba"
        assert (await second.ask()).body == b"ok"
        await first.stream.aclose()
        await proxy.idle()
        assert [(e.status, e.failure, e.attempts) for e in proxy.ended] == [
            (200, None, 1),
            (200, None, 1),
            (101, None, 1),
            (200, None, 1),
        ]


async def test_a_server_of_http1_that_was_taken_for_http2_gets_its_websocket() -> None:
    async def script(peer: Peer) -> None:
        await peer.least(4)
        if peer.received.startswith(b"PRI "):
            await peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            await peer.rest()
        else:
            await _both(peer)

    async with origin(script) as up, hop2(up.address) as proxy:
        client = await proxy.connect2()
        number = await client.request(WEBSOCKET, end=False)
        await client.send(number, b"abc", end=True)
        assert (await client.message(number)).body == b"cba"
        assert up.opened == 2


@pytest.mark.parametrize("version", [1, 2])
async def test_an_unsupported_request_does_not_count_against_the_endpoint(
    version: int,
) -> None:
    """Whatever a client offers, and however often."""
    async with mesh([only2(answering2())], policy(), up=b"2") as (world, _):
        for _ in range(20):
            if version == 1:
                client = await world.hop.connect()
                assert (await client.ask(HANDSHAKE)).status == 501
            else:
                second = await world.hop.connect2()
                number = await second.request(WEBSOCKET, end=False)
                assert (await second.message(number)).status == 501
            assert world.broken == 0
        client = await world.hop.connect()
        assert (await client.ask()).body == b"ok"
        assert (
            await client.ask(
                GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: TLS/1.2\r\n\r\n")
            )
        ).body == b"ok"


# Other offers


@pytest.mark.parametrize("offer", [b"TLS/1.2", b"TLS/1.2, HTTP/1.1", b"h2c", b"HTTP/2.0"])
async def test_an_upgrade_to_a_protocol_that_carries_http_is_ignored(offer: bytes) -> None:
    """Apache HttpClient 5.4 offers TLS with each GET. After such an upgrade this proxy would see no
    requests any more."""
    request = (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: "
        + offer
        + b"\r\nX: y\r\n\r\n"
    )
    received: list[Message] = []
    async with through(answering(received=received)) as (client, _):
        for _ in range(2):
            assert (await client.ask(request)).body == b"ok"
    assert [message.headers for message in received] == [[(b"host", b"a"), (b"x", b"y")]] * 2


@pytest.mark.parametrize("offer", [b"TLS/1.2", b"spdy/3.1", b"foo/2, bar", b"h2c", b"websocket"])
async def test_an_offer_that_http2_cannot_carry_is_ignored(offer: bytes) -> None:
    """The last one is not a handshake: it has no key."""
    received: list[Answer] = []

    async def note(peer: Peer2, number: int, message: Answer) -> None:
        received.append(message)
        await ok(peer, number, message)

    request = (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: "
        + offer
        + b"\r\nX: y\r\n\r\n"
    )
    async with origin(speaking(answering2(note), EXTENDED)) as up, hop2(up.address) as proxy:
        client = await proxy.connect()
        for _ in range(2):
            assert (await client.ask(request)).body == b"ok"
        assert up.opened == 1
    assert [dict(message.headers) for message in received] == [
        {b":method": b"GET", b":scheme": b"http", b":authority": b"a", b":path": b"/", b"x": b"y"}
    ] * 2


async def test_an_http1_response_to_an_http2_preface_is_reported_as_such() -> None:
    async def script(peer: Peer) -> None:
        await peer.until(b"SM\r\n\r\n")
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        await peer.rest()

    async with origin(script) as up, hop2(up.address) as proxy:
        answer = await (await proxy.connect2()).ask()
        assert answer.status == 502
        assert b"the server speaks HTTP/1, not HTTP/2" in answer.body
        assert up.opened == 1, "asking again would not change that"
        assert [e.failure for e in proxy.ended] == ["upstream_protocol"]
