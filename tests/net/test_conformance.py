"""The product's streams keep trio's stream contract, except for the one deviation that
proxy.net.socket_stream documents: not every operation makes a scheduler pass.

With a pass in every operation (BURST = 1), trio's own conformance suite must pass completely."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from proxy.net import socket_stream
from proxy.net.splice import Pipe
from tests.net.conftest import Mesh, clog, clogged_pair, pair


@pytest.fixture
def _every_operation_yields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_stream, "BURST", 1)


@pytest.mark.usefixtures("_every_operation_yields")
async def test_the_socket_stream_conforms() -> None:
    async def maker() -> tuple[socket_stream.SocketStream, socket_stream.SocketStream]:
        return pair(buffers=16384)

    await trio.testing.check_half_closeable_stream(maker, clogged_pair)


@pytest.mark.usefixtures("_every_operation_yields")
async def test_the_tls_stream_conforms(mesh: Mesh) -> None:
    # Without the suite's clogged streams: a started TLS record must be finished, so TLS cannot be
    # clogged and then used again. tls/test_handshake.py has those cases.
    await trio.testing.check_half_closeable_stream(mesh.connect, None)


async def test_a_stream_that_never_waits_lets_other_tasks_run_after_a_burst() -> None:
    ours, theirs = pair()
    theirs.socket.send(b"x" * 1000)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(10 * socket_stream.BURST):
            assert await ours.receive_some(1) == b"x"
        nursery.cancel_scope.cancel()
    assert 9 <= turns <= 12
    ours.close()
    theirs.close()


class Passes(trio.abc.Instrument):
    """Counts how often the task that created it was scheduled again."""

    def __init__(self) -> None:
        self.count = 0
        self._task = trio.lowlevel.current_task()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.count += task is self._task


@pytest.mark.parametrize("kind", ["socket", "tls"])
async def test_a_read_counts_by_its_size(mesh: Mesh, kind: str) -> None:
    ours, theirs = (
        pair(buffers=1 << 20) if kind == "socket" else await mesh.connect(pair(buffers=1 << 20))
    )
    await theirs.send_all(bytes(160 * 1024))
    await ours.receive_some(16384)  # which may have to wait
    trio.lowlevel.add_instrument(passes := Passes())
    for _ in range(8):
        assert len(await ours.receive_some(16384)) == 16384
    trio.lowlevel.remove_instrument(passes)
    assert passes.count == 1  # each read counts for two of the 16 operations of a burst
    ours.close()
    theirs.close()


async def test_a_read_into_a_pipe_counts_by_its_size() -> None:
    ours, theirs = pair(buffers=1 << 20)
    pipe = Pipe.open()
    assert pipe is not None
    trio.lowlevel.add_instrument(passes := Passes())
    for _ in range(16):
        assert theirs.socket.send(bytes(131072)) == 131072
        assert len(await ours.receive_into(pipe)) == 131072
        while pipe:
            pipe.drain(ours.socket)
        assert len(theirs.socket.recv(131072)) == 131072
    trio.lowlevel.remove_instrument(passes)
    assert passes.count == 2  # each read counts for three; what is above 16 is not carried over
    pipe.close()
    ours.close()
    theirs.close()


async def test_an_operation_in_a_cancelled_scope_does_nothing() -> None:
    ours, theirs = pair()
    theirs.socket.send(b"kept")
    with trio.CancelScope() as scope:
        scope.cancel()
        await ours.receive_some()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await ours.send_all(b"never sent")
    assert scope.cancelled_caught
    assert await ours.receive_some() == b"kept"
    await ours.send_all(b"whole")
    assert await theirs.receive_some() == b"whole"
    ours.close()
    theirs.close()


async def test_a_deadline_is_noticed_by_a_stream_that_never_has_to_wait() -> None:
    ours, theirs = pair()

    async def feed() -> None:
        while True:
            await theirs.send_all(bytes(65536))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed)
        with trio.move_on_after(0.05) as scope:
            while True:
                await ours.receive_some()
        nursery.cancel_scope.cancel()
    assert scope.cancelled_caught
    ours.close()
    theirs.close()


async def test_clogging_a_raw_socket_clogs_it() -> None:
    """The suite's clogged streams depend on it."""
    ours, theirs = pair(buffers=16384)
    await clog(ours.socket)
    with trio.move_on_after(0.02) as scope:
        await ours.wait_send_all_might_not_block()
    assert scope.cancelled_caught
    ours.close()
    theirs.close()
