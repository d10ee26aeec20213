"""The memory of the process: how large its budget is, by the limit of the container, and how freed memory goes back to the system.

The limit is that of the control group (cgroup v1 or v2) and of the groups above it, whichever is lowest. A part of it is what the
processes take without traffic. What is left is divided between the workers, and a fifth of it is kept for what is not counted: the
allocator's gaps, TLS libraries, buffers in transit.

glibc gives freed memory back at the end of its heap only, and one living object there keeps all that is below. After a flood that is most
of it: 170 MiB of 225 in a measurement. `malloc_trim` gives back the free pages in the middle. It is called in a thread, and only after the
process has shrunk: it took 10 ms for 150 MiB, during which other threads of the process wait for memory.

Python gives its own memory back by arenas of 1 MiB, each when the last object in it is gone. Two kinds of objects stay although nothing
uses them. Cycles stay until the garbage collector comes by. And trio keeps cancel scopes that have ended until their deadlines, up to a
thousand of them (`forget_ended_scopes`). Connections end one by one, so once is not enough: it is repeated until it does not help any more.

A full collection stops all threads for as long as it takes: 0.1 s and more, with the 250,000 objects of a flood. The collector makes a
dozen while that many come, and finds nothing. So those that it makes by itself are made seldom, and this module makes them, when the
process is larger than what is buffered accounts for.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
from pathlib import Path

import trio

from proxy.config.load import Config
from proxy.exchange.h2.stream_limit import StreamLimit
from proxy.net.memory_budget import ACTIONS, UNLIMITED, Action, Budget
from proxy.telemetry.log import RateLimit, warn
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus")

_MIB = 2**20
# Bytes that the supervisor of several workers takes.
_SUPERVISOR = 56 * _MIB
_LEAST = 16 * _MIB
# Memory is given back when so many bytes less are buffered than were; or when the process has grown by so much since it was last, and
# what is buffered accounts for less than half of it.
_FREED, _GROWN = 16 * _MIB, 24 * _MIB
# Seconds between two looks at that; and the most, when giving back does not help: less than so many bytes.
_LOOK, _SELDOM, _HELPED = 5.0, 300.0, 2**20
# How many collections of the middle generation go by until the collector makes a full one.
_FULL_COLLECTION = 1000
# trio looks through its deadlines when there are so many more of ended scopes than of others.
_ENDED_SCOPES, _MOST_SCOPES = 1000, 4000
# cgroup v1 says "no limit" by a number that is a little below 2**63.
_NO_LIMIT = 2**60
_PAGE = resource.getpagesize()

_WORDS: dict[Action, str] = {
    "window": "windows of HTTP/2 connections are smaller",
    "read": "connections that hold more than their share are not read",
    "close": "a connection that held more than its share for too long is closed",
    "connection": "new connections are closed",
    "stream": "new streams are refused",
    "request": "requests are answered by 503",
}


def limit_of_container(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The lowest memory limit of this process's control groups, in bytes; None: there is none.

    A container without a cgroup namespace sees the path of the host in `proc`, and its own group at the root of `mount`.
    """
    found = []
    for line in _lines(proc):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = mount if (mount / "cgroup.controllers").exists() else mount / "unified", "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (text := "".join(_lines(folder / name)[:1])).isdecimal():
                found.append(int(text))  # noqa: PERF401  # it reads better so
    return min((limit for limit in found if limit < _NO_LIMIT), default=None)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("ascii").splitlines() if line]
    except OSError:
        return []


