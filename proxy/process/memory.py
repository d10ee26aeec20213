"""The process's memory: its budget, from the container's limit, and returning freed memory to the
system.

The limit is the lowest one of the control group (cgroup v1 or v2) and the groups above it. A part
of it is what the processes need without traffic. The rest is divided between the workers. A fifth
of that is kept for memory that is not counted: allocator fragmentation, TLS libraries, buffers in
transit.

glibc returns freed memory only from the end of its heap. One live object there keeps everything
below it. After a flood that was 170 MiB of 225 in a measurement. `malloc_trim` also returns free
pages in the middle. It is called in a thread, and only after the process has shrunk: it took 10 ms
for 150 MiB, and other threads that allocate memory wait meanwhile.

Two kinds of unused objects stay. Cycles stay until the garbage collector runs. We break ours, so
only a few are left (tests/both_paths/test_garbage.py). trio keeps up to a thousand ended cancel
scopes until their deadlines (`forget_ended_scopes`). Connections end one by one, so one pass is not
enough: it is repeated until it frees no more.

A full collection stops all threads, the probes of /live too: for 0.3 s with the 400,000 objects of
a flood. While those objects are created, the collector would run a dozen times and find nothing. So
its automatic full collections are made rare. This module runs them instead, when the process is
larger than the buffered bytes explain, and few connections and streams are open. While many are
open, it runs one only if the container's limit is near, and then at most every five minutes.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import resource
from functools import partial
from pathlib import Path

import trio

from proxy.config.schema import Config
from proxy.exchange.h2.stream_limit import StreamLimit
from proxy.net.memory_budget import ACTIONS, UNLIMITED, Action, MemoryBudget
from proxy.telemetry.log import RateLimit, warn
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus")

_MIB = 2**20
# Bytes that the supervisor of several workers uses.
_SUPERVISOR = 56 * _MIB
_LEAST = 16 * _MIB
# Memory is returned when the buffered bytes have dropped by this amount. Also when the process has
# grown by this amount since the last time, and buffered bytes explain less than half of the growth.
_FREED, _GROWN = 16 * _MIB, 24 * _MIB
# Seconds between two such checks; and the longest pause, when returning memory frees less than so
# many bytes.
_INTERVAL, _LONGEST_PAUSE, _WORTHWHILE = 5.0, 300.0, 2**20
# So many open connections and streams are few: a full collection takes less than 0.05 s.
_FEW = 256
# Collections of the middle generation before the collector runs a full one.
_FULL_COLLECTION = 100_000
# trio cleans up its deadlines when ended scopes outnumber the others by this number.
_ENDED_SCOPES, _MOST_SCOPES = 1000, 4000
# cgroup v1 reports "no limit" as a number slightly below 2**63.
_NO_LIMIT = 2**60
_PAGE = resource.getpagesize()

_WORDS: dict[Action, str] = {
    "window": "windows of HTTP/2 connections are smaller",
    "read": "reading from connections above their share is paused",
    "close": "a connection that was above its share for too long is closed",
    "connection": "new connections are closed",
    "stream": "new streams are refused",
    "request": "requests are answered with 503",
}


def limit_of_container(
    proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The lowest memory limit of this process's control groups, in bytes; None if there is none.

    A container without a cgroup namespace sees the host's path in `proc`, and its own group at the
    root of `mount`.
    """
    found = []
    for line in _lines(proc):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = (
                mount if (mount / "cgroup.controllers").exists() else mount / "unified",
                "memory.max",
            )
        elif "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (
                folder.is_relative_to(root)
                and (text := "".join(_lines(folder / name)[:1])).isdecimal()
            ):
                found.append(int(text))  # noqa: PERF401  # clearer than a comprehension
    return min((limit for limit in found if limit < _NO_LIMIT), default=None)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("ascii").splitlines() if line]
    except OSError:
        return []


