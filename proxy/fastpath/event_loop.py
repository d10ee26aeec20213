"""The fast path's event loop. It runs inside trio's idle wait: whenever trio would block in epoll_wait, this loop polls instead.

trio waits in one place, when no task can run: in epoll_wait, until the next deadline at the latest. Before, it asks its clock how long
that is, and there this loop waits in its stead (`Clock`): for the fast path's descriptors, and for trio's own epoll set, which is a
descriptor like any other. What has come for the fast path is done on the spot. A pass of the scheduler for it would cost more than most
steps do: with one connection, a request took 71 µs of processor time at a hop when the fast path was a task of trio's, and 57 like this.

What has come for trio ends the wait. So does a step that has made a task runnable (`task_scheduled` tells), and a deadline that has come.
Then the clock's answer is that there is no time to wait.

Two more cases are left to what trio tells instruments before it waits (`before_io_wait`). When a task can run already, the clock is not
asked, and the fast path has its turn there. And a run on another's clock, as those of tests are, waits there as long as it would have
waited itself; since it computed before how long that is, it has to be woken by an entry in its queue.

trio calls clocks and instruments for what they are, and we use them for speed; but what they may do is the same: plain calls, from within
its own thread. An exception would end the run, or the instrument, so none leaves this.
"""

from __future__ import annotations

import logging
import random
import re
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import RunVar, Task, add_instrument, checkpoint, current_clock, current_trio_token, remove_instrument, wait_readable

if TYPE_CHECKING:
    from proxy.fastpath.fast_path import FastPath
    from proxy.fastpath.h1_connection import FastConnection

_log = logging.getLogger("isthmus.exchange")

# Events taken from the kernel in one turn, which is how long the tasks of trio may have to wait: a step takes 50 to 100 µs.
EVENTS = 128
# Seconds. trio waits no longer at a time, epoll_wait(2) not much.
_LONG = 86400.0
# Passes of the scheduler until a task has surely begun to wait.
_PASSES = 10
_TARGET = re.compile(r"^tfd: *([0-9]+) ", re.MULTILINE)


def _nothing() -> None:
    pass


class EventLoop(trio.abc.Instrument):
    """The loop beneath one run of trio's, shared by all paths in it (a process has one, a test may have several)."""

    def __init__(self, trios: int) -> None:
        """`trios`: the descriptor of trio's epoll set."""
        self.fast_paths: set[FastPath] = set()
        self.lent = 0  # connections, and relays, that are on a fast path
        self.now = 0.0  # trio's time at the beginning of this turn
        self.steps: dict[int, Callable[[int], None]] = {trios: self._on_trio}  # by descriptor: what to do when it is ready
        # By descriptor: all that this turn has heard of, done or not. None: it is no turn, or there was more than it could be told.
        self.heard: dict[int, int] | None = None
        self._again: list[FastConnection] = []  # connections that have bytes of a next request already
        self._epoll = select.epoll()
        self._epoll.register(trios, select.EPOLLIN)
        self._token = current_trio_token()
        self._trio_is_ready = False
        self._runnable = False  # some task is
        self._waited = False  # for this pass of trio's, on its clock

    def lends(self) -> None:
        """One more is on a fast path; its first steps are done by its task."""
        self.lent += 1
        self.now = trio.current_time()  # the last turn may be long past

    def watch(self, descriptor: int, before: int, events: int) -> None:
        """Wait for these events (0: none) instead of those `before`. A descriptor that is closed leaves the set by itself (epoll(7)), and
        its step is replaced when its number is used again."""
        if not events:
            self.steps.pop(descriptor, None)
            if not self._epoll.closed:  # a pool may be closed behind the last path
                with suppress(OSError):  # it has been closed, and is not there any more
                    self._epoll.unregister(descriptor)
        elif before:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)

    def again(self, connection: FastConnection) -> None:
        """`connection` wants another step, in the next turn."""
        self._again.append(connection)

    # What trio tells...

    def wait(self, timeout: float) -> None:
        """trio's clock is asked how long to wait: for `timeout` seconds if there were no fast path. When this returns no time is left.

        Less than none, where a deadline has passed while tasks ran, is none: epoll_wait(2) takes it for ever."""
        self._waited = True
        self._turns(max(0.0, min(timeout, _LONG)))

    def before_io_wait(self, timeout: float) -> None:
        """trio is about to wait for `timeout` seconds."""
        if self._waited:
            self._waited = False
        elif self.lent and self._turns(timeout):
            self._token.run_sync_soon(_nothing, idempotent=True)

    def task_scheduled(self, task: Task) -> None:  # noqa: ARG002  # whichever it is
        self._runnable = True

    # The loop...

    def _turns(self, timeout: float) -> bool:
        """Wait in trio's stead. Whether trio has to be woken, if it is about to wait as long again."""
        try:
            return self._wait(timeout)
        except Exception as error:  # each connection has a boundary of its own: this is a fault of the loop's
            _log.error("the fast path failed by a fault of this proxy's, and is closed", exc_info=error)
            for fast_path in list(self.fast_paths):
                try:
                    fast_path.close()
                except Exception as worse:
                    _log.error("and what was on it may be lost", exc_info=worse)
            return True
        finally:
            self.heard = None

    def _wait(self, timeout: float) -> bool:
        epoll, steps = self._epoll, self.steps
        until, began, whole = perf_counter() + timeout, trio.current_time(), timeout
        self._trio_is_ready = self._runnable = False
        while True:
            again, self._again = self._again, []
            events = epoll.poll(0 if again else timeout, EVENTS)
            self.now = trio.current_time()
            self.heard = dict(events) if len(events) < EVENTS else None
            for connection in again:
                connection.next()
            for descriptor, mask in events:
                step = steps.get(descriptor)
                if step is not None:  # otherwise it was forgotten in this very turn
                    step(mask)
            if timeout <= 0 or self._trio_is_ready:
                return False  # trio does not wait then
            timeout = until - perf_counter()
            if self._runnable or timeout <= 0:
                # On a clock that a test moves, what is over is no more than a time of silence, which trio has to notice by itself.
                return self._runnable or trio.current_time() - began >= whole / 2

    def _on_trio(self, _: int) -> None:
        self._trio_is_ready = True

    def close(self) -> None:
        self._epoll.close()


