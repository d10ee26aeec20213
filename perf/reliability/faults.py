"""Faults of programs, links and files, each on its own small mesh, as the members see them."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import trio

from lab.capture import Capture
from lab.cluster import Lab
from lab.faults import link_cut
from lab.load import Load
from lab.mesh import Mesh, Service
from lab.pod import OPERATOR, PACKAGES, Pod
from lab.process import LabError, Process
from lab.sidecar import ADMIN_PORT, http_get
from perf.reliability.report import Row

HTTP, TCP = 8080, 9000
# The lab has shorter timeouts than the defaults; here the defaults are measured.
SETTINGS: dict[str, Any] = {
    "log": {"access": False},
    "shutdown": {"grace": "25s", "outbound_minimum": "3s"},
    "directory": {"settle": "500ms"},
    "admin": {"metrics_max_age": "1s"},
}
_numbers = count(1)
HEAD = ("Fault", "Required", "Measured", "Result")


@dataclass(slots=True)
class Scene:
    """A member, and a service on some pods, all with sidecars."""

    mesh: Mesh
    web: Pod
    pods: list[Pod]
    service: Service

    def app(self, pod: Pod) -> Process:
        return pod.processes["app"]

    def load(self, clients: int = 6) -> Load:
        return Load(self.web, self.service.ipv4, HTTP, clients=clients)

    def serve_by(self, pods: Iterable[Pod]) -> None:
        """Move the service to these pods, in all directories."""
        self.service.pods = tuple(pods)
        self.mesh.publish()


async def start_app(pod: Pod, app: str) -> Process:
    """Start one of the servers of lab/apps in a pod."""
    return await pod.start(
        "app",
        [sys.executable, "-m", f"lab.apps.{app}", "::", str(HTTP), pod.name],
        port=HTTP,
        env=PACKAGES,
    )


@asynccontextmanager
async def scene(lab: Lab, replicas: int, app: str = "web") -> AsyncIterator[Scene]:
    """A running scene in its own cluster; the end of the block stops its pods."""
    cluster = lab.cluster(f"scene{next(_numbers)}")
    mesh = Mesh(cluster)
    web = cluster.pod("web")
    pods = [cluster.pod(f"shop{number}") for number in range(replicas)]
    mesh.join(web, **SETTINGS)
    for pod in pods:
        mesh.join(pod, "shop", **SETTINGS)
        await start_app(pod, app)
    service = mesh.service("shop", pods, {HTTP: "http1", TCP: "opaque"})
    await mesh.start()
    try:
        yield Scene(mesh, web, pods, service)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 30):
            await cluster.aclose()
            del lab.clusters[cluster.name]


@dataclass(frozen=True, slots=True)
class Measured:
    """The result of a fault in words, and what did not hold."""

    words: str
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    title: str
    rule: str
    run: Callable[[Lab], Awaitable[Measured]]


def judged(load: Load, since: float) -> Measured:
    """Whether no request of a load has failed since a time (time.monotonic)."""
    summary = load.summary(since)
    slowest = max((sample.seconds for sample in load.samples if sample.when >= since), default=0.0)
    faults = (f"{load.bad}",) if summary.errors else ()
    return Measured(
        f"{summary.errors} of {summary.requests} failed; slowest {slowest * 1000:.0f} ms", faults
    )


async def apps_restarted(lab: Lab) -> Measured:
    async with scene(lab, 3) as found, found.load() as load:
        since = time.monotonic()
        for pod in found.pods:
            await pod.restart(found.app(pod), port=HTTP)
            await trio.sleep(1)
    return judged(load, since)


async def sidecar_killed(lab: Lab) -> Measured:
    async with scene(lab, 1) as found, found.load() as load:
        since = time.monotonic()
        sidecar = found.mesh.sidecars[found.pods[0].name]
        sidecar.running().kill()
        await sidecar.running().wait()
        await sidecar.start(intercept=False)
        away = time.monotonic() - since
        await load.more(100)
    measured = judged(load, since)
    # On a busy machine the start can take longer than requests wait (`queue.timeout` of a policy, 3
    # s): then some of them must fail.
    return Measured(f"{measured.words}; ready again after {away:.1f} s", measured.faults)


async def app_away(lab: Lab) -> Measured:
    async with scene(lab, 1) as found, found.load() as load:
        app = found.app(found.pods[0])
        app.kill()
        await app.wait()
        await trio.sleep(3)
        await start_app(found.pods[0], "web")
        back = time.monotonic()
        await load.more(100)
        served = min(
            sample.when
            for sample in load.samples
            if sample.when >= back and sample.outcome == "200"
        )
        late = [
            sample for sample in load.samples if sample.when > served and sample.outcome != "200"
        ]
        await trio.sleep(2)
    faults = (f"{len(late)} errors after the first response",) if late else ()
    if served - back > 1.0:
        faults = (*faults, "the first response took more than a second")
    return Measured(
        f"first response {(served - back) * 1000:.0f} ms after the server was back, then"
        f" {len(late)} errors",
        faults,
    )


async def app_dies_first(lab: Lab) -> Measured:
    async with scene(lab, 2) as found, found.load() as load:
        since = time.monotonic()
        pod = found.pods[0]
        found.app(pod).signal(signal.SIGTERM)
        await trio.sleep(2)
        await found.mesh.sidecars[pod.name].running().aclose(40)
        await trio.sleep(1)
        found.serve_by(found.pods[1:])
        await load.more(200)
    return judged(load, since)


async def rolling_restart(lab: Lab) -> Measured:
    async with scene(lab, 2) as found, found.load() as load:
        since = time.monotonic()
        for pod in found.pods:
            others = [each for each in found.pods if each is not pod]
            sidecar = found.mesh.sidecars[pod.name]
            sidecar.running().signal(signal.SIGTERM)
            found.app(pod).signal(signal.SIGTERM)
            await trio.sleep(0.5)  # until the endpoint is removed from all directories
            found.serve_by(others)
            await sidecar.running().wait()
            await found.app(pod).wait()
            await start_app(pod, "web")
            await sidecar.start(intercept=False)
            found.serve_by(found.pods)
            await trio.sleep(1)
    return judged(load, since)


async def node_dies(lab: Lab) -> Measured:
    async with scene(lab, 2) as found, found.load() as load:
        since = time.monotonic()
        with link_cut(found.pods[0]):
            await trio.sleep(0.5)  # until requests are in flight to it
            await load.settle(60)
            settled = time.monotonic() - since
            await load.more(200)
        behind = load.summary(since + settled)
    faults = []
    if settled > 35:
        faults.append("a request waited for more than 35 s")
    if behind.errors:
        faults.append(f"{load.bad}")
    words = (
        f"requests in progress ended within {settled:.1f} s; then {behind.errors} of"
        f" {behind.requests} failed"
    )
    return Measured(words, tuple(faults))


HOLD = """
import socket, sys, time
server = socket.create_server(("", int(sys.argv[1])))
client, _ = server.accept()
client.sendall(b"hello")
print("accepted", flush=True)
client.settimeout(300)
try:
    while client.recv(100):
        pass
