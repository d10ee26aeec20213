"""Connections to a server, as exchanges use them. When a server closes one in use, a safe request
is retried and any other one gets a clear error. Nothing leaks, wherever an exchange is
cancelled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from proxy.exchange.h1.pool import PoolSettings
from proxy.net.address import Address
from tests.kit.hop import Hop, Settings, hop
from tests.kit.http import GET, OK, POST, Peer, descriptors, echo, origin, until
from tests.kit.ports import free_port


async def test_a_pool_that_is_exhausted_answers_503() -> None:
    release = trio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await release.wait()
        await peer.send(OK)
        await peer.rest()

    async with (
        origin(script) as server,
        hop(server.address, Settings(pool=PoolSettings(connections=1, wait_timeout=0.05))) as proxy,
    ):
        first, second = await proxy.connect(), await proxy.connect()
        await first.send(GET)
        await wait_all_tasks_blocked()
        answer = await second.ask()
        assert answer.status == 503
        assert b"error=connection_limit_reached" in (answer.get(b"proxy-status") or b"")
        release.set()
        assert (await first.response()).body == b"ok"
        assert proxy.ended[0].failure == "pool_exhausted"


def closing_on_reuse(
    *, reset: bool = False, after: bytes = b""
) -> Callable[[Peer], Awaitable[None]]:
    """A server that closes its first connection as soon as a second request has arrived on it."""
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        first = connections == 1
        await peer.request()
        await peer.send(OK)
        await peer.request()
        if first:
            await peer.send(after)
            if reset:
                peer.reset()
            return
        await peer.send(OK)

    return script


SAFE = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"DELETE / HTTP/1.1\r\nHost: a\r\n\r\n",
]
UNSAFE = [
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"PATCH / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi",
    b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("request_bytes", SAFE, ids=lambda r: r[:6].decode())
async def test_a_safe_request_that_was_never_answered_is_tried_once_more(
    request_bytes: bytes, reset: bool
) -> None:
    async with origin(closing_on_reuse(reset=reset)) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        await client.ask()
        assert (await client.ask(request_bytes)).body == b"ok"
        assert server.opened == 2
        assert proxy.ended[1].attempts == 2
        assert proxy.ended[1].failure is None


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("request_bytes", UNSAFE, ids=lambda r: r[:6].decode())
async def test_any_other_request_is_not_tried_again(request_bytes: bytes, reset: bool) -> None:
    async with origin(closing_on_reuse(reset=reset)) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        await client.ask()
        answer = await client.ask(request_bytes)
        assert answer.status == 502
        assert b"error=connection_terminated" in (answer.get(b"proxy-status") or b"")
        assert server.opened == 1
        assert proxy.ended[1].attempts == 1


@pytest.mark.parametrize(
    "after",
    [b"H", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n"],
    ids=["a byte", "part of a head", "103"],
)
async def test_nothing_is_retried_once_the_server_has_started_to_respond(after: bytes) -> None:
    async with origin(closing_on_reuse(after=after)) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        await client.ask()
        assert (await client.ask()).status == 502
        assert server.opened == 1


async def test_a_new_connection_that_the_server_closes_is_not_tried_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()

    async with origin(script) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        assert (await client.ask()).status == 502
        assert server.opened == 1


async def test_the_second_try_is_the_last() -> None:
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        await peer.request()
        if connections == 1:
            await peer.send(OK)
            await peer.request()

    async with origin(script) as server, hop(server.address) as proxy:
        client = await proxy.connect()
        await client.ask()
        assert (await client.ask()).status == 502
        assert server.opened == 2


async def test_a_server_that_goes_and_comes_back_is_found_again() -> None:
    address = Address("127.0.0.1", free_port())
    async with hop(address) as proxy:
        client = await proxy.connect()
        for _ in range(2):
            answer = await client.ask(POST, "POST")
            assert answer.status == 502
            assert b"error=connection_refused" in (answer.get(b"proxy-status") or b"")
            async with origin(echo, port=address.port):
                assert (await client.ask(POST, "POST")).body == b"hi"


# Cancellation, in each phase


UPLOAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n"


async def _silent(peer: Peer) -> None:
    await trio.sleep_forever()


async def _half(peer: Peer) -> None:
    await peer.head()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await trio.sleep_forever()


async def _switching(peer: Peer) -> None:
    await peer.head()
    await peer.send(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    )
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("script", "request_bytes", "phase"),
    [
        (_silent, GET, "dialling"),
        (_silent, GET, "waiting for the head"),
        (_silent, UPLOAD, "sending the body"),
        (_silent, UPLOAD, "waiting for the body"),
        (_half, GET, "reading the body"),
        (_half, UPLOAD, "both bodies"),
        (
            _switching,
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
            "tunnel",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_cancelling_an_exchange_leaves_nothing_open(
    script: Callable[[Peer], Awaitable[None]], request_bytes: bytes, phase: str
) -> None:
    before = descriptors()
    async with (
        origin(script) as server,
        hop(server.address) as proxy,
        trio.open_nursery() as nursery,
    ):
        if phase == "dialling":
            proxy.hangs = trio.Event()
        client = await proxy.connect()
        await client.send(request_bytes)
        if phase == "sending the body":
            nursery.start_soon(client.flood)
        await until(lambda: proxy.pool.counts()[0] == 1)
        await wait_all_tasks_blocked(0.02)
        assert proxy.pool.counts() == (1, 0)
        proxy.acceptor.drain(0)
        await proxy.gone()
        assert proxy.pool.counts() == (0, 0)
        nursery.cancel_scope.cancel()
    assert descriptors() <= before


async def test_cancelling_one_that_waits_for_a_connection_leaves_the_queue_in_order() -> None:
    before = descriptors()
    async with (
        origin(_silent) as server,
        hop(server.address, Settings(pool=PoolSettings(connections=1))) as proxy,
    ):
        await _ask(proxy, 3)
        (slot,) = proxy.pool._slots.values()
        assert (slot.open, len(slot.waiting)) == (1, 2)
        proxy.acceptor.drain(0)
        await proxy.gone()
        assert not proxy.pool._slots
    assert descriptors() <= before


async def _ask(proxy: Hop, count: int) -> None:
    for _ in range(count):
        await (await proxy.connect()).send(GET)
        await wait_all_tasks_blocked(0.01)