class Clock(trio.abc.Clock):
    """The system's clock, for a run of trio's that has a fast path: trio waits in the event loop. (So long as something is on the fast
    path, nobody sees all tasks blocked, as trio.testing can wait for.)"""

    def __init__(self) -> None:
        self.event_loop: EventLoop | None = None
        self._from = random.uniform(10_000, 200_000)  # noqa: S311  # as trio's own: times of two runs are not to be mixed

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._from + perf_counter()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        left = deadline - self.current_time()
        event_loop = self.event_loop
        if event_loop is None or not event_loop.lent:
            return left
        event_loop.wait(left)
        return 0.0


_HERE: RunVar[EventLoop | None] = RunVar("event_loop", None)


async def enter(fast_path: FastPath) -> EventLoop | None:
    """The event loop of this run of trio's, for a fast path that will `leave` it; None: there is none to be had."""
    event_loop = _HERE.get()
    if event_loop is None:
        trios = await _epoll_of_trio()
        if trios is None:
            return None
        event_loop = EventLoop(trios)
        clock = current_clock()
        if isinstance(clock, Clock):
            clock.event_loop = event_loop
        _HERE.set(event_loop)
        add_instrument(event_loop)
    event_loop.fast_paths.add(fast_path)
    return event_loop


def leave(fast_path: FastPath, event_loop: EventLoop) -> None:
    """The fast path is empty, and no more."""
    event_loop.fast_paths.discard(fast_path)
    if not event_loop.fast_paths:
        remove_instrument(event_loop)
        clock = current_clock()
        if isinstance(clock, Clock):
            clock.event_loop = None
        _HERE.set(None)
        event_loop.close()


async def _epoll_of_trio() -> int | None:
    """The descriptor of the epoll set on which trio waits. trio does not tell it, but the kernel does (proc(5), fdinfo): it is the one
    that has a socket in it for which a task of ours waits."""
    found = None
    ours, other = socket.socketpair()
    with ours, other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_readable, ours)
            for _ in range(_PASSES):
                await checkpoint()
                found = _watcher_of(ours.fileno())
                if found is not None:
                    break
            nursery.cancel_scope.cancel()
    return found


def _watcher_of(descriptor: int) -> int | None:
    """The epoll set of this process that `descriptor` is in."""
    for link in Path("/proc/self/fd").glob("*"):
        try:
            if str(link.readlink()) == "anon_inode:[eventpoll]":
                targets = _TARGET.findall(Path("/proc/self/fdinfo", link.name).read_text("ascii"))
                if str(descriptor) in targets:
                    return int(link.name)
        except OSError:  # it has been closed meanwhile
            continue
    return None
