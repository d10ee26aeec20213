"""An idle connection: when it is known to be idle, and when the socket has to be checked."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from proxy.fastpath import event_loop as room
from proxy.fastpath.event_loop import EventLoop
from proxy.fastpath.ready_socket import IN, ReadySocket
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream
from tests.fastpath.stage import ends, running_loop
from tests.kit.http import until
from tests.kit.library import send_tickets
from tests.net.conftest import Mesh, pair

MESH = Mesh()


class Turn:
    """Checks a side in the first of the steps of a pass."""

    def __init__(
        self, event_loop: EventLoop, side: ReadySocket, sock: socket.socket, other: socket.socket
    ) -> None:
        self._side, self._sock, self._other = side, sock, other
        self._seen: list[bool] = []
        event_loop.steps[sock.fileno()] = self._look
        event_loop.watch(sock.fileno(), 0, IN)

    def _look(self, _: int) -> None:
        self._sock.recv(1)
        self._seen.append(self._side.is_quiet())

    async def quiet(self, meanwhile: Callable[[], object] = lambda: None) -> bool:
        """`meanwhile` is called before the pass, after the event that starts it."""
        self._seen.clear()
        self._other.send(b"x")
        meanwhile()
        await until(lambda: bool(self._seen))
        return self._seen[0]


@asynccontextmanager
async def resting(
    *, tls: bool = False, spoken: bool = True
) -> AsyncIterator[tuple[ReadySocket, SocketStream | TLSStream, Turn]]:
    """A side that has read something and is idle, the other end, and a check."""
    ours, theirs = await MESH.connect(pair()) if tls else pair()
    async with running_loop() as event_loop:
        side = ReadySocket(event_loop, ours)
        side.set_step(lambda _: None)
        side.watch(IN)
        if spoken:
            await theirs.send_all(b"a response")
            assert await ours.receive_some() == b"a response"
        side.park()
        with ends() as (here, there):
            yield side, theirs, Turn(event_loop, side, here, there)
            event_loop.watch(here.fileno(), IN, 0)
        side.watch(0)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("tls", [False, True])
async def test_a_pass_without_an_event_for_it_knows_that_it_is_idle(tls: bool) -> None:
    async with resting(tls=tls) as (side, _, turn):
        for _ in range(3):
            assert await turn.quiet()
            assert not side.is_quiet(), "time has passed since that pass"


@pytest.mark.parametrize("tls", [False, True])
async def test_an_event_in_the_same_pass_is_noticed_before_its_step(tls: bool) -> None:
    async with resting(tls=tls) as (side, theirs, turn):
        assert await turn.quiet()
        assert not await turn.quiet(theirs.close)
        assert not await turn.quiet(), "it is not watched any more"
        assert not side.stream.is_idle()


async def test_one_that_has_session_tickets_to_read_is_checked_and_is_idle() -> None:
    async with resting(tls=True, spoken=False) as (side, theirs, turn):
        assert isinstance(theirs, TLSStream)
        send_tickets(theirs)
        for _ in range(2):
            assert not await turn.quiet()
            assert side.stream.is_idle()  # which reads them
        side.watch(IN)
        side.park()
        assert await turn.quiet()


async def test_one_from_which_others_have_read_is_checked() -> None:
    async with resting() as (side, theirs, turn):
        await theirs.send_all(b"more")
        assert side.receive() == b"more"
        assert not await turn.quiet()
        side.watch(IN)
        side.park()
        assert await turn.quiet()


@pytest.mark.parametrize("fast_path", ["runs", "is gone"])
async def test_one_that_is_closed_at_rest_is_not_kept_by_the_loop(fast_path: str) -> None:
    """A pool may be closed after the last fast path."""
    ours, theirs = await MESH.connect(pair())
    async with running_loop() as event_loop:
        side = ReadySocket(event_loop, ours)
        side.set_step(lambda _: None)
        side.watch(IN)
        side.park()
        assert side.descriptor in event_loop.steps
        if fast_path == "runs":
            side.forget()
    side.forget()
    assert side.descriptor not in event_loop.steps
    ours.close()
    theirs.close()


async def test_a_pass_with_too_many_events_knows_of_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with resting() as (_, __, turn):
        assert await turn.quiet()
        monkeypatch.setattr(room, "EVENTS", 1)
        assert not await turn.quiet()


async def test_one_whose_end_came_with_the_last_read_is_checked() -> None:
    async with resting(tls=True) as (side, theirs, turn):
        await theirs.send_all(bytes(16384))  # a whole record: what follows it is read with it
        await theirs.send_eof()
        assert len(side.receive(65536) or b"") == 16384
        side.watch(IN)
        side.park()
        assert not await turn.quiet()
        assert not side.stream.is_idle()
