"""The test bed: a cluster with the attacked sidecar, the attacking pods, a working member, and a
prober.

On a real network the attackers are other machines, so their load does not slow the member down.
Here they share one machine. So with two or more cores, the attacked sidecar has one core for itself
and takes precedence there. The member's client and server, and the prober, have real-time priority
on the other cores. A nice value would not be enough: with the kernel's autogroups (sched(7)) it
counts within one session only, and each program of the lab has its own session.
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
LIMIT = 256 * MIB  # memory limit of the attacked sidecar
# A protected port; an open port whose server does not read; an open port whose server answers.
WEB, STALL, OPEN = 8080, 8081, 8082
ATTACKER_PODS = 4  # attacking pods, so that a limit per source address is not the only defence
CLIENTS = 3  # of the member
# Seconds of the member's requests before an attack. Then the sidecar has loaded what it needs for
# them, such as the code of TLS.
WARM_UP = 3.0
# Real-time priorities.
MEMBER_PRIORITY, PROBER_PRIORITY = 1, 2


@dataclass(frozen=True, slots=True)
class Attack:
    """One kind of attacker: the total number of connections, streams on each, and the port."""

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
    attacker_pods: list[Pod]
    service: Service
    near: Sidecar  # of the member
    victim: Sidecar
    cgroup: MemoryCgroup

    def resident(self) -> int:
        """Resident memory of the attacked sidecar, in bytes."""
        return resident(self.victim.running().pid)

    def load(self) -> Load:
        """The member's requests to the service, through both sidecars."""
        return Load(self.web, self.service.ipv4, WEB, clients=CLIENTS)

    async def attack(self, attack: Attack, seconds: float) -> Counter[str]:
        """Attack from all attacking pods for `seconds`; returns their counts."""
        counts: Counter[str] = Counter()
        numbers = [str(max(1, attack.connections // len(self.attacker_pods))), str(attack.streams)]

        async def run(pod: Pod) -> None:
            counts.update(
                await _attacker(pod, attack.kind, self.shop.ipv4, attack.port, seconds, *numbers)
            )

        async with trio.open_nursery() as nursery:
            for pod in self.attacker_pods:
                nursery.start_soon(run, pod)
        return counts

    async def probe(self, seconds: float) -> dict[str, int]:
        """Ask /live and /ready of the attacked sidecar for `seconds`; see attacker.probe."""
        return await _attacker(self.kubelet, "probe", self.shop.ipv4, ADMIN_PORT, seconds)


async def _attacker(
    pod: Pod, kind: str, host: str, port: int, seconds: float, *numbers: str
) -> dict[str, int]:
    """Run the program `attacker` in a pod; returns its counts. Raises LabError."""
    first, user = (
        (["chrt", "--rr", str(PROBER_PRIORITY)], OPERATOR) if kind == "probe" else ([], APP)
    )
    program = [
        sys.executable,
        "-m",
        "perf.reliability.attacker",
        kind,
        host,
        str(port),
        f"{seconds:g}",
        *numbers,
    ]
    done = await pod.run([*first, *program], env=PACKAGES, timeout=seconds + 60, user=user)
    if not done.ok:
        raise LabError(f"the attacker {kind} failed: {done.stderr.decode(errors='replace')[-400:]}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


@dataclass(slots=True)
class Watched:
    """The observations of one measurement. Memory in bytes, times in seconds."""

    member: Summary
    slowest: float  # of the member's requests
    outcomes: dict[str, int]  # of the member's requests that were not answered with 200
    probes: dict[str, int]
    before: int  # resident memory
    most: int
    after: int = 0  # after the attackers have left
    attackers: Counter[str] | None = None


async def watch(bed: Bed, attacks: list[Attack], seconds: float) -> Watched:
    """Attack for `seconds` while the member works and the prober asks; returns the observations."""
    counts: Counter[str] = Counter()
    async with bed.load() as load:
        await trio.sleep(WARM_UP)
        before = bed.resident()
        seen: dict[str, Any] = {"most": before}
        since = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, bed, seen)
            async with trio.open_nursery() as attackers:

                async def attack(each: Attack) -> None:
                    counts.update(
                        {
                            f"{each.kind} {name}": number
                            for name, number in (await bed.attack(each, seconds)).items()
                        }
                    )

                async def probe() -> None:
                    seen["probes"] = await bed.probe(seconds)

                attackers.start_soon(probe)
                for each in attacks:
                    attackers.start_soon(attack, each)
            nursery.cancel_scope.cancel()
        summary = load.summary(since)
        slowest = max(
            (sample.seconds for sample in load.samples if sample.when >= since), default=0.0
        )
    return Watched(
        summary, slowest, load.bad, seen["probes"], before, seen["most"], attackers=counts
    )


async def _follow(bed: Bed, seen: dict[str, Any]) -> None:
    while True:
        seen["most"] = max(seen["most"], bed.resident())
        await trio.sleep(0.1)


@asynccontextmanager
async def bed() -> AsyncIterator[Bed]:
    """A test bed for the duration of the block. Raises LabError if a memory cgroup or a sandbox
    cannot be created.
    """
    with memory_cgroup("isthmus-soak", LIMIT) as cgroup, _first_on(_cores()) as own:
        async with Lab() as lab:
            cluster = lab.cluster("soak")
            mesh = Mesh(cluster)
            web, shop, kubelet = (cluster.pod(name) for name in ("web", "shop", "kubelet"))
            attacker_pods = [cluster.pod(f"attacker{number}") for number in range(ATTACKER_PODS)]
            near = mesh.join(web, log={"access": False})
            rules = {"require_identity": [WEB], "opaque_ports": [], "hello_timeout": "500ms"}
            victim = mesh.join(
                shop, inbound=rules, log={"access": False}, admin={"metrics_max_age": "1s"}
            )
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
            yield Bed(web, shop, kubelet, attacker_pods, service, near, victim, cgroup)


async def _app(pod: Pod, name: str, *arguments: str) -> Process:
    """Start one of the lab's servers; its port is the last argument."""
    port = int(arguments[-1])
    return await pod.start(
        f"{name}-{port}",
        [sys.executable, "-m", f"lab.apps.{name}", *arguments],
        port=port,
        env=PACKAGES,
    )


def _cores() -> tuple[set[int], set[int]]:
    """The core of the attacked sidecar, and the other cores; the same if there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[0]}, set(cores[1:] or cores)


@contextmanager
def _first_on(cores: tuple[set[int], set[int]]) -> Iterator[set[int]]:
    """Give this process, the member's client, priority on the other cores; yields the attacked
    sidecar's cores. Programs started meanwhile run on the other cores with normal priority. Raises
    LabError.
    """
    own, others = cores
    try:
        os.sched_setaffinity(0, others)
        _go_first(0)
        yield own
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, own | others)


def _keep(pid: int, cores: set[int]) -> None:
    """Pin a session leader to these cores, before all others there without real-time priority."""
    os.sched_setaffinity(pid, cores)
    with suppress(FileNotFoundError):  # a kernel without autogroups
        Path(f"/proc/{pid}/autogroup").write_text("-20")


@contextmanager
def all_first() -> Iterator[None]:
    """Give real-time priority to this process and to all that it starts during the block. Without
    it, other work on the machine counts: a sidecar that starts too slowly loses the requests that
    wait for it. Raises LabError."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(MEMBER_PRIORITY))
    except PermissionError as error:
        raise LabError(f"no real-time priority here ({error}): run this as root") from error
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _go_first(pid: int) -> None:
    """Give a process real-time priority, but not its children. Raises LabError."""
    try:
        os.sched_setscheduler(
            pid, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(MEMBER_PRIORITY)
        )
    except PermissionError as error:
        raise LabError(
            f"the member cannot have real-time priority here ({error}): run this as root"
        ) from error
