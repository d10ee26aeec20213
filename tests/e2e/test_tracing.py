"""Traces of requests through two sidecars, as a collector in another pod receives them.

Rules: every asserted span was exported by running proxies and decoded by lab/collector.py. The
applications know only headers: curl sends one, and the server returns the one that it got."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from lab.collector import Span, read
from lab.pod import PACKAGES, Pod
from lab.process import Process
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    MAIL,
    WEB,
    Pair,
    counted,
    curl,
    echo_server,
    eventually,
    exchange_raw,
    logged,
    prepare,
    web_server,
)

pytestmark = [pytest.mark.lab, pytest.mark.real]

OTLP = 4318
CALLER = "00f067aa0ba902b7"
LABELS = 'pod-template-hash="7d4b9c6f5d"\napp="shop"\n'
_traces = itertools.count(1)


def new_trace() -> str:
    return f"{next(_traces):032x}"


def context(trace: str, flags: str = "01") -> list[str]:
    return ["-H", f"traceparent: 00-{trace}-{CALLER}-{flags}"]


@dataclass
class Scene:
    pair: Pair
    file: Path
    collector: Process

    async def start_collector(self) -> None:
        self.collector = await collector(self.pair.cluster.pods["collector"], self.file)

    def spans(self, keep: Callable[[Span], bool]) -> list[Span]:
        return [span for span in read(self.file) if keep(span)]

    async def trace(self, trace: str, count: int | None = None) -> list[Span]:
        """The spans of a trace, the first hop's first, once there are `count`. Without `count`:
        once there is a server's span, and all named parents."""

        def all_of_them() -> list[Span]:
            spans = self.spans(lambda span: span.trace_id == trace)
            if count is not None:
                return spans if len(spans) >= count else []
            known = {CALLER, *(span.span_id for span in spans)}
            whole = any(span.kind == "server" for span in spans) and all(
                {span.parent_id, *span.links} <= known for span in spans
            )
            return spans if whole else []

        found: list[Span] = await eventually(all_of_them, f"{count} spans of {trace}", 30)
        assert count in (None, len(found))
        return sorted(found, key=lambda span: span.start)


async def collector(pod: Pod, file: Path) -> Process:
    """Start a collector that appends the spans to a file."""
    command = [sys.executable, "-m", "lab.collector", str(OTLP), str(file)]
    return await pod.start("collector", command, port=OTLP, env=PACKAGES)


@pytest.fixture(scope="module")
def scene(laboratory: Laboratory) -> Scene:
    async def build() -> Scene:
        pair = prepare(laboratory.lab, {WEB: "detect", MAIL: "opaque", ECHO: "opaque"})
        jaeger = pair.cluster.pod("collector")
        for sidecar in pair.both:
            sidecar.settings["tracing"] = {
                "delay": "100ms",
                "endpoint": f"http://{jaeger.ipv4}:{OTLP}",
            }
        pair.near.settings["pod"] = {"namespace": "front", "node": "node-a"}
        pair.far.settings["pod"] = {
            "name": "shop-7d4b9c6f5d-x2x9k",
            "namespace": "back",
            "uid": "u-1",
            "node": "node-b",
        }
        podinfo = pair.shop.directory / "podinfo"
        podinfo.mkdir()
        (podinfo / "labels").write_text(LABELS)
        (podinfo / "annotations").write_text('note="a \\"quoted\\" word"\n')
        pair.far.settings["tracing"] |= {
            "podinfo": str(podinfo),
            "inbound_ratio": 1.0,
            "resource": ["deployment.environment.name=test"],
        }
        file = jaeger.directory / "spans"
        process = await collector(jaeger, file)
        pair.mesh.join(
            pair.cluster.pod("leaver"),
            tracing={"delay": "5m", "endpoint": f"http://{jaeger.ipv4}:{OTLP}"},
        )
        # An endpoint without a response yet is expected to be faster than those with one. So both
        # are tried, whichever is the first.
        curious = {"balancing": {"default_rtt": "0.1ms"}}
        pair.mesh.service("twice", [pair.shop, jaeger], {WEB: "http1"}, policy=curious)
        insistent = {"retries": {"statuses": [501], "limit": 2}, "breaker": {"failures": 0}}
        pair.mesh.service("again", [pair.shop], {WEB: "http1"}, policy=insistent)
        await web_server(pair.shop)
        await echo_server(pair.shop)
        await pair.mesh.start()
        return Scene(pair, file, process)

    return laboratory.run(build)


