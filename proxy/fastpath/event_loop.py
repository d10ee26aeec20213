"""The fast path's event loop. It runs inside trio's idle wait: whenever trio would block in
epoll_wait, this loop polls instead.

When no task can run, trio waits in one place: epoll_wait, until the next deadline at the latest.
Just before, it asks its clock how long to wait. At that point this loop waits instead
(`EventLoopClock`), for the descriptors of the fast path and for trio's own epoll set, which is a
descriptor like any other. The loop handles events of the fast path immediately. A pass of the
scheduler would cost more than most steps. With one connection, one request used 71 µs of processor
time at a hop when the fast path was a trio task. It uses 57 µs now.

The wait ends when an event for trio arrives, when a step makes a task runnable (`task_scheduled`
reports this), or when a deadline has passed. The clock then answers that there is no time to wait.

Two cases use the instrument hook that trio calls before it waits (`before_io_wait`). First, when a
task can already run, trio does not ask the clock; the fast path takes its turn in the hook. Second,
a run with another clock, such as a test's, waits in the hook for the time that trio would have
waited. Since trio computed its own timeout before, an entry in its queue has to wake it.

trio defines clocks and instruments for other purposes; this module uses them for speed. Both are
plain calls in trio's own thread. An exception would end the run, or remove the instrument, so no
exception may leave this module.
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
from typing import Protocol

import trio
from trio.lowlevel import (
    RunVar,
    Task,
    add_instrument,
    checkpoint,
    current_clock,
    current_trio_token,
    remove_instrument,
    wait_readable,
)

_log = logging.getLogger("isthmus.exchange")

# Events taken from the kernel in one turn. This bounds how long trio's tasks wait: a step takes 50
# to 100 µs.
EVENTS = 128
# Seconds. The longest timeout for one poll; trio uses the same limit, and that of epoll_wait(2) is
# not much longer.
_LONG = 86400.0
# Passes of the scheduler after which a new task has certainly begun to wait.
_PASSES = 10
_TARGET = re.compile(r"^tfd: *([0-9]+) ", re.MULTILINE)


def _nothing() -> None:
    pass


class Closable(Protocol):
    """A fast path."""

    def close(self) -> None: ...


class Stepping(Protocol):
    """A connection that needs another step in the next turn."""

    def next(self) -> None: ...


class EventLoop(trio.abc.Instrument):
    """The event loop of one trio run. All fast paths in the run share it: a process has one, a test
    may have several."""

    def __init__(self, trios: int) -> None:
        """`trios`: the file descriptor of trio's epoll set."""
        self.fast_paths: set[Closable] = set()
        self.lent = 0  # connections and relays on a fast path
        self.now = 0.0  # trio's time at the start of this turn
        # by descriptor: the function to call when it is ready
        self.steps: dict[int, Callable[[int], None]] = {trios: self._on_trio}
        # The event masks of this turn by descriptor, handled or not. None: outside a turn, or when
        # the poll returned the maximum number of events and may have missed some.
        self.last_events: dict[int, int] | None = None
        # connections that have already read bytes of the next request
        self._again: list[Stepping] = []
        self._epoll = select.epoll()
        self._epoll.register(trios, select.EPOLLIN)
        self._token = current_trio_token()
        self._trio_is_ready = False
        self._runnable = False  # a task can run
        self._waited = False  # in this pass of trio, through the clock

    def add_lent(self) -> None:
        """Count one more connection or relay on a fast path. Its task runs the first steps
        itself."""
        self.lent += 1
        self.now = trio.current_time()  # the last turn may have been long ago

    def watch(self, descriptor: int, before: int, events: int) -> None:
        """Wait for `events` on `descriptor` (0: none). `before`: the events waited for until now. A
        closed descriptor leaves the epoll set by itself (epoll(7)). Its step is replaced when its
        number is used again."""
        if not events:
            self.steps.pop(descriptor, None)
            if not self._epoll.closed:  # a pool may be closed after the last fast path
                with suppress(OSError):  # already closed, so no longer in the set
                    self._epoll.unregister(descriptor)
        elif before:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)

    def call_next(self, connection: Stepping) -> None:
        """Give `connection` another step in the next turn."""
        self._again.append(connection)

    # Called by trio...

    def wait(self, timeout: float) -> None:
        """Wait in place of trio, whose clock was asked for a timeout: `timeout` seconds without a
        fast path. After this returns, trio must not wait.

        A negative timeout (a deadline passed while tasks ran) counts as 0, because epoll_wait(2)
        takes it as infinite.
        """
        self._waited = True
        self._turns(max(0.0, min(timeout, _LONG)))

    def before_io_wait(self, timeout: float) -> None:
        """Called by trio before it waits for `timeout` seconds."""
        if self._waited:
            self._waited = False
        elif self.lent and self._turns(timeout):
            self._token.run_sync_soon(_nothing, idempotent=True)

    def task_scheduled(self, task: Task) -> None:  # noqa: ARG002  # any task counts
        self._runnable = True

    # The loop...

    def _turns(self, timeout: float) -> bool:
        """Wait in place of trio. Returns True if trio has to be woken, because it would wait for
        the same time again."""
        try:
            return self._wait(timeout)
        # each connection handles its own errors: this is a bug in the loop
        except Exception as error:
            _log.error(
                "internal error in the fast path's event loop; the fast path is closed",
                exc_info=error,
            )
            for fast_path in list(self.fast_paths):
                try:
                    fast_path.close()
                except Exception as worse:
                    _log.error(
                        "closing the fast path failed; its connections may be lost", exc_info=worse
                    )
            return True
        finally:
            self.last_events = None

    def _wait(self, timeout: float) -> bool:
        epoll, steps = self._epoll, self.steps
        until, began, whole = perf_counter() + timeout, trio.current_time(), timeout
        self._trio_is_ready = self._runnable = False
        while True:
            again, self._again = self._again, []
            events = epoll.poll(0 if again else timeout, EVENTS)
            self.now = trio.current_time()
            self.last_events = dict(events) if len(events) < EVENTS else None
            for connection in again:
                connection.next()
            for descriptor, mask in events:
                step = steps.get(descriptor)
                if step is not None:  # None: an earlier step of this turn has removed it
                    step(mask)
            if timeout <= 0 or self._trio_is_ready:
                return False  # trio will not wait
            timeout = until - perf_counter()
            if self._runnable or timeout <= 0:
                # With a test's clock, the end of the timeout only means that nothing happened, and
                # trio has to notice that by itself.
                return self._runnable or trio.current_time() - began >= whole / 2

    def _on_trio(self, _: int) -> None:
        self._trio_is_ready = True

    def close(self) -> None:
        self._epoll.close()


