"""The ways into other clusters: which gateways are used, found out by their names and by asking them, over the real thing."""

from __future__ import annotations

import random
from pathlib import Path

import trio

from proxy.exchange.client import Lender
from proxy.mesh.directory import Endpoint, Target, parse
from proxy.sections import ClustersConfig
from proxy.ways import Ways
from tests.kit.apps import HOST, Fleet, way_in
from tests.kit.clusters import Clusters, clusters, east_directory
from tests.kit.http import until

GATEWAY = "spiffe://cluster.local/ns/isthmus/sa/gateway"
PATIENCE = 30.0


def counted(all_: Clusters, line: str) -> bool:
    return f"isthmus_{line}".encode() in all_.west.render()


async def test_a_gateway_that_is_given_by_a_name_is_found(tmp_path: Path) -> None:
    async with clusters(tmp_path, way={"host": "localhost"}) as all_:
        await until(lambda: bool(all_.west.ways.through(remote(all_)).endpoints), PATIENCE)
        for _ in range(5):  # it may have another address, at which nobody is
            assert (await all_.ask("c.east")).status == 200


def remote(all_: Clusters) -> Target:
    service = all_.west.runtime.directory.current.named("c.east", "default")
    assert service is not None
    return service.targets[80]


async def test_a_name_that_does_not_resolve_fails_requests_at_once_and_says_so(tmp_path: Path) -> None:
    async with clusters(tmp_path, way={"host": "gateway.invalid"}) as all_:
        await until(lambda: "resolve" in all_.west.ways.why("east"), PATIENCE)
        answer = await all_.ask("c.east")
    assert answer.status == 503
    assert b"no gateway of east can be used: " in answer.body
    assert b"(gateway.invalid)" in answer.body


async def test_a_gateway_that_does_not_answer_is_left_out_until_it_does(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        port = way_in(all_.gateway)
        assert (await all_.ask("c.east")).status == 200
        all_.gateway.inbound.drain(0)  # it listens no more, and its connections end
        await until(lambda: counted(all_, 'gateways_usable{cluster="east"} 0.0'), PATIENCE)
        answer = await all_.ask("c.east")
        assert answer.status == 503
        assert f"no gateway of east can be used: {HOST}:{port}: ".encode() in answer.body
        settings = {"enabled": True, "listen": [f"{HOST}:{port}"]}
        async with all_.fleet.running("gateway", east_directory(way_in(all_.server)), gateway=settings):
            await until(lambda: counted(all_, 'gateways_usable{cluster="east"} 1.0'), PATIENCE)
            assert (await all_.ask("c.east")).status == 200


async def test_a_gateway_that_is_shutting_down_gets_no_new_requests(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        assert (await all_.ask("c.east")).status == 200
        all_.gateway.drain.draining = True
        await until(lambda: "shutting down (503)" in all_.west.ways.why("east"), PATIENCE)
        await until(lambda: counted(all_, 'gateways_usable{cluster="east"} 0.0'), PATIENCE)


async def test_a_gateway_with_another_identity_is_none(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        directory = {
            "services": [],
            "clusters": [
                {
                    "name": "east",
                    "gateways": [{"address": HOST, "port": way_in(all_.gateway), "identity": Fleet.identity("other")}],
                    "services": [{"name": "c", "ports": [{"port": 80}]}],
                }
            ],
        }
        all_.fleet.direct(directory, "west")
        await until(lambda: not all_.west.runtime.directory.current.services, PATIENCE)
        answer = await all_.ask("c.east")
        assert answer.status in (502, 503)
        await until(lambda: counted(all_, 'gateway_probes_total{cluster="east",result="failed"}'), PATIENCE)


class Quiet:
    def gateway_probed(self, cluster: str, result: str) -> None:
        pass

    def gateways_usable(self, cluster: str, count: int) -> None:
        pass


class Known:
    def __init__(self, text: str) -> None:
        self.current = parse(text, "test")


class Nobody:
    """Lends to nobody: in these tests nobody is asked."""

    def carrier(self, endpoint: Endpoint, *, fresh: bool) -> object:
        raise AssertionError("nobody should be asked")


def still(text: str) -> tuple[Ways, Known]:
    known = Known(text)
    lender: Lender[Endpoint] = Nobody()  # type: ignore[assignment]
    return Ways(known, ClustersConfig(), lender, Quiet(), random.Random(1)), known


TEXT = f"""
services: []
clusters:
  - name: east
    gateways: [{{address: 203.0.113.7, identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}]}}]
  - name: north
    gateways: [{{host: gw.invalid, identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}]}}]
"""


async def test_clusters_that_nobody_asks_for_are_left_in_peace(autojump_clock: trio.testing.MockClock) -> None:
    ways, _ = still(TEXT)
    with trio.move_on_after(3600):
        await ways.watch()
    assert ways.why("north").endswith("(gw.invalid)")


async def test_where_nothing_has_happened_the_snapshot_is_the_truth(autojump_clock: trio.testing.MockClock) -> None:
    ways, known = still(TEXT)
    east = known.current.clusters["east"].services[0].targets[80]
    assert ways.through(east) is east
    north = known.current.clusters["north"].services[0].targets[80]
    assert ways.through(north).endpoints == ()
    assert ways.through(north) is ways.through(north)
    assert ways.why("nowhere") == "the directory names no gateway of nowhere"
    known.current = parse(TEXT.replace("203.0.113.7", "203.0.113.8"), "test")
    moved = known.current.clusters["east"].services[0].targets[80]
    assert ways.through(moved) is moved
    await trio.lowlevel.checkpoint()
