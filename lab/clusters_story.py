"""The part of the demonstration's story that is told by two clusters: on networks of their own, joined by their gateways only.

West is the cluster of the rest of the story; its `web` calls services of east.  East's gateway is behind NAT, west's has an address of its
own in the wide area.  `STEPS` are told in their order, and each leaves things as it found them.
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
ENOUGH = 100  # requests in each of these phases, or it says little
PATIENCE = 20.0  # seconds, for what has to happen by itself
HERE, THERE = "c of west", "c of east"
# Back home when `c` has been well for a second, and a way that does not answer is looked at each second: stories are short. What takes
# longer than `probe_timeout` and `response_timeout` is given up, so these are what a busy machine may take at times.
CLIENT: dict[str, Any] = {
    "clusters": {"settle": "1s", "probe_interval": "1s", "probe_timeout": "3s"},
    "dns": {},
    "http": {"response_timeout": "5s"},
}
POLICY = {"breaker": {"min_penalty": "500ms", "max_penalty": "1s"}}
PEERS_PORT = 7  # for looking at addresses


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
        """Note a proof."""
        self.stage.report.prove(label, detail, held)

    def load(self, service: str, clients: int = 2) -> Load:
        """Requests of `web` to a service of west, at its cluster address."""
        return Load(self.stage.web, self.west.services[service].ipv4, HTTP, clients=clients, authority=service)


async def build(stage: Stage) -> World:
    """East, the gateways, and the pods that west has for this part.  Everything but the collector is started with the rest of the story."""
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
    for name, ports in (("c", {HTTP: "http1"}), ("stock", {GRPC: "http2"}), ("mail", {MAIL: "opaque"})):
        pod = east.cluster.pod(name)
        east.join(pod, inbound=strict, http2={"idle_timeout": "1s"}, dns={}, tracing=tracing)
        east.service(name, [pod], ports, export=True, policy=POLICY)
    clusters.link()
    return world


async def servers(world: World) -> None:
    """Start the programs that are called."""
    stage, pods = world.stage, world.east.cluster.pods
    async with trio.open_nursery() as nursery:
        nursery.start_soon(web_server, world, "west")
        nursery.start_soon(web_server, world, "east")
        nursery.start_soon(lambda: stage.server(pods["stock"], "grpc_service", str(GRPC), "stock of east", port=GRPC))
        nursery.start_soon(lambda: stage.server(pods["mail"], "mail", str(MAIL), port=MAIL))


async def web_server(world: World, cluster: str) -> None:
    """Start `c` of one cluster."""
    await world.stage.server(world.clusters.pod(cluster, "c"), "web-c", "::", str(HTTP), f"c of {cluster}", port=HTTP)


# The steps...


async def apart(world: World) -> None:
    """The clusters share nothing but the gateways' addresses, and east's is not its own."""
    world.stage.report.section = "Two clusters on networks of their own, joined by their gateways"
    stranger, target = world.stage.stranger, world.clusters.pod("east", "c")
    reason = ""
    with trio.move_on_after(5):
        try:
            await stranger.connect(target.ipv4, HTTP)
        except OSError as error:
            reason = error.strerror or str(error)
    world.prove("apart", f"a pod of west connects to a pod of east, {target.ipv4}: {reason or 'it got through'}", bool(reason))
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
    detail = f"east's gateway is {border.leg.ipv4} outside and {inside} inside; {stranger.ipv4} of west is {client} there"
    world.prove("NAT at both ends", detail, held)


async def by_name(world: World) -> None:
    """A service of the other cluster, by its name, in three protocols; and what is on the wire meanwhile."""
    stage = world.stage
    async with Capture(stage.web) as wire:
        answer = await stage.client(stage.web, "get", "c.east", HTTP, SECRET)
        held = answer.get("status") == 200 and "hello from the c of east" in answer.get("body", "") and SECRET in answer.get("body", "")
        world.prove("c.east by HTTP", f"http.client -> {THERE}, 3 requests on one connection {why(answer, held)}", held)
        answer = await stage.client(stage.web, "grpc-kinds", "stock.east", GRPC, SECRET)
        held = all(answer.get(kind) is True for kind in ("unary", "server", "client", "both"))
        world.prove("stock.east by gRPC", f"all four kinds of calls, grpcio to grpcio {why(answer, held)}", held)
        answer = await stage.client(stage.web, "mail", "mail.east", MAIL, SECRET)
        held = answer.get("refused") == 0 and "error" not in answer
        greeting = f"greeted after {answer.get('greeting_seconds', 0) * 1000:.1f} ms" if held else ""
        world.prove("mail.east by TCP", f"smtplib -> aiosmtpd, the server speaks first, {greeting} {why(answer, held)}", held)
    verdict = wire.verdict(PUBLISHED_PORT)
    held = verdict.ok and not wire.contains(SECRET.encode())
    told = f"{verdict.flows} connections to the gateway: TLS 1.3 from the first byte to the last, the secret is not in it"
    world.prove("on the wire", told if held else "; ".join(verdict.problems) or "the secret IS on the wire", held)
    answer = await stage.client(world.clusters.pod("east", "c"), "get", "c.west", HTTP, SECRET)
    held = answer.get("status") == 200 and f"hello from the {HERE}" in answer.get("body", "")
    world.prove("and back: c.west", f"called by `c` of east, through west's gateway {why(answer, held)}", held)


async def split(world: World) -> None:
    """Requests to `c` of west, ten in a hundred of which east gets."""
    weights = (round(100 * (1 - SHARE)), round(100 * SHARE))
    await arrange(world, split=[{"service": "c", "weight": weights[0]}, {"service": "c", "cluster": "east", "weight": weights[1]}])
    async with world.load("c", clients=4) as load:
        await load.more(SPLIT_REQUESTS)
    answered, total = load.answered, sum(load.answered.values())
    spread = 5 * math.sqrt(total * SHARE * (1 - SHARE))  # five standard deviations: chance exceeds them once in a million
    held = abs(answered[THERE] - SHARE * total) <= spread and not load.bad
    told = f"`web` calls `c`: of {total} requests west answered {answered[HERE]} and east {answered[THERE]}, {load.bad or 'no'} errors"
    world.prove(f"split {weights[0]}/{weights[1]}", told, held)
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
        told = f"`c` of west is killed under load: east answers {took * 1000:.0f} ms later, {lost} of the requests under way were lost"
        # Two clients: what was under way when the server died may be lost, and nothing else.
        world.prove("failover", told, away and lost <= 2)
        await web_server(world, "west")
        await sidecar.start(intercept=False)
        back = time.monotonic()
        home = await answered(load, HERE, 1)
        took = time.monotonic() - back
        await answered(load, HERE, 100)
        lost = sum(load.bad.values()) - lost
        world.prove("and back", f"`c` of west is there again: it answers after {took:.1f} s, {lost} errors", home and lost == 0)
    await arrange(world)


async def outage(world: World) -> None:
    """East is gone, silently, while west's own service is called; and what is called of east says so."""
    leg = world.clusters.legs["east"]
    async with world.load("shop") as load:
        moments, good = [time.monotonic()], load.good
        await trio.sleep(PHASE)
        await enough(load, good)
        moments.append(time.monotonic())
        with leg.fault(Fault.SILENCE):
            answers: list[dict[str, Any]] = []
            slowest, good = 0.0, load.good
            while time.monotonic() < moments[1] + PHASE or len(answers) < 3:
                began = time.monotonic()
                answers.append(await remote(world))
                slowest = max(slowest, time.monotonic() - began)
            await enough(load, good)
            moments.append(time.monotonic())
        good = load.good
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
    held = all(answer.get("status") in (502, 503, 504) and "error=" in answer.get("proxy-status", "") for answer in answers)
    told = f"{len(answers)} calls while it was gone, none answered; the slowest took {slowest:.2f} s, the last was told: {said}"
    world.prove("c.east meanwhile", f"{told} {why(last, held)}", held)
    world.prove("c.east afterwards", f"answers {recovered:.2f} s after the way is mended", recovered < PATIENCE)