class EventLoopClock(trio.abc.Clock):
    """The system's clock, for a trio run with a fast path: trio waits in the event loop. While a
    connection is on the fast path, trio.testing.wait_all_tasks_blocked does not return."""

    def __init__(self) -> None:
        self.event_loop: EventLoop | None = None
        # Like trio's own clock: times of two runs must not be mixed. It is no secret (S311).
        self._from = random.uniform(10_000, 200_000)  # noqa: S311

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


async def enter(fast_path: Closable) -> EventLoop | None:
    """Return the event loop of this trio run, for a fast path that later calls `leave`. None:
    trio's epoll set was not found."""
    event_loop = _HERE.get()
    if event_loop is None:
        trios = await _epoll_of_trio()
        if trios is None:
            return None
        event_loop = EventLoop(trios)
        clock = current_clock()
        if isinstance(clock, EventLoopClock):
            clock.event_loop = event_loop
        _HERE.set(event_loop)
        add_instrument(event_loop)
    event_loop.fast_paths.add(fast_path)
    return event_loop


def leave(fast_path: Closable, event_loop: EventLoop) -> None:
    """Remove a fast path that is closed and empty. The last one closes the event loop."""
    event_loop.fast_paths.discard(fast_path)
    if not event_loop.fast_paths:
        remove_instrument(event_loop)
        clock = current_clock()
        if isinstance(clock, EventLoopClock):
            clock.event_loop = None
        _HERE.set(None)
        event_loop.close()


async def _epoll_of_trio() -> int | None:
    """Find the descriptor of trio's epoll set. trio does not expose it, but the kernel does
    (proc(5), fdinfo): it is the epoll set that contains a socket for which one of our tasks waits.
    """
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
    """Return the epoll set of this process that contains `descriptor`."""
    for link in Path("/proc/self/fd").glob("*"):
        try:
            if str(link.readlink()) == "anon_inode:[eventpoll]":
                targets = _TARGET.findall(Path("/proc/self/fdinfo", link.name).read_text("ascii"))
                if str(descriptor) in targets:
                    return int(link.name)
        except OSError:  # closed in the meantime
            continue
    return None
