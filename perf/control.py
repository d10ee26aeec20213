"""Measure the directory channel: one replica of the control plane, a simulated cluster, and many
simulated proxies.

    python -m perf.control [--services N] [--endpoints N] [--proxies N] [--uses N] [--changes N]
                           [--seconds S]

The replica is a real `isthmus control`. Its API server is in memory (lab/kube_api), in this
process, which also holds the proxies' ends of the connections. Each proxy follows `uses` services,
drawn at random. Then `changes` endpoints a second become ready or not ready. The time of a change
runs from the write at the API server until the last proxy that follows the service has received
it. It includes what this process needs for both. Last, a real end of a proxy, in a process of its
own, uses services one after the other: the time of each first use, and the growth of its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import trio

from lab.console import print_table
from lab.kube_api.server import ApiServer
from lab.kube_api.store import KINDS, Json
from proxy.config.schema_files import ControlPlaneConfig
from proxy.directory.channel.connector import Connector
from proxy.directory.channel.messages import (
    ALPN,
    MOST_KEYS,
    Frames,
    Hello,
    Ping,
    Subscribe,
    Update,
    frame,
    from_control,
)
from proxy.directory.channel.source import ControlSource
from proxy.directory.former_identities import FormerIdentities
from proxy.identity.identity import Identity, MaterialFiles
from proxy.identity.issue import issue, make_root
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.tls.expiry import Expiries
from proxy.net.tls.handshake import TLSOffer, TLSStream, tls_client

DOMAIN = "cluster.local"
CONTROL = SpiffeId(DOMAIN, "isthmus", "isthmus-control")
WEB = SpiffeId(DOMAIN, "shop", "web")
HOST = "127.0.0.1"
_NODES = 1000
_HANDSHAKES = 16
_POD, _SERVICE, _SLICE = (
    KINDS["v1", "pods"],
    KINDS["v1", "services"],
    KINDS["discovery.k8s.io/v1", "endpointslices"],
)


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a run. `endpoints`: of each service."""

    services: int
    endpoints: int
    proxies: int
    uses: int
    changes: int
    seconds: float


@dataclass(slots=True)
class Cluster:
    """The objects of the simulated cluster."""

    size: Size
    api: ApiServer
    made: int = 0

    def fill(self) -> None:
        """Write all objects."""
        for number in range(self.size.services):
            self.api.store.create(_SERVICE, "shop", service(number))
            addresses = [pod_address(number, at) for at in range(self.size.endpoints)]
            for at, address in enumerate(addresses):
                self.api.store.create(_POD, "shop", pod(f"s{number}-{at}", address))
            self.api.store.create(_SLICE, "shop", slice_of(number, addresses))
        # Each watch looks through the history for what is new.
        self.api.store.compact()

    def change(self) -> int:
        """One endpoint of a service becomes ready, or not ready; the number of the service. Each
        service has its turn, so that two changes do not undo each other before they are seen."""
        number = self.made * 7919 % self.size.services
        at = self.made // self.size.services % self.size.endpoints
        self.made += 1

        def changed(item: Json) -> Json:
            conditions = item["endpoints"][at]["conditions"]
            conditions["ready"] = conditions["serving"] = not conditions["ready"]
            return item

        self.api.store.update(_SLICE, ("shop", f"s{number}-1"), changed)
        return number


def pod_address(service_number: int, at: int) -> str:
    """The address of a pod."""
    number = service_number * 16 + at
    return f"10.{128 + number // 65536}.{number // 256 % 256}.{number % 256}"


def cluster_address(number: int) -> str:
    """The address of a service."""
    return f"10.96.{number // 256}.{number % 256}"


def service(number: int) -> Json:
    """A service."""
    address = cluster_address(number)
    return {
        "metadata": {"name": f"s{number}"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            "selector": {"app": f"s{number}"},
        },
    }


def pod(name: str, address: str) -> Json:
    """A meshed pod."""
    return {
        "metadata": {"name": name, "labels": {"isthmus.dev/meshed": "true", "app": name}},
        "spec": {"serviceAccountName": "web", "nodeName": f"node-{hash(name) % _NODES}"},
        "status": {"phase": "Running", "podIPs": [{"ip": address}]},
    }


