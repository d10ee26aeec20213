"""The relay keeps half-closes, forwards every byte, and never makes a broken connection look like a
finished one."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
import trio

from proxy.exchange.server_settings import Drain
from proxy.fastpath.fast_path import FastPath
from proxy.net.relay import Relayed, relay
from proxy.net.socket_stream import ConnectionLost, SocketStream, Stream
from proxy.net.tls.handshake import TLSStream
from tests.net.conftest import Mesh, both, pair, read_all

Either = SocketStream | TLSStream


@dataclass
class Joined:
    """client <-> a =relay= b <-> server"""

    client: Either
    a: Either
    b: Either
    server: Either

    def close(self) -> None:
        for stream in (self.client, self.a, self.b, self.server):
            stream.close()


def plain(buffers: int | None = None) -> Joined:
    client, a = pair(buffers=buffers)
    b, server = pair(buffers=buffers)
    return Joined(client, a, b, server)


@pytest.fixture(params=["plain-plain", "plain-tls", "tls-plain", "tls-tls", "piped-piped"])
async def joined(
    request: pytest.FixtureRequest, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> Joined:
    left, _, right = request.param.partition("-")
    if left == "piped":  # from the first byte
        monkeypatch.setattr("proxy.net.relay.BULK", 0)
    client, a = await mesh.connect() if left == "tls" else pair()
    b, server = await mesh.connect() if right == "tls" else pair()
    return Joined(client, a, b, server)


class Relaying(Protocol):
    async def __call__(
        self,
        client: Stream,
        server: Stream,
        /,
        *,
        idle: float,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> Relayed: ...


@pytest.fixture(params=["tasks", "fast_path"])
async def relayed(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Relaying:
    """relay(), alone and with the fast path before it."""
    if request.param == "tasks":
        return relay
    fast_path = FastPath(Drain(), 60, 60)
    await fast_path.open()
    nursery.start_soon(fast_path.run)
    return partial(relay, carry=fast_path.join)


async def test_a_conversation_with_half_closes_passes_whole(
    relayed: Relaying, joined: Joined
) -> None:
    question, answer = b"q" * 300_000, b"a" * 500_000

    async def ask() -> bytes:
        await joined.client.send_all(question)
        await joined.client.send_eof()
        return await read_all(joined.client)

    async def reply() -> bytes:
        received = await read_all(joined.server)  # responds only after the end of the request
        await joined.server.send_all(answer)
        await joined.server.send_eof()
        return received

    with trio.fail_after(30):
        results = await both(partial(relayed, joined.a, joined.b, idle=60), ask, reply)
    assert results[0] == Relayed(300_000, 500_000, "client", "eof", None)
    assert results[1:] == [answer, question]
    joined.close()


async def test_both_directions_run_at_once(relayed: Relaying, joined: Joined) -> None:
    data = bytes(range(256)) * 8192

    async def send(stream: Either) -> None:
        await stream.send_all(data)
        await stream.send_eof()

    pieces = [0, 0]

    def count(forward: int, backward: int) -> None:
        pieces[0] += forward
        pieces[1] += backward

    with trio.fail_after(30):
        results = await both(
            partial(relayed, joined.a, joined.b, idle=60, on_bytes=count),
            partial(send, joined.client), partial(send, joined.server),
            partial(read_all, joined.client), partial(read_all, joined.server),
        )  # fmt: skip
    assert results[3] == results[4] == data
    assert pieces == [len(data), len(data)]
    joined.close()


@pytest.mark.parametrize("how", ["reset", "truncated"])
async def test_a_side_that_is_lost_resets_the_other(
    relayed: Relaying, joined: Joined, how: str
) -> None:
    async def break_off() -> None:
        await joined.client.send_all(b"half a mess")
        await joined.server.receive_some()
        if how == "reset":
            joined.client.reset()
        elif isinstance(joined.client, TLSStream):
            joined.client.socket.shutdown(socket.SHUT_WR)
        else:
            joined.client.reset()  # TCP alone has no truncation

    with trio.fail_after(30):
        results = await both(partial(relayed, joined.a, joined.b, idle=60), break_off)
    outcome = results[0]
    assert isinstance(outcome, Relayed)
    assert (outcome.first, outcome.how, outcome.forward) == ("client", "lost", 11)
    assert isinstance(outcome.error, ConnectionLost)
    with pytest.raises(ConnectionLost) as caught:
        await read_all(joined.server)
    assert caught.value.reason == "reset"
    joined.close()


async def test_the_response_of_a_side_that_no_longer_reads_still_arrives(
    relayed: Relaying, joined: Joined
) -> None:
    async def pour() -> None:
        with suppress(ConnectionLost):
            while True:
                await joined.client.send_all(bytes(65536))

    async def refuse() -> None:
        await joined.server.receive_some(1)
        await joined.server.send_all(b"413 too much")
        await joined.server.aclose()

    with trio.fail_after(30):
        outcome: list[Relayed] = []
        received: list[bytes] = []

        async def run() -> None:
            outcome.append(await relayed(joined.a, joined.b, idle=60))
            joined.a.close()

        async def hear() -> None:
            received.append(await joined.client.receive_some())

        async with trio.open_nursery() as nursery:
            for task in (run, pour, refuse, hear):
                nursery.start_soon(task)
    assert received == [b"413 too much"]
    assert outcome[0].first == "server"
    assert outcome[0].how in {"eof", "unread", "lost"}
    joined.close()


async def test_silence_on_both_sides_ends_it_with_resets(
    relayed: Relaying, autojump_clock: trio.abc.Clock
) -> None:
    joined = plain()
    began = trio.current_time()
    outcome = await relayed(joined.a, joined.b, idle=60)
    assert outcome == Relayed(0, 0, None, "idle", None)
    assert 60 <= trio.current_time() - began <= 68
    for stream in (joined.client, joined.server):
        with pytest.raises(ConnectionLost):
            await read_all(stream)
    joined.close()


async def test_data_in_either_direction_keeps_it_open(
    relayed: Relaying, autojump_clock: trio.abc.Clock
) -> None:
    joined = plain()
    began = trio.current_time()

    async def chat() -> None:
        for number in range(6):
            await trio.sleep(50)
            speaker, hearer = (
                (joined.client, joined.server) if number % 2 else (joined.server, joined.client)
            )
            await speaker.send_all(b"x")
            assert await hearer.receive_some() == b"x"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(chat)
        outcome = await relayed(joined.a, joined.b, idle=60)
    assert (outcome.forward, outcome.backward, outcome.how) == (3, 3, "idle")
    assert 360 <= trio.current_time() - began <= 368
    joined.close()


async def test_a_half_closed_silence_ends_too(
    relayed: Relaying, autojump_clock: trio.abc.Clock
) -> None:
    joined = plain()
    await joined.client.send_eof()
    outcome = await relayed(joined.a, joined.b, idle=60)
    assert (outcome.first, outcome.how) == ("client", "idle")
    with pytest.raises(ConnectionLost):
        await read_all(joined.client)
    joined.close()


async def test_a_side_that_is_lost_after_the_other_has_ended_cleanly_is_not_forgotten(
    relayed: Relaying,
) -> None:
    joined = plain()

    async def end() -> None:
        await joined.client.send_eof()
        assert await read_all(joined.server) == b""
        joined.server.reset()

    results = await both(partial(relayed, joined.a, joined.b, idle=60), end)
    outcome = results[0]
    assert isinstance(outcome, Relayed)
    assert (outcome.first, outcome.how) == ("client", "lost")
    with pytest.raises(ConnectionLost):
        await read_all(joined.client)
    joined.close()


async def test_a_cancelled_relay_resets_both_sides(relayed: Relaying) -> None:
    joined = plain()
    with trio.move_on_after(0.01) as scope:
        await relayed(joined.a, joined.b, idle=60)
    assert scope.cancelled_caught
    for stream in (joined.client, joined.server):
        with pytest.raises(ConnectionLost):
            await read_all(stream)
    joined.close()


async def test_a_reader_that_is_slow_holds_its_sender_back(relayed: Relaying) -> None:
    joined = plain(buffers=16384)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(relayed, joined.a, joined.b, idle=60))
        with trio.move_on_after(0.1):
            await joined.client.send_all(bytes(64 << 20))
        assert joined.a.bytes_read < 1 << 20
        nursery.cancel_scope.cancel()
    joined.close()


# Through a pipe...


def pipes() -> int:
    """How many ends of pipes this process has open."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += str(entry.readlink()).startswith("pipe:")
    return found


