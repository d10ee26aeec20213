"""A gateway that is known by a DNS name, whose address changes.

Rules: the proxy resolves the name as any program of its pod would, in the pod's own hosts file. The
old address is not only retired but dead, so that nothing that still uses it can work. Nothing is
restarted, and the directory does not change."""

from __future__ import annotations

import pytest
import trio

from lab.clusters import Clusters
from lab.load import Load
from lab.wide_area import Fault
from tests.e2e.clusters import HTTP, answers_again, clusters, member, resolved, web_server
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import WEB, curl

pytestmark = [pytest.mark.lab, pytest.mark.real]

NAME = "gateway.east.example"
C_EAST = f"http://c.east:{WEB}/"


@pytest.fixture(scope="module")
def made(laboratory: Laboratory) -> Clusters:
    async def build() -> Clusters:
        made = clusters(laboratory.lab, "west", "east")
        west, east = made.meshes["west"], made.meshes["east"]
        quick = {
            "settle": "1s",
            "resolve_interval": "1s",
            "probe_interval": "500ms",
            "probe_timeout": "3s",
        }
        member(made, "west", "web", clusters=quick, http={"response_timeout": "10s"})
        for cluster, name in (("west", "home"), ("east", "c")):
            made.meshes[cluster].service(name, [member(made, cluster, name)], HTTP, export=True)
        (way,) = east.gateways
        east.gateways[:] = [{"host": NAME, "port": way["port"], "identity": way["identity"]}]
        west.cluster.name_host(NAME, made.legs["east"].ipv4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(web_server, made, "west", "home")
            nursery.start_soon(web_server, made, "east")
            nursery.start_soon(made.start)
        return made

    return laboratory.run(build)


async def test_a_gateway_that_moves_is_found_again_by_its_name(made: Clusters) -> None:
    west, east = made.meshes["west"].cluster, made.meshes["east"]
    web = made.pod("west", "web")
    await answers_again(web, C_EAST, "c of east", timeout=40)
    # The same port at another address, of another pod.
    moved = made.lab.wide_area().attach(east.cluster.pod("moved"))
    second = east.gateway(east.cluster.pods["moved"], moved, gateway={"listen": ["0.0.0.0:14143"]})
    east.gateways.pop()  # only the name changes
    await made.start()
    async with Load(
        web, made.meshes["west"].services["home"].ipv4, WEB, clients=2, authority="home"
    ) as local:
        with made.legs["east"].fault(Fault.SILENCE):
            west.name_host(NAME, moved.ipv4)
            await answers_again(web, C_EAST, "c of east", timeout=60)
            assert (await curl(web, C_EAST)).status == 200
        await local.more(20)
    assert not local.bad
    assert any(
        line.get("direction") == "gateway" and line.get("status") == 200 for line in second.logged()
    )


async def test_a_name_that_is_gone_for_a_while_does_not_close_a_way_that_works(
    made: Clusters,
) -> None:
    west, web = made.meshes["west"].cluster, made.pod("west", "web")
    await answers_again(web, C_EAST, "c of east", timeout=40)
    west.name_host(NAME)
    async with Load(
        web, await resolved(web, "c.east"), WEB, clients=2, authority=f"c.east:{WEB}"
    ) as remote:
        # Time for three look-ups that find nothing: a test cannot wait for something that does not
        # happen.
        await trio.sleep(3)
        await remote.more(50)
    assert not remote.bad
