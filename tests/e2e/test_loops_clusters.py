"""Loops between clusters, through their gateways: ended at the first return to a gateway, with the
whole cycle. Requests without a loop are served.

`west` and `east` know each other. `ping` in west and `pong` in east are nginx that forward to each
other, by a service that is split to the other cluster. `both` is a service of each, whose split
sends half of its requests to the other's. On other ports the same nginx use gRPC, drop the tokens
and keep the rest, or forward to a third cluster, `south`: one round for `ring`, and only one way
for `chain`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import trio

from lab.cluster import Cluster, Lab
from lab.mesh import Mesh
from lab.pod import Pod
from lab.process import Process
from lab.sidecar import Sidecar
from lab.traces import TraceCollector
from tests.e2e.calls import calling
from tests.e2e.conftest import Laboratory
from tests.e2e.ingress import has_answered, nginx, relay, requests
from tests.e2e.stage import counted, curl, eventually, logged

pytestmark = [pytest.mark.lab, pytest.mark.real]

ROUND, BOTH, LOST, RING, CHAIN, GRPC, RELAY = 8080, 8081, 8082, 8083, 8084, 8087, 8090
MOST = 24  # connections of west's relay
RETURNS = 4  # the default
BUSY = 4.0


# cluster -> (the pod that forwards there, the next cluster)
WAYS = {"west": ("ping", "east"), "east": ("pong", "west"), "south": ("pang", "")}
NEXT = {"west": "east", "east": "south", "south": "west"}


@dataclass
class Scene:
    meshes: dict[str, Mesh]
    collector: TraceCollector
    relay: Process = field(init=False)  # west's

    @property
    def sidecars(self) -> list[Sidecar]:
        return [sidecar for mesh in self.meshes.values() for sidecar in mesh.sidecars.values()]

    def gateway(self, cluster: str) -> Sidecar:
        return self.meshes[cluster].sidecars["gateway"]

    def pod(self, cluster: str, name: str) -> Pod:
        return self.meshes[cluster].cluster.pods[name]

    async def loops(self) -> float:
        return sum([await counted(sidecar, "isthmus_loops_total") for sidecar in self.sidecars])


def to(service: str, cluster: str) -> list[dict[str, object]]:
    """A split that sends all requests to a service of another cluster."""
    return [{"service": service, "cluster": cluster, "weight": 1}]


async def furnish(mesh: Mesh, end: Pod) -> None:
    """The services of a cluster, and the nginx behind them. `ring` and `chain` forward to the next
    cluster's, the chain as far as south."""
    here = mesh.cluster.name
    name, other = WAYS[here]
    mesh.service("ring", [end], {RING: "http1"}, export=True)
    mesh.service("further", [end], {RING: "http1"}, split=to("ring", NEXT[here]))
    mesh.service("chain", [end], {CHAIN: "http1"}, export=True)
    mesh.service("onward", [end], {CHAIN: "http1"}, split=to("chain", NEXT[here]))
    last = here == "south"
    ports = {
        RING: f"proxy_pass http://further:{RING};",
        CHAIN: "return 200 $http_isthmus_hops;" if last else f"proxy_pass http://onward:{CHAIN};",
    }
    if other:
        mesh.service(name, [end], {ROUND: "http1", LOST: "http1", GRPC: "http2"}, export=True)
        mesh.service(
            "away",
            [end],
            {ROUND: "http1", LOST: "http1", GRPC: "http2"},
            split=to(WAYS[other][0], other),
        )
        ports |= {
            ROUND: f"proxy_pass http://away:{ROUND};",
            LOST: f'proxy_set_header isthmus-hops ""; proxy_pass http://away:{LOST};',
            GRPC: f"http2 grpc_pass grpc://away:{GRPC};",
        }
    await nginx(end, ports)


async def relays(mesh: Mesh) -> Process:
    """A socat in its own pod that sends what it gets to the one of the other cluster. West's has a
    small connection limit."""
    here, pod = mesh.cluster.name, mesh.cluster.pod("relay")
    mesh.join(pod, outbound={"max_connections": MOST} if here == "west" else {})
    mesh.service("relay", [pod], {RELAY: "opaque"}, export=True)
    mesh.service("past", [pod], {RELAY: "opaque"}, split=to("relay", WAYS[here][1]))
    return await relay(pod, RELAY, "past", RELAY)


