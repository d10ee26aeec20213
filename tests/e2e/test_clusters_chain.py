"""Three clusters: a request may go from the first to the second and from there to the third,
because an application sends it each time.

Rules: every cluster has a gateway, and every hop between clusters goes through one. The application
in the middle calls another service by its name, and does not know about clusters."""

from __future__ import annotations

import json

import pytest
import trio

from lab.clusters import Clusters
from tests.e2e.clusters import GATEWAY, HTTP, ask, clusters, header, member, web_server
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import WEB, counted, curl, logged

pytestmark = [pytest.mark.lab, pytest.mark.real]

ID = "spiffe://cluster.local/ns/default/sa/"

# Responds with the response of another service, and forwards the request id, as an application
# should.
MIDDLE = """
import http.client, socket, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        onward = http.client.HTTPConnection(sys.argv[2], int(sys.argv[1]), timeout=20)
        onward.request("GET", self.path, headers={"X-Request-Id": self.headers.get("X-Request-Id", "")})
        answer = onward.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Middle", "b")
        self.end_headers()
        self.wfile.write(body)
Server(("::", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def made(laboratory: Laboratory) -> Clusters:
    async def build() -> Clusters:
        made = clusters(laboratory.lab, "west", "east", "south", nat="south")
        member(made, "west", "web")
        b, c = member(made, "east", "b"), member(made, "south", "c")
        made.meshes["east"].service("b", [b], HTTP, export=True)
        made.meshes["south"].service("c", [c], HTTP, export=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: b.python("middle", MIDDLE, str(WEB), "c.south", port=WEB))
            nursery.start_soon(web_server, made, "south", "c")
            nursery.start_soon(made.start)
        return made

    return laboratory.run(build)


async def test_a_chain_over_three_clusters(made: Clusters) -> None:
    response = await ask(
        made.pod("west", "web"), f"http://b.east:{WEB}/head", "-H", "X-Request-Id: tangerine"
    )
    assert response["name"] == "c of south"
    assert header(response, "x-request-id") == ["tangerine"]
    # The caller is the sender of each request: the last server sees `b`, and not `web`.
    assert header(response, "isthmus-client-id") == [f"{ID}b"]
    for cluster, caller in (("east", "web"), ("south", "b")):
        line = await logged(
            made.sidecar(cluster, "gateway"), "/head", direction="gateway", identity=f"{ID}{caller}"
        )
        assert line["status"] == 200
    assert (await logged(made.sidecar("south", "c"), "/head", direction="inbound"))[
        "identity"
    ] == GATEWAY
    assert (
        await counted(
            made.sidecar("west", "gateway"), "isthmus_requests_total", direction="gateway"
        )
        == 0
    )


async def test_a_gateway_does_not_pass_on_to_a_third_cluster(made: Clusters) -> None:
    """West asks east's gateway for a service of south: east exports only its own services."""
    west, (gate,) = made.pod("west", "web"), made.meshes["east"].gateways
    for name in ("c.south.east", "c-south.east"):
        answer = await curl(
            west, "--connect-to", f"::{gate['address']}:{gate['port']}", f"http://{name}:{WEB}/"
        )
        assert (answer.status, answer.error) == (403, "http_request_denied"), (name, answer)
    direct = await curl(west, f"http://c.south:{WEB}/head")
    assert json.loads(direct.body)["name"] == "c of south"
