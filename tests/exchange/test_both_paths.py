"""Both paths behave the same: the same conversations, in any pieces, with exchanges handed over at
any moment, have the same results.

Each conversation is drawn from a seed and runs on the ordinary path, on the fast one, and on the
fast one while exchanges are handed over at any moment. Compared are what the client got, what the
server got, and the records. Messages are compared, not bytes: the chunks of a body depend on what
one read returns, on either path."""

from __future__ import annotations

import math
import os
import random
import socket
from dataclasses import dataclass, field
from typing import cast

import pytest
import trio

from proxy.fastpath import eligibility
from proxy.fastpath.h1_connection import FastConnection
from tests.kit.hop import Hop, Settings, hop
from tests.kit.http import GET, OK, POST, Message, Peer, chunked, connect, origin, until

EXCHANGES = 24


def _request(rng: random.Random, number: int) -> bytes:
    body = rng.randbytes(rng.choice([0, 0, 0, 1, 700, 90_000]))
    method = b"POST" if body else rng.choice([b"GET", b"GET", b"GET", b"HEAD", b"PUT"])
    fields = [b"Host: a", b"X-Number: %d" % number]
    if body and rng.random() < 0.3:
        fields, body = [*fields, b"Transfer-Encoding: chunked"], chunked(body)
    elif body or method == b"PUT":
        fields.append(b"Content-Length: %d" % len(body))
    fields += rng.choice(
        [
            [],
            [],
            [b"Connection: keep-alive"],
            [b"connection: Keep-Alive"],
            [b"isthmus-client-id: me"],
            [b"TE: trailers"],
        ]
    )
    return b"%b /%d HTTP/1.1\r\n%b\r\n\r\n%b" % (method, number, b"\r\n".join(fields), body)


def _response(rng: random.Random, request: bytes) -> bytes:
    body = (
        b""
        if request.startswith(b"HEAD")
        else rng.randbytes(rng.choice([0, 2, 1024, 1024, 16_384, 300_000]))
    )
    kind = rng.random()
    if kind < 0.1:
        return b"HTTP/1.1 204 No Content\r\n\r\n"
    if kind < 0.15:
        return b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n"
    if request.startswith(b"HEAD"):
        return b"HTTP/1.1 200 OK\r\nContent-Length: 4711\r\n\r\n"
    if kind < 0.3:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (
            chunked(body) if body else chunked()
        )
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" if kind < 0.4 else b""
    kept = rng.choice([b"", b"Connection: keep-alive\r\n", b"Keep-Alive: timeout=5\r\n"])
    return interim + b"HTTP/1.1 200 OK\r\nServer: x\r\n%bContent-Length: %d\r\n\r\n%b" % (
        kept,
        len(body),
        body,
    )


