"""A gateway by another vendor: Envoy at the edge of east, configured as in deploy/envoy/, forwards
the traffic of west's pods to east's.

Rules: the configuration is the example's own text, with the laboratory's addresses. The services
and their sidecars behind it are ordinary members of the mesh. Envoy's log and the sidecars' logs
show which peers were verified."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from lab.envoy import Envoy
from lab.mesh import Mesh
from lab.pod import Pod
from lab.sidecar import Authority
from lab.wide_area import Leg
from tests.e2e.conftest import Laboratory
from tests.e2e.database import POSTGRES, postgres, psql
from tests.e2e.stage import WEB, Curled, client, curl, eventually, logged, python, serve

pytestmark = [pytest.mark.lab, pytest.mark.real]

GATE, GRPC = 4143, 50051
C = f"c.default.svc.cluster.local:{WEB}"

# Asks a PostgreSQL server through a tunnel whether it supports TLS: eight bytes there, one back.
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
    """East, with the services `c`, `stock` and `db` behind Envoy; in west a member of the mesh, and
    a pod without a sidecar."""

    west: Mesh
    mesh: Mesh  # of east
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

    @property
    def web(self) -> Pod:
        return self.west.cluster.pods["web"]

    async def call(self, url: str) -> Curled:
        """curl from a member of the mesh, which does not know about Envoy."""
        return await curl(self.web, url)

    async def ask(self, *arguments: str, authority: str = C, path: str = "/head") -> Curled:
        """curl from the pod without a sidecar to the gateway, without verification of the
        gateway."""
        return await curl(
            self.stranger,
            "-k",
            "--http1.1",
            "-H",
            f"Host: {authority}",
            *arguments,
            f"https://{self.leg.ipv4}:{GATE}{path}",
        )


@pytest.fixture(scope="module")
def stage(laboratory: Laboratory) -> Stage:
    async def build() -> Stage:
        lab = laboratory.lab
        area, west = lab.wide_area(), Mesh(lab.cluster("west"))
        mesh = Mesh(lab.cluster("east"), west.authority)
        area.border(west.cluster)
        c, stock, db, gateway = (mesh.cluster.pod(name) for name in ("c", "stock", "db", "gateway"))
        for pod, port, hint in (
            (c, WEB, "http1"),
            (stock, GRPC, "http2"),
            (db, POSTGRES, "opaque"),
        ):
            mesh.join(
                pod,
                inbound={
                    "require_identity": True,
                    "trusted_gateways": [str(mesh.authority.identity("gateway", "isthmus"))],
                },
            )
            mesh.service(pod.name, [pod], {port: hint}, export=True)
        west.join(west.cluster.pod("web"), dns={})
        west.link(mesh)
        words = {"10.244.2.5": c.ipv4, "10.244.2.6": db.ipv4, "10.244.2.7": stock.ipv4}
        envoy = Envoy(gateway, mesh.authority, mesh.authority.identity("gateway", "isthmus"), words)
        leg = area.attach(gateway)
        mesh.announce(envoy, address=leg.ipv4, port=GATE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve(c, "web", "::", str(WEB), "c of east", port=WEB))
            nursery.start_soon(lambda: serve(stock, "grpc_service", str(GRPC), "stock", port=GRPC))
            nursery.start_soon(postgres, db)
            nursery.start_soon(mesh.start)
            nursery.start_soon(west.start)
            nursery.start_soon(envoy.start)
        return Stage(west, mesh, envoy, leg, west.cluster.pod("stranger"))

    return laboratory.run(build)


def entries(stage: Stage) -> list[dict[str, Any]]:
    """Envoy's access log."""
    assert stage.envoy.process is not None
    return [json.loads(line) for line in stage.envoy.process.output.lines if line.startswith("{")]


# Traffic of west's sidecars...


@pytest.mark.parametrize(
    "name", ["c.east", "c.default.east", "c-east", "c-east.default.svc.cluster.local"]
)
async def test_http_is_carried_to_a_service_of_the_other_cluster(stage: Stage, name: str) -> None:
    response = json.loads((await stage.call(f"http://{name}:{WEB}/head")).body)
    assert response["name"] == "c of east"
    assert dict(response["headers"])["host"] == C


async def test_grpc_is_carried_in_all_its_kinds(stage: Stage) -> None:
    seen = await client(stage.web, "grpc-kinds", "stock.east", str(GRPC), "tangerine")
    assert {
        kind: seen.get(kind) for kind in ("unary", "server", "client", "both")
    } == dict.fromkeys(("unary", "server", "client", "both"), True)


