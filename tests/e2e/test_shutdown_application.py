"""An application that gets SIGTERM and waits for its open connections to end, ends as soon as it
would without a sidecar.

Rules: the application is a typical one: the threads of the standard library's server, joined at its
end. A prober sends it a request every half second, as the kubelet does, on a new connection each
time. The measured time is from its SIGTERM to its end."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from lab.cluster import Cluster
from lab.pod import Pod
from lab.process import Process
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import Pair, curl, echo_server, eventually, prepare

pytestmark = [pytest.mark.lab, pytest.mark.real]

APP, ECHO = 8090, 7000
SERVER = """
import http.server, signal, socket, sys, threading
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = False  # so that server_close waits for those of the open connections
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"well")
server = Server(("::", int(sys.argv[1])), Handler)
def stop(*_):
    threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, stop)
server.serve_forever()
server.server_close()
"""
PAUSE = 0.5  # seconds between probes
LATER = 1.5  # seconds that may be lost with a sidecar
PATIENCE = 20.0


@pytest.fixture
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        settings = {"shutdown": {"grace": "60s", "outbound_minimum": "3s"}}
        pair = prepare(laboratory.lab, {APP: "detect", ECHO: "opaque"}, web=settings, shop=settings)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(application, pair.shop)
            nursery.start_soon(echo_server, pair.web)
            nursery.start_soon(pair.mesh.start)
        return pair

    return laboratory.run(build)


async def application(pod: Pod) -> Process:
    return await pod.python("application", SERVER, str(APP), port=APP)


@dataclass
class Prober:
    """The results of probes, by their time."""

    outcomes: list[tuple[float, str]] = field(default_factory=list)

    def since(self, moment: float) -> set[str]:
        return {outcome for when, outcome in self.outcomes if when >= moment}

    async def answered(self) -> None:
        await eventually(
            lambda: [outcome for _, outcome in self.outcomes[-3:]] == ["200"] * 3,
            "three probes in a row are answered",
        )


@asynccontextmanager
async def probing(pod: Pod, host: str) -> AsyncIterator[Prober]:
    prober = Prober()

    async def probe() -> None:
        while True:
            began = time.monotonic()
            prober.outcomes.append((began, await ask(pod, host)))
            await trio.sleep(PAUSE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe)
        yield prober
        nursery.cancel_scope.cancel()


async def ask(pod: Pod, host: str) -> str:
    """A request on a new connection, as the kubelet makes it. Returns its status, or its error."""
    try:
        stream = await pod.connect(host, APP)
        async with stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n")
            with trio.fail_after(PATIENCE):
                answer = await stream.receive_some()
    except (OSError, trio.BrokenResourceError) as error:
        return type(error).__name__
    return answer[9:12].decode()


async def ends(process: Process) -> float:
    """Send SIGTERM to a program. Returns after how many seconds it has ended."""
    began = time.monotonic()
    process.signal(signal.SIGTERM)
    with trio.fail_after(PATIENCE):
        await process.wait()
    return time.monotonic() - began


async def without_a_sidecar(cluster: Cluster) -> float:
    pod = cluster.pod("plain")
    process = await application(pod)
    prober_pod = cluster.pod("prober")
    async with probing(prober_pod, pod.ipv4) as prober:
        await prober.answered()
        return await ends(process)


def term(sidecar: Sidecar) -> float:
    sidecar.running().signal(signal.SIGTERM)
    return time.monotonic()


async def test_it_gets_sigterm_together_with_its_sidecar(pair: Pair) -> None:
    alone = await without_a_sidecar(pair.cluster)
    async with probing(pair.cluster.pods["prober"], pair.shop.ipv4) as prober:
        await prober.answered()
        told = term(pair.far)
        assert await ends(pair.shop.processes["application"]) < alone + LATER
        await trio.sleep(2 * PAUSE)
        # Without a sidecar too: there is no listener any more. The first probe may have been in
        # progress.
        assert prober.since(told + PAUSE) == {"ConnectionRefusedError"}
    with trio.fail_after(PATIENCE):
        assert await pair.far.running().wait() == 0


async def test_it_gets_sigterm_before_its_sidecar(pair: Pair) -> None:
    """As with native sidecars. The sidecar does not know that its application is ending, and
    continues to accept probes."""
    alone = await without_a_sidecar(pair.cluster)
    async with probing(pair.cluster.pods["prober"], pair.shop.ipv4) as prober:
        await prober.answered()
        told = time.monotonic()
        assert await ends(pair.shop.processes["application"]) < alone + LATER
        await eventually(lambda: prober.since(told + LATER), "one more probe")
        assert prober.since(told + LATER) == {"502"}
    assert (await curl(pair.web, f"http://shop:{APP}/")).status in (502, 503)


async def test_clients_of_the_mesh_that_have_left_do_not_hold_it_up(pair: Pair) -> None:
    """Their sidecar keeps its connections for a while, and so the application's connections too,
    but not longer."""
    for _ in range(5):
        assert (await curl(pair.web, f"http://shop:{APP}/")).status == 200
    began = time.monotonic()
    assert await ends(pair.shop.processes["application"]) < 3 + LATER  # pool.idle_timeout
    assert time.monotonic() - began < 3 + LATER


async def test_the_application_may_open_connections_for_a_while_after_the_sigterm_to_its_sidecar(
    pair: Pair,
) -> None:
    told = term(pair.far)
    await trio.sleep(2.2)
    stream = await pair.shop.connect(pair.web.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"\0last words")
        with trio.fail_after(PATIENCE):
            assert await stream.receive_some() == b"\0last words"
    with trio.fail_after(PATIENCE):
        assert await pair.far.running().wait() == 0
    assert time.monotonic() - told > 3.0
