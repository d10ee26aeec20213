"""A memory cgroup bounds what a process may use, counts the processes that the kernel has killed
for it, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lab.cgroup import memory_cgroup

MIB = 2**20
TAKES = (
    "import sys; sys.stdin.readline(); data = bytearray(int(sys.argv[1])); print(len(data),"
    " flush=True)"
)

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="cgroups are made by root"),
]


def take(size: int, limit: int) -> tuple[int, int, int]:
    """A process in a cgroup takes `size` bytes: its return code, the kernel's kills, and the peak
    in bytes."""
    with memory_cgroup("isthmus-test", limit) as cgroup:
        with subprocess.Popen(
            [sys.executable, "-c", TAKES, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            cgroup.add(process.pid)
            process.communicate(b"\n", timeout=60)
        found = process.returncode, cgroup.kills(), cgroup.peak()
        folder = cgroup.folder
    assert not folder.exists()
    return found


def test_a_process_within_its_limit_keeps_running() -> None:
    code, kills, peak = take(32 * MIB, 128 * MIB)
    assert (code, kills) == (0, 0)
    assert 32 * MIB <= peak <= 128 * MIB


def test_a_process_above_its_limit_is_killed_and_counted() -> None:
    code, kills, peak = take(256 * MIB, 64 * MIB)
    assert code == -9
    assert kills >= 1
    assert peak <= 64 * MIB