async def test_a_request_has_a_span_at_each_sidecar(scene: Scene) -> None:
    trace = new_trace()
    answer = await curl(
        scene.pair.web,
        *context(trace),
        "-H",
        "tracestate: a=1",
        f"http://shop:{WEB}/path?token=hunter2",
    )
    assert answer.status == 200
    near, far = await scene.trace(trace, 2)
    assert [(span.name, span.kind, span.status) for span in (near, far)] == [
        ("GET", "client", "unset"),
        ("GET", "server", "unset"),
    ]
    assert (near.parent_id, far.parent_id, near.remote, far.remote) == (
        CALLER,
        near.span_id,
        True,
        True,
    )
    assert (near.state, far.state) == ("a=1", "a=1")
    assert near.start <= far.start <= near.end  # the scheduler decides which of the two ends first
    assert "hunter2" not in json.dumps([str(near), str(far)])


async def request_of(scene: Scene, trace: str) -> dict[str, Any]:
    """What the application gets with a request of this trace; its spans too."""
    answer = await curl(
        scene.pair.web, *context(trace), "-H", "tracestate: a=1", f"http://shop:{WEB}/head"
    )
    found: dict[str, Any] = json.loads(answer.body)
    return found


async def test_the_application_gets_the_last_span(scene: Scene) -> None:
    trace = new_trace()
    headers = dict((await request_of(scene, trace))["headers"])
    _, far = await scene.trace(trace, 2)
    assert headers["traceparent"] == f"00-{trace}-{far.span_id}-01"
    assert headers["tracestate"] == "a=1"


async def test_a_span_has_its_pod_and_the_identity_of_its_peer(scene: Scene) -> None:
    trace, pair = new_trace(), scene.pair
    await curl(pair.web, *context(trace), f"http://shop:{WEB}/path")
    near, far = await scene.trace(trace, 2)
    expected = {
        "k8s.pod.name": "shop-7d4b9c6f5d-x2x9k", "k8s.namespace.name": "back", "k8s.node.name": "node-b", "k8s.pod.uid": "u-1",
        "k8s.pod.ip": pair.shop.ipv4, "k8s.cluster.name": pair.cluster.name, "k8s.deployment.name": "shop", "service.name": "shop",
        "service.namespace": "back", "k8s.pod.label.app": "shop", "k8s.pod.annotation.note": 'a "quoted" word',
        "deployment.environment.name": "test", "telemetry.distro.name": "isthmus",
    }  # fmt: skip
    assert expected.items() <= far.resource.items()
    assert (near.pod, near.resource["k8s.node.name"]) == ("web", "node-a")
    identities = [str(sidecar.identity) for sidecar in pair.both]
    assert [
        near.attributes["isthmus.peer.identity"],
        far.attributes["isthmus.peer.identity"],
    ] == identities[::-1]
    for span in (near, far):
        assert span.attributes["tls.protocol.version"] == "1.3"
        assert span.attributes["tls.curve"] == "X25519MLKEM768"
        assert span.attributes["tls.cipher"].startswith("TLS_")
        assert span.attributes["http.response.status_code"] == 200
        assert [event.name for event in span.events] == ["isthmus.response.head"]
        assert span.start <= span.events[0].at <= span.end
    assert near.attributes["network.peer.address"] in (pair.shop.ipv4, pair.shop.ipv6)
    assert near.attributes["url.full"] == f"http://shop:{WEB}/path"
    assert far.attributes["client.address"] in (pair.web.ipv4, pair.web.ipv6)
    assert far.attributes["url.path"] == "/path"


@pytest.mark.parametrize(
    "headers",
    [
        ["uber-trace-id: {trace}:{caller}:0:1"],
        ["b3: {trace}-{caller}-1"],
        ["x-b3-traceid: {trace}", "x-b3-spanid: {caller}", "x-b3-sampled: 1"],
    ],
)
async def test_other_formats_join_the_spans_as_well(scene: Scene, headers: list[str]) -> None:
    trace = new_trace()
    given = [
        part for header in headers for part in ("-H", header.format(trace=trace, caller=CALLER))
    ]
    await curl(scene.pair.web, *given, f"http://shop:{WEB}/")
    near, far = await scene.trace(trace, 2)
    assert (near.parent_id, far.parent_id) == (CALLER, near.span_id)


