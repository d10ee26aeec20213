"""gRPC calls by grpcio from within a pod: a single client program, or a load during which a test
changes the mesh."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from lab.pod import Pod
from lab.process import Process
from tests.e2e.stage import PROGRAMS, Pair, prepare, python, serve

GRPC = 50051
THREADS = 6  # of a load

_BEGIN = """
import grpc, hashlib, json, os, queue, sys, threading, time
from lab.apps.grpc_client import OPTIONS, Shop
from lab.apps.grpc_service import SERVICE
host, port = sys.argv[1], int(sys.argv[2])
shop = Shop(host, port)
def status(error):
    metadata = dict([*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())])
    kind = [part[6:] for part in metadata.get("proxy-status", "").split(";") if part.startswith("error=")][:1]  # of who noticed
    return " ".join([error.code().name, *kind])
"""

# Threads that call in sequence over one channel, until a file appears. It prints the results as a
# line of JSON a few times a second.
_LOAD = """
threads, stop, pause = int(sys.argv[3]), sys.argv[4], float(sys.argv[5])
outcomes, answered, longest, lock, ended = {}, {}, 0.0, threading.Lock(), threading.Event()
name = shop.unary_unary("Name")
def call():
    global longest
    while not ended.is_set():
        began = time.monotonic()
        try:
            who, outcome = name(b"", timeout=30).decode(), "OK"
        except grpc.RpcError as error:
            who, outcome = None, status(error)
            if " " not in outcome:
                outcome += f" ({error.details()[:80]})"
        with lock:
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            longest = max(longest, time.monotonic() - began)
            if who:
                answered[who] = answered.get(who, 0) + 1
        time.sleep(pause if who else 0.05)
def tell():
    with lock:
        print(json.dumps({"outcomes": outcomes, "answered": answered, "longest": longest, "ended": ended.is_set()}), flush=True)
running = [threading.Thread(target=call) for _ in range(threads)]
for thread in running:
    thread.start()
while not os.path.exists(stop):
    tell()
    time.sleep(0.05)
ended.set()
for thread in running:
    thread.join()
tell()
"""


def build(
    lab: Any, *, web: dict[str, Any] | None = None, shop: dict[str, Any] | None = None
) -> Pair:
    """A pair whose pod `shop` serves the service `shop`, and with a third pod, `annex`, the service
    `stock`. Nothing is started."""
    pair = prepare(lab, {GRPC: "detect"}, web=web, shop=shop)
    annex = pair.cluster.pod("annex")
    pair.mesh.join(annex, "shop", **(shop or {}))
    # A busy machine may suspend a pod for a moment. Then it gets fewer requests for a while. Here
    # that while is short.
    pair.mesh.service(
        "stock", [pair.shop, annex], {GRPC: "detect"}, policy={"balancing": {"decay": "1s"}}
    )
    return pair


async def grpc_server(pod: Pod) -> Process:
    return await serve(pod, "grpc_service", str(GRPC), pod.name, port=GRPC)


async def start(pair: Pair) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(grpc_server, pair.shop)
        nursery.start_soon(grpc_server, pair.cluster.pods["annex"])
        nursery.start_soon(pair.mesh.start)


def server(pair: Pair) -> Process:
    return pair.shop.processes["grpc_service"]


async def calling(
    pod: Pod, code: str, *arguments: str, host: str = "shop", port: int = GRPC, timeout: float = 60
) -> Any:
    """Run a client program. It finds `shop` (the server's calls, lab.apps.grpc_client) and
    `status`. Returns its output, as JSON."""
    return json.loads(
        await python(pod, _BEGIN + code, host, str(port), *arguments, timeout=timeout)
    )


async def speaking(pod: Pod, name: str, code: str, *arguments: str, host: str = "shop") -> Process:
    """Start such a client in the background."""
    return await pod.start(
        name, [sys.executable, "-c", _BEGIN + code, host, str(GRPC), *arguments], env=PROGRAMS
    )


class Calls:
    """`async with Calls(pod, host) as load: ...`: unary calls over one channel. The outcome of each
    is recorded: "OK", or the status with the type of the error in Proxy-Status if there is one
    ("UNAVAILABLE connection_refused")."""

    def __init__(
        self, pod: Pod, host: str, *, threads: int = THREADS, pause: float = 0.002
    ) -> None:
        """`pause`: seconds between two calls of a thread."""
        self._pod = pod
        self._host = host
        self._threads = threads
        self._pause = pause
        self._stop = Path(pod.directory / f"stop-{id(self)}")
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        arguments = (str(self._threads), str(self._stop), str(self._pause))
        self._process = await speaking(
            self._pod, f"calls-{id(self)}", _LOAD, *arguments, host=self._host
        )
        await self.more(self._threads)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 40):
            await self.stop()

    async def stop(self) -> None:
        """Let the calls in progress finish."""
        assert self._process is not None
        self._stop.touch()
        await self._process.wait()
        while not self._process.output.ended:
            await self._process.output.changed.wait()

    def _said(self) -> dict[str, Any]:
        assert self._process is not None
        for line in reversed(self._process.output.lines):
            if line.startswith("{"):
                said: dict[str, Any] = json.loads(line)
                return said
        return {}

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(self._said().get("outcomes", {}))

    @property
    def answered(self) -> Counter[str]:
        return Counter(self._said().get("answered", {}))

    @property
    def longest(self) -> float:
        """Seconds that the slowest call took."""
        return float(self._said()["longest"])

    @property
    def bad(self) -> dict[str, int]:
        return {outcome: number for outcome, number in self.outcomes.items() if outcome != "OK"}

    async def more(self, number: int, outcome: str = "OK", timeout: float = 60.0) -> None:
        """Wait for `number` more of this outcome."""
        assert self._process is not None
        goal = self.outcomes[outcome] + number
        with trio.move_on_after(timeout):
            while self.outcomes[outcome] < goal:
                assert not self._process.output.ended, self._process.output.tail()
                await self._process.output.changed.wait()
            return
        raise AssertionError(
            f"not {number} more {outcome!r} within {timeout:g} s: {dict(self.outcomes)}"
        )
