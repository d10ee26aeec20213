"""What the end-to-end tests build and inspect: pairs of meshed pods, the results of curl, the
metrics and logs of proxies."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import trio
from prometheus_client.parser import text_string_to_metric_families

from lab.cluster import Cluster, Lab
from lab.load import proxy_error
from lab.mesh import Mesh, Service
from lab.pod import PACKAGES, Pod
from lab.process import Process
from lab.sidecar import Sidecar

WEB, SOCKET, ECHO, MAIL = 8080, 9000, 7000, 2525
PROGRAMS = PACKAGES
LAST_GET = b"GET / HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n"
# Sidecars get it by the environment, like everything that runs in the laboratory.
FAST_PATH = os.environ.get("ISTHMUS_FAST_PATH", "true") == "true"
_numbers = count(1)


@dataclass
class Pair:
    """Two pods with sidecars: `web` calls the service `shop`, which the pod `shop` serves."""

    cluster: Cluster
    mesh: Mesh
    web: Pod
    shop: Pod
    service: Service
    near: Sidecar = field(init=False)
    far: Sidecar = field(init=False)

    def __post_init__(self) -> None:
        self.near, self.far = self.mesh.sidecars["web"], self.mesh.sidecars["shop"]

    @property
    def both(self) -> tuple[Sidecar, Sidecar]:
        return self.near, self.far


def prepare(
    lab: Lab,
    ports: Mapping[int, str],
    *,
    web: Mapping[str, Any] | None = None,
    shop: Mapping[str, Any] | None = None,
) -> Pair:
    """A pair in its own cluster. `web` and `shop` are merged over the configurations. Nothing is
    started."""
    cluster = lab.cluster(f"c{next(_numbers)}")
    mesh = Mesh(cluster)
    first, second = cluster.pod("web"), cluster.pod("shop")
    mesh.join(first, **(web or {}))
    mesh.join(second, **(shop or {}))
    return Pair(cluster, mesh, first, second, mesh.service("shop", [second], ports))


async def web_and_echo(lab: Lab) -> Pair:
    """A running pair whose `shop` serves HTTP and an echo server."""
    pair = prepare(lab, {WEB: "detect", ECHO: "opaque"})
    await web_server(pair.shop)
    await echo_server(pair.shop)
    await pair.mesh.start()
    return pair


async def serve(pod: Pod, app: str, *arguments: str, port: int, name: str | None = None) -> Process:
    """Start one of the laboratory's servers (lab/apps) in a pod."""
    return await pod.start(
        name or app, [sys.executable, "-m", f"lab.apps.{app}", *arguments], port=port, env=PROGRAMS
    )


async def web_server(pod: Pod, port: int = WEB) -> Process:
    return await serve(pod, "web", "::", str(port), port=port, name=f"web-{port}")


async def client(pod: Pod, what: str, *arguments: str, timeout: float = 60) -> dict[str, Any]:
    """Run one of the laboratory's clients (lab.apps.client) in a pod. Returns what it prints."""
    done = await pod.run(
        [sys.executable, "-m", "lab.apps.client", what, *arguments], env=PROGRAMS, timeout=timeout
    )
    assert done.ok, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def python(pod: Pod, code: str, *arguments: str, timeout: float = 60) -> str:
    """Run a Python program in a pod. Returns its output."""
    done = await pod.run_python(code, *arguments, timeout=timeout)
    assert done.ok, done.stderr.decode()
    return done.text


ASK = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=60)
for _ in range(int(sys.argv[3])):
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200, answer.status
    answer.read()
"""


async def ask_again_and_again(pair: Pair, times: int) -> None:
    """Repeated plain requests on one connection."""
    await python(pair.web, ASK, pair.service.ipv4, str(WEB), str(times))


# curl...


@dataclass(frozen=True)
class Curled:
    """The last response that curl got. `exit` is curl's exit code, `errors` its error messages."""

    exit: int
    status: int
    headers: dict[str, list[str]]
    body: bytes
    info: dict[str, Any]
    errors: str

    @property
    def error(self) -> str:
        """The error type in Proxy-Status (RFC 9209); empty if no proxy made the response."""
        return proxy_error(self.headers.get("proxy-status", [""])[0])


async def curl(pod: Pod, *arguments: str, stdin: bytes = b"", timeout: float = 30) -> Curled:
    """Run curl in a pod. Its report follows a NUL on standard error, so that it differs from bodies
    and error messages."""
    report = "%{stderr}\\0%{json}%{header_json}".replace("\\0", "\x01")
    done = await pod.run(
        ["curl", "-sS", "-m", str(timeout - 5), "-w", report, *arguments],
        stdin=stdin,
        timeout=timeout,
    )
    errors, _, text = done.stderr.decode(errors="replace").partition("\x01")
    info, end = json.JSONDecoder().raw_decode(text)
    headers = json.JSONDecoder().raw_decode(text[end:].lstrip())[0]
    return Curled(done.returncode, info["response_code"], headers, done.stdout, info, errors)


