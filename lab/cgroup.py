"""Memory cgroups: a memory limit for some processes, like that of a container.

Works with cgroup v1 (a mounted `memory` controller) and v2 (if the root cgroup delegates `memory`).
Needs root.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.process import LabError

_ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """One memory cgroup. `folder` is its directory; `limit` in bytes."""

    def __init__(self, folder: Path, limit: int, *, unified: bool) -> None:
        self.folder = folder
        self.limit = limit
        self._unified = unified

    def add(self, pid: int) -> None:
        """Move a process into the cgroup. Only its later allocations count."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def peak(self) -> int:
        """The highest memory use, in bytes."""
        return int(
            (
                self.folder / ("memory.peak" if self._unified else "memory.max_usage_in_bytes")
            ).read_text()
        )

    def kills(self) -> int:
        """How many processes the kernel killed because of the limit."""
        file = self.folder / ("memory.events" if self._unified else "memory.oom_control")
        values = dict(line.split() for line in file.read_text().splitlines())
        return int(values.get("oom_kill", 0))


@contextmanager
def memory_cgroup(name: str, limit: int) -> Iterator[MemoryCgroup]:
    """A memory cgroup with a limit in bytes; removed after the block, when its processes have
    ended. Raises LabError.
    """
    unified = (_ROOT / "cgroup.controllers").exists()
    folder = (_ROOT if unified else _ROOT / "memory") / f"{name}-{os.urandom(4).hex()}"
    try:
        folder.mkdir()
        if unified:
            (folder / "memory.max").write_text(str(limit))
            with contextlib.suppress(OSError):  # a kernel without swap accounting has no such file
                (folder / "memory.swap.max").write_text("0")
        else:
            (folder / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise LabError(
            f"a memory cgroup cannot be created here ({error}): run as root, with the memory"
            " controller delegated"
        ) from error
    try:
        yield MemoryCgroup(folder, limit, unified=unified)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
