"""The ground that the road lies on: its steps run in the place where trio would wait.

trio waits in one place, when no task can run: in epoll_wait, until the next deadline at the latest. It tells instruments before it does
(`before_io_wait`), and there this loop waits in its stead: for the road's descriptors, and for trio's own epoll set, which is a descriptor
like any other. What has come for the road is done on the spot. A pass of the scheduler for it would cost more than most steps do: with one
connection, a request took 71 µs of processor time at a hop when the road was a task of trio's, and 57 like this.

What has come for trio ends the wait. So does everything else that trio has to see to, and since it computed before we began how long to
wait, it is woken then: when a step has made a task runnable (`task_scheduled` tells), and when a deadline has come.

trio calls instruments for debugging what we do for speed, but what they may do is the same: plain calls, from within its own thread. An
exception would end the instrument, so none leaves it.
"""

from __future__ import annotations

import logging
import re
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import RunVar, Task, add_instrument, checkpoint, current_trio_token, remove_instrument, wait_readable

if TYPE_CHECKING:
    from proxy.fast.lane import Lane
    from proxy.fast.road import Road

_log = logging.getLogger("isthmus.exchange")

# Events taken from the kernel in one turn.
EVENTS = 256
# Passes of the scheduler until a task has surely begun to wait.
_PASSES = 10
_TARGET = re.compile(r"^tfd: *([0-9]+) ", re.MULTILINE)


def _nothing() -> None:
    pass


class Ground(trio.abc.Instrument):
    """The loop beneath one run of trio's, shared by all roads in it (a process has one, a test may have several)."""

    def __init__(self, trios: int) -> None:
        """`trios`: the descriptor of trio's epoll set."""
        self.roads: set[Road] = set()
        self.lent = 0  # connections, and relays, that are on a road
        self.now = 0.0  # trio's time at the beginning of this turn
        self.steps: dict[int, Callable[[int], None]] = {trios: self._on_trio}  # by descriptor: what to do when it is ready
        # By descriptor: all that this turn has heard of, done or not. None: it is no turn, or there was more than it could be told.
        self.heard: dict[int, int] | None = None
        self._again: list[Lane] = []  # lanes that have bytes of a next request already
        self._epoll = select.epoll()
        self._epoll.register(trios, select.EPOLLIN)
        self._token = current_trio_token()
        self._trio_is_ready = False
        self._runnable = False  # some task is

    def lends(self) -> None:
        """One more is on a road; its first steps are done by its task."""
        self.lent += 1
        self.now = trio.current_time()  # the last turn may be long past

    def watch(self, descriptor: int, before: int, events: int) -> None:
        """Wait for these events (0: none) instead of those `before`. A descriptor that is closed leaves the set by itself (epoll(7)), and
        its step is replaced when its number is used again."""
        if not events:
            self.steps.pop(descriptor, None)
            with suppress(OSError):  # it has been closed, and is not there any more
                self._epoll.unregister(descriptor)
        elif before:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)

    def again(self, lane: Lane) -> None:
        """`lane` wants another step, in the next turn."""
        self._again.append(lane)

    # What trio tells...

    def before_io_wait(self, timeout: float) -> None:
        """trio is about to wait for `timeout` seconds."""
        if not self.lent:
            return
        try:
            self._wait(timeout)
        except Exception as error:  # each lane has a boundary of its own: this is a fault of the loop's
            _log.error("the fast road failed by a fault of this proxy's, and is closed", exc_info=error)
            for road in list(self.roads):
                road.close()
            self._wake()
        finally:
            self.heard = None

    def task_scheduled(self, task: Task) -> None:  # noqa: ARG002  # whichever it is
        self._runnable = True

    # The loop...

    def _wait(self, timeout: float) -> None:
        epoll, steps = self._epoll, self.steps
        until, began, whole = perf_counter() + timeout, trio.current_time(), timeout
        self._trio_is_ready = self._runnable = False
        while True:
            again, self._again = self._again, []
            events = epoll.poll(0 if again else timeout, EVENTS)
            self.now = trio.current_time()
            self.heard = dict(events) if len(events) < EVENTS else None
            for lane in again:
                lane.next()
            for descriptor, mask in events:
                step = steps.get(descriptor)
                if step is not None:  # otherwise it was forgotten in this very turn
                    step(mask)
            if timeout <= 0 or self._trio_is_ready:
                return  # trio does not wait then
            timeout = until - perf_counter()
            if self._runnable or timeout <= 0:
                # On a clock that a test moves, what is over is no more than a time of silence, which trio has to notice by itself.
                if self._runnable or trio.current_time() - began >= whole / 2:
                    self._wake()
                return

    def _on_trio(self, _: int) -> None:
        self._trio_is_ready = True

    def _wake(self) -> None:
        self._token.run_sync_soon(_nothing, idempotent=True)

    def close(self) -> None:
        self._epoll.close()


_HERE: RunVar[Ground | None] = RunVar("ground", None)


async def enter(road: Road) -> Ground | None:
    """The ground of this run of trio's, for a road that will `leave` it; None: there is none to be had."""
    ground = _HERE.get()
    if ground is None:
        trios = await _epoll_of_trio()
        if trios is None:
            return None
        ground = Ground(trios)
        _HERE.set(ground)
        add_instrument(ground)
    ground.roads.add(road)
    return ground


def leave(road: Road, ground: Ground) -> None:
    """The road is empty, and no more."""
    ground.roads.discard(road)
    if not ground.roads:
        remove_instrument(ground)
        _HERE.set(None)
        ground.close()


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
