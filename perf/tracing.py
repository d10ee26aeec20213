"""The cost of tracing: off, on and not recorded, on and all recorded. CPU time per request and hop,
latency, and the microseconds of a span on its request's path.

Baseline: tracing off. The pairs of proxies run side by side and are loaded in turn, each round in a
different order. The collector is a separate process that discards what it gets.
"""

from __future__ import annotations

import gc
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path

from lab.console import print_table
from perf.pair import (
    HOST,
    Pair,
    await_port,
    free_port,
    isthmus_pair,
    make_identities,
    running,
    server,
)
from proxy.exchange.exchange import Body, ConnectionInfo, Exchange, Handler, Whole
from proxy.exchange.trace_layer import Side, Tracing, trace
from proxy.net.address import Address
from proxy.net.socket_stream import Stream
from proxy.telemetry.metrics import Metrics
from proxy.wire.messages import Field, Headers, RequestHead, ResponseHead
from tracing.queue import TAKEN, Outcome, QueueSettings, SpanQueue
from tracing.sampling import Sampling, Tracer
from tracing.spans import Record

ROUNDS, SECONDS, CONNECTIONS = 3, 4, 8
CALLS, REPEATS = 2_000, 50
TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
FIELDS = [
    (b"Host", b"shop"),
    (b"User-Agent", b"curl/8.5.0"),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"gzip"),
    (b"Cookie", b"a=b"),
]
SEVERAL = [
    (b"X-B3-TraceId", TRACE),
    (b"X-B3-SpanId", SPAN),
    (b"X-B3-ParentSpanId", b"b7ad6b7169203331"),
    (b"X-B3-Sampled", b"1"),
]
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
    """(requests, p50 in ms, p99 in ms) under load for SECONDS."""
    header = ["-H", f"traceparent: {_w3c(flags.encode())[0][1].decode()}"] if flags else []
    command = [
        "wrk",
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{SECONDS}",
        "--latency",
        *header,
        f"http://{HOST}:{pair.outbound.port}/",
    ]
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=SECONDS + 30
    ).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(text)
    times = {match[1]: float(match[2]) * _UNITS[match[3]] for match in _LATENCY.finditer(text)}
    return (
        int(next(line.split()[0] for line in text.splitlines() if "requests in" in line)),
        times["50"],
        times["99"],
    )


def requests() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-perf-")))
        make_identities(folder)
        back, collector = stack.enter_context(server(folder)), free_port()
        process = stack.enter_context(
            running([sys.executable, "-c", COLLECTOR, str(collector)], folder / "collector.log")
        )
        await_port(collector, process, folder / "collector.log")
        settings = {
            "off": {"tracing": {"exporter": "none"}},
            "on": {"tracing": {"endpoint": f"http://{HOST}:{collector}"}},
        }
        pairs = {}
        for name, given in settings.items():
            (folder / name).mkdir()
            for side in ("client", "server"):
                (folder / name / side).symlink_to(folder / side)
            pairs[name] = stack.enter_context(
                isthmus_pair(folder / name, back, {"settings": given})
            )
        off, on = pairs["off"], pairs["on"]
        cases = {
            "off": (off, None),
            "off, with a header": (off, "01"),
            "on, not recorded": (on, "00"),
            "on, all recorded": (on, "01"),
        }
        cpu: dict[str, list[float]] = {name: [] for name in cases}
        latency: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for pair in (off, on):
            load(pair, "01")
        for number in range(ROUNDS):
            order = list(cases.items())
            for name, (pair, flags) in order[number:] + order[:number]:
                before = sum(proxy.cpu() for proxy in pair.proxies)
                count, p50, p99 = load(pair, flags)
                cpu[name].append(
                    (sum(proxy.cpu() for proxy in pair.proxies) - before) / count / 2 * 1e6
                )
                latency[name].append((p50, p99))
        print(
            f"{CONNECTIONS} connections, {ROUNDS} rounds of {SECONDS} s, median (lowest - highest)"
        )
        base = statistics.median(cpu["off"])
        rows = []
        for name, values in cpu.items():
            p50, p99 = (
                statistics.median(found[which] for found in latency[name]) for which in (0, 1)
            )
            mid = statistics.median(values)
            rows.append(
                [
                    name,
                    f"{mid:.0f}",
                    f"({min(values):.0f} - {max(values):.0f})",
                    f"{mid / base:.2f} x",
                    f"{p50:.2f}",
                    f"{p99:.2f}",
                ]
            )
        head = ["tracing", "CPU us per request and hop", "(lowest - highest)", "of off"]
        print_table([*head, "p50 ms", "p99 ms"], rows)
        print(
            "memory: "
            + ", ".join(
                f"{name} {pair.inbound.resident() / 2**20:.1f} MiB"
                for name, pair in (("off", off), ("on", on))
            )
        )


