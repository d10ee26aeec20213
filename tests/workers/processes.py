"""Processes of a supervisor."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def children(parent: int) -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text("ascii", "replace").rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return sorted(found)
