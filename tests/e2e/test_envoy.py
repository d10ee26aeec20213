"""Another vendor's gateway: Envoy at the edge of east, configured as deploy/envoy/ shows, carries what west's pods say to east's.

Rules: the configuration is the example's own text, with the laboratory's addresses; the services and their sidecars behind it are ordinary
members of the mesh; who was verified by whom is read from Envoy's log and from the sidecars'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from lab.cluster import Cluster
from lab.envoy import Envoy
from lab.mesh import Mesh
from lab.pod import Pod
from lab.sidecar import Authority
from lab.wide_area import Leg
from tests.e2e.conftest import Laboratory
from tests.e2e.database import POSTGRES, postgres
from tests.e2e.stage import WEB, Curled, curl, eventually, logged, python, serve

pytestmark = [pytest.mark.lab, pytest.mark.real]

GATE = 4143
C = f"c.default.svc.cluster.local:{WEB}"

# Asks a PostgreSQL server, through a tunnel, whether it speaks TLS: eight bytes there, one back.
TUNNEL = """
import json, socket, ssl, sys
host, port, authority, certificate, key = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["http/1.1"])
context.load_cert_chain(certificate, key)
with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain) as stream:
    stream.sendall(f"CONNECT {authority} HTTP/1.1\\r\\nHost: {authority}\\r\\n\\r\\n".encode())
    answer = b""
    while b"\\r\\n\\r\\n" not in answer and (piece := stream.recv(4096)):
        answer += piece
    stream.sendall(bytes([0, 0, 0, 8, 4, 210, 22, 47]))
    print(json.dumps({"status": int(answer.split()[1]), "said": stream.recv(1).decode()}))
"""


@dataclass
class Stage:
    """East, with the services `c`, `stock` and `db` behind Envoy; and a pod of west without a sidecar."""

    west: Cluster
    east: Cluster
    mesh: Mesh
    envoy: Envoy
    leg: Leg
    stranger: Pod

    def show(self, name: str, authority: Authority, service_account: str) -> list[str]:
        """Arguments of curl for a client with a certificate."""
        issued = authority.issue(authority.identity(service_account))
        files = [self.stranger.directory / f"{name}.pem", self.stranger.directory / f"{name}.key"]
        for file, data in zip(files, (issued.certificate_pem, issued.key_pem), strict=True):
            file.write_bytes(data)
            file.chmod(0o644)
        return ["--cert", str(files[0]), "--key", str(files[1])]

    async def ask(self, *arguments: str, authority: str = C, path: str = "/head") -> Curled:
        """curl from the stranger to the gateway, without asking who that is."""
        return await curl(self.stranger, "-k", "--http1.1", "-H", f"Host: {authority}", *arguments, f"https://{self.leg.ipv4}:{GATE}{path}")


@pytest.fixture(scope="module")
def stage(laboratory: Laboratory) -> Stage:
    async def build() -> Stage:
        lab = laboratory.lab
        west, east = lab.cluster("west"), lab.cluster("east")
        area, mesh = lab.wide_area(), Mesh(east)
        area.border(west)
        c, stock, db, gateway = (east.pod(name) for name in ("c", "stock", "db", "gateway"))
        for pod in (c, stock, db):
            mesh.join(pod, inbound={"require_identity": True})
        words = {"10.244.2.5": c.ipv4, "10.244.2.6": db.ipv4, "10.244.2.7": stock.ipv4}
        envoy = Envoy(gateway, mesh.authority, mesh.authority.identity("gateway", "isthmus"), words)
        leg = area.attach(gateway)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve(c, "web", "::", str(WEB), "c of east", port=WEB))
            nursery.start_soon(lambda: serve(stock, "grpc_service", "50051", "stock", port=50051))
            nursery.start_soon(postgres, db)
            nursery.start_soon(mesh.start)
            nursery.start_soon(envoy.start)
        return Stage(west, east, mesh, envoy, leg, west.pod("stranger"))

    return laboratory.run(build)


def entries(stage: Stage) -> list[dict[str, Any]]:
    """Envoy's access log."""
    assert stage.envoy.process is not None
    return [json.loads(line) for line in stage.envoy.process.output.lines if line.startswith("{")]


# Who gets in...


