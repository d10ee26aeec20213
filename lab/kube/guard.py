"""A run of the test cluster: one directory, one sandbox, and a process that removes what a sandbox
leaves.

Everything runs in the sandbox (lab/sandbox.py), so the kernel removes processes, mounts, network
namespaces, interfaces and packet filters, however the run ends. Two things do not belong to a
namespace: cgroups, and files on the disk. A separate small process, the janitor, waits until the
sandbox is gone, by a pipe that only the sandbox holds, and removes both. If the janitor was killed
too, the next run does it (`sweep`).
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab import sandbox
from lab.kube import cgroups
from lab.kube.places import CHECKOUT, cache
from lab.process import LabError

ENV_RUN = "ISTHMUS_KUBE_RUN"  # the directory of the run
PATIENCE = 60.0  # seconds that the processes of a run may take to end
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def runs() -> Path:
    """The directories of all runs."""
    return cache() / "runs"


def directory() -> Path:
    """The directory of this run. Raises LabError outside of one."""
    place = os.environ.get(ENV_RUN)
    if not place or not sandbox.inside():
        raise LabError(
            "a test cluster is started within a run only: python -m lab.kube run -- COMMAND"
        )
    return Path(place)


def run(command: Sequence[str]) -> int:
    """Run a command in a sandbox in which clusters can be started; its exit code. Raises LabError,
    SandboxError."""
    if os.geteuid() != 0:
        raise LabError("a Kubernetes node needs root: run this as root")
    sweep()
    with _claimed() as (place, lock):
        os.environ[ENV_RUN] = str(place)
        watch_end, release_end = os.pipe()
        reader, done = os.pipe()
        janitor = [sys.executable, "-m", "lab.kube.guard", place.name, str(watch_end), str(lock)]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        # No output: a program that reads ours would otherwise wait for the janitor too.
        with subprocess.Popen(
            janitor,
            pass_fds=(watch_end, lock, done),
            start_new_session=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            for fd in (watch_end, done):
                os.close(fd)
            try:
                return sandbox.run(command)
            finally:
                os.close(release_end)
                os.read(reader, 1)  # until the janitor has ended
                os.close(reader)
                process.wait()
                if place.exists():
                    print(
                        f"isthmus lab: the run's directory is still there: {place}", file=sys.stderr
                    )


@contextlib.contextmanager
def _claimed() -> Iterator[tuple[Path, int]]:
    """A new directory, with a lock that lasts as long as a process of the run."""
    runs().mkdir(parents=True, exist_ok=True)
    with (runs() / ".lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # no `sweep` looks between these lines
        place = runs() / secrets.token_hex(4)
        place.mkdir(mode=0o755)
        lock = os.open(place, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield place, lock
    finally:
        os.close(lock)


def sweep() -> list[str]:
    """Remove what runs have left whose processes and janitor were all killed; their names. Raises
    LabError."""
    runs().mkdir(parents=True, exist_ok=True)
    swept = []
    with (runs() / ".lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        for place in runs().iterdir():
            if not place.is_dir():
                continue
            lock = os.open(place, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clean(place.name)
                swept.append(place.name)
            except BlockingIOError:
                continue  # it runs
            finally:
                os.close(lock)
    return swept


def clean(run: str) -> None:
    """Remove the cgroups and the directory of a run whose processes have ended or are about to.
    Raises LabError."""
    if not cgroups.remove(run, PATIENCE):
        raise LabError(f"the cgroup {cgroups.name(run)} still has processes after {PATIENCE:g} s")
    place = runs() / run
    end = time.monotonic() + PATIENCE
    while place.exists():  # a mount of the sandbox may take a moment to go
        shutil.rmtree(place, ignore_errors=True)
        if place.exists():
            if time.monotonic() > end:
                raise LabError(f"{place} cannot be removed")
            time.sleep(0.1)


def main() -> None:
    """The janitor: `guard RUN FD LOCK`."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    run, watch_end = sys.argv[1], int(sys.argv[2])
    os.read(watch_end, 1)  # returns when no process holds the other end any more
    clean(run)


if __name__ == "__main__":
    main()
