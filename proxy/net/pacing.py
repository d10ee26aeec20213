"""How much is begun and ended in one pass of the scheduler.

trio runs every task that can run before it looks at the sockets again. So if thousands of streams are to begin, or connections to end, in
the same pass, everything else waits until all of that is done: probes, and the requests of others. The `Pacer` bounds it. Whatever begins
or ends takes a step through its connection's `Line`; a pass has a number of steps, and what is more waits for the next one. The lines
take turns, one step each, so a client with two hundred requests delays its own and not those of others. Members of the mesh come first,
but for a quarter of the steps, so that others are not stopped for ever.

The number of steps follows from the processor time that a pass takes: it is halved when a pass took longer than `_LONG`, and grows slowly
while passes are short. While there are steps left and no one waits, a step is a plain call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import thread_time

import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, checkpoint, current_task, reschedule, wait_task_rescheduled

# Steps of one pass.
_LEAST, _FIRST, _MOST, _MORE = 8, 256, 512, 8
# Seconds of processor time: what other processes take does not depend on the number of steps.
_LONG, _SHORT = 0.010, 0.005


class Line:
    """The steps of one connection that wait. `member`: see the module."""

    __slots__ = ("_emptied", "member", "steps")

    def __init__(self, *, member: bool = False) -> None:
        self.member = member
        self.steps: deque[tuple[Callable[[], object], int]] = deque()  # and how many each counts for
        self._emptied: trio.Event | None = None

    async def emptied(self) -> None:
        """Wait until no step of this line waits."""
        while self.steps:
            if self._emptied is None:
                self._emptied = trio.Event()
            await self._emptied.wait()

    def took(self) -> None:
        """A step has been taken from it."""
        if not self.steps and self._emptied is not None:
            self._emptied.set()
            self._emptied = None


class Pacer:
    """`run` has to run beside the connections; without it nothing waits."""

    __slots__ = ("_lines", "_running", "_steps", "_task", "left", "waited", "waiting")

    def __init__(self) -> None:
        self.left = _FIRST  # steps that may be taken until `run` has its next turn
        self.waiting = 0  # steps
        self.waited = 0  # steps that had to wait, since the start
        self._steps = _FIRST
        self._running = False
        self._task: Task | None = None  # that of `run`, while it has nothing to do
        self._lines: tuple[deque[Line], deque[Line]] = (deque(), deque())  # of others, and of members; those with steps that wait

    def take(self, line: Line, step: Callable[[], object], count: int = 1) -> None:
        """Call `step`, which must not raise, now or in a later pass, behind those of its line that wait. It counts for `count` steps."""
        if self.now(line, count):
            step()
        else:
            self.queue(line, step, count)

    def now(self, line: Line | None = None, count: int = 1) -> bool:
        """Whether so many steps may be taken at once; then they count as taken. Otherwise they have to be queued."""
        if self.left > 0 and (line is None or not line.steps):
            self.left -= count
            return True
        return not self._running

    def queue(self, line: Line, step: Callable[[], object], count: int = 1) -> None:
        """Have `step` called in a later pass."""
        if not line.steps:
            self._lines[line.member].append(line)
        line.steps.append((step, count))
        self.waiting += count
        self.waited += count
        self._wake()

    async def turn(self, line: Line | None = None, *, member: bool = False) -> None:
        """Wait for a step of `line`, or of a line of its own. If the task is cancelled meanwhile, the step is lost, and that is all."""
        if not self.now(line):
            line = line or Line(member=member)
            ready = trio.Event()
            self.queue(line, ready.set)
            await ready.wait()

    def hurry(self, line: Line) -> None:
        """Take all steps of `line` that wait, now."""
        if line.steps:
            self._lines[line.member].remove(line)
            while line.steps:
                step, count = line.steps.popleft()
                self.waiting -= count
                step()
            line.took()

    def _wake(self) -> None:
        task = self._task
        if task is not None:
            self._task = None
            reschedule(task)

    async def run(self) -> None:
        """Take the steps that wait, until cancelled. Then nothing waits any more."""
        self._running = True
        try:
            while True:
                self.left = self._steps  # newcomers may go at once, if no one is before them
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
        """`seconds`: of the last pass."""
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
            step, count = line.steps.popleft()
            steps -= count
            self.waiting -= count
            if line.steps:
                lines.append(line)
            line.took()
            step()

    async def _idle(self) -> None:
        """Until a step waits."""

        def abort(_: RaiseCancelT) -> Abort:
            self._task = None
            return Abort.SUCCEEDED

        self._task = current_task()
        await wait_task_rescheduled(abort)
