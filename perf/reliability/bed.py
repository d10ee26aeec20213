"""The test bed: a cluster with the sidecar under attack, the pods that attack it, a member that goes on with its work, and a prober.

On a real network the attackers are other machines, and their load does not slow the member down. Here they share the machine with it.
So the sidecar under attack has one core for itself, where there are two or more, and goes before what else the machine may do there.
What makes the member's requests and answers them, and the prober, have real-time priority: they go first on the other cores. A nice
value would not do. With the kernel's autogroups (sched(7)) it counts within one session only, and each program of the laboratory has a
session of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from lab.cgroup import MemoryCgroup, memory_cgroup
from lab.cluster import Lab
from lab.load import Load, Summary
from lab.mesh import Mesh, Service
from lab.pod import APP, OPERATOR, PACKAGES, Pod
from lab.process import LabError, Process
from lab.sidecar import ADMIN_PORT, Sidecar

MIB = 2**20
LIMIT = 256 * MIB  # memory of the sidecar under attack
# A protected port; a port that is open to all and behind which nothing is read; an open port that answers.
WEB, STALL, OPEN = 8080, 8081, 8082
CROWD = 4  # pods that attack, so that a limit by source address is not the only defence
CLIENTS = 3  # of the member
# Priorities among what runs in real time.
MEMBER_PRIORITY, PROBER_PRIORITY = 1, 2


@dataclass(frozen=True, slots=True)
class Attack:
    """One kind of attacker: so many connections in all, with so many streams on each, to one port."""

    kind: str
    port: int
    connections: int
    streams: int = 1


@dataclass(slots=True)
class Bed:
    """A running test bed."""

    web: Pod
    shop: Pod
    kubelet: Pod
    crowd: list[Pod]
    service: Service
    near: Sidecar  # of the member
    victim: Sidecar
    cgroup: MemoryCgroup

    def resident(self) -> int:
        """Resident memory of the sidecar under attack, in bytes."""
        return resident(self.victim.running().pid)

    def load(self) -> Load:
        """The member's requests to the service, through both sidecars."""
        return Load(self.web, self.service.ipv4, WEB, clients=CLIENTS)

    async def attack(self, attack: Attack, seconds: float) -> Counter[str]:
        """Attack from all pods of the crowd for so many seconds; what they did."""
        counts: Counter[str] = Counter()
        numbers = [str(max(1, attack.connections // len(self.crowd))), str(attack.streams)]

        async def run(pod: Pod) -> None:
            counts.update(await _attacker(pod, attack.kind, self.shop.ipv4, attack.port, seconds, *numbers))

        async with trio.open_nursery() as nursery:
            for pod in self.crowd:
                nursery.start_soon(run, pod)
        return counts

    async def probe(self, seconds: float) -> dict[str, int]:
        """Ask /live and /ready of the sidecar under attack for so many seconds; see attacker.probe."""
        return await _attacker(self.kubelet, "probe", self.shop.ipv4, ADMIN_PORT, seconds)


async def _attacker(pod: Pod, kind: str, host: str, port: int, seconds: float, *numbers: str) -> dict[str, int]:
    """Run the program `attacker` in a pod; what it says it did. Raises LabError."""
    first, user = (["chrt", "--rr", str(PROBER_PRIORITY)], OPERATOR) if kind == "probe" else ([], APP)
    program = [sys.executable, "-m", "perf.reliability.attacker", kind, host, str(port), f"{seconds:g}", *numbers]
    done = await pod.run([*first, *program], env=PACKAGES, timeout=seconds + 60, user=user)
    if not done.ok:
        raise LabError(f"the attacker {kind} failed: {done.stderr.decode(errors='replace')[-400:]}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Watched:
    """What was seen while something went on. Memory in bytes, times in seconds."""

    member: Summary
    slowest: float  # of the member's requests
    outcomes: dict[str, int]  # of the member's requests that were not answered by 200
    probes: dict[str, int]
    before: int  # resident memory
    most: int
    after: int = 0  # once the attackers have left
    attackers: Counter[str] | None = None


async def watch(bed: Bed, attacks: list[Attack], seconds: float) -> Watched:
    """Attack for so many seconds while the member works and the prober asks; what was seen."""
    seen: dict[str, Any] = {"most": bed.resident()}
    before = bed.resident()
    counts: Counter[str] = Counter()
    async with bed.load() as load:
        since = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, bed, seen)
            async with trio.open_nursery() as attackers:

                async def attack(each: Attack) -> None:
                    counts.update({f"{each.kind} {name}": number for name, number in (await bed.attack(each, seconds)).items()})

                async def probe() -> None:
                    seen["probes"] = await bed.probe(seconds)

                attackers.start_soon(probe)
                for each in attacks:
                    attackers.start_soon(attack, each)
            nursery.cancel_scope.cancel()
        summary = load.summary(since)
        slowest = max((sample.seconds for sample in load.samples if sample.when >= since), default=0.0)
    return Watched(summary, slowest, load.bad, seen["probes"], before, seen["most"], attackers=counts)


async def _follow(bed: Bed, seen: dict[str, Any]) -> None:
    while True:
        seen["most"] = max(seen["most"], bed.resident())
        await trio.sleep(0.1)


@asynccontextmanager
async def bed() -> AsyncIterator[Bed]:
    """A test bed for the time of the block. Raises LabError where a memory cgroup or a sandbox cannot be made."""
    with memory_cgroup("isthmus-soak", LIMIT) as cgroup, _first_on(_cores()) as own:
        async with Lab() as lab:
            cluster = lab.cluster("soak")
            mesh = Mesh(cluster)
            web, shop, kubelet = (cluster.pod(name) for name in ("web", "shop", "kubelet"))
            crowd = [cluster.pod(f"crowd{number}") for number in range(CROWD)]
            near = mesh.join(web, log={"access": False})
            rules = {"require_identity": [WEB], "opaque_ports": [], "hello_timeout": "500ms"}
            victim = mesh.join(shop, inbound=rules, log={"access": False}, admin={"metrics_max_age": "1s"})
            service = mesh.service("shop", [shop], {WEB: "http1"})
            _go_first((await _app(shop, "web", "::", str(WEB))).pid)
            await _app(shop, "web", "::", str(OPEN))
            await _app(shop, "stall", str(STALL))
            for sidecar in (near, victim):
                sidecar.write_files(mesh.document())
            await near.start()
            _go_first(near.running().pid)
            await victim.start(ready=False)
            cgroup.add(victim.running().pid)
            _keep(victim.running().pid, own)
            await victim.wait_ready()
            yield Bed(web, shop, kubelet, crowd, service, near, victim, cgroup)


async def _app(pod: Pod, name: str, *arguments: str) -> Process:
    """Start one of the laboratory's servers; its port is the last argument."""
    port = int(arguments[-1])
    return await pod.start(f"{name}-{port}", [sys.executable, "-m", f"lab.apps.{name}", *arguments], port=port, env=PACKAGES)


def _cores() -> tuple[set[int], set[int]]:
    """The core of the sidecar under attack, and those of all others: the same if there is one only."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[0]}, set(cores[1:] or cores)


@contextmanager
def _first_on(cores: tuple[set[int], set[int]]) -> Iterator[set[int]]:
    """Have this process, which is the member's client, go first on the cores of the others; gives the core that is left. Programs that are
    started meanwhile run on the same cores, at an ordinary priority. Raises LabError."""
    own, others = cores
    try:
        os.sched_setaffinity(0, others)
        _go_first(0)
        yield own
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, own | others)


def _keep(pid: int, cores: set[int]) -> None:
    """Have a process, which leads a session, run on these cores, before all others there that have no real-time priority."""
    os.sched_setaffinity(pid, cores)
    with suppress(FileNotFoundError):  # a kernel without autogroups
        Path(f"/proc/{pid}/autogroup").write_text("-20")


def _go_first(pid: int) -> None:
    """Give a process real-time priority, but not what it starts. Raises LabError."""
    try:
        os.sched_setscheduler(pid, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(MEMBER_PRIORITY))
    except PermissionError as error:
        raise LabError(f"the member cannot have real-time priority here ({error}): run this as root") from error