async def passed_on(joined: Joined, data: bytes) -> None:
    """Send `data` from the client to the server, and wait until it has arrived."""

    async def take() -> bytes:
        taken = bytearray()
        while len(taken) < len(data):
            taken += await joined.server.receive_some()
        return bytes(taken)

    assert (await both(take, partial(joined.client.send_all, data)))[0] == data


async def test_bulk_goes_by_a_pipe_which_is_given_back_when_it_is_over(relayed: Relaying) -> None:
    joined, before = plain(), pipes()
    bulk = bytes(range(256)) * 40_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(relayed, joined.a, joined.b, idle=60))
        await passed_on(joined, b"a few words")
        assert pipes() == before
        await passed_on(joined, bulk)
        assert pipes() == before + 2
        for number in range(100):
            await passed_on(joined, b"%d words" % number)
        assert pipes() == before
        await passed_on(joined, bulk)
        nursery.cancel_scope.cancel()
    assert pipes() == before
    joined.close()


async def test_bulk_is_copied_where_no_pipe_is_to_be_had(
    relayed: Relaying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "proxy.net.splice.PIPE_SIZE", (1 << 31) + 4096
    )  # more than the kernel can say: not even root has it
    joined, before = plain(), pipes()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(relayed, joined.a, joined.b, idle=60))
        await passed_on(joined, bytes(range(256)) * 40_000)
        assert pipes() == before
        nursery.cancel_scope.cancel()
    joined.close()