def _w3c(flags: bytes) -> list[Field]:
    return [(b"traceparent", b"00-%b-%b-%b" % (TRACE, SPAN, flags))]


class _Bare(Exchange):
    """An exchange that is not sent: only the layer around it is measured."""

    __slots__ = ()

    async def inform(self, head: ResponseHead) -> None: ...
    async def respond(self, head: ResponseHead, body: Body) -> None: ...
    async def switch(self, head: ResponseHead) -> Stream: ...  # type: ignore[empty-body]  # never called
    def abort(self, code: int | None = None, trailers: Headers | None = None) -> None: ...


def spans() -> None:
    """CPU microseconds of the layer for one request, from its head to the queue, without the
    handler.
    """
    here = Address(HOST, 1)
    facts, answer = (
        ConnectionInfo("inbound", here, here),
        ResponseHead(200, Headers([(b"Content-Length", b"2")])),
    )

    async def handler(exchange: Exchange) -> None:
        exchange.response = answer
        exchange.on_response(200)
        exchange.on_attempt(exchange)

    def once(layered: Handler, context: list[Field], version: bytes = b"1.1") -> Callable[[], None]:
        items = [*FIELDS, *context]
        lines = Headers(items).encode()

        def call() -> None:
            headers = Headers.canonical(lines, []) if version == b"1.1" else Headers(items)
            exchange = _Bare(RequestHead(b"GET", b"/path", headers, version), Whole(), facts)
            coroutine: Coroutine[None, None, None] = layered(exchange)  # type: ignore[assignment]  # handlers promise an Awaitable; ours are coroutines
            try:
                coroutine.send(None)
            except StopIteration:
                return

        return call

    def layered(side: Side) -> Handler:
        return trace(Tracing(Tracer(Sampling()), queue.put), side)(handler)

    queue = SpanQueue(
        _DiscardingExporter,
        QueueSettings(2 * CALLS, batch=CALLS, delay=3600),
        Metrics().spans,
        print,
    )
    bare, bare2 = once(handler, _w3c(b"01")), once(handler, _w3c(b"01"), b"2")
    cases = {
        "off": (once(trace(None, "server")(handler), _w3c(b"01")), bare),
        "on, no context": (once(layered("server"), [(b"X-Other", b"1")]), bare),
        "on, not recorded": (once(layered("server"), _w3c(b"00")), bare),
        "recorded, server": (once(layered("server"), _w3c(b"01")), bare),
        "recorded, client": (once(layered("client"), _w3c(b"01")), bare),
        "recorded, both": (once(layered("both"), _w3c(b"01")), bare),
        "server, with tracestate": (
            once(layered("server"), [*_w3c(b"01"), (b"tracestate", b"a=1,b=2")]),
            bare,
        ),
        "server, B3": (once(layered("server"), [(b"b3", TRACE + b"-" + SPAN + b"-1")]), bare),
        "server, B3 in several": (once(layered("server"), SEVERAL), bare),
        "server, W3C and B3": (once(layered("server"), [*_w3c(b"01"), *SEVERAL]), bare),
        "server, HTTP/2": (once(layered("server"), _w3c(b"01"), b"2"), bare2),
        "client, HTTP/2": (once(layered("client"), _w3c(b"01"), b"2"), bare2),
    }
    print(
        f"the layer alone: the best of {REPEATS} rounds of {CALLS} calls, minus the best without it"
    )
    rows = []
    for name, (call, without) in cases.items():
        took, alone = [], []
        for _ in range(REPEATS):
            took.append(_timed(call))
            while len(queue):
                time.sleep(0.001)  # the exporter takes spans as soon as they fill a batch
            alone.append(_timed(without))
        rows.append([name, f"{min(took) - min(alone):.2f}"])
    print_table(["", "us per request"], rows)


def _timed(call: Callable[[], None]) -> float:
    gc.collect()
    gc.disable()
    started = time.thread_time()
    for _ in range(CALLS):
        call()
    took = (time.thread_time() - started) / CALLS * 1e6
    gc.enable()
    return took


class _DiscardingExporter:
    """An exporter that discards everything: its work is not on a request's path."""

    def prepare(self, records: Sequence[Record]) -> None: ...
    def send(self, seconds: float) -> Outcome:  # noqa: ARG002  # it takes no time
        return TAKEN

    def forget(self) -> None: ...
    def close(self) -> None: ...


def main() -> None:
    spans()
    requests()


if __name__ == "__main__":
    main()