def slice_of(number: int, addresses: list[str]) -> Json:
    """The slice of a service."""
    endpoints = [
        {
            "addresses": [address],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": f"node-{hash(address) % _NODES}",
            "targetRef": {"kind": "Pod", "name": f"s{number}-{at}", "namespace": "shop"},
        }
        for at, address in enumerate(addresses)
    ]
    return {
        "metadata": {
            "name": f"s{number}-1",
            "labels": {"kubernetes.io/service-name": f"s{number}"},
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


@dataclass(slots=True)
class Followers:
    """All simulated proxies. `began` and `missing`: the change of a service that is under way, and
    how many proxies have not received it."""

    size: Size
    identity: Identity
    port: int
    following: dict[int, int] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    received: int = 0
    bytes_received: int = 0
    streams: list[TLSStream] = field(default_factory=list)

    def changed(self, number: int) -> None:
        """A service has changed. A change of it that is under way stays the one that is timed."""
        count = self.following.get(number, 0)
        if count and number not in self.began:
            self.began[number], self.missing[number] = time.monotonic(), count

    def _arrived(self, number: int) -> None:
        if number in self.began:
            self.missing[number] -= 1
            if not self.missing[number]:
                self.times.append(time.monotonic() - self.began.pop(number))
                del self.missing[number]

    async def join(self, nursery: trio.Nursery, limit: trio.CapacityLimiter) -> None:
        """Connect one proxy and wait until it has all its entries. Then it follows them in
        `nursery`."""
        async with limit:
            stream = await tls_client(
                await Dialer().dial(Address(HOST, self.port)),
                self.identity.client_context,
                TLSOffer(CONTROL.sni, (ALPN,)),
                verify=None,
                timeout=60.0,
            )
            self.streams.append(stream)
            numbers = random.sample(range(self.size.services), self.size.uses)
            for number in numbers:
                self.following[number] = self.following.get(number, 0) + 1
            keys = [f"a/{cluster_address(number)}" for number in numbers]
            data = frame(Hello("node-1"))
            for at in range(0, len(keys), MOST_KEYS):
                data += frame(Subscribe(tuple((key, b"") for key in keys[at : at + MOST_KEYS])))
            await stream.send_all(data)
            frames, known = Frames(1 << 24), 0
            while known < len(numbers):
                known += len(await self._updates(stream, frames))
        nursery.start_soon(self._follow, stream, frames)

    async def _follow(self, stream: TLSStream, frames: Frames) -> None:
        while True:
            for key in await self._updates(stream, frames):
                third, fourth = map(int, key.split(".")[2:])
                self.received += 1
                self._arrived(third * 256 + fourth)

    async def _updates(self, stream: TLSStream, frames: Frames) -> list[str]:
        data = await stream.receive_some()
        if not data:
            raise SystemExit("the control plane has closed a connection")
        self.bytes_received += len(data)
        messages = map(from_control, frames.feed(data))
        return [message.key for message in messages if isinstance(message, Update)]

    async def ping(self) -> None:
        """Keep all connections alive."""
        while True:
            await trio.sleep(10)
            for stream in self.streams:
                await stream.send_all(frame(Ping()))


def cpu(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int | str, key: str = "VmRSS") -> float:
    """Resident memory of a process in MiB; `VmHWM`: the peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} of {pid}")


def materials(folder: Path) -> dict[str, Path]:
    """Files of the identities of the control plane and of all proxies, by name."""
    root = make_root(DOMAIN)
    paths = {"roots": folder / "roots.pem"}
    paths["roots"].write_bytes(root.certificate_pem)
    for name, identity in (("control", CONTROL), ("web", WEB)):
        leaf = issue(root, identity, timedelta(hours=2))
        for kind, pem in (("crt", leaf.certificate_pem), ("key", leaf.key_pem)):
            paths[f"{name}.{kind}"] = folder / f"{name}.{kind}"
            paths[f"{name}.{kind}"].write_bytes(pem)
            paths[f"{name}.{kind}"].chmod(0o600)
    return paths


def web_identity(folder: Path) -> Identity:
    """The identity of the proxies."""
    return Identity(MaterialFiles(folder / "web.crt", folder / "web.key", (folder / "roots.pem",)))


@contextmanager
def control(
    folder: Path, paths: dict[str, Path], api_port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A replica; it writes to control.log."""
    kubeconfig = folder / "kubeconfig"
    server = {"name": "x", "cluster": {"server": f"http://{HOST}:{api_port}"}}
    context = {"name": "x", "context": {"cluster": "x", "user": "x"}}
    document = {"apiVersion": "v1", "kind": "Config", "current-context": "x"}
    users = {"clusters": [server], "users": [{"name": "x", "user": {}}], "contexts": [context]}
    kubeconfig.write_text(json.dumps(document | users))
    command = [sys.executable, "-m", "proxy.cli", "control", "--kubeconfig", str(kubeconfig)]
    command += ["--admin", "", "--listen", f"{HOST}:0", "--name", "bench"]
    command += ["--certificate", str(paths["control.crt"]), "--key", str(paths["control.key"])]
    command += ["--roots", str(paths["roots"])]
    with (folder / "control.log").open("wb") as log, subprocess.Popen(command, stderr=log) as made:
        try:
            yield made
        finally:
            made.terminate()


async def port_of(folder: Path) -> int:
    """The port that the replica listens on, once discovery is complete."""
    while True:
        text = (folder / "control.log").read_text()
        if "discovery is complete" in text and "proxies connect to " in text:
            line = text.split("proxies connect to ")[1].splitlines()[0]
            return int(line.rpartition(":")[2])
        await trio.sleep(0.1)


async def measure(size: Size, folder: Path) -> dict[str, Any]:
    """All figures."""
    paths = materials(folder)
    found: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        api = ApiServer(nursery)
        cluster = Cluster(size, api)
        cluster.fill()
        (listener,) = await trio.open_tcp_listeners(0, host=HOST)
        nursery.start_soon(trio.serve_listeners, api.serve, [listener])
        began = time.monotonic()
        with control(folder, paths, listener.socket.getsockname()[1]) as replica:
            port = await port_of(folder)
            found["seconds until discovery is complete"] = time.monotonic() - began
            found["CPU s until then"] = cpu(replica.pid)
            found["MiB then"] = resident(replica.pid)
            followers = Followers(size, web_identity(folder), port)
            await connect(nursery, followers, found)
            found["MiB with all proxies"] = resident(replica.pid)
            await churn(cluster, followers, replica.pid, found)
            found["MiB at the peak"] = resident(replica.pid, "VmHWM")
            found |= await trio.to_thread.run_sync(one_proxy, folder, port, size)
            nursery.cancel_scope.cancel()
    return found


async def connect(nursery: trio.Nursery, followers: Followers, found: dict[str, Any]) -> None:
    """Connect all proxies."""
    limit, began = trio.CapacityLimiter(_HANDSHAKES), time.monotonic()
    async with trio.open_nursery() as starting:
        for _ in range(followers.size.proxies):
            starting.start_soon(followers.join, nursery, limit)
    nursery.start_soon(followers.ping)
    found["seconds to connect all proxies"] = time.monotonic() - began


async def churn(cluster: Cluster, followers: Followers, pid: int, found: dict[str, Any]) -> None:
    """Change endpoints, and time the changes."""
    size = cluster.size
    before, began, made = cpu(pid), time.monotonic(), 0
    own = time.process_time()
    while (now := time.monotonic()) - began < size.seconds:
        while made < (now - began) * size.changes:
            followers.changed(cluster.change())
            made += 1
        await trio.sleep(0.01)
    seconds = time.monotonic() - began
    found["changes a second"] = made / seconds
    found["CPU of the replica, cores"] = (cpu(pid) - before) / seconds
    found["CPU of this process, cores"] = (time.process_time() - own) / seconds
    await trio.sleep(3)
    found["changes that did not arrive within 3 s"] = len(followers.began)
    found["updates received"] = followers.received
    times = sorted(followers.times)
    found["changes timed"] = len(times)
    found["ms until all have it, median"] = statistics.median(times) * 1000
    found["ms until all have it, p99"] = times[int(len(times) * 0.99)] * 1000
    found["ms until all have it, longest"] = times[-1] * 1000


def one_proxy(folder: Path, port: int, size: Size) -> dict[str, Any]:
    """The figures of one proxy's end, in a process of its own."""
    words = [str(folder), str(port), str(size.services), str(size.uses)]
    done = subprocess.run(
        [sys.executable, "-m", "perf.control", "--one-proxy", *words],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def use_services(folder: Path, port: int, services: int, uses: int) -> dict[str, Any]:
    """Use services one after the other."""
    settings = ControlPlaneConfig(address=f"{HOST}:{port}", identity=str(CONTROL))
    connector = Connector(
        web_identity(folder), Dialer().dial, Expiries(0.0, lambda _: None, enabled=False)
    )
    source = ControlSource(settings, Hello("node-1"), connector, FormerIdentities(600, 65536))
    first: list[float] = []
    second: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, lambda _: None)
        while source.since is None:  # noqa: ASYNC110  # once, before anything is measured
            await trio.sleep(0.01)
        warm, *numbers = random.sample(range(services), uses + 1)
        with source.holding(Address(cluster_address(warm), 80)):
            await source.learn(Address(cluster_address(warm), 80))
        before = resident("self")
        for number in numbers:
            for times in (first, second):
                address, began = Address(cluster_address(number), 80), time.perf_counter()
                with source.holding(address):
                    await source.learn(address)
                    known = source.current.find_address(address)
                times.append(time.perf_counter() - began)
                if known is None or not known.service:
                    raise SystemExit(f"{address} is not known")
        grown = resident("self") - before
        nursery.cancel_scope.cancel()
    return {
        "MiB that a proxy grows by": grown,
        "ms of a first use, median": statistics.median(first) * 1000,
        "ms of a first use, longest": max(first) * 1000,
        "ms of a second use, median": statistics.median(second) * 1000,
    }


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m perf.control", description=__doc__)
    parser.add_argument("--one-proxy", nargs=4, help=argparse.SUPPRESS)
    for name, value in (
        ("services", 10_000), ("endpoints", 10), ("proxies", 1000), ("uses", 50), ("changes", 100),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value})")
    parser.add_argument("--seconds", type=float, default=60.0, help="of changes (default: 60)")
    args = parser.parse_args()
    if args.one_proxy:
        folder, *numbers = args.one_proxy
        port, services, uses = map(int, numbers)
        print(json.dumps(trio.run(use_services, Path(folder), port, services, uses)))
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    size = Size(args.services, args.endpoints, args.proxies, args.uses, args.changes, args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        found = trio.run(measure, size, Path(folder))
    rows = [
        (name, f"{figure:.3f}" if isinstance(figure, float) else str(figure))
        for name, figure in found.items()
    ]
    print_table(("figure", "value"), rows)


if __name__ == "__main__":
    main()