def tell_outage(world: World, phases: list[Summary]) -> None:
    """What `web` saw of west's own service, before, during and after."""
    for when, phase in zip(("before", "during", "after"), phases, strict=True):
        world.prove(f"east's outage: {when}", f"`web` calls `shop` of west: {phase}", phase.requests > ENOUGH and phase.errors == 0)


async def hops(world: World) -> None:
    """Who was verified by whom at each hop, from each proxy's own log."""
    world.stage.report.section = "Identities across clusters, as each of the three proxies verified and logged them"
    name = world.stage.mesh.authority.identity
    web, gateway = str(name("web")), str(world.east.sidecars["gateway"].identity)
    for label, service, port in (("HTTP", "c", HTTP), ("gRPC", "stock", GRPC), ("TCP", "mail", MAIL)):
        target = str(name(service))
        near, way, far = world.west.sidecars["web"], world.east.sidecars["gateway"], world.east.sidecars[service]
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
        told = "; ".join(f"{who} verified {whom}: {seen or 'nobody'}" for who, whom, seen, _ in verified)
        world.prove(f"{label}: {service}.east", told, held)


STEPS: tuple[tuple[str, Callable[[World], Awaitable[None]]], ...] = (
    ("two clusters: what joins them, and what does not", apart),
    ("services of the other cluster are called by name: HTTP, gRPC, TCP", by_name),
    ("requests are split between the clusters", split),
    ("west's `c` dies under load, and comes back", failover),
    ("the whole of east goes away, and comes back", outage),
    ("reading who each proxy has verified", hops),
)


# What the steps share...


async def arrange(world: World, **traits: Any) -> None:
    """Give west's `c` a split or a failover, and wait until the sidecar of `web` knows."""
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
    """How many directories the sidecar of `web` has taken."""
    counted = await world.west.sidecars["web"].metrics()
    return sum(value for name, value in counted.items() if name.startswith("isthmus_directory_reloads_total{") and '"ok"' in name)


async def answered(load: Load, name: str, more: int) -> bool:
    """Wait until a server has answered so many more requests."""
    goal = load.answered[name] + more
    with trio.move_on_after(PATIENCE):
        while load.answered[name] < goal:  # noqa: ASYNC110  # several clients count, and a moment's delay harms nobody
            await trio.sleep(0.005)
        return True
    return False


async def enough(load: Load, since: int) -> None:
    """Wait until a load of which `since` requests were answered before has answered enough. Raises LabError."""
    await load.more(max(0, since + ENOUGH + 1 - load.good), timeout=PATIENCE)


async def remote(world: World) -> dict[str, Any]:
    """One call of east's `c`, whatever comes of it."""
    return await world.stage.client(world.stage.web, "once", "c.east", HTTP)


async def found(sidecar: Any, *, port: int = 0, **facts: str) -> dict[str, Any]:
    """The first line of a proxy's log with these facts; waits for it, since a line is written when what it tells of has ended."""
    with trio.move_on_after(PATIENCE / 2):
        while True:
            for line in sidecar.logged():
                if facts.items() <= line.items() and (not port or f":{port}" in f"{line.get('destination')} {line.get('authority')}"):
                    return dict(line)
            await trio.sleep(0.1)
    return {}
