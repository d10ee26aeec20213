"""Bodies are streamed and never buffered: a slow reader stops the sender, and memory does not grow
with the body.

The last tests do the same with many connections and all kinds of messages, byte for byte, with
nothing left at the end."""

from __future__ import annotations

import hashlib
import random
import resource

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.kit.hop import Settings, hop, through
from tests.kit.http import GET, OK, Peer, chunked, descriptors, origin, until

BUFFERS = 16384
SMALL = Settings(buffers=BUFFERS)
# Three hops' kernel buffers (the kernel doubles the requested size, and may exceed it by a segment)
# and a read or two of the proxy.
HELD = 700_000


class Counted:
    """Sends for ever, and counts how much could be sent."""

    def __init__(self, chunks: bool) -> None:
        self.sent = 0
        self.piece = b"4000\r\n" + bytes(16384) + b"\r\n" if chunks else bytes(16384)

    async def flood(self, peer: Peer) -> None:
        while True:
            await peer.send(self.piece)
            self.sent += len(self.piece)

    async def settled(self) -> int:
        """The amount sent when nothing more can be sent."""
        before = -1
        while self.sent != before:
            before = self.sent
            await trio.sleep(0.05)
        return self.sent


@pytest.mark.parametrize("chunks", [False, True], ids=["length", "chunked"])
async def test_a_client_that_does_not_read_stops_the_server(chunks: bool) -> None:
    counted = Counted(chunks)

    async def script(peer: Peer) -> None:
        await peer.request()
        framing = b"Transfer-Encoding: chunked" if chunks else b"Content-Length: 1000000000"
        await peer.send(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        await counted.flood(peer)

    async with through(script, SMALL, buffers=BUFFERS) as (client, proxy):
        await client.send(GET)
        held = await counted.settled()
        assert 0 < held < HELD
        for _ in range(200):
            await client.stream.receive_some(65536)
        assert await counted.settled() > held  # and it continues as the client reads
        client.reset()
        await proxy.gone()


@pytest.mark.parametrize("chunks", [False, True], ids=["length", "chunked"])
async def test_a_server_that_does_not_read_stops_the_client(chunks: bool) -> None:
    counted = Counted(chunks)
    go_on = trio.Event()

    async def script(peer: Peer) -> None:
        await go_on.wait()
        for _ in range(200):
            await peer.stream.receive_some(65536)
        await trio.sleep_forever()

    async with (
        through(script, SMALL, buffers=BUFFERS) as (client, _),
        trio.open_nursery() as nursery,
    ):
        framing = b"Transfer-Encoding: chunked" if chunks else b"Content-Length: 1000000000"
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n")
        nursery.start_soon(counted.flood, client)
        held = await counted.settled()
        assert 0 < held < HELD
        go_on.set()
        assert await counted.settled() > held
        nursery.cancel_scope.cancel()


async def test_a_pipelining_client_that_does_not_read_is_not_read_either() -> None:
    counted = Counted(chunks=False)
    counted.piece = GET * 600

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + bytes(10000))

    async with (
        through(script, SMALL, buffers=BUFFERS) as (client, _),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(counted.flood, client)
        assert await counted.settled() < HELD
        nursery.cancel_scope.cancel()


async def test_a_large_body_passes_in_both_directions_without_being_held() -> None:
    size, piece = 64 << 20, random.Random(1).randbytes(1 << 16)
    hashes = []

    async def read(peer: Peer) -> bytes:
        digest = hashlib.sha256(peer.received)
        left = size - len(peer.received)
        peer.received.clear()
        while left:
            data = await peer.stream.receive_some(min(left, 1 << 16))
            assert data
            digest.update(data)
            left -= len(data)
        return digest.digest()

    async def write(peer: Peer) -> None:
        for _ in range(size // len(piece)):
            await peer.send(piece)

    async def script(peer: Peer) -> None:
        await peer.head()
        hashes.append(await read(peer))
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        await write(peer)
        await peer.rest()

    async with through(script) as (client, proxy):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        await write(client)
        await client.head()
        hashes.append(await read(client))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        await proxy.idle()
    expected = hashlib.sha256(piece * (size // len(piece))).digest()
    assert hashes == [expected, expected]
    assert grown < 5 << 10, f"{grown} KiB"  # ru_maxrss is in KiB
    assert (proxy.ended[0].request_bytes, proxy.ended[0].response_bytes) == (size, size)


async def test_small_pieces_are_passed_on_as_they_come() -> None:
    """Nothing is collected first: each event of a stream arrives by itself."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        for i in range(20):
            await peer.send(b"event %d\n" % i)
            await acknowledged.wait()

    acknowledged = trio.Event()
    async with through(script) as (client, _):
        await client.send(GET)
        await client.head()
        assert await client.until(b"event 0\n\r\n") == b"8\r\nevent 0\n\r\n"
        acknowledged.set()
        assert (await client.until(b"0\r\n\r\n")).endswith(b"9\r\nevent 19\n\r\n0\r\n\r\n")


# Many connections


def _bodies(source: random.Random) -> bytes:
    return source.randbytes(
        source.choice([0, 1, 10, 1000, 5000, 70_000, source.randrange(200_000)])
    )


def _pieces(source: random.Random, body: bytes) -> list[bytes]:
    """`body` cut into chunks, most of them of a common size."""
    pieces, at = [], 0
    while at < len(body):
        size = source.choice([1, 100, 4096, 65536, 100_000])
        size = max(size, len(body) // 50)
        pieces.append(body[at : at + size])
        at += size
    return pieces


def _framed(source: random.Random, body: bytes) -> bytes:
    """A random framing of `body`: the fields and the bytes."""
    if source.random() < 0.5:
        return b"Content-Length: %d\r\n\r\n" % len(body) + body
    trailers = b"X-Sum: %d\r\n" % len(body) if source.random() < 0.3 else b""
    return b"Transfer-Encoding: chunked\r\n\r\n" + chunked(
        *_pieces(source, body), trailers=trailers
    )


async def _mirror(peer: Peer) -> None:
    """Responds with the request's body, in a framing of its own choice."""
    source = random.Random(peer.stream.socket.getpeername()[1])
    while True:
        request = await peer.request()
        method, target = request.start
        body = target if method == b"HEAD" else target + b" " + request.body
        digest = hashlib.sha256(request.body).hexdigest().encode()
        fields = b"HTTP/1.1 200 OK\r\nX-Digest: " + digest + b"\r\n"
        kind = source.random()
        if method == b"HEAD":
            await peer.send(fields + b"Content-Length: 5\r\n\r\n")
        elif kind < 0.1:
            await peer.send(fields + b"Connection: close\r\n\r\n" + body)
            return
        elif kind < 0.2:
            await peer.send(fields + b"Connection: close\r\n" + _framed(source, body))
            return
        else:
            await peer.send(fields + _framed(source, body))


METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]


async def _converse(client: Peer, seed: int, count: int) -> None:
    """Up to `count` random requests on one connection; the last one may close it."""
    source = random.Random(seed)
    for number in range(count):
        method = source.choice(METHODS)
        body = _bodies(source) if method in ("POST", "PUT", "PATCH") else b""
        target = b"/%d/%d" % (seed, number)
        last = source.random() < 0.02
        fields = [b"Host: a\r\n"]
        if source.random() < 0.3:
            fields.append(b"X-Unusual:   blanks  \r\n")  # the fast path of h11
        if last:
            fields.append(b"Connection: close\r\n")
        source.shuffle(fields)
        framed = _framed(source, body) if body or method == "POST" else b"\r\n"
        request = method.encode() + b" " + target + b" HTTP/1.1\r\n" + b"".join(fields) + framed
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                _send_in_pieces, client, request, source.choice([1 << 30, 1 << 30, 10_000, 777])
            )
            answer = await client.response(method)
        assert answer.status == 200
        assert answer.get(b"x-digest") == hashlib.sha256(body).hexdigest().encode()
        assert answer.body == (b"" if method == "HEAD" else target + b" " + body)
        if last:
            assert await client.ended()
            return


async def _send_in_pieces(peer: Peer, data: bytes, size: int) -> None:
    for at in range(0, len(data), size):
        await peer.send(data[at : at + size])


async def test_a_crowd_of_connections_gets_every_byte_right_and_leaves_nothing() -> None:
    before = descriptors()
    async with origin(_mirror) as server, hop(server.address) as proxy:
        await wait_all_tasks_blocked(0.01)
        tasks = trio.lowlevel.current_statistics().tasks_living

        async def client(seed: int) -> None:
            for turn in range(3):
                peer = await proxy.connect()
                await _converse(peer, 3 * seed + turn, 8)
                peer.close()

        async with trio.open_nursery() as nursery:
            for seed in range(64):
                nursery.start_soon(client, seed)
        await proxy.gone()
        assert proxy.errors == []
        assert all((e.status, e.failure) == (200, None) for e in proxy.ended)
        assert len(proxy.ended) > 1000
        assert proxy.pool.counts()[0] == 0
        proxy.pool.close()
        await until(
            lambda: trio.lowlevel.current_statistics().tasks_living <= tasks
        )  # the server notices
        assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert descriptors() <= before


async def test_many_small_exchanges_over_64_connections_pass_without_one_error() -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(OK)

    async with origin(script) as server, hop(server.address) as proxy:

        async def client() -> None:
            peer = await proxy.connect()
            for _ in range(40):
                await peer.send(GET)
                assert await peer.exactly(len(OK)) == OK

        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(client)
        assert len(proxy.ended) == 64 * 40
        assert {e.failure for e in proxy.ended} == {None}
        assert server.opened <= 64
