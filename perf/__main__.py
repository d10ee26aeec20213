"""Compare this proxy with others: all do equal work, in turns, in one run.

    python -m perf [--quick] [--only WORK,...] [--peers NAME,...] [--rounds N] [--seconds S]

Everything, including load generators and servers, is pinned to one core (ISTHMUS_PERF_CPU, by
default the last one), so that no figure depends on the scheduler. So requests per second include
the CPU of all programs. The figure that counts is the CPU time of the proxies. For each work, the
proxies take turns, round after round; the table has the median of the rounds, and the lowest and
highest. The result is written to perf/results as JSON; `python -m perf.report FILE` makes the
tables and plots of docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lab.console import put, wide_console
from perf.loads import BODIES, Work, works
from perf.pair import HOST, Pair, await_port, free_port, make_identities, running, server
from perf.peers import PEERS, Kind, Order, Peer
from perf.tables import show


@dataclass(slots=True)
class Sample:
    """One round of one work through one proxy. CPU in microseconds per unit, for the outbound and
    the inbound process.
    """

    work: str
    peer: str
    outbound: float
    inbound: float
    rate: float  # units per second
    resident_kib: float  # of one process, after the work
    latency: dict[str, float]
    facts: dict[str, float] = field(default_factory=dict)


def sample(work: Work, peer: Peer, pair: Pair, seconds: float) -> Sample:
    before = [proxy.cpu() for proxy in pair.proxies]
    done = work.run(pair, seconds)
    outbound, inbound = [
        (proxy.cpu() - was) / done.units * 1e6
        for proxy, was in zip(pair.proxies, before, strict=True)
    ]
    resident = sum(proxy.resident() for proxy in pair.proxies) / 2 / 1024
    return Sample(
        work.name,
        peer.name,
        outbound,
        inbound,
        done.units / done.seconds,
        resident,
        done.latency,
        done.facts,
    )


@contextmanager
def http2_server(folder: Path) -> Iterator[int]:
    port, log = free_port(), folder / "nghttpd.log"
    command = [
        "nghttpd",
        "--no-tls",
        "--trailer=grpc-status: 0",
        "-d",
        str(folder / "www"),
        "-a",
        HOST,
        str(port),
    ]
    with running(command, log) as process:
        await_port(port, process, log)
        yield port


class Run:
    """All samples of one run."""

    def __init__(self, peers: list[Peer], chosen: list[Work], rounds: int, seconds: float) -> None:
        self.peers = peers
        self.works = chosen
        self.rounds = rounds
        self.seconds = seconds
        self.samples: list[Sample] = []
        self.left_out: list[str] = []
        self._console = wide_console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_interactive,
        )
        self._task = self._progress.add_task("starts", total=0)

    def all(self) -> None:
        with self._progress, tempfile.TemporaryDirectory(prefix="isthmus-perf-") as name:
            folder = Path(name)
            make_identities(folder)
            for path, size in BODIES.items():
                file = folder / "www" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as body:
                    body.truncate(size)
            with server(folder) as http1, http2_server(folder) as http2:
                servers: dict[Kind, int] = {"http1": http1, "tcp": http1, "http2": http2}
                for (kind, resume, fresh), group in groupby(
                    self.works, lambda work: (work.kind, work.resume, work.fresh)
                ):
                    self._group(
                        folder, Order(kind, folder, servers[kind], resume), list(group), fresh
                    )

    def _group(self, folder: Path, order: Order, group: list[Work], fresh: bool) -> None:
        with ExitStack() as stack:
            pairs: dict[Peer, Pair] = {}
            for peer in self.peers:
                if order.kind not in peer.kinds:
                    continue
                if why := peer.missing(order.kind):
                    put(self._console, f"  {peer.name} is left out of {order.kind}: {why}")
                    self.left_out.append(f"{peer.name} ({order.kind}): {why}")
                    continue
                own = Path(
                    stack.enter_context(
                        tempfile.TemporaryDirectory(prefix=f"{peer.name}-", dir=folder)
                    )
                )
                for side in ("client", "server"):
                    (own / side).symlink_to(folder / side)
                pairs[peer] = stack.enter_context(
                    peer.start(Order(order.kind, own, order.server, order.resume))
                )
            rounds = 1 if fresh else self.rounds
            self._expect(len(group) * len(pairs) * rounds)
            for work in group:
                if not fresh:
                    for pair in pairs.values():
                        work.run(pair, 0.5)  # warms up connections, sessions and caches
                for number in range(rounds):
                    for peer, pair in pairs.items():
                        self._progress.update(
                            self._task,
                            description=f"{work.title}: {peer.name}, round {number + 1}",
                        )
                        self.samples.append(sample(work, peer, pair, self.seconds))
                        self._progress.advance(self._task)
                show(self.document(), [work.name], self._console)

    def _expect(self, samples: int) -> None:
        """So many samples follow. Later groups are not known yet: a peer may be missing."""
        total = self._progress.tasks[self._task].total or 0
        self._progress.update(self._task, total=total + samples)

    def document(self) -> dict[str, object]:
        return {
            "machine": machine(),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "left_out": self.left_out,
            "works": [
                {"name": work.name, "title": work.title, "unit": work.unit, "kind": work.kind}
                for work in self.works
            ],
            "samples": [asdict(each) for each in self.samples],
        }


def machine() -> dict[str, str]:
    """The machine and versions that the figures come from."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?"
    )
    optimised = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "python": (
            f"{platform.python_version()}, configured {'with' if optimised else 'without'}"
            " --enable-optimizations"
        ),
        "versions": "; ".join(_version(*command) for command in _VERSIONS),
    }


_VERSIONS = (
    ("envoy", "--version"),
    ("haproxy", "-v"),
    ("nginx", "-v"),
    ("nghttpx", "--version"),
    ("wrk", "-v"),
    ("h2load", "--version"),
)


def _version(name: str, flag: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        done = subprocess.run(
            [name, flag],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
            env={**os.environ, "PATH": path},
        )
    except OSError:
        return f"{name}: none"
    words = [
        word
        for word in (done.stdout + done.stderr).replace("/", " ").split()
        if word[0].isdigit() and "." in word
    ]
    return f"{name} {words[0] if words else '?'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf", description="The same work through this proxy and through others."
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one short round of everything: shows that it runs, not for figures",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="WORK,...",
        help=f"only these: {', '.join(work.name for work in works())}",
    )
    parser.add_argument(
        "--peers",
        default="",
        metavar="NAME,...",
        help=f"only these: {', '.join(peer.name for peer in PEERS)}",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="duration of each load in each round"
    )
    args = parser.parse_args()
    cpu = int(os.environ.get("ISTHMUS_PERF_CPU") or max(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, {cpu})
    chosen = [work for work in works() if not args.only or work.name in args.only.split(",")]
    peers = [peer for peer in PEERS if not args.peers or peer.name in args.peers.split(",")]
    if args.quick:
        args.rounds, args.seconds = 1, 0.5
    run = Run(peers, chosen, args.rounds, args.seconds)
    try:
        run.all()
    except KeyboardInterrupt:
        print("\nended")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    path.write_text(json.dumps(run.document(), indent=1))
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
