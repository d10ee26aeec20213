"""The effect of more workers: requests per second through one proxy with 1, 2 and 4 workers, and
the cost per request.

Baseline: one process, a proxy without workers. The proxies run side by side and are loaded in turn,
each round in a different order. The hop is clear text on both sides, so client and server use as
little CPU as possible. But they run on the same cores and take CPU from the workers. So the output
also has the maximum rate that these cores allow: all of their time, divided by the CPU of proxy,
client and server per request. Memory is the processes' proportional share (PSS) after the load; it
counts shared pages once.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from lab.console import print_table
from perf.pair import HOST, await_port, free_port, running, server, wrk

WORKERS = (1, 2, 4)
ROUNDS, SECONDS, CONNECTIONS = 5, 4, 64
_PROPORTIONAL = "Pss:"


@dataclass(frozen=True, slots=True)
class Round:
    rate: float  # requests a second
    proxy: float  # us of CPU time per request
    others: float  # us of CPU time of client and server per request


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(path.read_text("ascii", "replace").rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:  # grows during the loop
        found += parents.get(one, [])
    return found


def cpu(pids: list[int]) -> float:
    """Seconds of CPU time so far."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)  # as Proxy.cpu in perf/pair.py


def memory(pids: list[int]) -> float:
    """Memory in MiB."""
    lines = (
        line
        for pid in pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
    )
    return sum(int(line.split()[1]) for line in lines if line.startswith(_PROPORTIONAL)) / 1024


def loaded(port: int, proxy: list[int], back: list[int]) -> Round:
    before, spent = (cpu(proxy), cpu(back)), resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    count = wrk(port, CONNECTIONS, SECONDS)
    took = time.monotonic() - began
    client = resource.getrusage(resource.RUSAGE_CHILDREN)
    others = (
        cpu(back) - before[1] + client.ru_utime - spent.ru_utime + client.ru_stime - spent.ru_stime
    )
    return Round(count / took, (cpu(proxy) - before[0]) / count * 1e6, others / count * 1e6)


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-perf-")))
        back_port = stack.enter_context(server(folder))
        back = tree(int((folder / "nginx.pid").read_text()))
        proxies = {}
        for workers in WORKERS:
            port = free_port()
            config = {
                "workers": workers,
                "outbound": {
                    "listen": [f"{HOST}:{port}"],
                    "fixed_destination": f"{HOST}:{back_port}",
                },
                "inbound": {"listen": []},
                "admin": {"listen": []},
                "log": {"level": "warning"},
            }
            path, log = folder / f"{workers}.yaml", folder / f"{workers}.log"
            path.write_text(json.dumps(config))
            command = [sys.executable, "-m", "proxy.cli", "run", "--config", str(path)]
            process = stack.enter_context(running(command, log))
            await_port(port, process, log)
            expected = workers + 1 if workers > 1 else 1
            give_up = time.monotonic() + 30
            while len(tree(process.pid)) < expected and time.monotonic() < give_up:
                time.sleep(0.05)
            time.sleep(1)  # until the last worker has bound its port
            proxies[workers] = (port, tree(process.pid))
        for port, pids in proxies.values():
            loaded(port, pids, back)
        found: dict[int, list[Round]] = {workers: [] for workers in WORKERS}
        for number in range(ROUNDS):
            order = list(proxies.items())
            for workers, (port, pids) in (
                order[number % len(order) :] + order[: number % len(order)]
            ):
                found[workers].append(loaded(port, pids, back))
        print(
            f"{cores} cores for all; {CONNECTIONS} connections, {ROUNDS} rounds of {SECONDS} s,"
            " median (lowest - highest)"
        )
        base = statistics.median(one.rate for one in found[1])
        rows = []
        for workers, rounds in found.items():
            rates = sorted(one.rate for one in rounds)
            proxy, others = (
                statistics.median(values)
                for values in zip(*((one.proxy, one.others) for one in rounds), strict=True)
            )
            most = cores * 1e6 / (proxy + others)
            rate = statistics.median(rates)
            rows.append(
                [
                    str(workers),
                    f"{rate:.0f}",
                    f"({rates[0]:.0f} - {rates[-1]:.0f})",
                    f"{rate / base:.2f} x",
                    *(f"{value:.0f}" for value in (proxy, others, most)),
                    f"{memory(proxies[workers][1]):.0f}",
                ]
            )
        head = ["workers", "requests/s", "(lowest - highest)", "of one worker"]
        # CPU time for each request; at most: if it were all that limits the rate
        head += ["us of the proxy", "us of the others", "at most/s", "RSS MiB"]
        print_table(head, rows)


if __name__ == "__main__":
    main()