async def test_an_unsampled_trace_leaves_no_span_even_at_ratio_one(
    scene: Scene,
) -> None:
    trace, marker = new_trace(), new_trace()
    await curl(scene.pair.web, *context(trace, "00"), f"http://shop:{WEB}/")
    await curl(scene.pair.web, *context(marker), f"http://shop:{WEB}/")
    await scene.trace(marker, 2)
    assert not scene.spans(lambda span: span.trace_id == trace)


async def test_a_request_without_a_trace_starts_one_at_the_sampling_ratio(scene: Scene) -> None:
    await curl(scene.pair.web, f"http://shop:{WEB}/started-here")
    (span,) = await eventually(
        lambda: scene.spans(lambda s: s.attributes.get("url.path") == "/started-here"),
        "the span",
        30,
    )
    assert (span.kind, span.parent_id, span.pod) == ("server", "", "shop-7d4b9c6f5d-x2x9k")


async def test_the_access_log_names_trace_and_span(scene: Scene) -> None:
    trace = new_trace()
    await curl(scene.pair.web, *context(trace), f"http://shop:{WEB}/logged")
    near, far = await scene.trace(trace, 2)
    for sidecar, span in ((scene.pair.near, near), (scene.pair.far, far)):
        line = await logged(sidecar, "/logged")
        assert (line["trace_id"], line["span_id"]) == (trace, span.span_id)


async def test_a_failure_is_on_both_spans_with_its_reason(scene: Scene) -> None:
    trace = new_trace()
    scene.pair.cluster.name_host("dead", scene.pair.shop.ipv4)
    answer = await curl(scene.pair.web, *context(trace), "http://dead:9/")
    assert answer.status == 502
    near, far = await scene.trace(trace, 2)
    assert (
        far.status,
        far.attributes["error.type"],
        far.attributes["http.response.status_code"],
    ) == ("error", "connect_refused", 502)
    assert "error=connection_refused" in far.attributes["isthmus.proxy_status"]
    assert (near.status, near.attributes["error.type"]) == (
        "error",
        "connect_refused",
    )  # as the server's sidecar has sent it


async def test_an_opaque_connection_is_a_span_where_the_ratio_says_so(scene: Scene) -> None:
    assert (
        await exchange_raw(scene.pair.web, scene.pair.service.ipv4, ECHO, b"hello", end=True)
        == b"hello"
    )
    (span,) = await eventually(
        lambda: scene.spans(lambda s: s.name == "TCP" and s.attributes["isthmus.bytes.read"] == 5),
        "the span",
        30,
    )
    assert (span.kind, span.attributes["isthmus.bytes.written"], span.parent_id) == (
        "server",
        5,
        "",
    )
    assert span.attributes["isthmus.peer.identity"] == str(scene.pair.near.identity)
    assert span.attributes["isthmus.destination"].endswith(f":{ECHO}")
    assert (await logged(scene.pair.far, span.trace_id))["span_id"] == span.span_id


async def test_an_attempt_that_got_no_connection_has_a_span_beside_the_one_that_did(
    scene: Scene,
) -> None:
    """One endpoint of the service `twice` has no server. Chance decides which one is tried first,
    but the other is the next."""
    dead = scene.pair.cluster.pods["collector"]
    for _ in range(3):
        trace = new_trace()
        answer = await curl(scene.pair.web, *context(trace), f"http://twice:{WEB}/")
        assert answer.status == 200
        spans = await scene.trace(trace)
        if len(spans) > 2:
            break
    first, again, far = spans
    assert [first.kind, again.kind, far.kind] == ["client", "client", "server"]
    assert (first.status, first.attributes["error.type"]) == ("error", "connect_refused")
    assert first.attributes["network.peer.address"] in (dead.ipv4, dead.ipv6)
    assert (again.status, again.attributes["http.request.resend_count"], again.links) == (
        "unset",
        1,
        [first.span_id],
    )
    assert (first.parent_id, again.parent_id, far.parent_id) == (CALLER, CALLER, again.span_id)
    assert first.end <= again.start


