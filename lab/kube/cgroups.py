"""The part of each cgroup hierarchy that a run of the test cluster has: made for a node, and
removed when its processes have ended.

With cgroups of version 1 there is one hierarchy for each controller below /sys/fs/cgroup; with
version 2 it is /sys/fs/cgroup itself.
"""

import contextlib
import os
import time
from pathlib import Path

from lab.process import LabError

ROOT = Path("/sys/fs/cgroup")
_PREFIX = "isthmus-kube-"


def name(run: str) -> str:
    """The cgroup of a run, below the root of each hierarchy."""
    return _PREFIX + run


def unified() -> bool:
    """Whether the controllers are in one hierarchy (version 2)."""
    return (ROOT / "cgroup.controllers").exists()


def hierarchies() -> list[Path]:
    """The roots of all hierarchies."""
    if unified():
        return [ROOT]
    return sorted(
        path
        for path in ROOT.iterdir()
        if not path.is_symlink() and (path / "cgroup.procs").exists()
    )


def make(run: str, node: str) -> str:
    """The cgroup of a node, with `system` in it for the node's own programs; its path from the
    root. Raises LabError."""
    path = f"{name(run)}/{node}"
    try:
        for root in hierarchies():
            folder = root
            for part in (*path.split("/"), "system"):
                if unified():
                    controllers = (folder / "cgroup.controllers").read_text().split()
                    (folder / "cgroup.subtree_control").write_text(
                        " ".join(f"+{one}" for one in controllers)
                    )
                folder /= part
                folder.mkdir(exist_ok=True)
                _inherit_cpuset(folder)
    except OSError as error:
        raise LabError(
            f"a cgroup for the node cannot be made ({error}): this needs root, and a root"
            " cgroup that may have others below it"
        ) from error
    return "/" + path


def _inherit_cpuset(folder: Path) -> None:
    """A new cpuset of version 1 is empty, and nothing can be moved into it."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        own, parent = folder / file, folder.parent / file
        if not unified() and own.exists() and not own.read_text().strip():
            own.write_text(parent.read_text())


def join(path: str, pid: int) -> None:
    """Move a process to the `system` part of a node's cgroup."""
    for root in hierarchies():
        (root / path.strip("/") / "system" / "cgroup.procs").write_text(str(pid))


def remove(run: str, patience: float) -> bool:
    """Remove the cgroups of a run; waits up to `patience` seconds for processes that are about to
    end. Whether nothing is left."""
    end = time.monotonic() + patience
    while True:
        left = [root / name(run) for root in hierarchies() if not _removed(root / name(run))]
        if not left or time.monotonic() > end:
            return not left
        time.sleep(0.05)


def _removed(folder: Path) -> bool:
    if not folder.exists():
        return True
    for inner, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            Path(inner).rmdir()
    return not folder.exists()