# Metrics and logs of a proxy...


async def counted(sidecar: Sidecar, name: str, **labels: str) -> float:
    """The sum of the samples with this name that have these labels."""
    status, text = await sidecar.admin("/metrics")
    assert status == 200, text
    samples = [
        sample for family in text_string_to_metric_families(text) for sample in family.samples
    ]
    return sum(
        sample.value
        for sample in samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def on_fast_path(sidecar: Sidecar) -> float:
    """Exchanges that have finished on the fast path."""
    return await counted(sidecar, "isthmus_fast_path_exchanges_total", end="finished")


async def logged(sidecar: Sidecar, text: str, **facts: object) -> dict[str, Any]:
    """Wait for a log line that contains `text` and has these facts. Returns the line."""

    def find() -> Any:
        for line in reversed(sidecar.logged()):
            if text in json.dumps(line, ensure_ascii=False) and facts.items() <= line.items():
                return line
        return None

    found: dict[str, Any] = await eventually(
        find, f"a line with {text!r} and {facts} in the log of {sidecar.pod.name}"
    )
    return found


async def eventually(probe: Callable[[], Any], what: str, timeout: float = 40.0) -> Any:
    """Call `probe` (sync or async) until its result is true. Returns the result."""
    with trio.move_on_after(timeout):
        while True:
            answer = probe()
            if isinstance(answer, Awaitable):
                answer = await answer
            if answer:
                return answer
            await trio.sleep(0.05)
    raise AssertionError(f"not within {timeout:g} s: {what}")


# Raw connections...


async def exchange_raw(
    pod: Pod, host: str, port: int, data: bytes, *, patience: float = 30.0, end: bool = False
) -> bytes:
    """Connect from a pod, send `data`, and read until the other side ends or resets the connection.
    Returns what was read. Fails if the connection does not end within `patience` seconds. `end`:
    half-close at once after `data`."""
    received = b""
    try:
        stream = await pod.connect(host, port)
    except ConnectionResetError:  # it was open, and reset before the read
        return received
    async with stream:
        with trio.fail_after(patience):
            try:
                await stream.send_all(data)
                if end:
                    await stream.send_eof()
                while piece := await stream.receive_some():
                    received += piece
            except trio.BrokenResourceError:
                pass
    return received


ECHO_SERVER = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
async def echo(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass
    finally:
        writer.close()
async def main():
    server = await asyncio.start_server(echo, None, int(sys.argv[1]), backlog=1024)
    await server.serve_forever()
asyncio.run(main())
"""


async def echo_server(pod: Pod, port: int = ECHO) -> Process:
    return await pod.python(f"echo-{port}", ECHO_SERVER, str(port), port=port)


@dataclass
class Health:
    """The metrics and logs of a pair's proxies before a test, and the check afterwards. The check
    is the teardown of each test, so the tests of a module can run in any order."""

    pair: Pair
    clear: dict[str, float]
    errors: dict[str, float]
    lines: dict[str, int]

    @classmethod
    async def of(cls, pair: Pair) -> Health:
        return cls(
            pair,
            {kind: await _clear(pair, kind) for kind in _CLEAR},
            {
                sidecar.pod.name: await counted(sidecar, "isthmus_errors_total")
                for sidecar in pair.both
            },
            {sidecar.pod.name: len(sidecar.logged()) for sidecar in pair.both},
        )

    async def only_mutual_tls(self) -> None:
        """Check that the server's sidecar has accepted connections by mutual TLS only."""
        assert {kind: await _clear(self.pair, kind) for kind in _CLEAR} == self.clear

    async def no_errors(self) -> None:
        """Check that the proxies have counted no errors at all."""
        for sidecar in self.pair.both:
            errors = await counted(sidecar, "isthmus_errors_total")
            assert errors == self.errors[sidecar.pod.name]

    async def nothing_wrong(self, *levels: str) -> None:
        """Check that there was no internal error, no exception in the log and no line of one of
        these levels. Wait until no pooled connection is in use."""
        for sidecar in self.pair.both:
            assert await counted(sidecar, "isthmus_errors_total", reason="internal") == 0
            new = sidecar.logged()[self.lines[sidecar.pod.name] :]
            assert [line for line in new if line["level"] in levels or "exception" in line] == []
            await eventually(
                partial(_nothing_active, sidecar),
                f"no connection of a pool is in use in {sidecar.pod.name}",
            )


_CLEAR = ("none", "passthrough", "unknown")


async def _clear(pair: Pair, kind: str) -> float:
    return await counted(
        pair.far,
        "isthmus_connections_opened_total",
        direction="inbound",
        peer="src",
        tls=kind,
    )


async def _nothing_active(sidecar: Sidecar) -> bool:
    return await counted(sidecar, "isthmus_pool_connections", state="active") == 0
