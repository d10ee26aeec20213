"""Streams that always have something to read take turns, so the duration of a pass of the scheduler
does not grow with their number."""

from __future__ import annotations

import time
from functools import partial

import pytest
import trio
import trio.testing

from proxy.net import socket_stream
from proxy.net.byte_stream import Stream
from proxy.net.fairness import PACER
from proxy.net.pacing import Pacer
from proxy.net.socket_stream import SocketStream
from tests.net.conftest import Mesh, pair

BUSY = 300
WORK = 0.0003  # seconds of processor time for each read


async def reads_in_a_pass() -> int:
    """The median of how often BUSY streams, which always have something to read, read between two
    runs of another task."""
    reads = 0

    async def upload(ours: SocketStream) -> None:
        nonlocal reads
        while True:
            await ours.receive_some(1)
            reads += 1
            until = time.thread_time() + WORK
            while time.thread_time() < until:
                pass

    pairs = [pair() for _ in range(BUSY)]
    for _, theirs in pairs:
        theirs.socket.send(bytes(16384))
    passes: list[int] = []
    async with trio.open_nursery() as nursery:
        for ours, _ in pairs:
            nursery.start_soon(upload, ours)
        for _ in range(30):
            reads = 0
            await trio.lowlevel.checkpoint()
            passes.append(reads)
        nursery.cancel_scope.cancel()
    for ours, theirs in pairs:
        ours.close()
        theirs.close()
    return sorted(passes[15:])[7]


@pytest.fixture(autouse=True)
def _every_operation_ends_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_stream, "BURST", 1)


async def test_without_a_pacer_all_of_them_read_in_a_pass() -> None:
    assert await reads_in_a_pass() >= BUSY * 3 // 4


async def test_with_one_a_pass_has_as_many_as_it_has_time_for() -> None:
    pacer = Pacer()
    PACER.set(pacer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pacer.run)
        await trio.lowlevel.checkpoint()
        assert 8 <= await reads_in_a_pass() <= 100  # 10 ms: 33
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["socket", "tls"])
async def test_no_stream_waits_for_a_turn_for_ever(
    kind: str, mesh: Mesh, autojump_clock: trio.testing.MockClock
) -> None:
    """64 transfers at once, some of them cancelled in between. If all tasks waited, the clock would
    jump to the time limit."""
    autojump_clock.autojump_threshold = 1.0
    pacer = Pacer()
    PACER.set(pacer)
    data = bytes(100_000)
    whole = 0

    async def transfer(ours: Stream, theirs: Stream, *, cancelled: bool) -> None:
        nonlocal whole
        with trio.CancelScope() as scope:

            async def send() -> None:
                for at in range(0, len(data), 1000):
                    await ours.send_all(data[at : at + 1000])
                await ours.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                size = 0
                while piece := await theirs.receive_some(1000):
                    size += len(piece)
                    if cancelled and size > len(data) // 2:
                        scope.cancel()
                whole += size == len(data)
        ours.close()
        theirs.close()

    pairs = [pair() if kind == "socket" else await mesh.connect(pair()) for _ in range(64)]
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pacer.run)
            async with trio.open_nursery() as transfers:
                for number, (ours, theirs) in enumerate(pairs):
                    transfers.start_soon(partial(transfer, ours, theirs, cancelled=number % 4 == 0))
            nursery.cancel_scope.cancel()
    assert whole == 48
    assert pacer.waited > 1000
    assert pacer.waiting == 0


async def test_one_busy_stream_hardly_ever_waits() -> None:
    pacer = Pacer()
    PACER.set(pacer)
    ours, theirs = pair()
    theirs.socket.send(bytes(10_000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pacer.run)
        for _ in range(10_000):
            await ours.receive_some(1)
        assert 1 <= pacer.waited <= 1250  # not even with the fewest steps more than one in 8
        nursery.cancel_scope.cancel()
    ours.close()
    theirs.close()


async def test_handshakes_of_a_crowd_wait_for_later_passes(mesh: Mesh) -> None:
    """Sixty ClientHellos that are there at once, and steps for eight."""
    pacer = Pacer()
    PACER.set(pacer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pacer.run)
        await trio.testing.wait_all_tasks_blocked()
        pacer.left = 8
        done: list[bytes] = []

        async def connect() -> None:
            client, server = await mesh.connect()
            await client.send_all(b"x")
            done.append(await server.receive_some(1))
            client.close()
            server.close()

        async with trio.open_nursery() as clients:
            for _ in range(60):
                clients.start_soon(connect)
        assert done == [b"x"] * 60
        assert pacer.waited >= 52
        assert pacer.waiting == 0
        nursery.cancel_scope.cancel()