def budget_of(config: Config, limit: int | None) -> int:
    """Bytes that one process may buffer if its container may use `limit` bytes."""
    if config.memory.budget is not None:
        return config.memory.budget
    if limit is None:
        return UNLIMITED
    workers = config.workers
    left = limit - (_SUPERVISOR if workers > 1 else 0) - workers * config.memory.base
    return max(_LEAST, left // workers * 4 // 5)


class MemoryWatch:
    """Holds the budget, logs its actions, and returns freed memory. Call `check` about once a
    second.
    """

    def __init__(
        self, config: Config, limit: int | None, streams: StreamLimit, metrics: Metrics
    ) -> None:
        """`limit`: see `limit_of_container`."""
        self.budget = budget = MemoryBudget(budget_of(config, limit), config.memory.patience)
        # Above this size of the process, a full collection does not wait.
        self._near_limit = math.inf if limit is None else limit // config.workers // 8 * 7
        self._streams = streams
        self._metrics = metrics
        self._limits = {action: RateLimit(1) for action in ACTIONS}
        self._floor = resident()
        self._peak = 0  # the maximum of buffered bytes since memory was last returned
        self._next_check = 0.0  # earliest time of the next return because fewer bytes are buffered
        # earliest time of a return because of the process's size, and the current pause between
        # them
        self._next_trim, self._pause = 0.0, _INTERVAL
        # A full collection is due, but too many connections are open. The earliest next one while
        # they are.
        self._postponed, self._collect_next = False, 0.0
        budget.on_action = self._log_action
        self.observe()  # so that all series exist from the start

    def _log_action(self, action: Action) -> None:
        budget = self.budget
        words = "memory is short (%d of %d MiB buffered, %d for clients without an identity): %s"
        figures = (budget.used // _MIB, budget.limit // _MIB, budget.open_used // _MIB)
        warn(_log, self._limits[action], words, *figures, _WORDS[action])

    async def check(self) -> None:
        """Close connections that exceeded their share for too long. Return freed memory to the
        system if it is much.
        """
        now = trio.current_time()
        self.budget.sweep(now)
        if now < self._next_check:
            return
        self._next_check = now + _INTERVAL
        used, self._peak = self.budget.used, max(self._peak, self.budget.used)
        size = resident()
        self._floor = min(self._floor, size)
        grown = size - self._floor
        few = self._few_are_open()
        if used < self._peak - _FREED or (self._postponed and few):
            self._pause = _INTERVAL
        elif now < self._next_trim or grown < _GROWN or used > grown // 2:
            return
        collect = few or (size > self._near_limit and now >= self._collect_next)
        self._postponed = not collect
        if collect:
            self._collect_next = now + _LONGEST_PAUSE
            forget_ended_scopes()
            await trio.lowlevel.checkpoint()
        await trio.to_thread.run_sync(partial(trim, collect=collect))
        self._metrics.memory_trims.at().inc()
        self._peak = used
        self._next_trim = now + self._pause
        self._pause = (
            _INTERVAL if size - resident() > _WORTHWHILE else min(2 * self._pause, _LONGEST_PAUSE)
        )

    def _few_are_open(self) -> bool:
        streams = self._streams
        return self.budget.connections + streams.open < _FEW and not streams.pacer.waiting

    def observe(self) -> None:
        """Set the metrics to their current values."""
        budget, metrics, streams = self.budget, self._metrics, self._streams
        metrics.memory_used.at("members").set(budget.used - budget.open_used)
        metrics.memory_used.at("others").set(budget.open_used)
        if budget.limit != UNLIMITED:
            metrics.memory_limit.at().set(budget.limit)
        for action, count in budget.counts.items():
            metrics.memory_actions.at(action).set(count)
        metrics.streams_open.at("members").set(streams.open - streams.others)
        metrics.streams_open.at("others").set(streams.others)
        metrics.streams_refused.at().set(streams.refused)
        metrics.steps_waiting.at().set(streams.pacer.waiting)


def resident() -> int:
    """Bytes of memory that this process uses now (RSS)."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE


def collect_seldom() -> None:
    """Make automatic full collections of the garbage collector rare (see the module's
    docstring)."""
    gc.set_threshold(*gc.get_threshold()[:2], _FULL_COLLECTION)


def forget_ended_scopes() -> None:
    """Make trio drop, in its next pass, the ended cancel scopes whose deadlines have not come yet.

    trio keeps them in its heap of deadlines until they outnumber the others by more than a
    thousand. It has no function to drop them, so this creates and ends that many scopes. Their
    number depends on the number of deadlines; with more than a few thousand deadlines this function
    does nothing.
    """
    most = min(_MOST_SCOPES, _ENDED_SCOPES + 2 * trio.lowlevel.current_statistics().tasks_living)
    until = trio.current_time() + _LONGEST_PAUSE
    for _ in range(most):
        with trio.CancelScope(deadline=until):  # noqa: ASYNC100  # only its deadline is needed
            pass


def trim(*, collect: bool = True) -> bool:
    """Return the C library's free pages to the system, with `collect` after a run of the garbage
    collector. False: this C library cannot do that.
    """
    if collect:  # an idle proxy allocates little, so the collector would not run for a long time
        gc.collect()
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError):  # musl has no malloc_trim
        return False
