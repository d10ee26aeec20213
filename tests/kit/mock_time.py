"""Moves trio's mock clock in a test whose sockets are real."""

from __future__ import annotations

import math
from collections.abc import Callable

from trio.abc import Clock
from trio.testing import MockClock, wait_all_tasks_blocked


async def settled(done: Callable[[], object]) -> None:
    """Wait until `done` is true. The mock clock stands still meanwhile."""
    for _ in range(2000):
        if done():
            return
        await wait_all_tasks_blocked(0.002)
    raise AssertionError("not reached")


async def elapse(clock: Clock, seconds: float, step: float = 60.0) -> None:
    """Move the clock in steps. Between them all tasks run until they wait, also for sockets."""
    assert isinstance(clock, MockClock)
    for _ in range(math.ceil(seconds / step)):
        clock.jump(step)
        await wait_all_tasks_blocked(0.002)
