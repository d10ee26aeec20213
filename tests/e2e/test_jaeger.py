"""What Jaeger's UI will show, read from its query API: a real Jaeger 2 in a pod, with the
configuration of deploy/addons/jaeger.

It runs when ISTHMUS_TEST_JAEGER names a Jaeger binary. No package that the suite could install has
one (CONTRIBUTING.md says how to build it). East's proxies could reach the pod, but west's could
not. So the test sends it what both clusters' collectors have received from the proxies, byte for
byte."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from lab.pod import ROOT, Pod
from lab.sandbox import inside
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import WEB, curl, eventually
from tests.e2e.traced_clusters import CALLER, GRPC, Scene, build, context

JAEGER = os.environ.get("ISTHMUS_TEST_JAEGER")
OTLP, UI = 4318, 16686

pytestmark = [
    pytest.mark.skipif(JAEGER is None, reason="no Jaeger binary is named by ISTHMUS_TEST_JAEGER"),
    pytest.mark.skipif(not inside(), reason="not in the sandbox"),
]


@pytest.fixture(scope="module")
def scene(laboratory: Laboratory) -> Scene:
    return laboratory.run(build, laboratory.lab)


@pytest.fixture(scope="module")
def jaeger(laboratory: Laboratory, scene: Scene) -> Pod:
    async def start() -> Pod:
        pod = scene.east.cluster.pod("jaeger")
        documents = yaml.safe_load_all(
            (Path(ROOT) / "deploy" / "addons" / "jaeger" / "jaeger.yaml").read_text()
        )
        config = pod.directory / "config.yaml"
        config.write_text(
            next(
                document["data"]["config.yaml"]
                for document in documents
                if document["kind"] == "ConfigMap"
            )
        )
        await pod.start("jaeger", [str(JAEGER), "--config", str(config)], port=UI)
        return pod

    return laboratory.run(start)


async def shown(scene: Scene, jaeger: Pod, trace_id: str, count: int) -> dict[str, Any]:
    """The trace as Jaeger's API gives it, once it has so many spans."""
    await scene.trace(trace_id, count)
    headers = ["-H", "content-type: application/x-protobuf", "--data-binary", "@-"]
    for collector in scene.collectors.values():
        for body in collector.raw():
            answer = await curl(jaeger, *headers, f"http://127.0.0.1:{OTLP}/v1/traces", stdin=body)
            assert answer.status == 200, answer.body

    async def whole() -> Any:
        found = await ask(jaeger, f"/api/traces/{trace_id}")
        return (
            found[0]
            if found and len({span["spanID"] for span in found[0]["spans"]}) == count
            else None
        )

    trace: dict[str, Any] = await eventually(whole, "the trace in Jaeger", 30)
    return trace


async def ask(jaeger: Pod, path: str) -> Any:
    answer = await curl(jaeger, f"http://127.0.0.1:{UI}{path}")
    return json.loads(answer.body)["data"] if answer.status == 200 else None


def tags(of: dict[str, Any]) -> dict[str, Any]:
    return {tag["key"]: tag["value"] for tag in of["tags"]}


async def test_jaeger_shows_a_request_across_both_clusters_as_one_tree(
    scene: Scene, jaeger: Pod
) -> None:
    trace_id, headers = context()
    await curl(scene.web, *headers, f"http://c:{WEB}/path?t=hunter2")
    trace = await shown(scene, jaeger, trace_id, 4)
    spans = {span["spanID"]: span for span in trace["spans"]}
    parents = {
        name: span["references"][0]["spanID"] for name, span in spans.items() if span["references"]
    }
    way, above = list[dict[str, Any]](), CALLER
    while (
        below := next((name for name, parent in parents.items() if parent == above), None)
    ) is not None:
        way.append(spans[below])
        above = below
    processes = [tags(trace["processes"][span["processID"]]) for span in way]
    places = [(about["k8s.cluster.name"], about["k8s.pod.name"]) for about in processes]
    assert [(*place, tags(span)["span.kind"]) for place, span in zip(places, way, strict=True)] == [
        ("west", "web", "client"), ("east", "gateway", "server"), ("east", "gateway", "client"), ("east", "c", "server"),
    ]  # fmt: skip
    assert {about["k8s.namespace.name"] for about in processes} <= {"default", "isthmus"}
    names = {
        pod: str(sidecar.identity)
        for mesh in (scene.west, scene.east)
        for pod, sidecar in mesh.sidecars.items()
    }
    peers = [tags(span)["isthmus.peer.identity"] for span in way]
    assert peers == [names["gateway"], names["web"], names["c"], names["gateway"]]
    assert {
        (span["operationName"], tags(span)["http.response.status_code"], tags(span)["tls.curve"])
        for span in way
    } == {("GET", 200, "X25519MLKEM768")}
    assert tags(way[0])["isthmus.split.backend"] == "east/default/c"
    assert "hunter2" not in json.dumps(trace)


async def test_jaeger_shows_a_grpc_call_and_its_result(scene: Scene, jaeger: Pod) -> None:
    trace_id, headers = context()
    grpc = [
        "--http2-prior-knowledge",
        "-H",
        "content-type: application/grpc",
        "-H",
        "te: trailers",
        "--data-binary",
        "@-",
    ]
    await curl(
        scene.web, *grpc, *headers, f"http://stock:{GRPC}/isthmus.lab.Shop/Missing", stdin=bytes(5)
    )
    trace = await shown(scene, jaeger, trace_id, 4)
    assert {
        (tags(span)["rpc.response.status_code"], tags(span)["error"]) for span in trace["spans"]
    } == {("UNIMPLEMENTED", True)}


async def test_jaeger_lists_the_workloads_as_services_and_finds_spans_by_their_tags(
    scene: Scene, jaeger: Pod
) -> None:
    trace_id, headers = context()
    await curl(scene.web, *headers, f"http://c:{WEB}/")
    await shown(scene, jaeger, trace_id, 4)

    async def listed() -> bool:
        return {"web", "c", "gateway"} <= set(await ask(jaeger, "/api/services") or [])

    await eventually(listed, "the workloads in Jaeger", 30)
    asked = json.dumps({"isthmus.peer.identity": str(scene.west.sidecars["web"].identity)})
    found = await ask(jaeger, f"/api/traces?service=gateway&limit=100&tags={quote(asked)}")
    assert trace_id in {trace["traceID"] for trace in found}
