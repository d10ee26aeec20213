"""A request from one cluster to another as a trace: four spans of three pods, one tree.

Rules: both clusters have their own collector, because they share only the gateways. Every asserted
span was exported by running proxies and decoded by lab/collector.py. The applications forward
headers, or not even these."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import Laboratory
from tests.e2e.stage import MAIL, WEB, client, curl, eventually
from tests.e2e.traced_clusters import CALLER, GRPC, Scene, build, context

pytestmark = [pytest.mark.lab, pytest.mark.real]


@pytest.fixture(scope="module")
def scene(laboratory: Laboratory) -> Scene:
    return laboratory.run(build, laboratory.lab)


async def test_a_request_to_the_other_cluster_is_one_tree(scene: Scene) -> None:
    trace_id, headers = context()
    answer = await curl(scene.web, *headers, f"http://c:{WEB}/head?t=hunter2")
    forwarded = dict(json.loads(answer.body)["headers"])
    spans = await scene.trace(trace_id, 4)
    assert [(span.cluster, span.pod, span.kind) for span in spans] == [
        ("west", "web", "client"), ("east", "gateway", "server"), ("east", "gateway", "client"), ("east", "c", "server"),
    ]  # fmt: skip
    near, entry, leave, far = spans
    assert [span.parent_id for span in spans] == [
        CALLER,
        near.span_id,
        entry.span_id,
        leave.span_id,
    ]
    assert [span.remote for span in spans] == [True, True, False, True]
    assert forwarded["traceparent"] == f"00-{trace_id}-{far.span_id}-01"
    assert {span.attributes["http.response.status_code"] for span in spans} == {200}
    assert "hunter2" not in str(spans)


async def test_each_span_has_the_identity_and_the_address_of_its_peer(scene: Scene) -> None:
    trace_id, headers = context()
    await curl(scene.web, *headers, f"http://c:{WEB}/")
    near, entry, leave, far = await scene.trace(trace_id, 4)
    name = {
        pod: str(sidecar.identity)
        for mesh in (scene.west, scene.east)
        for pod, sidecar in mesh.sidecars.items()
    }
    identities = [span.attributes["isthmus.peer.identity"] for span in (near, entry, leave, far)]
    assert identities == [name["gateway"], name["web"], name["c"], name["gateway"]]
    assert [span.attributes["isthmus.direction"] for span in (near, entry, leave, far)] == [
        "outbound",
        "gateway",
        "gateway",
        "inbound",
    ]
    assert (near.attributes["isthmus.cluster"], near.attributes["isthmus.gateway"]) == (
        "east",
        True,
    )
    assert (near.attributes["isthmus.service"], near.attributes["isthmus.split.backend"]) == (
        "default/c",
        "east/default/c",
    )
    assert leave.attributes["isthmus.service"] == "default/c"
    assert {span.attributes["tls.curve"] for span in (near, entry, leave, far)} == {
        "X25519MLKEM768"
    }


async def test_a_call_by_grpc_is_named_by_its_method_everywhere(scene: Scene) -> None:
    trace_id, headers = context()
    # A gRPC call as bytes: an empty message after its five-byte prefix.
    grpc = [
        "--http2-prior-knowledge",
        "-H",
        "content-type: application/grpc",
        "-H",
        "te: trailers",
        "--data-binary",
        "@-",
    ]
    for method in ("Echo", "Missing"):
        url = f"http://stock:{GRPC}/isthmus.lab.Shop/{method}"
        await curl(scene.web, *grpc, *headers, url, stdin=bytes(5))
    spans = await scene.trace(trace_id, 8)
    good, missing = (
        [span for span in spans if span.name == name] for name in ("isthmus.lab.Shop/Echo", "grpc")
    )
    assert [len(good), len(missing)] == [4, 4]
    assert {span.attributes["rpc.response.status_code"] for span in good} == {"OK"}
    assert {
        (span.attributes["rpc.response.status_code"], span.attributes["error.type"])
        for span in missing
    } == {("UNIMPLEMENTED",) * 2}
    assert {span.attributes["rpc.method_original"] for span in missing} == {
        "isthmus.lab.Shop/Missing"
    }


async def test_an_opaque_connection_takes_its_context_through_the_tunnel(scene: Scene) -> None:
    done = await client(scene.west.cluster.pods["teller"], "mail", "mail", str(MAIL), "tangerine")
    assert "error" not in done, done
    (near,) = await eventually(
        lambda: [span for span in scene.collectors["west"].all() if span.name == "TCP"],
        "the span",
        30,
    )
    _, entry, leave = await scene.trace(near.trace_id, 3)
    assert (near.pod, near.kind, near.parent_id) == ("teller", "client", "")
    assert [(span.name, span.kind, span.pod) for span in (entry, leave)] == [
        ("CONNECT", "server", "gateway"), ("CONNECT", "client", "gateway"),
    ]  # fmt: skip
    assert (entry.parent_id, leave.parent_id) == (near.span_id, entry.span_id)
    assert near.attributes["isthmus.split.backend"] == "east/default/mail"
    assert near.attributes["isthmus.bytes.read"] > 100