async def build(lab: Lab) -> Scene:
    area = lab.wide_area()
    west = Mesh(lab.cluster("west"))
    scene = Scene({"west": west}, await TraceCollector.start(west.cluster))
    scene.meshes |= {name: Mesh(lab.cluster(name), west.authority) for name in ("east", "south")}
    for here, mesh in scene.meshes.items():
        cluster: Cluster = mesh.cluster
        area.border(cluster)
        gateway = cluster.pod("gateway")
        mesh.gateway(gateway, area.attach(gateway))
        end = cluster.pod(WAYS[here][0])
        mesh.join(end)
        await furnish(mesh, end)
        if WAYS[here][1]:
            mesh.join(cluster.pod("web"))
            both = cluster.pod("both")
            mesh.join(both)
            half = [{"service": "both", "weight": 1}, *to("both", WAYS[here][1])]
            mesh.service("both", [both], {BOTH: "http1"}, export=True, split=half)
            await nginx(both, {BOTH: f"return 200 {cluster.name};"})
            process = await relays(mesh)
            if cluster.name == "west":
                scene.relay = process
    for here, mesh in scene.meshes.items():
        mesh.link(*(other for name, other in scene.meshes.items() if name != here))
    scene.gateway("west").settings["tracing"] = scene.collector.settings()
    async with trio.open_nursery() as nursery:
        for mesh in scene.meshes.values():
            nursery.start_soon(mesh.start)
    return scene


@pytest.fixture(scope="module")
def scene(laboratory: Laboratory) -> Scene:
    async def build_it() -> Scene:
        return await build(laboratory.lab)

    return laboratory.run(build_it)


async def test_splits_that_point_at_each_other_are_no_loop(scene: Scene) -> None:
    seen, loops = [], await scene.loops()
    for _ in range(60):
        for cluster in ("west", "east"):
            answer = await curl(scene.pod(cluster, "web"), f"http://both:{BOTH}/")
            assert answer.status == 200
            seen.append(answer.body)
    assert {b"west", b"east"} == set(seen)
    assert await scene.loops() == loops


ROUNDS = {
    "HTTP/1.1": (ROUND, "east/gateway -> east/pong -> west/gateway -> west/ping -> east/gateway"),
    "three clusters": (
        RING,
        (
            "east/gateway -> east/pong -> south/gateway -> south/pang -> west/gateway -> west/ping"
            " -> east/gateway"
        ),
    ),
}


@pytest.mark.parametrize("case", ROUNDS)
async def test_a_request_that_loops_through_clusters_is_ended_with_its_cycle(
    scene: Scene, case: str
) -> None:
    """The one through three clusters is a mirror of a mirror that comes back."""
    port, way = ROUNDS[case]
    ends = scene.pod("west", "ping"), scene.pod("east", "pong")
    before = [requests(pod, port) for pod in ends]
    loops = await counted(scene.gateway("east"), "isthmus_loops_total", kind="request")
    cpu = [sidecar.running().cpu_seconds() for sidecar in scene.sidecars]
    for _ in range(10):
        seen = await curl(
            scene.pod("west", "web"), f"http://{'ping' if port == ROUND else 'ring'}:{port}/a"
        )
        assert (seen.status, seen.error) == (508, "proxy_loop_detected")
        assert seen.body.decode().strip().endswith(f"the same request has been here already: {way}")
    await logged(
        scene.gateway("east"), "a loop was stopped (request, gateway)", logger="isthmus.loopguard"
    )
    assert await counted(scene.gateway("east"), "isthmus_loops_total", kind="request") == loops + 10
    # ping has it from web and from west's gateway, pong from east's: once each, because the
    # gateways refuse the first return.
    for pod, old, each in zip(ends, before, (2, 1), strict=True):
        await eventually(
            partial(has_answered, pod, port, old + 10 * each),
            f"{pod.name} has logged them",
        )
        assert requests(pod, port) == old + 10 * each
    for sidecar, seconds in zip(scene.sidecars, cpu, strict=True):
        assert sidecar.running().cpu_seconds() - seconds < BUSY
        assert await counted(sidecar, "isthmus_errors_total", reason="internal") == 0


