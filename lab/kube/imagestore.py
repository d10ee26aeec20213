"""The directory of containerd with all images unpacked: made once for an archive, and given to each
node as a copy of hard links.

Unpacking takes most of the time of a node's start. What is unpacked never changes: containers write
to layers of their own. Only databases are copied.
"""

import os
import shutil
import subprocess
from pathlib import Path

from lab.kube.layers import prune
from lab.process import LabError

# A containerd of its own, with nothing but images; it ends with the script.
_SCRIPT = """set -eu
mount -t tmpfs tmpfs /run
containerd --root "$1" --state /run/state --address /run/containerd.sock --log-level warn &
daemon=$!
until ctr --address /run/containerd.sock version >/dev/null 2>&1; do sleep 0.1; kill -0 $daemon; done
ctr --address /run/containerd.sock --namespace k8s.io images import "$2"
kill $daemon
wait $daemon || true
"""


def unpacked(archive: Path) -> Path:
    """The directory for an archive, in the directory that the archive is in. Raises LabError."""
    final = archive.with_suffix(".store")
    if not final.exists():
        print("  unpack the images", flush=True)
        work = archive.with_suffix(".new")
        shutil.rmtree(work, ignore_errors=True)
        namespaces = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
            "--mount-proc",
        ]
        command = [*namespaces, "sh", "-c", _SCRIPT, "unpack", str(work), str(archive)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise LabError(
                f"containerd cannot unpack {archive}: {(done.stdout + done.stderr).strip()[-2000:]}"
            )
        work.rename(final)
    os.utime(final)
    prune(archive.parent)
    return final


def copy(store: Path, target: Path) -> None:
    """Give a node its own directory: `target`, which does not exist yet, on the same file system.
    Raises LabError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["cp", "-al", str(store), str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise LabError(f"{store} cannot be linked to {target}: {done.stderr.strip()[-2000:]}")
    for database in target.glob("*/*.db"):
        part = database.with_suffix(".part")
        shutil.copy2(database, part)
        part.rename(database)
