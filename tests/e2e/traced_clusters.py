"""Two clusters whose proxies trace, with a collector each, for the tests of traces across clusters.

West has clients (`web`, and `teller`, which starts traces itself); east has `c` (HTTP), `stock`
(gRPC) and `mail` (opaque), exported, and a gateway. West has services with the same names."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import trio

from lab.cluster import Lab
from lab.collector import Span
from lab.mesh import Mesh
from lab.pod import Pod
from lab.traces import TraceCollector
from tests.e2e.stage import MAIL, WEB, eventually, serve, web_server

GRPC = 50051
CALLER = "00f067aa0ba902b7"
_traces = itertools.count(0xC0)


@dataclass
class Scene:
    """The clusters and their collectors."""

    west: Mesh
    east: Mesh
    collectors: dict[str, TraceCollector]

    @property
    def web(self) -> Pod:
        return self.west.cluster.pods["web"]

    async def trace(self, trace_id: str, count: int) -> list[Span]:
        """The spans of a trace from both clusters, the outermost first."""

        def whole() -> list[Span]:
            spans = [
                span for collector in self.collectors.values() for span in collector.spans(trace_id)
            ]
            return spans if len(spans) >= count else []

        found: list[Span] = await eventually(whole, f"{count} spans of {trace_id}", 30)
        assert len(found) == count
        return sorted(found, key=lambda span: span.start)


async def build(lab: Lab) -> Scene:
    """The clusters, with everything running."""
    west = Mesh(lab.cluster("west"))
    east = Mesh(lab.cluster("east"), authority=west.authority)
    area = lab.wide_area()
    area.border(west.cluster)
    collectors = {
        mesh.cluster.name: await TraceCollector.start(mesh.cluster) for mesh in (west, east)
    }
    near, far = (collectors[name].settings() for name in ("west", "east"))
    pods = {name: east.cluster.pod(name) for name in ("c", "stock", "mail")}
    for pod in pods.values():
        east.join(pod, tracing=far)
    gateway = east.cluster.pod("gateway")
    east.gateway(gateway, area.attach(gateway), gateway={"allow": ["*"]}, tracing=far)
    for name, port, protocol in (
        ("c", WEB, "http1"),
        ("stock", GRPC, "http2"),
        ("mail", MAIL, "opaque"),
    ):
        east.service(name, [pods[name]], {port: protocol}, export=True)
        west.service(
            name, [], {port: protocol}, split=[{"service": name, "cluster": "east", "weight": 1}]
        )
    west.link(east)
    west.join(west.cluster.pod("web"), tracing=near)
    west.join(west.cluster.pod("teller"), tracing={**near, "outbound_ratio": 1.0})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(web_server, pods["c"])
        nursery.start_soon(
            lambda: serve(pods["stock"], "grpc_service", str(GRPC), "stock", port=GRPC)
        )
        nursery.start_soon(lambda: serve(pods["mail"], "mail", str(MAIL), port=MAIL))
        nursery.start_soon(east.start)
        nursery.start_soon(west.start)
    return Scene(west, east, collectors)


def context() -> tuple[str, list[str]]:
    """A new trace id, and the arguments with which curl sends a request of that trace."""
    trace_id = f"4bf92f3577b34da6a3ce929d0e0e{next(_traces):04x}"
    return trace_id, ["-H", f"traceparent: 00-{trace_id}-{CALLER}-01"]