except OSError as error:
    print("lost", error, flush=True)
print("gone", time.monotonic(), flush=True)
time.sleep(300)
"""


async def client_vanishes(lab: Lab) -> Measured:
    async with scene(lab, 1) as found:
        server = await found.pods[0].python("database", HOLD, str(TCP), port=TCP)
        stream = await found.web.connect(found.service.ipv4, TCP)
        await stream.receive_some(5)
        began = time.monotonic()
        with link_cut(found.web):
            try:
                line = await server.wait_line("gone", 75)
            except LabError:
                return Measured("", ("the server's connection was open after 75 s",))
        seconds = float(line.split()[1]) - began
    return Measured(
        f"the server's connection ended after {seconds:.1f} s",
        ("more than 60 s",) if seconds > 60 else (),
    )


async def quiet_client_leaves(lab: Lab) -> Measured:
    async with scene(lab, 1, "edge") as found:
        delays = []
        for _ in range(3):
            stream = await found.web.connect(found.service.ipv4, HTTP)
            await stream.send_all(b"GET /quiet HTTP/1.1\r\nHost: shop\r\n\r\n")
            while b"data" not in await stream.receive_some(65536):
                pass
            left = time.monotonic()
            await stream.aclose()
            await trio.sleep(3)
            delays += [when - left for when in (await _gone(found, left))[:1]]
    if len(delays) < 3:
        return Measured("", ("the server did not detect it within 3 s",))
    return Measured(
        f"the server detected it after {max(delays) * 1000:.0f} ms",
        ("more than a second",) if max(delays) > 1 else (),
    )


async def _gone(found: Scene, since: float) -> list[float]:
    """When clients of /quiet disconnected, as the server recorded."""
    status, body = await http_get(found.pods[0], "127.0.0.1", HTTP, "/gone")
    return [when for when in json.loads(body)["gone"] if when >= since] if status == 200 else []


EARLY = """
import http.client, json, sys
bad = 0
for _ in range(12):
    connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=20)
    try:
        connection.request("POST", "/early", body=bytes(4 << 20))
    except OSError:
        pass
    answer = connection.getresponse()
    answer.read()
    bad += answer.status != 413
    try:
        connection.request("GET", "/")
        second = connection.getresponse()
        second.read()
        bad += second.status != 200
    except (OSError, http.client.HTTPException):
        bad += 1
    connection.close()