async def test_a_database_is_reached_by_name(stage: Stage) -> None:
    done = await psql(stage.web, "db.east", "select 6 * 7")
    assert done.text == "42\n", done.stderr.decode()


async def test_a_large_body_goes_through_unchanged_both_ways(stage: Stage) -> None:
    size = 8 * 1024 * 1024
    down = await client(stage.web, "download", "c.east", str(WEB), str(size))
    up = await client(stage.web, "upload", "c.east", str(WEB), str(size))
    assert (down.get("bytes"), up.get("right")) == (size, True)


async def test_each_hop_is_between_verified_identities(stage: Stage) -> None:
    await stage.call(f"http://c.east:{WEB}/")
    web, gateway, c = (
        str(each.identity)
        for each in (stage.west.sidecars["web"], stage.envoy, stage.mesh.sidecars["c"])
    )
    first = await logged(
        stage.west.sidecars["web"], "request", direction="outbound", upstream_identity=gateway
    )
    assert first["upstream"] == f"{stage.leg.ipv4}:{GATE}"
    second = await eventually(
        lambda: [
            line for line in entries(stage) if line["authority"] == C and line["identity"] == web
        ],
        "a line of Envoy's",
    )
    assert {line["upstream_identity"] for line in second} == {c}
    await logged(stage.mesh.sidecars["c"], "request", direction="inbound", identity=gateway)


async def test_a_gateway_that_is_gone_is_said_to_be_and_comes_back(stage: Stage) -> None:
    assert stage.envoy.process is not None
    stage.envoy.process.kill()
    await stage.envoy.process.wait()
    answer = await stage.call(f"http://c.east:{WEB}/")
    assert answer.status in (502, 503), answer
    assert answer.error
    await stage.envoy.start()

    async def back() -> bool:
        return (await stage.call(f"http://c.east:{WEB}/")).status == 200

    await eventually(back, "the service is back")


# Access...


async def test_a_member_of_the_mesh_is_admitted_and_its_identity_is_forwarded(stage: Stage) -> None:
    answer = await stage.ask(*stage.show("member", stage.mesh.authority, "web"))
    assert answer.status == 200, answer
    head = json.loads(answer.body)
    assert head["name"] == "c of east"
    headers = {name.lower(): value for name, value in head["headers"]}
    assert headers["host"] == C
    assert headers["isthmus-client-id"] == "spiffe://cluster.local/ns/default/sa/web"


async def test_claims_of_a_client_about_itself_are_ignored(stage: Stage) -> None:
    member = stage.show("member", stage.mesh.authority, "web")
    forged = [
        "-H",
        "isthmus-client-id: spiffe://cluster.local/ns/default/sa/boss",
        "-H",
        "Isthmus-Client-ID: another",
        "-H",
        "x-forwarded-client-cert: URI=x",
    ]
    head = json.loads((await stage.ask(*member, *forged)).body)
    told = [(name.lower(), value) for name, value in head["headers"]]
    assert [value for name, value in told if name == "isthmus-client-id"] == [
        "spiffe://cluster.local/ns/default/sa/web"
    ]
    assert "x-forwarded-client-cert" not in dict(told)


async def test_a_client_without_a_certificate_gets_no_answer(stage: Stage) -> None:
    answer = await stage.ask()
    assert (answer.status, answer.body) == (0, b"")
    assert answer.exit != 0


async def test_nor_does_one_that_another_root_vouches_for(stage: Stage) -> None:
    answer = await stage.ask(*stage.show("forged", Authority(), "web"))
    assert (answer.status, answer.body) == (0, b"")


async def test_nor_one_of_another_trust_domain_whatever_root_it_has(stage: Stage) -> None:
    """The roots of both domains are trusted for a while, as when two meshes are merged: the name
    decides."""
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


# Routes...


async def test_what_is_not_exported_is_not_there(stage: Stage) -> None:
    member = stage.show("member", stage.mesh.authority, "web")
    for authority in (
        "nobody.default.svc.cluster.local",
        "c.other.svc.cluster.local:8080",
        "c",
        stage.mesh.cluster.pods["c"].ipv4,
        "gateway:9901",
    ):
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
    inbound = await logged(
        stage.mesh.sidecars["db"],
        "connection",
        direction="inbound",
        identity=str(stage.envoy.identity),
    )
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