@dataclass
class Conversation:
    """The messages of a conversation, by number."""

    requests: list[bytes]
    responses: list[bytes]

    @classmethod
    def drawn(cls, seed: int) -> Conversation:
        rng = random.Random(seed)
        requests = [_request(rng, number) for number in range(EXCHANGES)]
        requests.append(b"GET /%d HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % EXCHANGES)
        return cls(requests, [_response(rng, request) for request in requests])


@dataclass
class Seen:
    got: list[Message] = field(default_factory=list)
    received: list[Message] = field(default_factory=list)
    books: list[object] = field(default_factory=list)
    fast: int = 0


async def _in_pieces(peer: Peer, data: bytes, rng: random.Random) -> None:
    while data:
        size = rng.choice([len(data), len(data), 1, 40, 5000, 65536])
        await peer.send(data[:size])
        data = data[size:]
        if rng.random() < 0.3:
            await trio.sleep(0.001)


async def _disturb(proxy: Hop, rng: random.Random) -> None:
    """Hand over exchanges in progress, again and again."""
    while True:
        await trio.sleep(rng.random() * 0.004)
        if proxy.fast_path is not None:
            proxy.fast_path.give_up(math.inf)


async def carry(talk: Conversation, seed: int, *, fast: bool, disturbed: bool = False) -> Seen:
    seen, rng = Seen(), random.Random(seed)

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            seen.received.append(request)
            await _in_pieces(peer, talk.responses[int(request.start[1][1:])], rng)

    async with (
        origin(script) as server,
        hop(server.address, Settings(fast=fast)) as proxy,
        trio.open_nursery() as nursery,
    ):
        if disturbed:
            nursery.start_soon(_disturb, proxy, rng)
        client = await connect(proxy.address)

        async def say() -> None:
            await _in_pieces(client, b"".join(talk.requests), rng)

        with trio.fail_after(60):
            nursery.start_soon(say)
            for request in talk.requests:
                seen.got.append(await client.response(request.split(b" ")[0].decode()))
            assert await client.ended()
        client.close()
        await proxy.gone()
        seen.books, seen.fast = list(proxy.ended), proxy.fast
        assert not proxy.errors
        nursery.cancel_scope.cancel()
    return seen


@pytest.mark.parametrize("seed", range(10))
async def test_the_same_conversation_on_both_paths(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        eligibility, "REST", 0
    )  # the fast path is tried again and again, although most messages are not plain
    talk = Conversation.drawn(seed)
    ordinary = await carry(talk, seed, fast=False)
    assert len(ordinary.received) == EXCHANGES + 1
    for other in (
        await carry(talk, seed, fast=True),
        await carry(talk, seed, fast=True, disturbed=True),
    ):
        assert other.got == ordinary.got
        assert other.received == ordinary.received
        assert other.books == ordinary.books
        assert other.fast >= 3, "the conversations tested nothing"
    assert ordinary.fast == 0


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_connection_whose_server_has_closed_after_its_response_is_not_used(
    at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that may not be sent twice would fail. `at_once`: it arrives in the pass of the
    event loop that sees the end."""
    monkeypatch.setattr(eligibility, "REST", 0)
    served = ended = 0

    async def script(peer: Peer) -> None:
        nonlocal served, ended
        while True:
            await peer.request()
            served += 1
            if (
                served == 3
                # In one segment: the proxy cannot read in between, and the kernel cannot deliver one
                # without the other
            ):
                peer.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
                os.write(peer.stream.socket.fileno(), OK)
                peer.close()
                ended += 1
                return
            await peer.send(OK)

    async with origin(script) as server, hop(server.address, Settings(fast=True)) as proxy:
        client = await proxy.connect()
        for _ in range(2):
            assert (await client.ask()).status == 200
        with trio.fail_after(20):
            await client.send(POST * 2 if at_once else POST)
            assert (await client.response()).status == 200
            if not at_once:
                await until(lambda: ended == 1)
                await client.send(POST)
            assert (await client.response()).status == 200
        assert proxy.dialled == 2
        assert proxy.fast == 2


async def test_an_answer_in_chunks_whose_end_the_client_has_not_taken_yet_ends_once() -> None:
    head, body = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", bytes(40_000)

    async def script(peer: Peer) -> None:
        for answer in (chunked(b"ok"), chunked(body, trailers=b"X-Sum: 1\r\n"), chunked(b"ok")):
            await peer.request()
            await peer.send(head + answer)

    async with origin(script) as server, hop(server.address, Settings(fast=True)) as proxy:
        client = await proxy.connect(buffers=4096)
        with trio.fail_after(20):
            assert (await client.ask()).body == b"ok"
            fast_path = proxy.fast_path
            assert fast_path is not None
            await until(lambda: bool(fast_path._connections))
            lent = [cast("FastConnection", one) for one in fast_path._connections]
            for connection in lent:  # so that the result of one read does not fit
                connection._client.stream.socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
                )
            await client.send(GET)
            await until(
                lambda: any(
                    connection._client.unsent and not connection._remaining for connection in lent
                )
            )
            fast_path.give_up(math.inf)
            answer = await client.response()
            assert (answer.body, answer.trailers) == (body, [(b"x-sum", b"1")])
            assert (await client.ask()).body == b"ok"
            assert client.received == b""
