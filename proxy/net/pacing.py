"""Limits how many streams and connections start and end in one scheduler pass.

trio runs every runnable task before it checks the sockets again. If thousands of streams start, or
connections end, in the same pass, everything else waits for them: probes, and other requests. The
`Pacer` limits this. Each start or end takes a step through the `Line` of its connection. A pass has
a number of steps; the rest waits for the next pass. The lines take turns, one step each, so a
client with two hundred requests delays only its own. Members of the mesh come first, except for a
quarter of the steps, so that others are not blocked completely.

The number of steps depends on the CPU time of a pass: it is halved if a pass took longer than
`_LONG`, and grows slowly while passes are short. If steps are left and none waits, a step is a
plain function call.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from time import thread_time

import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    Task,
    checkpoint,
    current_task,
    reschedule,
    wait_task_rescheduled,
)

_log = logging.getLogger("isthmus.net")

# Steps of one pass: minimum, initial value, maximum, growth.
_LEAST, _FIRST, _MOST, _MORE = 8, 256, 512, 8
# Seconds of CPU time of this thread, which other processes do not affect.
_LONG, _SHORT = 0.010, 0.005


class Line:
    """The waiting steps of one connection. `member`: see the module."""

    __slots__ = ("_emptied", "member", "steps")

    def __init__(self, *, member: bool = False) -> None:
        self.member = member
        self.steps: deque[Callable[[], object]] = deque()
        self._emptied: trio.Event | None = None

    async def emptied(self) -> None:
        """Wait until no step of this line is waiting."""
        while self.steps:
            if self._emptied is None:
                self._emptied = trio.Event()
            await self._emptied.wait()

    def report_step(self) -> None:
        """Report that a step was taken from the line."""
        if not self.steps and self._emptied is not None:
            self._emptied.set()
            self._emptied = None


class Pacer:
    """Distributes the steps.

    `run` must run while connections are open; without it nothing waits.
    """

    __slots__ = ("_lines", "_running", "_steps", "_task", "left", "waited", "waiting")

    def __init__(self) -> None:
        self.left = _FIRST  # steps that are free until `run` runs again
        self.waiting = 0  # steps that wait now
        self.waited = 0  # steps that have waited, since the start
        self._steps = _FIRST
        self._running = False
        self._task: Task | None = None  # the task of `run`, while it is idle
        self._lines: tuple[deque[Line], deque[Line]] = (deque(), deque())  # non-members, members

    def take(self, line: Line, step: Callable[[], object]) -> None:
        """Call `step` now or in a later pass, after the waiting steps of its line."""
        if self.now(line):
            step()
        else:
            self.queue(line, step)

    def now(self, line: Line | None = None) -> bool:
        """Whether a step may be taken at once. If so, it counts as taken.

        Otherwise the caller must queue it.
        """
        if self.left > 0 and (line is None or not line.steps):
            self.left -= 1
            return True
        return not self._running

    def queue(self, line: Line, step: Callable[[], object]) -> None:
        """Call `step` in a later pass. An exception of it is logged there."""
        if not line.steps:
            self._lines[line.member].append(line)
        line.steps.append(step)
        self.waiting += 1
        self.waited += 1
        self._wake()

    async def turn(self, line: Line | None = None, *, member: bool = False) -> None:
        """Wait for a step of `line`, or of a new line.

        If the task is cancelled, the step is lost.
        """
        if not self.now(line):
            line = line or Line(member=member)
            ready = trio.Event()
            self.queue(line, ready.set)
            await ready.wait()

    def hurry(self, line: Line) -> None:
        """Take all waiting steps of `line` now."""
        if line.steps:
            self._lines[line.member].remove(line)
            while line.steps:
                self.waiting -= 1
                line.steps.popleft()()
            line.report_step()

    def _wake(self) -> None:
        task = self._task
        if task is not None:
            self._task = None
            reschedule(task)

    async def run(self) -> None:
        """Take the waiting steps until cancelled. After that, steps never wait."""
        self._running = True
        try:
            while True:
                self.left = self._steps  # new steps need not wait if none is waiting
                while self.waiting:
                    self.left = 0
                    began = thread_time()
                    self._take(self._steps)
                    await checkpoint()
                    self._adapt(thread_time() - began)
                self.left = self._steps
                await self._idle()
        finally:
            self._running = False
            self._take(self.waiting)

    def _adapt(self, seconds: float) -> None:
        """Adapt the number of steps. `seconds`: CPU time of the last pass."""
        if seconds > _LONG:
            self._steps = max(_LEAST, self._steps // 2)
        elif seconds < _SHORT:
            self._steps = min(_MOST, self._steps + _MORE)

    def _take(self, steps: int) -> None:
        others, members = self._lines
        turn = 0
        while steps > 0 and self.waiting:
            turn += 1
            lines = members if members and (turn % 4 or not others) else others
            line = lines.popleft()
            step = line.steps.popleft()
            steps -= 1
            self.waiting -= 1
            if line.steps:
                lines.append(line)
            line.report_step()
            try:
                step()
            # error boundary: a bug in one connection must not end the process
            except Exception as error:
                _log.error("internal error in a step that had waited", exc_info=error)

    async def _idle(self) -> None:
        """Wait until a step is queued."""

        def abort(_: RaiseCancelT) -> Abort:
            self._task = None
            return Abort.SUCCEEDED

        self._task = current_task()
        await wait_task_rescheduled(abort)
