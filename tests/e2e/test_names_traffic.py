"""From a name to the service: programs of one cluster reach services of another by `c.east`,
through virtual addresses and a gateway.

Rules: the programs know only the name, and there is no resolver for any other name. HTTP and opaque
TCP work, over both address families. Requests for a service that has left the directory fail at
once."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import trio

from lab.envoy import Envoy
from lab.mesh import Mesh
from lab.pod import Pod
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.database import POSTGRES, postgres
from tests.e2e.stage import WEB, counted, curl, eventually, exchange_raw, logged, python, serve

pytestmark = [pytest.mark.lab, pytest.mark.real]

VERSIONS = pytest.mark.parametrize("version", [4, 6])

# Asks a PostgreSQL server whether it supports TLS: eight bytes there, one back.
SSL_REQUEST = """
import socket, sys
host, port, version = sys.argv[1], int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if version == "6" else socket.AF_INET
found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
with socket.create_connection(found[0][4][:2], timeout=20) as stream:
    stream.sendall(bytes([0, 0, 0, 8, 4, 210, 22, 47]))
    print(found[0][4][0], stream.recv(1).decode())
"""


@dataclass
class Stage:
    """West's pod `web` and its sidecar; east, whose services `c` and `db` are behind Envoy."""

    west: Mesh
    east: Mesh
    web: Pod
    near: Sidecar


@pytest.fixture(scope="module")
def stage(laboratory: Laboratory) -> Stage:
    async def build() -> Stage:
        lab = laboratory.lab
        west = Mesh(lab.cluster("west"))
        east = Mesh(lab.cluster("east"), authority=west.authority)
        area = lab.wide_area()
        area.border(west.cluster)
        c, db, gateway = (east.cluster.pod(name) for name in ("c", "db", "gateway"))
        for pod in (c, db):
            east.join(pod, inbound={"require_identity": True})
        words = {"10.244.2.5": c.ipv4, "10.244.2.6": db.ipv4, "10.244.2.7": c.ipv4}
        envoy = Envoy(gateway, east.authority, east.authority.identity("gateway", "isthmus"), words)
        east.announce(envoy, address=area.attach(gateway).ipv4, port=4143)
        east.service("c", [c], {WEB: "http1"}, export=True)
        east.service("db", [db], {POSTGRES: "opaque"}, export=True)
        west.link(east)
        west.cluster.resolve_by(
            "192.0.2.53",
            search=("default.svc.cluster.local", "svc.cluster.local", "cluster.local"),
            ndots=5,
        )
        web = west.cluster.pod("web")
        near = west.join(
            web, dns={"timeout": "1s"}
        )  # there is no resolver, so waiting for it is useless
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve(c, "web", "::", str(WEB), "c of east", port=WEB))
            nursery.start_soon(postgres, db)
            nursery.start_soon(east.start)
            nursery.start_soon(west.start)
            nursery.start_soon(envoy.start)
        return Stage(west, east, web, near)

    return laboratory.run(build)


@VERSIONS
@pytest.mark.parametrize("name", ["c.east", "c.default.east", "c-east"])
async def test_curl_reaches_a_service_of_another_cluster_by_its_name(
    stage: Stage, name: str, version: int
) -> None:
    answer = await curl(stage.web, f"-{version}", f"http://{name}:{WEB}/head")
    assert answer.status == 200, answer
    assert json.loads(answer.body)["name"] == "c of east"
    line = await logged(stage.near, f"{name}:{WEB}", status=200)
    assert line["upstream_identity"] == str(stage.east.authority.identity("gateway", "isthmus"))


@VERSIONS
async def test_opaque_tcp_reaches_it_too(stage: Stage, version: int) -> None:
    address, said = (
        await python(stage.web, SSL_REQUEST, "db.east", str(POSTGRES), str(version))
    ).split()
    assert said in "SN"
    assert (":" in address) is (version == 6)


async def test_a_removed_service_is_not_found_and_its_old_address_is_refused(
    stage: Stage,
) -> None:
    address = (await python(stage.web, SSL_REQUEST, "db.east", str(POSTGRES), "4")).split()[0]
    before = await counted(stage.near, "isthmus_directory_reloads_total", result="ok")
    gone = stage.east.services.pop("db")
    stage.west.publish()

    async def taken() -> bool:
        return await counted(stage.near, "isthmus_directory_reloads_total", result="ok") > before

    await eventually(taken, "the directory is in use")
    assert (
        await curl(stage.web, f"http://db.east:{POSTGRES}/")
    ).exit == 6  # could not resolve host
    assert (
        await exchange_raw(
            stage.web, address, POSTGRES, bytes([0, 0, 0, 8, 4, 210, 22, 47]), patience=20
        )
        == b""
    )
    line = await logged(stage.near, f"{address}:{POSTGRES}", reason="no_endpoint")
    assert "east/default/db" in line["words"]
    stage.east.services["db"] = gone
    stage.west.publish()


async def test_an_address_of_the_range_without_a_service_is_refused(stage: Stage) -> None:
    answer = await curl(stage.web, "http://240.1.2.3/")
    assert (answer.status, answer.error) == (503, "destination_unavailable")
