"""A request from one cluster to another as a trace: four spans of three pods, one tree.

Rules: both clusters have a collector of their own, since they share nothing but the gateways; what is asserted was exported by running
proxies, and decoded by lab/collector.py. The applications only forward headers, or not even that.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

import pytest
import trio

from lab.collector import Span
from lab.mesh import Mesh
from lab.pod import Pod
from lab.traces import TraceCollector
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import MAIL, WEB, client, curl, eventually, serve, web_server

pytestmark = [pytest.mark.lab, pytest.mark.real]

GRPC = 50051
CALLER = "00f067aa0ba902b7"
_traces = itertools.count(0xC0)


@dataclass
class Scene:
    west: Mesh
    east: Mesh
    collectors: dict[str, TraceCollector]

    @property
    def web(self) -> Pod:
        return self.west.cluster.pods["web"]

    async def trace(self, trace_id: str, count: int) -> list[Span]:
        """The spans of a trace from both clusters, the outermost first."""

        def whole() -> list[Span]:
            spans = [span for collector in self.collectors.values() for span in collector.spans(trace_id)]
            return spans if len(spans) >= count else []

        found: list[Span] = await eventually(whole, f"{count} spans of {trace_id}", 30)
        assert len(found) == count
        return sorted(found, key=lambda span: span.start)


@pytest.fixture(scope="module")
def scene(laboratory: Laboratory) -> Scene:
    async def build() -> Scene:
        lab = laboratory.lab
        west = Mesh(lab.cluster("west"))
        east = Mesh(lab.cluster("east"), authority=west.authority)
        area = lab.wide_area()
        area.border(west.cluster)
        collectors = {mesh.cluster.name: await TraceCollector.start(mesh.cluster) for mesh in (west, east)}
        near, far = (collectors[name].settings() for name in ("west", "east"))
        pods = {name: east.cluster.pod(name) for name in ("c", "stock", "mail")}
        for pod in pods.values():
            east.join(pod, tracing=far)
        gateway = east.cluster.pod("gateway")
        east.gateway(gateway, area.attach(gateway), gateway={"allow": ["*"]}, tracing=far)
        for name, port, protocol in (("c", WEB, "http1"), ("stock", GRPC, "http2"), ("mail", MAIL, "opaque")):
            east.service(name, [pods[name]], {port: protocol}, export=True)
            west.service(name, [], {port: protocol}, split=[{"service": name, "cluster": "east", "weight": 1}])
        west.link(east)
        west.join(west.cluster.pod("web"), tracing=near)
        west.join(west.cluster.pod("teller"), tracing={**near, "outbound_ratio": 1.0})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(web_server, pods["c"])
            nursery.start_soon(lambda: serve(pods["stock"], "grpc_service", str(GRPC), "stock", port=GRPC))
            nursery.start_soon(lambda: serve(pods["mail"], "mail", str(MAIL), port=MAIL))
            nursery.start_soon(east.start)
            nursery.start_soon(west.start)
        return Scene(west, east, collectors)

    return laboratory.run(build)


def context() -> tuple[str, list[str]]:
    trace_id = f"{next(_traces):032x}"
    return trace_id, ["-H", f"traceparent: 00-{trace_id}-{CALLER}-01"]


async def test_a_request_to_the_other_cluster_is_one_tree(scene: Scene) -> None:
    trace_id, headers = context()
    answer = await curl(scene.web, *headers, f"http://c:{WEB}/head?t=hunter2")
    told = dict(json.loads(answer.body)["headers"])
    spans = await scene.trace(trace_id, 4)
    assert [(span.cluster, span.pod, span.kind) for span in spans] == [
        ("west", "web", "client"), ("east", "gateway", "server"), ("east", "gateway", "client"), ("east", "c", "server"),
    ]  # fmt: skip
    near, entry, leave, far = spans
    assert [span.parent_id for span in spans] == [CALLER, near.span_id, entry.span_id, leave.span_id]
    assert [span.remote for span in spans] == [True, True, False, True]
    assert told["traceparent"] == f"00-{trace_id}-{far.span_id}-01"
    assert {span.attributes["http.response.status_code"] for span in spans} == {200}
    assert "hunter2" not in str(spans)


async def test_each_span_says_who_was_at_its_other_end_and_where_it_was_sent(scene: Scene) -> None:
    trace_id, headers = context()
    await curl(scene.web, *headers, f"http://c:{WEB}/")
    near, entry, leave, far = await scene.trace(trace_id, 4)
    name = {pod: str(sidecar.identity) for mesh in (scene.west, scene.east) for pod, sidecar in mesh.sidecars.items()}
    identities = [span.attributes["isthmus.peer.identity"] for span in (near, entry, leave, far)]
    assert identities == [name["gateway"], name["web"], name["c"], name["gateway"]]
    assert [span.attributes["isthmus.direction"] for span in (near, entry, leave, far)] == ["outbound", "gateway", "gateway", "inbound"]
    assert (near.attributes["isthmus.cluster"], near.attributes["isthmus.gateway"]) == ("east", True)
    assert (near.attributes["isthmus.service"], near.attributes["isthmus.split.backend"]) == ("default/c", "east/default/c")
    assert leave.attributes["isthmus.service"] == "default/c"
    assert {span.attributes["tls.curve"] for span in (near, entry, leave, far)} == {"X25519MLKEM768"}


async def test_a_call_by_grpc_is_named_by_its_method_everywhere(scene: Scene) -> None:
    trace_id, headers = context()
    # A call as it is on the wire: an empty message behind its five bytes.
    grpc = ["--http2-prior-knowledge", "-H", "content-type: application/grpc", "-H", "te: trailers", "--data-binary", "@-"]
    for method in ("Echo", "Missing"):
        url = f"http://stock:{GRPC}/isthmus.lab.Shop/{method}"
        await curl(scene.web, *grpc, *headers, url, stdin=bytes(5))
    spans = await scene.trace(trace_id, 8)
    good, missing = ([span for span in spans if span.name == name] for name in ("isthmus.lab.Shop/Echo", "grpc"))
    assert [len(good), len(missing)] == [4, 4]
    assert {span.attributes["rpc.response.status_code"] for span in good} == {"OK"}
    assert {(span.attributes["rpc.response.status_code"], span.attributes["error.type"]) for span in missing} == {("UNIMPLEMENTED",) * 2}
    assert {span.attributes["rpc.method_original"] for span in missing} == {"isthmus.lab.Shop/Missing"}


async def test_an_opaque_connection_takes_its_context_through_the_tunnel(scene: Scene) -> None:
    done = await client(scene.west.cluster.pods["teller"], "mail", "mail", str(MAIL), "tangerine")
    assert "error" not in done, done
    (near,) = await eventually(lambda: [span for span in scene.collectors["west"].all() if span.name == "TCP"], "the span", 30)
    _, entry, leave = await scene.trace(near.trace_id, 3)
    assert (near.pod, near.kind, near.parent_id) == ("teller", "client", "")
    assert [(span.name, span.kind, span.pod) for span in (entry, leave)] == [
        ("CONNECT", "server", "gateway"), ("CONNECT", "client", "gateway"),
    ]  # fmt: skip
    assert (entry.parent_id, leave.parent_id) == (near.span_id, entry.span_id)
    assert near.attributes["isthmus.split.backend"] == "east/default/mail"
    assert near.attributes["isthmus.bytes.read"] > 100
