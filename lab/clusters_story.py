"""The two-cluster part of the demonstration: two networks, connected only by their gateways.

The rest of the demonstration runs in west; its `web` calls services of east. East's gateway is
behind NAT, west's has its own address in the wide area. `STEPS` run in order, and each restores
what it changed.
"""

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import trio

from lab.capture import Capture
from lab.clusters import PUBLISHED_PORT, Clusters
from lab.load import Load, Summary
from lab.mesh import Mesh
from lab.stage import GRPC, HTTP, MAIL, SECRET, Stage, error_type, why
from lab.traces import TraceCollector
from lab.wide_area import Fault

SPLIT_REQUESTS = 1000
SHARE = 0.1  # of the requests to `c` that go to east
PHASE = 1.5  # seconds of load before, during and after the outage, at least
ENOUGH = 100  # requests in each of these phases; fewer prove little
PATIENCE = 20.0  # maximum wait in seconds for what happens without our action
HERE, THERE = "c of west", "c of east"
# Short times keep the demonstration short: requests return to `c` after it has been well for a
# second, and an unreachable gateway is probed each second. `probe_timeout` and `response_timeout`
# allow for a busy machine.
CLIENT: dict[str, Any] = {
    "clusters": {"settle": "1s", "probe_interval": "1s", "probe_timeout": "3s"},
    "dns": {},
    "http": {"response_timeout": "5s"},
}
POLICY = {"breaker": {"min_penalty": "500ms", "max_penalty": "1s"}}
PEERS_PORT = 7  # for looking at source addresses


@dataclass(slots=True)
class World:
    """Both clusters."""

    stage: Stage
    clusters: Clusters

    @property
    def west(self) -> Mesh:
        return self.clusters.meshes["west"]

    @property
    def east(self) -> Mesh:
        return self.clusters.meshes["east"]

    def prove(self, label: str, detail: str, held: bool) -> None:
        """Record a proof."""
        self.stage.report.prove(label, detail, held)

    def load(self, service: str, clients: int = 2) -> Load:
        """Requests of `web` to a service of west, at its cluster address."""
        return Load(
            self.stage.web,
            self.west.services[service].ipv4,
            HTTP,
            clients=clients,
            authority=service,
        )


async def build(stage: Stage) -> World:
    """Create east, the gateways, and west's pods for this part. Only the collector starts here; the
    rest starts with the other sidecars.
    """
    clusters = Clusters(stage.lab)
    world = World(stage, clusters)
    west = clusters.adopt(stage.mesh)
    cluster = stage.lab.cluster("east")
    collector = await TraceCollector.start(cluster)
    stage.collectors.append(collector)
    tracing = collector.settings()
    east = clusters.adopt(Mesh(cluster, authority=stage.mesh.authority), nat=True, tracing=tracing)
    trusted = {"trusted_gateways": [str(west.sidecars["gateway"].identity)]}
    west.join(west.cluster.pod("c"), inbound=trusted)
    west.service("c", [west.cluster.pods["c"]], {HTTP: "http1"}, export=True, policy=POLICY)
    strict = {**trusted, "require_identity": True}
    for name, ports in (
        ("c", {HTTP: "http1"}),
        ("stock", {GRPC: "http2"}),
        ("mail", {MAIL: "opaque"}),
    ):
        pod = east.cluster.pod(name)
        east.join(pod, inbound=strict, http2={"idle_timeout": "1s"}, dns={}, tracing=tracing)
        east.service(name, [pod], ports, export=True, policy=POLICY)
    clusters.link()
    return world


async def servers(world: World) -> None:
    """Start the servers."""
    stage, pods = world.stage, world.east.cluster.pods
    async with trio.open_nursery() as nursery:
        nursery.start_soon(web_server, world, "west")
        nursery.start_soon(web_server, world, "east")
        nursery.start_soon(
            lambda: stage.server(
                pods["stock"], "grpc_service", str(GRPC), "stock of east", port=GRPC
            )
        )
        nursery.start_soon(lambda: stage.server(pods["mail"], "mail", str(MAIL), port=MAIL))