print(bad)
"""


async def early_answer(lab: Lab) -> Measured:
    async with scene(lab, 1, "edge") as found, found.load(3) as load:
        since = time.monotonic()
        done = await found.web.run_python(EARLY, found.service.ipv4, str(HTTP), timeout=120)
        bad = int(done.text or "24")
    measured = judged(load, since)
    faults = (
        measured.faults
        if not bad
        else (*measured.faults, f"{bad} of 24 answers were missed: {done.stderr.decode()[-200:]}")
    )
    return Measured(
        f"{bad} of 24 exchanges of the uploader failed; other clients: {measured.words}", faults
    )


async def drained_server(lab: Lab) -> Measured:
    """A server that waits for its connections: how long it takes to end, with and without a
    sidecar. A native sidecar is stopped only after the application has ended.
    """
    seconds = {"without a sidecar": await _drain(lab, sidecar=False, signal_sidecar=False)}
    seconds["with one"] = await _drain(lab, sidecar=True, signal_sidecar=True)
    seconds["with a native one"] = await _drain(lab, sidecar=True, signal_sidecar=False)
    slow = [name for name, each in seconds.items() if each > seconds["without a sidecar"] + 2]
    faults = (f"more than two seconds longer {' and '.join(slow)}",) if slow else ()
    return Measured(", ".join(f"{each:.1f} s {name}" for name, each in seconds.items()), faults)


async def _drain(lab: Lab, *, sidecar: bool, signal_sidecar: bool) -> float:
    """Seconds from SIGTERM to the end of the server. `signal_sidecar`: whether its sidecar gets the
    signal too.
    """
    cluster = lab.cluster(f"scene{next(_numbers)}")
    mesh = Mesh(cluster)
    pod, kubelet = cluster.pod("shop"), cluster.pod("kubelet")
    app = await start_app(pod, "edge")
    if sidecar:
        mesh.join(pod, **SETTINGS)
        await mesh.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_probe, kubelet, pod)
        await trio.sleep(3)
        began = time.monotonic()
        app.signal(signal.SIGTERM)
        if signal_sidecar:
            mesh.sidecars[pod.name].running().signal(signal.SIGTERM)
        with trio.move_on_after(60):
            await app.wait()
        seconds = time.monotonic() - began
        nursery.cancel_scope.cancel()
    await cluster.aclose()
    del lab.clusters[cluster.name]
    return seconds


async def _probe(kubelet: Pod, pod: Pod) -> None:
    """Probe once per second, from outside the mesh."""
    while True:
        with trio.move_on_after(1):
            await http_get(kubelet, pod.ipv4, HTTP, "/")
        await trio.sleep(1)


async def half_written_directory(lab: Lab) -> Measured:
    """Every prefix of the directory file exists for a moment; no clear text may be sent."""
    async with scene(lab, 1) as found:
        near = found.mesh.sidecars["web"]
        whole = near.directory_file.read_bytes()
        async with found.load(2) as load, Capture(found.web) as wire:
            since = time.monotonic()
            for size in range(0, len(whole), max(1, len(whole) // 60)):
                near.directory_file.write_bytes(whole[:size])  # in place, as an editor does
                await trio.sleep(0.3)
            near.write(near.directory_file, whole)
            await trio.sleep(1)
        clear = sum(b"hello from the" in data for _, data in wire.frames)
    measured = judged(load, since)
    faults = measured.faults if not clear else (*measured.faults, f"{clear} packets in clear text")
    return Measured(f"{clear} packets in clear text; {measured.words}", faults)


async def stopped_worker(lab: Lab) -> Measured:
    """One of two workers is stopped: the admin port must still answer."""
    cluster = lab.cluster(f"scene{next(_numbers)}")
    mesh = Mesh(cluster)
    pod = cluster.pod("shop")
    sidecar = mesh.join(pod, workers=2, **SETTINGS)
    await mesh.start()
    supervisor = sidecar.running().pid
    worker = _children(supervisor)[0]
    done = await pod.run(["kill", "-STOP", worker], user=OPERATOR)
    slowest = 0.0
    statuses = set()
    for _ in range(20):
        began = time.monotonic()
        status, _ = await http_get(pod, "127.0.0.1", ADMIN_PORT, "/live")
        statuses.add(status)
        slowest = max(slowest, time.monotonic() - began)
        await trio.sleep(0.1)
    await pod.run(["kill", "-CONT", worker], user=OPERATOR)
    await cluster.aclose()
    del lab.clusters[cluster.name]
    faults = [] if done.ok else ["the worker was not stopped"]
    if slowest > 0.1:
        faults.append("more than 100 ms")
    return Measured(
        f"slowest /live {slowest * 1000:.0f} ms, status {', '.join(map(str, sorted(statuses)))}",
        tuple(faults),
    )


def _children(pid: int) -> list[str]:
    """The processes whose parent is `pid` (proc_pid_stat(5))."""

    def parent(stat: Path) -> str:
        with suppress(OSError):  # the process has ended
            return stat.read_text("ascii", "replace").rpartition(")")[2].split()[1]
        return ""

    return [
        stat.parent.name for stat in Path("/proc").glob("[0-9]*/stat") if parent(stat) == str(pid)
    ]


FAULTS = (
    Fault(
        "apps-restarted",
        "three applications restart, one after another",
        "no request fails",
        apps_restarted,
    ),
    Fault(
        "sidecar-killed",
        "the sidecar of the only endpoint is killed and started again",
        "no request fails",
        sidecar_killed,
    ),
    Fault(
        "app-away",
        "the only endpoint's application is down for 3 s",
        "it serves again within 1 s, without errors",
        app_away,
    ),
    Fault(
        "app-dies-first",
        "one of two applications ends before its sidecar",
        "no request fails",
        app_dies_first,
    ),
    Fault(
        "rolling-restart",
        "two replicas restart with their sidecars",
        "no request fails",
        rolling_restart,
    ),
    Fault(
        "node-dies",
        "packets to one of two endpoints are dropped",
        "requests in progress end within 35 s",
        node_dies,
    ),
    Fault(
        "client-vanishes",
        "packets from a database client are dropped",
        "the server's connection ends within 60 s",
        client_vanishes,
    ),
    Fault(
        "quiet-client-leaves",
        "a client leaves during a quiet event stream",
        "the server detects it within 1 s",
        quiet_client_leaves,
    ),
    Fault(
        "early-answer",
        "12 uploads get 413 before they are read",
        "no later request fails",
        early_answer,
    ),
    Fault(
        "drained-server",
        "SIGTERM to a probed server that waits for its connections",
        "as fast as without a sidecar",
        drained_server,
    ),
    Fault(
        "half-directory",
        "the directory file is written in pieces",
        "no clear text, no request fails",
        half_written_directory,
    ),
    Fault(
        "stopped-worker",
        "one of two workers is stopped (SIGSTOP)",
        "/live answers within 100 ms",
        stopped_worker,
    ),
)


async def run(lab: Lab, only: frozenset[str]) -> AsyncIterator[Row]:
    """The rows of the table, as they are measured."""
    for fault in FAULTS:
        if fault.name not in only:
            continue
        measured = await fault.run(lab)
        yield Row("faults", fault.name, (fault.title, fault.rule, measured.words), measured.faults)