async def test_a_retried_status_has_a_span_for_each_attempt(scene: Scene) -> None:
    """The server does not support PUT, and responds so each time."""
    trace = new_trace()
    answer = await curl(scene.pair.web, "-X", "PUT", *context(trace), f"http://again:{WEB}/")
    assert answer.status == 501
    spans = await scene.trace(trace, 6)
    near, far = ([span for span in spans if span.kind == kind] for kind in ("client", "server"))
    assert [span.parent_id for span in near] == [CALLER] * 3
    assert [span.parent_id for span in far] == [span.span_id for span in near]
    assert [span.attributes.get("http.request.resend_count") for span in near] == [None, 1, 2]
    assert [span.links for span in near] == [[], [near[0].span_id], [near[1].span_id]]
    for span in spans:
        assert (
            span.status,
            span.attributes["error.type"],
            span.attributes["http.response.status_code"],
        ) == ("error", "501", 501)
        assert span.attributes["isthmus.peer.identity"]
    assert all(before.end <= after.start for before, after in itertools.pairwise(near))
    assert {span.attributes["isthmus.service"] for span in near} == {"default/again"}
    line = await logged(scene.pair.near, "PUT", trace_id=trace)
    assert line["span_id"] == near[-1].span_id


async def test_labels_that_change_are_on_the_next_spans(scene: Scene) -> None:
    labels = scene.pair.shop.directory / "podinfo" / "labels"
    for text, name in (('app="renamed"\n', "renamed"), (LABELS, "shop")):
        labels.with_suffix(".new").write_text(text)
        labels.with_suffix(".new").rename(labels)
        trace = new_trace()
        await curl(scene.pair.web, *context(trace), f"http://shop:{WEB}/")
        _, far = await scene.trace(trace, 2)
        assert far.resource["k8s.pod.label.app"] == name


async def test_spans_are_counted_and_none_is_lost(scene: Scene) -> None:
    async def numbers(what: str) -> list[float]:
        return [
            await counted(sidecar, f"isthmus_spans_{what}_total") for sidecar in scene.pair.both
        ]

    exported, dropped = await numbers("exported"), await numbers("dropped")
    trace = new_trace()
    await curl(scene.pair.web, *context(trace), f"http://shop:{WEB}/")
    await scene.trace(trace, 2)

    async def are_counted() -> bool:
        now = await numbers("exported")
        return all(new > old for new, old in zip(now, exported, strict=True))

    await eventually(are_counted, "the spans are counted")
    assert await numbers("dropped") == dropped


async def test_remaining_spans_are_sent_at_the_end_of_a_proxy(scene: Scene) -> None:
    """The exporter of `leaver` would wait for ever until a batch is full."""
    trace, sidecar = new_trace(), scene.pair.mesh.sidecars["leaver"]
    await curl(sidecar.pod, *context(trace), f"http://shop:{WEB}/")
    await scene.trace(trace, 1)
    assert not scene.spans(lambda span: span.pod == "leaver")
    sidecar.running().signal(signal.SIGTERM)
    near, far = await scene.trace(trace, 2)
    assert (near.pod, near.span_id) == ("leaver", far.parent_id)


async def test_a_collector_that_dies_only_changes_the_counters(scene: Scene) -> None:
    await scene.collector.aclose()
    try:
        for _ in range(5):
            answer = await curl(scene.pair.web, *context(new_trace()), f"http://shop:{WEB}/")
            assert answer.status == 200

        async def failing() -> bool:
            return (
                await counted(scene.pair.near, "isthmus_span_exports_total", result="unreachable")
                > 0
            )

        await eventually(failing, "exports that fail", 30)
        answer = await curl(scene.pair.web, *context(new_trace()), f"http://shop:{WEB}/")
        assert answer.status == 200
        line = await logged(scene.pair.near, "spans cannot be exported")
        assert line["level"] == "warning"
    finally:
        with trio.fail_after(60, shield=True):
            await scene.start_collector()
    trace = new_trace()
    await curl(scene.pair.web, *context(trace), f"http://shop:{WEB}/")
    await scene.trace(trace, 2)
