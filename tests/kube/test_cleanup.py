"""A run leaves nothing behind: no process, mount, interface, packet filter, cgroup, file or
setting, however it ends.

Each case starts a separate run with one cluster, which has the pod of its DNS. The test looks from
outside of that run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.kube import cgroups, guard
from lab.kube.node import WANTED
from lab.kube.places import CHECKOUT

pytestmark = pytest.mark.own_cluster
START = 300.0  # seconds, for a run with a cluster on a busy machine
END = guard.PATIENCE + 30


@dataclass(frozen=True)
class Machine:
    """What a run could change of the machine, except for what has the run's name."""

    settings: dict[str, str]
    links: str
    filters: str
    namespaces: str
    mounts: str

    @classmethod
    def now(cls) -> Machine:
        settings = {
            name: Path("/proc/sys", name).read_text()
            for name in WANTED
            if Path("/proc/sys", name).exists()
        }
        shown = (
            output("ip", "-oneline", "link"),
            output("nft", "list", "ruleset"),
            output("ip", "netns"),
        )
        return cls(settings, *shown, Path("/proc/self/mounts").read_text())


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def processes(run: str) -> list[str]:
    """The processes of a run: by their cgroup, or by the run's directory in their command line or
    environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                texts = [(folder / name).read_bytes() for name in ("cmdline", "environ", "cgroup")]
            except OSError:
                continue
            if any(run.encode() in text for text in texts):
                found.append(f"{folder.name} {texts[0].decode(errors='replace')}")
    return found


def remains(run: str) -> list[str]:
    """Everything that has the name of the run: processes, cgroups, files."""
    folders = [root / cgroups.name(run) for root in cgroups.hierarchies()]
    return [
        *processes(run),
        *(str(path) for path in (*folders, guard.runs() / run) if path.exists()),
    ]


def until(what: str, seconds: float, condition: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not so after {seconds:g} s"
        time.sleep(0.1)


@dataclass
class Run:
    outer: subprocess.Popen[str]
    name: str

    @property
    def janitor(self) -> int:
        (found,) = [
            int(line.split()[0]) for line in processes(self.name) if "lab.kube.guard" in line
        ]
        return found


@contextmanager
def running(tmp_path: Path, script: str) -> Iterator[Run]:
    """A run with a cluster, whose command prints the run's directory when the cluster is ready, and
    then runs a script."""
    command = [
        sys.executable,
        "-m",
        "lab.kube",
        "run",
        "--clusters",
        "west",
        "--logs",
        str(tmp_path),
        "--",
    ]
    shell = f'echo "$ISTHMUS_KUBE_RUN"; {script}'
    # Within the clusters of the other tests, which it does not use.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ISTHMUS_KUBE_") and name != "KUBECONFIG"
    }
    outer = subprocess.Popen(
        [*command, "sh", "-c", shell],
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert outer.stdout is not None
    with outer:
        try:
            lines = iter(outer.stdout.readline, "")
            place = next((line.strip() for line in lines if line.startswith("/")), None)
            assert place is not None, f"the cluster did not start; logs: {tmp_path}"
            yield Run(outer, Path(place).name)
        finally:
            outer.kill()


def test_when_its_command_ends(tmp_path: Path) -> None:
    before = Machine.now()
    with running(tmp_path, "exit 7") as run:
        assert run.outer.wait(START) == 7
        # The command of a run returns when everything is gone.
        assert remains(run.name) == []
        assert Machine.now() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_it_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    before = Machine.now()
    with running(tmp_path, "exec sleep 1000") as run:
        # What must be gone afterwards exists before: a pod's cgroup, and what the node runs.
        assert any("kube-apiserver" in line for line in processes(run.name))
        assert any(
            path.name.startswith("pod")
            for root in cgroups.hierarchies()
            for path in (root / cgroups.name(run.name)).rglob("pod*")
        )
        assert Machine.now() == before
        run.outer.send_signal(number)
        run.outer.wait(END)
        until("nothing is left", END, lambda: not remains(run.name))
        assert Machine.now() == before


def test_when_the_test_run_and_its_janitor_are_killed_the_next_run_removes_it(
    tmp_path: Path,
) -> None:
    before = Machine.now()
    with running(tmp_path, "exec sleep 1000") as run:
        other = run.name
        os.kill(run.janitor, signal.SIGKILL)
        assert other not in guard.sweep()  # it runs
        run.outer.kill()
        run.outer.wait(END)
        until("no process is left", END, lambda: not processes(other))
        assert remains(other) != []
        assert other in guard.sweep()
        assert remains(other) == []
        assert Machine.now() == before
