"""The event loop beneath trio: it does the fast path's work where trio would wait, and does not
delay trio's own work."""

from __future__ import annotations

import logging
import select
import threading
import time

import pytest
import trio

from proxy.exchange.server_settings import Drain
from proxy.fastpath import event_loop as room
from proxy.fastpath.event_loop import EventLoop, EventLoopClock
from proxy.fastpath.fast_path import FastPath
from tests.fastpath.stage import ends, running_loop
from tests.kit.build import interpreted
from tests.kit.http import descriptors


@pytest.fixture(params=["on its own clock", "on another's"])
def clock(request: pytest.FixtureRequest) -> trio.abc.Clock | None:
    """The clock of the run: a proxy has the one, a test the other."""
    return EventLoopClock() if request.param == "on its own clock" else None


class Passes(trio.abc.Instrument):
    """Counts the steps of tasks."""

    def __init__(self) -> None:
        self.steps = 0

    def before_task_step(self, _: object) -> None:
        self.steps += 1


async def test_fast_path_events_take_no_pass_of_the_scheduler(
    clock: trio.abc.Clock | None,
) -> None:
    passes, received, all_of_it = Passes(), bytearray(), trio.Event()
    with ends() as (here, there):
        async with running_loop() as event_loop:

            def step(_: int) -> None:
                received.extend(here.recv(1))
                if len(received) < 1000:
                    there.send(b"x")
                else:
                    all_of_it.set()

            event_loop.steps[here.fileno()] = step
            event_loop.watch(here.fileno(), 0, select.EPOLLIN)
            trio.lowlevel.add_instrument(passes)
            there.send(b"x")
            with trio.fail_after(20):
                await all_of_it.wait()
            trio.lowlevel.remove_instrument(passes)
    assert passes.steps < 100


async def test_a_deadline_comes_although_the_fast_path_is_idle(
    clock: trio.abc.Clock | None,
) -> None:
    async with running_loop():
        with trio.fail_after(20):
            await trio.sleep(0.05)


async def test_a_deadline_comes_although_the_fast_path_is_never_idle(
    clock: trio.abc.Clock | None,
) -> None:
    steps = 0

    def step(_: int) -> None:
        nonlocal steps
        steps += 1

    with ends() as (here, there):
        async with running_loop() as event_loop:
            event_loop.steps[here.fileno()] = step
            event_loop.watch(here.fileno(), 0, select.EPOLLIN)
            there.send(b"x")  # which nothing reads
            with trio.fail_after(20):
                await trio.sleep(0.05)
    assert steps > 10


async def test_a_deadline_that_has_passed_while_a_task_ran_is_not_slept_over(
    clock: trio.abc.Clock | None,
) -> None:
    before = time.perf_counter()
    waker = threading.Timer(
        20, trio.lowlevel.current_trio_token().run_sync_soon, [lambda: None]
    )  # from a sleep without an end
    waker.start()
    async with running_loop(), trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 0.02)
        for _ in range(5):
            await trio.lowlevel.checkpoint()  # it sleeps
        time.sleep(0.05)  # noqa: ASYNC251  # and is due, when trio looks next
    waker.cancel()
    assert time.perf_counter() - before < 15


@pytest.mark.parametrize("last", [False, True], ids=["other connections stay", "it was the last"])
async def test_a_task_that_a_step_has_made_runnable_runs_at_once(
    last: bool, clock: trio.abc.Clock | None
) -> None:
    """So does one whose connection leaves the fast path in the middle of a wait, when no other
    connection is left on it."""
    event = trio.Event()
    with ends() as (here, there):
        async with running_loop() as event_loop:

            def step(_: int) -> None:
                here.recv(1)
                event_loop.watch(here.fileno(), select.EPOLLIN, 0)
                event_loop.lent -= last
                event.set()

            event_loop.steps[here.fileno()] = step
            event_loop.watch(here.fileno(), 0, select.EPOLLIN)
            threading.Timer(0.2, there.send, [b"x"]).start()  # when trio waits
            before = time.perf_counter()
            with trio.fail_after(20):
                await event.wait()
            assert time.perf_counter() - before < 15  # and not because its deadline had come
            event_loop.lent += last


async def test_a_task_that_can_run_already_does_not_keep_the_fast_path_waiting(
    clock: trio.abc.Clock | None,
) -> None:
    received = bytearray()
    with ends() as (here, there):
        async with running_loop() as event_loop:
            event_loop.steps[here.fileno()] = lambda _: received.extend(here.recv(1))
            event_loop.watch(here.fileno(), 0, select.EPOLLIN)
            there.send(b"x")
            for _ in range(100):  # and trio never waits
                await trio.lowlevel.checkpoint()
    assert received == b"x"


async def test_a_proxy_s_run_waits_on_the_ground_and_needs_no_waking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its own clock, trio needs no wake-up to run a task that a step has made runnable."""
    clock, event, woken = EventLoopClock(), trio.Event(), []

    async def main() -> None:
        with ends() as (here, there):
            async with running_loop() as event_loop:

                def step(_: int) -> None:
                    here.recv(1)
                    event.set()

                event_loop.steps[here.fileno()] = step
                event_loop.watch(here.fileno(), 0, select.EPOLLIN)
                monkeypatch.setattr(
                    trio.lowlevel.TrioToken, "run_sync_soon", lambda *_, **__: woken.append(1)
                )
                there.send(b"x")
                with trio.fail_after(20):
                    await event.wait()
                monkeypatch.undo()

    await trio.to_thread.run_sync(lambda: trio.run(main, clock=clock))
    assert event.is_set()
    assert not woken


async def test_other_threads_and_other_sockets_still_wake_the_loop(
    clock: trio.abc.Clock | None,
) -> None:
    with ends() as (here, there):
        async with running_loop():
            with trio.fail_after(20):
                await trio.to_thread.run_sync(there.send, b"x")
                await trio.lowlevel.wait_readable(here)


async def test_paths_of_one_run_share_their_loop_and_leave_nothing_open(
    clock: trio.abc.Clock | None,
) -> None:
    before = descriptors()
    async with running_loop() as one, running_loop() as other:
        assert one is other
    assert descriptors() == before
    async with running_loop() as another:
        assert another is not one


@interpreted
async def test_a_fault_of_the_loop_closes_the_fast_path_and_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: trio.abc.Clock | None,
) -> None:
    def broken(_: EventLoop, __: float) -> bool:
        raise OSError("no epoll today")

    async with running_loop() as event_loop:
        (fast_path,) = event_loop.fast_paths
        assert isinstance(fast_path, FastPath)
        monkeypatch.setattr(EventLoop, "_wait", broken)
        with trio.fail_after(20):
            await trio.sleep(0.05)
        assert not fast_path.running
    assert "internal error in the fast path's event loop; the fast path is closed" in caplog.text


@interpreted
async def test_without_trio_s_epoll_set_there_is_no_fast_path_for_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "_watcher_of", lambda _: None)
    caplog.set_level(logging.WARNING)
    fast_path = FastPath(Drain(), 60, 60)
    await fast_path.open()
    assert "HTTP/1.1 and relays take the ordinary path" in caplog.text
    with pytest.raises(RuntimeError):
        fast_path.event_loop  # noqa: B018  # it raises
