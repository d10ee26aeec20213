"""Loops between clusters, through their gateways: cut at the first return to a gateway, with the whole way; and what is none, is not.

`west` and `east` know each other. `ping` in west and `pong` in east are nginx that forward to each other, by a service that is split to the
other cluster; `both` is a service of each, whose split sends half of its requests to the other's.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lab.cluster import Cluster, Lab
from lab.mesh import Mesh
from lab.pod import Pod
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.ingress import nginx, requests
from tests.e2e.stage import counted, curl, eventually, logged

pytestmark = [pytest.mark.lab, pytest.mark.real]

ROUND, BOTH = 8080, 8081
BUSY = 4.0


@dataclass
class Two:
    west: Mesh
    east: Mesh

    @property
    def sidecars(self) -> list[Sidecar]:
        return [*self.west.sidecars.values(), *self.east.sidecars.values()]

    def pod(self, cluster: str, name: str) -> Pod:
        return {"west": self.west, "east": self.east}[cluster].cluster.pods[name]

    async def loops(self) -> float:
        return sum([await counted(sidecar, "isthmus_loops_total") for sidecar in self.sidecars])


async def build(lab: Lab) -> Two:
    area = lab.wide_area()
    west = Mesh(lab.cluster("west"))
    two = Two(west, Mesh(lab.cluster("east"), west.authority))
    for mesh, mine, other, theirs in ((two.west, "ping", "east", "pong"), (two.east, "pong", "west", "ping")):
        cluster: Cluster = mesh.cluster
        area.border(cluster)
        gateway = cluster.pod("gateway")
        mesh.gateway(gateway, area.attach(gateway))
        ends = cluster.pod("web"), cluster.pod(mine), cluster.pod("both")
        for pod in ends:
            mesh.join(pod)
        mesh.service(mine, [ends[1]], {ROUND: "http1"}, export=True)
        half = [{"service": "both", "weight": 1}, {"service": "both", "cluster": other, "weight": 1}]
        mesh.service("both", [ends[2]], {BOTH: "http1"}, export=True, split=half)
        mesh.service("away", [ends[1]], {ROUND: "http1"}, split=[{"service": theirs, "cluster": other, "weight": 1}])
        await nginx(ends[1], {ROUND: f"proxy_pass http://away:{ROUND};"})
        await nginx(ends[2], {BOTH: f"return 200 {cluster.name};"})
    two.west.link(two.east)
    two.east.link(two.west)
    await two.west.start()
    await two.east.start()
    return two


@pytest.fixture(scope="module")
def two(laboratory: Laboratory) -> Two:
    async def build_it() -> Two:
        return await build(laboratory.lab)

    return laboratory.run(build_it)


async def test_splits_that_point_at_each_other_are_no_loop(two: Two) -> None:
    seen = []
    for _ in range(60):
        for cluster in ("west", "east"):
            answer = await curl(two.pod(cluster, "web"), f"http://both:{BOTH}/")
            assert answer.status == 200
            seen.append(answer.body)
    assert {b"west", b"east"} == set(seen)
    assert await two.loops() == 0


async def test_a_request_that_goes_round_through_two_clusters_is_cut_with_its_way(two: Two) -> None:
    before = [requests(two.pod("west", "ping"), ROUND), requests(two.pod("east", "pong"), ROUND)]
    cpu = [sidecar.running().cpu_seconds() for sidecar in two.sidecars]
    for _ in range(10):
        seen = await curl(two.pod("west", "web"), f"http://ping:{ROUND}/a")
        assert (seen.status, seen.error) == (508, "proxy_loop_detected")
        assert b"east/gateway -> east/pong -> west/gateway -> west/ping -> east/gateway\n" in seen.body
    await logged(two.east.sidecars["gateway"], "a loop was stopped (request, gateway)", logger="isthmus.loopguard")
    assert await counted(two.east.sidecars["gateway"], "isthmus_loops_total", kind="request") == 10
    # ping has it from web and from west's gateway, pong from east's: once each, for the gateways refuse the first return.
    for pod, old, each in ((two.pod("west", "ping"), before[0], 2), (two.pod("east", "pong"), before[1], 1)):
        await eventually(lambda pod=pod, old=old, each=each: requests(pod, ROUND) >= old + 10 * each, f"{pod.name} has written them down")
        assert requests(pod, ROUND) == old + 10 * each
    for sidecar, old in zip(two.sidecars, cpu, strict=True):
        assert sidecar.running().cpu_seconds() - old < BUSY
        assert await counted(sidecar, "isthmus_errors_total", reason="internal") == 0
