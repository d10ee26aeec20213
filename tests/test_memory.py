"""How large the memory budget is by the limit of the container, and that freed memory goes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proxy.config import Config
from proxy.memory import budget_of, limit_of_container
from proxy.net.memory import UNLIMITED
from proxy.sections import MemoryConfig

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
        ("0::/a/b\n", {"cgroup.controllers": "", "a/memory.max": "268435456\n", "a/b/memory.max": "max\n"}, 256 * MIB),
        ("0::/a/b\n", {"cgroup.controllers": "", "a/memory.max": "99\n", "a/b/memory.max": "77\n"}, 77),
        ("5:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "536870912\n"}, 512 * MIB),
        ("5:cpu,memory:/pod/x\n", {"memory/pod/x/memory.limit_in_bytes": "1000\n", "memory/memory.limit_in_bytes": "2000\n"}, 1000),
        # The path of the host, in a container that sees its own group at the root of the mount.
        ("5:memory:/kubepods/pod7/c1\n", {"memory/memory.limit_in_bytes": "536870912\n"}, 512 * MIB),
        ("0::/../../pod7/c1\n", {"cgroup.controllers": "", "memory.max": "536870912\n"}, 512 * MIB),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),  # cgroup v1 has no word for "no limit"
        ("3:cpu:/\n", {"cpu/memory.limit_in_bytes": "5\n"}, None),
        ("", {}, None),
    ],
)
def test_the_limit_is_the_lowest_of_the_control_groups(tmp_path: Path, proc: str, files: dict[str, str], limit: int | None) -> None:
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
def test_the_budget_is_what_is_left_of_the_limit_for_each_worker(workers: int, limit: int | None, budget: int) -> None:
    assert budget_of(Config(workers=workers), limit) == budget


def test_a_budget_that_is_set_counts(tmp_path: Path) -> None:
    assert budget_of(Config(workers=2, memory=MemoryConfig(budget=20 * MIB)), 2**40) == 20 * MIB


TRIM = """
import os
from proxy.memory import resident, trim
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
    start, high, after, freed = subprocess.run([sys.executable, "-c", TRIM], check=True, capture_output=True, text=True).stdout.split()
    assert int(high) - int(start) > 100
    if freed == "True":
        assert int(after) - int(start) < 25