async def web_server(world: World, cluster: str) -> None:
    """Start `c` of one cluster."""
    await world.stage.server(
        world.clusters.pod(cluster, "c"), "web-c", "::", str(HTTP), f"c of {cluster}", port=HTTP
    )


# The steps


async def apart(world: World) -> None:
    """The clusters share only the gateways' addresses, and east's gateway is behind NAT."""
    world.stage.report.section = "Two clusters on networks of their own, joined by their gateways"
    stranger, target = world.stage.stranger, world.clusters.pod("east", "c")
    reason = ""
    with trio.move_on_after(5):
        try:
            await stranger.connect(target.ipv4, HTTP)
        except OSError as error:
            reason = error.strerror or str(error)
    world.prove(
        "apart",
        f"a pod of west connects to a pod of east, {target.ipv4}: {reason or 'it got through'}",
        bool(reason),
    )
    border = world.stage.lab.wide_area().border(world.east.cluster)
    gateway = world.clusters.pod("east", "gateway")
    border.publish(PEERS_PORT, gateway)
    listener = await gateway.listen(PEERS_PORT)
    stream = await stranger.connect(border.leg.ipv4, PEERS_PORT)
    accepted = await listener.accept()
    inside, client = accepted.socket.getsockname()[0], accepted.socket.getpeername()[0]
    for each in (stream, accepted, listener):
        await each.aclose()
    border.withdraw(PEERS_PORT)
    held = inside == gateway.ipv4 != border.leg.ipv4 and client not in (stranger.ipv4, inside)
    detail = (
        f"east's gateway is {border.leg.ipv4} outside and {inside} inside; {stranger.ipv4} of west"
        f" is {client} there"
    )
    world.prove("NAT at both ends", detail, held)


async def by_name(world: World) -> None:
    """Call a service of the other cluster by name, in three protocols; check the wire meanwhile."""
    stage = world.stage
    async with Capture(stage.web) as wire:
        answer = await stage.client(stage.web, "get", "c.east", HTTP, SECRET)
        held = (
            answer.get("status") == 200
            and "hello from the c of east" in answer.get("body", "")
            and SECRET in answer.get("body", "")
        )
        world.prove(
            "c.east by HTTP",
            f"http.client -> {THERE}, 3 requests on one connection {why(answer, held)}",
            held,
        )
        answer = await stage.client(stage.web, "grpc-kinds", "stock.east", GRPC, SECRET)
        held = all(answer.get(kind) is True for kind in ("unary", "server", "client", "both"))
        world.prove(
            "stock.east by gRPC",
            f"all four kinds of calls, grpcio to grpcio {why(answer, held)}",
            held,
        )
        answer = await stage.client(stage.web, "mail", "mail.east", MAIL, SECRET)
        held = answer.get("refused") == 0 and "error" not in answer
        greeting = (
            f"greeted after {answer.get('greeting_seconds', 0) * 1000:.1f} ms" if held else ""
        )
        world.prove(
            "mail.east by TCP",
            f"smtplib -> aiosmtpd, the server speaks first, {greeting} {why(answer, held)}",
            held,
        )
    verdict = wire.verdict(PUBLISHED_PORT)
    held = verdict.ok and not wire.contains(SECRET.encode())
    detail = (
        f"{verdict.flows} connections to the gateway: TLS 1.3 from the first byte to the last, the"
        " secret is not in it"
    )
    world.prove(
        "on the wire",
        detail if held else "; ".join(verdict.problems) or "the secret IS on the wire",
        held,
    )
    answer = await stage.client(world.clusters.pod("east", "c"), "get", "c.west", HTTP, SECRET)
    held = answer.get("status") == 200 and f"hello from the {HERE}" in answer.get("body", "")
    world.prove(
        "and back: c.west",
        f"called by `c` of east, through west's gateway {why(answer, held)}",
        held,
    )