async def test_a_grpc_call_that_loops_through_two_clusters_is_aborted(scene: Scene) -> None:
    code = """
try:
    shop.unary_unary("Name")(b"", timeout=20)
except grpc.RpcError as error:
    print(json.dumps([status(error), error.details()]))
"""
    status, details = await calling(scene.pod("west", "web"), code, host="ping", port=GRPC)
    assert status == "ABORTED proxy_loop_detected"
    assert details.endswith(
        "east/gateway -> east/pong -> west/gateway -> west/ping -> east/gateway"
    )


async def test_a_loop_through_software_that_drops_the_tokens_is_found_in_forwarded(
    scene: Scene,
) -> None:
    ends = scene.pod("west", "ping"), scene.pod("east", "pong")
    before = [requests(pod, LOST) for pod in ends]
    loops = await counted(scene.gateway("east"), "isthmus_loops_total", kind="forwarded")
    seen = await curl(scene.pod("west", "web"), f"http://ping:{LOST}/b")
    assert (seen.status, seen.error) == (508, "proxy_loop_detected")
    node = "west.gateway.isthmus.sa.cluster.local"
    assert (
        seen.body.decode()
        .strip()
        .endswith(
            "Forwarded has this gateway 5 times already for the same host:"
            f" east/gateway -> {node} -> east/gateway"
        )
    )
    now = await counted(scene.gateway("east"), "isthmus_loops_total", kind="forwarded")
    assert now == loops + 1
    for pod, old, most in zip(ends, before, (RETURNS + 2, RETURNS + 1), strict=True):
        await eventually(
            partial(has_answered, pod, LOST, old + most),
            f"{pod.name} has logged them",
        )
        assert requests(pod, LOST) == old + most


async def test_a_chain_through_three_clusters_is_not_a_loop(scene: Scene) -> None:
    loops = await scene.loops()
    seen = await curl(scene.pod("west", "web"), f"http://chain:{CHAIN}/c")
    assert seen.status == 200
    hops = [hop.partition(":")[2] for hop in seen.body.decode().split(", ")]
    way = [
        "west/web",
        "west/ping",
        "west/ping",
        "east/gateway",
        "east/pong",
        "east/pong",
        "south/gateway",
        "south/pang",
    ]
    assert hops == way
    assert await scene.loops() == loops


async def test_the_span_of_the_gateway_that_ends_a_loop_has_its_cycle(scene: Scene) -> None:
    trace_id = f"{0xC1:032x}"
    seen = await curl(
        scene.pod("east", "web"),
        "-H",
        f"traceparent: 00-{trace_id}-00f067aa0ba902b7-01",
        f"http://pong:{ROUND}/d",
    )
    assert (seen.status, seen.error) == (508, "proxy_loop_detected")

    def cycles() -> list[tuple[str, str]]:
        events = [
            (span.pod, event) for span in scene.collector.spans(trace_id) for event in span.events
        ]
        return [
            (pod, event.attributes["isthmus.loop.cycle"])
            for pod, event in events
            if event.name == "isthmus.loop"
        ]

    found = await eventually(cycles, "the span with the loop", 30)
    assert found == [
        ("gateway", "west/gateway -> west/ping -> east/gateway -> east/pong -> west/gateway")
    ]


async def relayed(scene: Scene, what: str) -> list[float]:
    """The connections that west's and east's relay have opened, or have open."""
    name = f"isthmus_connections_{what}"
    return [
        await counted(scene.meshes[here].sidecars["relay"], name, direction="outbound", peer="src")
        for here in ("west", "east")
    ]


async def test_opaque_relays_that_go_round_by_tunnels_have_as_many_connections_as_they_may_have_and_no_more(
    scene: Scene,
) -> None:
    """Only a limit of a relay ends this loop (docs/loops.md)."""
    cpu = [sidecar.running().cpu_seconds() for sidecar in scene.sidecars]
    async with await scene.pod("west", "web").connect(
        scene.meshes["west"].services["relay"].ipv4, RELAY
    ):

        async def full() -> bool:
            return await relayed(scene, "open") == [MOST, MOST]

        await eventually(full, "the loop has as many connections as allowed", 30)
        # For more rounds: a test cannot wait for something that does not happen
        await trio.sleep(1)
        assert await relayed(scene, "opened_total") == [MOST, MOST]
        for sidecar, old in zip(scene.sidecars, cpu, strict=True):
            assert sidecar.running().cpu_seconds() - old < BUSY
    scene.relay.kill()

    async def quiet() -> bool:
        return await relayed(scene, "open") == [0, 0]

    await eventually(quiet, "a relay that is stopped ends it")
