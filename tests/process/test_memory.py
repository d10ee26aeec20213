"""The memory budget follows the limit of the container, and freed memory is returned to the
system."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from proxy.config.schema import Config
from proxy.config.schema_connections import MemoryConfig
from proxy.exchange.h2.stream_limit import StreamLimit
from proxy.net.memory_budget import UNLIMITED
from proxy.process.memory import (
    MemoryWatch,
    budget_of,
    forget_ended_scopes,
    limit_of_container,
    resident,
    trim,
)
from proxy.telemetry.metrics import Metrics

MIB = 2**20


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "ascii")


@pytest.mark.parametrize(
    ("proc", "files", "limit"),
    [
        ("0::/\n", {"cgroup.controllers": "memory", "memory.max": "536870912\n"}, 512 * MIB),
        ("0::/\n", {"cgroup.controllers": "memory", "memory.max": "max\n"}, None),
        ("0::/\n", {"cgroup.controllers": "memory"}, None),  # the root has none
        (
            "0::/a/b\n",
            {"cgroup.controllers": "", "a/memory.max": "268435456\n", "a/b/memory.max": "max\n"},
            256 * MIB,
        ),
        (
            "0::/a/b\n",
            {"cgroup.controllers": "", "a/memory.max": "99\n", "a/b/memory.max": "77\n"},
            77,
        ),
        ("5:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "536870912\n"}, 512 * MIB),
        (
            "5:cpu,memory:/pod/x\n",
            {
                "memory/pod/x/memory.limit_in_bytes": "1000\n",
                "memory/memory.limit_in_bytes": "2000\n",
            },
            1000,
        ),
        # The path of the host, in a container that sees its own group at the root of the mount.
        (
            "5:memory:/kubepods/pod7/c1\n",
            {"memory/memory.limit_in_bytes": "536870912\n"},
            512 * MIB,
        ),
        ("0::/../../pod7/c1\n", {"cgroup.controllers": "", "memory.max": "536870912\n"}, 512 * MIB),
        (
            "5:memory:/\n",
            {"memory/memory.limit_in_bytes": "9223372036854771712\n"},
            None,
        ),  # cgroup v1 has no value for "no limit"
        ("3:cpu:/\n", {"cpu/memory.limit_in_bytes": "5\n"}, None),
        ("", {}, None),
    ],
)
def test_the_limit_is_the_lowest_of_the_control_groups(
    tmp_path: Path, proc: str, files: dict[str, str], limit: int | None
) -> None:
    write(tmp_path / "proc", proc)
    for name, text in files.items():
        write(tmp_path / "sys" / name, text)
    assert limit_of_container(tmp_path / "proc", tmp_path / "sys") == limit


def test_no_control_groups_are_no_limit(tmp_path: Path) -> None:
    assert limit_of_container(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    ("workers", "limit", "budget"),
    [
        (1, 512 * MIB, (512 - 88) * MIB * 4 // 5),
        (1, 256 * MIB, (256 - 88) * MIB * 4 // 5),
        (4, 1024 * MIB, (1024 - 56 - 4 * 88) * MIB // 4 * 4 // 5),
        (1, 64 * MIB, 16 * MIB),  # too small for the proxy itself
        (1, None, UNLIMITED),
    ],
)
def test_the_budget_is_the_rest_of_the_limit_for_each_worker(
    workers: int, limit: int | None, budget: int
) -> None:
    assert budget_of(Config(workers=workers), limit) == budget


def test_a_budget_that_is_set_counts(tmp_path: Path) -> None:
    assert budget_of(Config(workers=2, memory=MemoryConfig(budget=20 * MIB)), 2**40) == 20 * MIB


TRIM = """
import os
from proxy.process.memory import resident, trim
start = resident()
blocks = [os.urandom(16384) for _ in range(8000)]
kept = blocks[::50] + [os.urandom(300) for _ in range(1000)]
high = resident()
del blocks
freed = trim()
print(start >> 20, high >> 20, resident() >> 20, freed)
"""


@pytest.mark.real
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_goes_back_to_the_system_with_living_objects_in_between() -> None:
    start, high, after, freed = subprocess.run(
        [sys.executable, "-c", TRIM], check=True, capture_output=True, text=True
    ).stdout.split()
    assert int(high) - int(start) > 100
    if freed == "True":
        assert int(after) - int(start) < 25


def scopes() -> int:
    gc.collect()
    return sum(type(each) is trio.CancelScope for each in gc.get_objects())


async def test_scopes_that_have_ended_are_forgotten_before_their_deadlines() -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(trio.sleep, 3600)
        await trio.testing.wait_all_tasks_blocked()
        before = scopes()
        for _ in range(300):
            with trio.CancelScope(deadline=trio.current_time() + 3600):  # noqa: ASYNC100  # only its deadline is wanted
                pass
        await trio.lowlevel.checkpoint()
        assert scopes() >= before + 300  # trio keeps them
        forget_ended_scopes()
        await trio.lowlevel.checkpoint()
        assert scopes() <= before + 5
        nursery.cancel_scope.cancel()


class Watched:
    """A MemoryWatch, and how often it has returned memory."""

    def __init__(self, limit: int | None = None) -> None:
        self.metrics = Metrics()
        self.watch = MemoryWatch(Config(), limit, StreamLimit(), self.metrics)

    @property
    def trims(self) -> float:
        lines = self.metrics.render().decode().splitlines()
        return next(
            (
                float(line.split()[1])
                for line in lines
                if line.startswith("isthmus_memory_trims_total ")
            ),
            0.0,
        )

    async def looks(self, seconds: int, clock: trio.testing.MockClock) -> float:
        """Check once a second; returns how often memory was returned in that time."""
        before = self.trims
        for _ in range(seconds):
            await self.watch.check()
            clock.jump(1)
        return self.trims - before


async def test_memory_is_given_back_until_that_does_not_help(
    mock_clock: trio.testing.MockClock,
) -> None:
    watched = Watched()
    assert await watched.looks(20, mock_clock) == 0
    start = resident()
    share = watched.watch.budget.share(64 * MIB)
    kept = [bytes(16384) for _ in range(8000)]  # 125 MiB, of which the budget knows half
    assert await watched.looks(4, mock_clock) == 0
    share.close()
    assert await watched.looks(6, mock_clock) >= 1
    # It is still large. That is checked seldom, and at growing intervals.
    assert 3 <= await watched.looks(100, mock_clock) <= 5
    assert await watched.looks(600, mock_clock) <= 4
    # Memory that is freed later is returned although nothing was buffered for it.
    del kept
    await watched.looks(400, mock_clock)
    assert resident() < start + 24 * MIB


async def test_memory_is_given_back_at_once_after_it_did_not_help_for_long(
    mock_clock: trio.testing.MockClock,
) -> None:
    watched = Watched()
    kept = [bytes(16384) for _ in range(4000)]
    await watched.looks(1000, mock_clock)
    share = watched.watch.budget.share(64 * MIB)
    await watched.looks(6, mock_clock)
    before = watched.trims
    share.close()
    await watched.looks(6, mock_clock)
    assert watched.trims > before
    assert kept


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """The full collections of the garbage collector so far."""
    found: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            found.append(phase)

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


async def test_a_full_collection_waits_until_few_connections_are_open(
    mock_clock: trio.testing.MockClock, collections: list[str]
) -> None:
    watched = Watched()
    await watched.looks(6, mock_clock)
    shares = [watched.watch.budget.share(MIB) for _ in range(300)]
    await watched.looks(6, mock_clock)
    for share in shares[:30]:
        share.close()
    del collections[:]
    assert await watched.looks(20, mock_clock) >= 1  # the free pages go back at once
    assert not collections
    for share in shares[30:60]:
        share.close()
    await watched.looks(6, mock_clock)
    assert len(collections) == 1
    for share in shares[60:]:
        share.close()


@pytest.mark.parametrize(
    ("limit", "most"),
    [(None, 0), (1 << 40, 0), (resident(), 3)],
    ids=["no limit", "a far limit", "a near limit"],  # the same in each process of pytest-xdist
)
async def test_while_many_connections_are_open_a_full_collection_comes_only_near_the_limit(
    mock_clock: trio.testing.MockClock,
    collections: list[str],
    limit: int | None,
    most: int,
) -> None:
    trim()  # what earlier tests have freed would be used again, and the process would not grow
    watched = Watched(limit)
    await watched.looks(6, mock_clock)
    shares = [watched.watch.budget.share() for _ in range(300)]
    kept = [b"x" * 16384 for _ in range(4000)]
    del collections[:]
    await watched.looks(900, mock_clock)
    assert min(most, 1) <= len(collections) <= most  # at most every five minutes
    for share in shares:
        share.close()
    assert kept