async def test_a_member_of_the_mesh_is_let_in_and_its_identity_goes_with_it(stage: Stage) -> None:
    answer = await stage.ask(*stage.show("member", stage.mesh.authority, "web"))
    assert answer.status == 200, answer
    head = json.loads(answer.body)
    assert head["name"] == "c of east"
    headers = {name.lower(): value for name, value in head["headers"]}
    assert headers["host"] == C
    assert headers["l5d-client-id"] == "spiffe://cluster.local/ns/default/sa/web"


async def test_what_a_client_says_of_itself_is_not_believed(stage: Stage) -> None:
    member = stage.show("member", stage.mesh.authority, "web")
    forged = [
        "-H",
        "l5d-client-id: spiffe://cluster.local/ns/default/sa/boss",
        "-H",
        "L5D-Client-ID: another",
        "-H",
        "x-forwarded-client-cert: URI=x",
    ]
    head = json.loads((await stage.ask(*member, *forged)).body)
    told = [(name.lower(), value) for name, value in head["headers"]]
    assert [value for name, value in told if name == "l5d-client-id"] == ["spiffe://cluster.local/ns/default/sa/web"]
    assert "x-forwarded-client-cert" not in dict(told)


async def test_a_client_without_a_certificate_gets_no_answer(stage: Stage) -> None:
    answer = await stage.ask()
    assert (answer.status, answer.body) == (0, b"")
    assert answer.exit != 0


async def test_nor_does_one_that_another_root_vouches_for(stage: Stage) -> None:
    answer = await stage.ask(*stage.show("forged", Authority(), "web"))
    assert (answer.status, answer.body) == (0, b"")


async def test_nor_one_of_another_trust_domain_whatever_root_it_has(stage: Stage) -> None:
    """The roots of both domains are trusted for a while, as when two meshes become one: the name decides."""
    other = Authority("other.example")
    certificates = stage.show("foreign", other, "web")
    stage.envoy.write_roots(stage.mesh.authority, other)
    try:
        seen: list[Curled] = []

        async def refused_by_name() -> bool:
            seen.append(await stage.ask(*certificates))
            assert stage.envoy.process is not None
            return seen[-1].status == 0

        await eventually(refused_by_name, "the client is refused")
        assert not any(answer.status for answer in seen)
        assert (await stage.ask(*stage.show("member", stage.mesh.authority, "web"))).status == 200
    finally:
        stage.envoy.write_roots(stage.mesh.authority)


async def test_clear_text_gets_no_answer(stage: Stage) -> None:
    answer = await curl(stage.stranger, "-H", f"Host: {C}", f"http://{stage.leg.ipv4}:{GATE}/")
    assert (answer.status, answer.body) == (0, b"")


# Where to...


async def test_what_is_not_exported_is_not_there(stage: Stage) -> None:
    member = stage.show("member", stage.mesh.authority, "web")
    for authority in ("nobody.default.svc.cluster.local", "c.other.svc.cluster.local:8080", "c", stage.east.pods["c"].ipv4, "gateway:9901"):
        answer = await stage.ask(*member, authority=authority)
        assert answer.status == 404, (authority, answer)


async def test_a_tunnel_leads_to_a_database(stage: Stage) -> None:
    answer = json.loads(
        await python(
            stage.stranger,
            TUNNEL,
            stage.leg.ipv4,
            str(GATE),
            f"db.default.svc.cluster.local:{POSTGRES}",
            *stage.show("member", stage.mesh.authority, "web")[1::2],
        )
    )
    assert answer == {"status": 200, "said": "N"}
    inbound = await logged(stage.mesh.sidecars["db"], "connection", direction="inbound", identity=str(stage.envoy.identity))
    assert (inbound["protocol"], inbound["tls"]) == ("isthmus-tcp", "TLSv1.3")


async def test_a_new_certificate_is_taken_up_without_a_restart(stage: Stage) -> None:
    before = stage.envoy.process
    second = Authority()
    member = stage.show("second", second, "web")
    assert (await stage.ask(*member)).status == 0
    stage.envoy.write_roots(stage.mesh.authority, second)
    try:

        async def let_in() -> bool:
            return (await stage.ask(*member)).status == 200

        await eventually(let_in, "the new root is trusted")
    finally:
        stage.envoy.write_roots(stage.mesh.authority)
    assert stage.envoy.process is before
    assert POSTGRES == 5432