def budget_of(config: Config, limit: int | None) -> int:
    """Bytes that one process may buffer, where its container may use `limit`."""
    if config.memory.budget is not None:
        return config.memory.budget
    if limit is None:
        return UNLIMITED
    workers = config.workers
    left = limit - (_SUPERVISOR if workers > 1 else 0) - workers * config.memory.base
    return max(_LEAST, left // workers * 4 // 5)


class MemoryWatch:
    """Has the budget, tells of it, and gives memory back. `look` is to be called about once a second."""

    def __init__(self, config: Config, streams: StreamLimit, metrics: Metrics) -> None:
        self.budget = budget = Budget(budget_of(config, limit_of_container()), config.memory.patience)
        self._streams = streams
        self._metrics = metrics
        self._limits = {action: RateLimit(1) for action in ACTIONS}
        self._counted = dict.fromkeys(ACTIONS, 0)
        self._refused = 0
        self._floor = resident()
        self._most = 0  # bytes that were buffered at a time since memory was given back
        self._next = 0.0  # when it may be given back again because less is buffered
        self._later, self._pause = 0.0, _LOOK  # and because the process is large: not before, and how long it is put off then
        budget.on_action = self._acted
        self.observe()  # so that all series are there from the start

    def _acted(self, action: Action) -> None:
        budget = self.budget
        words = "memory is short (%d of %d MiB buffered, %d for clients without an identity): %s"
        figures = (budget.used // _MIB, budget.limit // _MIB, budget.open_used // _MIB)
        warn(_log, self._limits[action], words, *figures, _WORDS[action])

    async def look(self) -> None:
        """Close what has held too much for too long; give freed memory back to the system, if there is much of it."""
        now = trio.current_time()
        self.budget.sweep(now)
        if now < self._next:
            return
        self._next = now + _LOOK
        used, self._most = self.budget.used, max(self._most, self.budget.used)
        size = resident()
        self._floor = min(self._floor, size)
        grown = size - self._floor
        if used < self._most - _FREED:
            self._pause = _LOOK
        elif now < self._later or grown < _GROWN or used > grown // 2:
            return
        forget_ended_scopes()
        await trio.lowlevel.checkpoint()
        await trio.to_thread.run_sync(trim)
        self._metrics.memory_trims.at().inc()
        self._most = used
        self._later = now + self._pause
        self._pause = _LOOK if size - resident() > _HELPED else min(2 * self._pause, _SELDOM)

    def observe(self) -> None:
        """Bring the metrics up to date."""
        budget, metrics, streams = self.budget, self._metrics, self._streams
        metrics.memory_used.at("members").set(budget.used - budget.open_used)
        metrics.memory_used.at("others").set(budget.open_used)
        if budget.limit != UNLIMITED:
            metrics.memory_limit.at().set(budget.limit)
        for action, count in budget.counts.items():
            metrics.memory_actions.at(action).inc(count - self._counted[action])
            self._counted[action] = count
        metrics.streams_open.at("members").set(streams.open - streams.others)
        metrics.streams_open.at("others").set(streams.others)
        metrics.streams_refused.at().inc(streams.refused - self._refused)
        self._refused = streams.refused
        metrics.steps_waiting.at().set(streams.pacer.waiting)


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE


def collect_seldom() -> None:
    """Have the garbage collector make full collections seldom: see above."""
    gc.set_threshold(*gc.get_threshold()[:2], _FULL_COLLECTION)


def forget_ended_scopes() -> None:
    """Have trio forget, in its next pass, the cancel scopes that have ended and whose deadlines have not come.

    It keeps them in its heap of deadlines until they are in the majority by more than a thousand. So that many are made and ended here:
    there is no call for it. How many it takes depends on how many deadlines there are; with more than a few thousand it does nothing.
    """
    most = min(_MOST_SCOPES, _ENDED_SCOPES + 2 * trio.lowlevel.current_statistics().tasks_living)
    until = trio.current_time() + _SELDOM
    for _ in range(most):
        with trio.CancelScope(deadline=until):  # noqa: ASYNC100  # only its deadline is wanted
            pass


def trim() -> bool:
    """Free what only the garbage collector can, and give free pages of the C library's heap back to the system; False: this C library
    cannot."""
    gc.collect()  # an idle proxy allocates little, so the collector would not come by for long
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError):  # musl
        return False
