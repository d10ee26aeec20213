"""The command: python -m lab.kube build | run | enter."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import trio

from lab import sandbox
from lab.kube import cluster, guard
from lab.kube.catalogue import images
from lab.kube.dockerfile import DockerfileError
from lab.kube.places import CHECKOUT, ENV_VERSION, chosen
from lab.kube.programs import programs
from lab.process import LabError


def build() -> dict[str, str]:
    """Build what has changed; the environment by which a run finds it. The images are built while
    the programs are: steps of images mostly use one core, and wait for the network."""
    version, began = chosen(), time.monotonic()
    with ThreadPoolExecutor(1) as other:
        building = other.submit(programs, version)
        store = images(building.result)
        found = building.result()
    print(
        f"isthmus lab: programs and images are ready ({time.monotonic() - began:.0f} s)", flush=True
    )
    path = f"{found}:{os.environ['PATH']}"
    return {
        cluster.ENV_PROGRAMS: str(found),
        cluster.ENV_IMAGES: str(store),
        "PATH": path,
        ENV_VERSION: version,
    }


def run(command: Sequence[str], names: Sequence[str], logs: Path) -> int:
    """Run a command that can start clusters; with clusters of these names that run already."""
    os.environ.update(build())
    os.environ[cluster.ENV_LOGS] = str(logs.resolve())
    if names:
        inside = [
            sys.executable,
            "-m",
            "lab.kube",
            "inside",
            "--clusters",
            ",".join(names),
            "--",
            *command,
        ]
        return guard.run(inside)
    return guard.run(command)


def inside(command: Sequence[str], names: Sequence[str]) -> int:
    """The second half of `run`, in the sandbox: start the clusters, run the command, end them."""

    async def main() -> int:
        clusters = await cluster.start_all(names)
        first = clusters[names[0]]
        environment = {**os.environ, **first.environment(), cluster.ENV_RUNNING: ",".join(names)}
        try:
            # The command has the terminal: no other group of processes, and no pipes.
            return await trio.to_thread.run_sync(lambda: subprocess.call(command, env=environment))
        finally:
            for one in clusters.values():
                await one.aclose()

    return trio.run(main)


def enter(name: str, command: Sequence[str]) -> int:
    """Run a command on a node, in the terminal."""
    running = cluster.attach(name)
    return subprocess.run(
        [*running.prefix(), *(command or ["bash"])],
        env={**os.environ, **cluster.ON_THE_NODE},
        check=False,
    ).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.kube", description="Real Kubernetes clusters for tests."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build", help="build programs and images, where something has changed")
    # `inside` is the second half of `run`, and is not called by hand.
    for one in (
        verbs.add_parser("run", help="run a command that can start clusters"),
        verbs.add_parser("inside"),
    ):
        one.add_argument(
            "--clusters",
            default="",
            help="clusters that run already, with commas between: west,east",
        )
        one.add_argument(
            "--logs",
            type=Path,
            default=CHECKOUT / "build" / "kube",
            help="where the logs of nodes go (build/kube)",
        )
        one.add_argument("command", nargs=argparse.REMAINDER)
    one = verbs.add_parser("enter", help="run a command on a node, within a run")
    one.add_argument("name")
    one.add_argument("command", nargs=argparse.REMAINDER)
    found = parser.parse_args(arguments)
    try:
        if found.verb == "build":
            build()
            return 0
        command = found.command[1:] if found.command[:1] == ["--"] else found.command
        if found.verb == "enter":
            return enter(found.name, command)
        names = [name for name in found.clusters.split(",") if name]
        return run(command, names, found.logs) if found.verb == "run" else inside(command, names)
    except (LabError, DockerfileError, sandbox.SandboxError) as error:
        print(f"isthmus lab: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
