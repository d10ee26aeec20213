"""A rolling restart of two replicas under load loses no request.

Rules: Kubernetes sends SIGTERM to the application and its sidecar at the same moment, and removes
the pod from the directory later. The application is a typical one: it stops listening, finishes
what it has, and then ends. A POST is retried only if it was not processed. The outcome of every
request is recorded."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import trio

from lab.load import Load
from lab.mesh import Mesh, Service
from lab.pod import Pod
from lab.process import Process
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import eventually

pytestmark = pytest.mark.lab

APP = 8090
REQUESTS = 400  # between two steps
LATE = 1.0  # seconds until the directory changes
SETTINGS: dict[str, Any] = {"shutdown": {"grace": "60s"}}

# Ends with SIGTERM, when its open connections have ended.
SERVER = """
import http.server, json, signal, socket, sys, threading
name = sys.argv[2]
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = False  # so that server_close waits for those of the open connections
    request_queue_size = 128
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 65536
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        body = json.dumps({"name": name}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
server = Server(("::", int(sys.argv[1])), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever(poll_interval=0.05)
server.server_close()
"""


class Replicas:
    """`web` calls the service `shop`, which two pods serve."""

    def __init__(self, laboratory: Laboratory, name: str) -> None:
        cluster = laboratory.lab.cluster(name)
        self.mesh = Mesh(cluster)
        self.web = cluster.pod("web")
        self.pods = [cluster.pod("shop-1"), cluster.pod("shop-2")]
        for pod in (self.web, *self.pods):
            self.mesh.join(pod, "web" if pod is self.web else "shop", **SETTINGS)
        self.service: Service = self.mesh.service("shop", self.pods, {APP: "http1"})

    async def start(self) -> None:
        for pod in self.pods:
            await self.application(pod)
        await self.mesh.start()

    async def application(self, pod: Pod) -> Process:
        return await pod.python("application", SERVER, str(APP), pod.name, port=APP)

    def publish(self, *pods: Pod) -> None:
        self.service.pods = pods
        self.mesh.publish()


@pytest.fixture
def replicas(laboratory: Laboratory, request: pytest.FixtureRequest) -> Replicas:
    async def build() -> Replicas:
        replicas = Replicas(laboratory, f"r{abs(hash(request.node.name)) % 100000}")
        await replicas.start()
        return replicas

    return laboratory.run(build)


async def stopped(*processes: Process) -> None:
    for process in processes:
        process.signal(signal.SIGTERM)
    with trio.fail_after(40):
        for process in processes:
            assert await process.wait() == 0


async def answers(load: Load, pod: Pod) -> None:
    before = load.answered[pod.name]
    await eventually(lambda: load.answered[pod.name] > before + 20, f"{pod.name} answers")


@pytest.mark.parametrize("body", [b"", b"hello"], ids=["GET", "POST"])
async def test_one_replica_after_the_other(replicas: Replicas, body: bytes) -> None:
    load = Load(replicas.web, replicas.service.ipv4, APP)
    load.body = body
    async with load:
        await load.more(REQUESTS)
        for pod, other in (replicas.pods, replicas.pods[::-1]):
            sidecar = replicas.mesh.sidecars[pod.name]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stopped, pod.processes["application"], sidecar.running())
                await trio.sleep(LATE)
                replicas.publish(other)
            await load.more(REQUESTS)
            await replicas.application(pod)
            await sidecar.start(intercept=False)
            replicas.publish(*replicas.pods)
            await answers(load, pod)
            await load.more(REQUESTS)
        await load.stop()
    print(dict(load.outcomes), load.connections, load.raced)
    assert load.bad == {}
    assert load.raced == 0


async def test_applications_that_end_before_their_sidecars(replicas: Replicas) -> None:
    """They are restarted beside their sidecars, in sequence, and the directory does not change."""
    async with Load(replicas.web, replicas.service.ipv4, APP) as load:
        await load.more(REQUESTS)
        for pod in replicas.pods * 2:
            pod.processes["application"].kill()
            await pod.processes["application"].wait()
            await load.more(REQUESTS)
            await replicas.application(pod)
            await answers(load, pod)
        await load.stop()
    print(dict(load.outcomes), load.connections, load.raced)
    assert load.bad == {}
    assert load.raced == 0
