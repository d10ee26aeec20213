"""What Jaeger's UI will show, asked of its query API: a real Jaeger 2 in a pod, with the configuration of deploy/addons/jaeger.

It runs when ISTHMUS_TEST_JAEGER names a Jaeger binary, which is in no package that the suite could install.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.pod import ROOT
from lab.sandbox import inside
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import WEB, Pair, curl, eventually, prepare, web_server

JAEGER = os.environ.get("ISTHMUS_TEST_JAEGER")
OTLP, UI = 4318, 16686
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

pytestmark = [
    pytest.mark.skipif(JAEGER is None, reason="no Jaeger binary is named by ISTHMUS_TEST_JAEGER"),
    pytest.mark.skipif(not inside(), reason="not in the sandbox"),
]


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        pair = prepare(laboratory.lab, {WEB: "detect"})
        jaeger = pair.cluster.pod("jaeger")
        for sidecar in pair.both:
            sidecar.settings["tracing"] = {"endpoint": f"http://{jaeger.ipv4}:{OTLP}", "delay": "100ms"}
        documents = yaml.safe_load_all((Path(ROOT) / "deploy" / "addons" / "jaeger" / "jaeger.yaml").read_text())
        config = jaeger.directory / "config.yaml"
        config.write_text(next(document["data"]["config.yaml"] for document in documents if document["kind"] == "ConfigMap"))
        await jaeger.start("jaeger", [str(JAEGER), "--config", str(config)], port=UI)
        await web_server(pair.shop)
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


async def ask(pair: Pair, path: str) -> Any:
    jaeger = pair.cluster.pods["jaeger"]
    answer = await curl(jaeger, f"http://127.0.0.1:{UI}{path}")
    return json.loads(answer.body)["data"] if answer.status == 200 else None


async def test_jaeger_shows_the_tree_with_pods_and_identities(pair: Pair) -> None:
    await curl(pair.web, "-H", f"traceparent: 00-{TRACE}-{CALLER}-01", f"http://shop:{WEB}/path?t=hunter2")

    async def whole() -> Any:
        found = await ask(pair, f"/api/traces/{TRACE}")
        return found[0] if found and len(found[0]["spans"]) == 2 else None

    trace = await eventually(whole, "the trace in Jaeger", 30)
    spans = {tag["value"]: span for span in trace["spans"] for tag in span["tags"] if tag["key"] == "span.kind"}
    near, far = spans["client"], spans["server"]
    assert [reference["spanID"] for reference in far["references"] if reference["refType"] == "CHILD_OF"] == [near["spanID"]]
    for span, sidecar, other in ((near, pair.near, pair.far), (far, pair.far, pair.near)):
        tags = {tag["key"]: tag["value"] for tag in span["tags"]}
        process = trace["processes"][span["processID"]]
        about = {tag["key"]: tag["value"] for tag in process["tags"]}
        assert (about["k8s.pod.name"], about["k8s.cluster.name"]) == (sidecar.pod.name, pair.cluster.name)
        assert tags["isthmus.peer.identity"] == str(other.identity)
        assert (span["operationName"], tags["http.response.status_code"], tags["tls.curve"]) == ("GET", 200, "X25519MLKEM768")
    assert "hunter2" not in json.dumps(trace)


async def test_jaeger_lists_the_workloads_as_services(pair: Pair) -> None:
    async def listed() -> bool:
        return {"web", "shop"} <= set(await ask(pair, "/api/services") or [])

    await eventually(listed, "both services in Jaeger", 30)