async def split(world: World) -> None:
    """Requests to `c` of west; ten percent go to east."""
    weights = (round(100 * (1 - SHARE)), round(100 * SHARE))
    await arrange(
        world,
        split=[
            {"service": "c", "weight": weights[0]},
            {"service": "c", "cluster": "east", "weight": weights[1]},
        ],
    )
    async with world.load("c", clients=4) as load:
        await load.more(SPLIT_REQUESTS)
    answered, total = load.answered, sum(load.answered.values())
    spread = 5 * math.sqrt(
        total * SHARE * (1 - SHARE)
    )  # five standard deviations: chance exceeds them once in a million
    held = abs(answered[THERE] - SHARE * total) <= spread and not load.bad
    detail = (
        f"`web` calls `c`: of {total} requests west answered {answered[HERE]} and east"
        f" {answered[THERE]}, {load.bad or 'no'} errors"
    )
    world.prove(f"split {weights[0]}/{weights[1]}", detail, held)
    await arrange(world)


async def failover(world: World) -> None:
    """The pod of west's `c` dies under load, and comes back."""
    await arrange(world, failover={"clusters": ["east"]})
    sidecar, pod = world.west.sidecars["c"], world.clusters.pod("west", "c")
    async with world.load("c") as load:
        await load.more(50)
        dead = time.monotonic()
        for process in (sidecar.running(), pod.processes["web-c"]):
            process.kill()
            await process.wait()
        away = await answered(load, THERE, 1)
        took = time.monotonic() - dead
        await answered(load, THERE, 100)
        lost = sum(load.bad.values())
        detail = (
            f"`c` of west is killed under load: east answers {took * 1000:.0f} ms later, {lost}"
            " requests in flight were lost"
        )
        # Two clients: only the requests in flight when the server died may be lost.
        world.prove("failover", detail, away and lost <= 2)
        await web_server(world, "west")
        await sidecar.start(intercept=False)
        back = time.monotonic()
        home = await answered(load, HERE, 1)
        took = time.monotonic() - back
        await answered(load, HERE, 100)
        lost = sum(load.bad.values()) - lost
        world.prove(
            "and back",
            f"`c` of west is back: it answers after {took:.1f} s, {lost} errors",
            home and lost == 0,
        )
    await arrange(world)


async def outage(world: World) -> None:
    """East becomes unreachable while west's own service is called; calls to east fail with a clear
    error.
    """
    leg = world.clusters.legs["east"]
    async with world.load("shop") as load:
        moments, good = [time.monotonic()], load.succeeded
        await trio.sleep(PHASE)
        await enough(load, good)
        moments.append(time.monotonic())
        with leg.fault(Fault.SILENCE):
            answers: list[dict[str, Any]] = []
            slowest, good = 0.0, load.succeeded
            while time.monotonic() < moments[1] + PHASE or len(answers) < 3:
                began = time.monotonic()
                answers.append(await remote(world))
                slowest = max(slowest, time.monotonic() - began)
            await enough(load, good)
            moments.append(time.monotonic())
        good = load.succeeded
        with trio.move_on_after(PATIENCE):
            while (await remote(world)).get("status") != 200:
                pass
        recovered = time.monotonic() - moments[2]
        await trio.sleep(max(0.0, PHASE - recovered))
        await enough(load, good)
        moments.append(time.monotonic())
        phases = [load.summary(since, until) for since, until in pairwise(moments)]
    tell_outage(world, phases)
    last = answers[-1]
    said = f"{last.get('status', '')} {error_type(last.get('proxy-status', ''))}"
    held = all(
        answer.get("status") in (502, 503, 504) and "error=" in answer.get("proxy-status", "")
        for answer in answers
    )
    detail = (
        f"{len(answers)} calls during the outage, none answered; the slowest took {slowest:.2f} s,"
        f" the last response: {said}"
    )
    world.prove("c.east meanwhile", f"{detail} {why(last, held)}", held)
    world.prove(
        "c.east afterwards",
        f"answers {recovered:.2f} s after the link is restored",
        recovered < PATIENCE,
    )


def tell_outage(world: World, phases: list[Summary]) -> None:
    """The calls of west's own service before, during and after the outage."""
    for when, phase in zip(("before", "during", "after"), phases, strict=True):
        world.prove(
            f"east's outage: {when}",
            f"`web` calls `shop` of west: {phase}",
            phase.requests > ENOUGH and phase.errors == 0,
        )


