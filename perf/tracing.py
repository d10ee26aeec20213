"""What does tracing cost? Off, on and not recorded, on and all of it recorded: processor time for a request and hop, latency, and the
microseconds that a span takes on the path of its request.

Baseline: tracing off. The pairs of proxies run side by side and are loaded in turn, each round in another order. The collector is a
process of its own that takes what it is sent and throws it away.
"""

from __future__ import annotations

import gc
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path

from perf.pair import HOST, Pair, await_port, free_port, isthmus_pair, make_identities, running, server
from proxy.exchange.exchange import Body, Exchange, Facts, Handler, Whole
from proxy.exchange.trace import Side, Tracing, trace
from proxy.net.address import Address
from proxy.net.streams import Stream
from proxy.wire.messages import Headers, RequestHead, ResponseHead
from tracing.sampling import Sampling, Tracer

ROUNDS, SECONDS, CONNECTIONS = 3, 4, 8
CALLS, REPEATS = 20_000, 7
CONTEXT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-"
_LATENCY = re.compile(r"^\s+(50|99)%\s+([0-9.]+)(us|ms|s)$", re.MULTILINE)
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}

COLLECTOR = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def load(pair: Pair, flags: str | None) -> tuple[int, float, float]:
    """(requests, p50 in ms, p99 in ms) under load for a while."""
    header = ["-H", f"traceparent: {CONTEXT}{flags}"] if flags else []
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}", "--latency", *header, f"http://{HOST}:{pair.outbound.port}/"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS + 30).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(text)
    times = {match[1]: float(match[2]) * _UNITS[match[3]] for match in _LATENCY.finditer(text)}
    return int(next(line.split()[0] for line in text.splitlines() if "requests in" in line)), times["50"], times["99"]


def requests() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-perf-")))
        make_identities(folder)
        back, collector = stack.enter_context(server(folder)), free_port()
        process = stack.enter_context(running([sys.executable, "-c", COLLECTOR, str(collector)], folder / "collector.log"))
        await_port(collector, process, folder / "collector.log")
        settings = {"off": {"tracing": {"exporter": "none"}}, "on": {"tracing": {"endpoint": f"http://{HOST}:{collector}"}}}
        pairs = {}
        for name, given in settings.items():
            (folder / name).mkdir()
            for side in ("client", "server"):
                (folder / name / side).symlink_to(folder / side)
            pairs[name] = stack.enter_context(isthmus_pair(folder / name, back, {"settings": given}))
        off, on = pairs["off"], pairs["on"]
        cases = {"off": (off, None), "off, with a header": (off, "01"), "on, not recorded": (on, "00"), "on, all recorded": (on, "01")}
        cpu: dict[str, list[float]] = {name: [] for name in cases}
        latency: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for pair in (off, on):
            load(pair, "01")
        for number in range(ROUNDS):
            order = list(cases.items())
            for name, (pair, flags) in order[number:] + order[:number]:
                before = sum(proxy.cpu() for proxy in pair.proxies)
                count, p50, p99 = load(pair, flags)
                cpu[name].append((sum(proxy.cpu() for proxy in pair.proxies) - before) / count / 2 * 1e6)
                latency[name].append((p50, p99))
        print(f"{CONNECTIONS} connections, {ROUNDS} rounds of {SECONDS} s, median (lowest - highest)")
        base = statistics.median(cpu["off"])
        for name, values in cpu.items():
            p50, p99 = (statistics.median(found[which] for found in latency[name]) for which in (0, 1))
            mid = statistics.median(values)
            line = f"{mid:6.0f} us of CPU per request and hop ({min(values):.0f} - {max(values):.0f}), {mid / base:.2f} times"
            print(f"  {name:20} {line}; p50 {p50:.2f} ms, p99 {p99:.2f} ms")
        print("  memory: " + ", ".join(f"{name} {pair.inbound.resident() / 2**20:.1f} MiB" for name, pair in (("off", off), ("on", on))))


class _Bare(Exchange):
    """An exchange that nobody sends: what is measured is the layer around it."""

    __slots__ = ()

    async def inform(self, head: ResponseHead) -> None: ...
    async def respond(self, head: ResponseHead, body: Body) -> None: ...
    async def switch(self, head: ResponseHead) -> Stream: ...  # type: ignore[empty-body]  # never called
    def abort(self, code: int | None = None, trailers: Headers | None = None) -> None: ...


def spans() -> None:
    """Microseconds of processor time of the layer for one request, without what the handler takes, in the same process and turn about."""
    here = Address(HOST, 1)
    fields = [
        (b"Host", b"shop"), (b"User-Agent", b"curl/8.5.0"), (b"Accept", b"*/*"), (b"Accept-Encoding", b"gzip"), (b"Cookie", b"a=b"),
    ]  # fmt: skip
    facts = Facts("inbound", here, here)
    answer = ResponseHead(200, Headers([(b"Content-Length", b"2")]))
    kept: list[object] = []

    async def handler(exchange: Exchange) -> None:
        exchange.response = answer
        exchange.on_response(200)
        exchange.on_attempt()

    def once(layered: Handler, context: list[tuple[bytes, bytes]]) -> Callable[[], None]:
        lines = Headers([*fields, *context]).encode()

        def call() -> None:
            exchange = _Bare(RequestHead(b"GET", b"/path", Headers.canonical(lines, [])), Whole(), facts)
            coroutine: Coroutine[None, None, None] = layered(exchange)  # type: ignore[assignment]  # handlers promise an Awaitable; ours are coroutines
            try:
                coroutine.send(None)
            except StopIteration:
                return

        return call

    def layer(side: Side) -> Handler:
        return trace(Tracing(Tracer(Sampling()), kept.append), side)(handler)

    def header(flags: bytes) -> list[tuple[bytes, bytes]]:
        return [(b"traceparent", CONTEXT.encode() + flags)]

    bare = once(handler, header(b"01"))
    cases = {
        "off": once(trace(None, "server")(handler), header(b"01")),
        "on, no context": once(layer("server"), [(b"X-Other", b"1")]),
        "on, not recorded": once(layer("server"), header(b"00")),
        "recorded, server": once(layer("server"), header(b"01")),
        "recorded, client": once(layer("client"), header(b"01")),
    }
    print(f"the layer alone, {CALLS} calls, best of {REPEATS}, less the call without it")
    for name, call in cases.items():
        found = min(_timed(call) - _timed(bare) for _ in range(REPEATS))
        print(f"  {name:20} {max(found, 0.0):6.2f} us per request")
        kept.clear()


def _timed(call: Callable[[], None]) -> float:
    gc.collect()
    gc.disable()
    started = time.thread_time()
    for _ in range(CALLS):
        call()
    took = (time.thread_time() - started) / CALLS * 1e6
    gc.enable()
    return took


def main() -> None:
    spans()
    requests()


if __name__ == "__main__":
    main()