async def hops(world: World) -> None:
    """Which peer each proxy verified at each hop, from its own log."""
    world.stage.report.section = (
        "Identities across clusters, as each of the three proxies verified and logged them"
    )
    name = world.stage.mesh.authority.identity
    web, gateway = str(name("web")), str(world.east.sidecars["gateway"].identity)
    for label, service, port in (
        ("HTTP", "c", HTTP),
        ("gRPC", "stock", GRPC),
        ("TCP", "mail", MAIL),
    ):
        target = str(name(service))
        near, way, far = (
            world.west.sidecars["web"],
            world.east.sidecars["gateway"],
            world.east.sidecars[service],
        )
        full = f"{service}.default.svc.cluster.local:{port}"
        first = await found(near, direction="outbound", upstream_identity=gateway, port=port)
        second = await found(way, direction="gateway", identity=web, authority=full)
        third = await found(far, direction="inbound", identity=gateway, port=port)
        verified = [
            ("sidecar of `web`", "the gateway", first.get("upstream_identity"), gateway),
            ("gateway", "the caller", second.get("identity"), web),
            ("gateway", "the target", second.get("upstream_identity"), target),
            (f"sidecar of `{service}`", "the gateway", third.get("identity"), gateway),
        ]
        held = all(seen == wanted for _, _, seen, wanted in verified)
        detail = "; ".join(
            f"{who} verified {whom}: {seen or 'none'}" for who, whom, seen, _ in verified
        )
        world.prove(f"{label}: {service}.east", detail, held)


STEPS: tuple[tuple[str, Callable[[World], Awaitable[None]]], ...] = (
    ("two clusters: what joins them, and what does not", apart),
    ("services of the other cluster are called by name: HTTP, gRPC, TCP", by_name),
    ("requests are split between the clusters", split),
    ("west's `c` dies under load, and comes back", failover),
    ("all of east becomes unreachable, and comes back", outage),
    ("reading which peers each proxy verified", hops),
)


# Helpers of the steps


async def arrange(world: World, **traits: Any) -> None:
    """Give west's `c` a split or a failover, and wait until the sidecar of `web` has loaded it."""
    near = world.west.sidecars["web"]
    before = await reloads(world)
    world.west.services["c"].traits = {"export": True, "policy": POLICY, **traits}
    known = near.directory_file.read_bytes()
    world.west.publish()
    with trio.move_on_after(PATIENCE):
        while near.directory_file.read_bytes() != known:
            if await reloads(world) > before:
                return
            await trio.sleep(0.05)


async def reloads(world: World) -> float:
    """How many directories the sidecar of `web` has loaded."""
    counted = await world.west.sidecars["web"].metrics()
    return sum(
        value
        for name, value in counted.items()
        if name.startswith("isthmus_directory_reloads_total{") and '"ok"' in name
    )


async def answered(load: Load, name: str, more: int) -> bool:
    """Wait until a server has answered `more` further requests."""
    goal = load.answered[name] + more
    with trio.move_on_after(PATIENCE):
        while load.answered[name] < goal:  # noqa: ASYNC110  # several clients count, and a small delay is harmless
            await trio.sleep(0.005)
        return True
    return False


async def enough(load: Load, since: int) -> None:
    """Wait until a load has enough requests answered after the first `since`. Raises LabError."""
    await load.more(max(0, since + ENOUGH + 1 - load.succeeded), timeout=PATIENCE)


async def remote(world: World) -> dict[str, Any]:
    """One call of east's `c`; failures are results too."""
    return await world.stage.client(world.stage.web, "once", "c.east", HTTP)


async def found(sidecar: Any, *, port: int = 0, **facts: str) -> dict[str, Any]:
    """The first line of a proxy's log with these fields. Waits for it: a line is written when its
    connection or request has ended.
    """
    with trio.move_on_after(PATIENCE / 2):
        while True:
            for line in sidecar.logged():
                if facts.items() <= line.items() and (
                    not port or f":{port}" in f"{line.get('destination')} {line.get('authority')}"
                ):
                    return dict(line)
            await trio.sleep(0.1)
    return {}
