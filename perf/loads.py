"""The measured work: each item is one kind of load for one kind of pair, limited in time, and
reports what was done.

All load generators are independent programs (wrk, h2load, curl), except the open-loop one
(perf/rate.py) and the idle connections.
"""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from perf.pair import HOST, Pair
from perf.peers import Kind

BULK = 256 << 20
BODIES = {"100": 100, "1k": 1024, "16k": 16384, "1m": 1 << 20, "bulk": BULK, "perf.Echo/Call": 100}
IDLE = 500


@dataclass(slots=True)
class Done:
    """`units` of work in `seconds`; latencies in microseconds by percentile; `facts`: other
    figures, by name.
    """

    units: float
    seconds: float
    latency: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """`run(pair, seconds)` does the work. CPU is reported in microseconds per `unit`. `resume`:
    whether TLS sessions are resumed. `fresh`: runs once, on newly started proxies.
    """

    name: str
    title: str
    kind: Kind
    unit: str
    run: Callable[[Pair, float], Done]
    resume: bool = True
    fresh: bool = False


def _output(command: list[str], seconds: float) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=seconds + 60
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def wrk(pair: Pair, seconds: float, connections: int, path: str = "", header: str = "") -> Done:
    """HTTP/1.1, closed loop: each connection sends the next request as soon as it gets a
    response."""
    extra = ["-H", header] if header else []
    timed = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency"]
    command = ["wrk", *timed, *extra, f"http://{HOST}:{pair.outbound.port}/{path}"]
    text = _output(command, seconds)
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"{' '.join(command)}\n{text}")
    found = re.search(r"(\d+) requests in ([\d.]+)(ms|s|m),", text)
    if found is None:
        raise SystemExit(text)
    length = float(found[2]) * {"ms": 1e-3, "s": 1.0, "m": 60.0}[found[3]]
    percentiles = re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", text)
    latency = {
        f"p{share}": float(value) * {"us": 1, "ms": 1e3, "s": 1e6}[unit]
        for share, value, unit in percentiles
    }
    return Done(float(found[1]), length, latency)


def h2load(pair: Pair, seconds: float, connections: int, streams: int) -> Done:
    """Unary calls like gRPC: 100 bytes each way, trailers."""
    with tempfile.NamedTemporaryFile("w") as body:
        body.write("x" * 100)
        body.flush()
        command = [
            "h2load", "-D", f"{max(1, round(seconds))}", "-c", str(connections), "-m", str(streams),
            "-d", body.name, "-H", "content-type: application/grpc", "-H", "te: trailers",
            f"http://{HOST}:{pair.outbound.port}/perf.Echo/Call",
        ]  # fmt: skip
        text = _output(command, seconds)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", text)
    # Requests in flight at the end count as failed; more failures are errors.
    if counts is None or int(counts[1]) == 0 or int(counts[2]) > connections * streams:
        raise SystemExit(text)
    return Done(float(counts[1]), max(1, round(seconds)))


def bulk(pair: Pair, _: float, flag: str = "--http1.1") -> Done:
    """One large body; a unit is a MiB."""
    command = [
        "curl",
        "-sS",
        flag,
        "-o",
        "/dev/null",
        "-w",
        "%{size_download} %{time_total}",
        f"http://{HOST}:{pair.outbound.port}/bulk",
    ]
    size, seconds = _output(command, 60).split()
    if int(size) != BULK:
        raise SystemExit(f"received {size} of {BULK} bytes")
    return Done(BULK / 2**20, float(seconds))


def rate(pair: Pair, seconds: float, per_second: int) -> Done:
    """A fixed rate, evenly spaced, even if the proxy cannot keep up."""
    seconds = max(seconds, 200 / per_second)
    found = json.loads(
        _output(
            [
                sys.executable,
                "-m",
                "perf.rate",
                str(pair.outbound.port),
                str(per_second),
                f"{seconds:g}",
            ],
            seconds,
        )
    )
    return Done(found["answers"], seconds, {name: found[name] for name in ("p50", "p99", "p99.9")})


def idle(pair: Pair, _: float) -> Done:
    """Open connections that were used once. A unit is a connection; the figure is its memory."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    before = [proxy.resident() for proxy in pair.proxies]
    clients = []
    began = time.perf_counter()
    try:
        for _number in range(IDLE):
            client = socket.create_connection((HOST, pair.outbound.port), timeout=30)
            clients.append(client)
            client.sendall(b"GET /100 HTTP/1.1\r\nHost: perf.test\r\n\r\n")
            if not client.recv(65536).startswith(b"HTTP/1.1 200"):
                raise SystemExit("an idle connection was not answered")
        facts = {"resident_kib": sum(before) / 2 / 1024}
        grown = [proxy.resident() - was for proxy, was in zip(pair.proxies, before, strict=True)]
        facts["per_connection_kib"] = sum(grown) / 2 / IDLE / 1024
    finally:
        for client in clients:
            client.close()
    return Done(IDLE, time.perf_counter() - began, facts=facts)


def works() -> list[Work]:
    def http1(name: str, title: str, connections: int, path: str = "") -> Work:
        return Work(
            name,
            title,
            "http1",
            "request",
            lambda pair, seconds: wrk(pair, seconds, connections, path),
        )

    fixed = [
        Work(
            f"rate-{number}",
            f"HTTP/1.1, 1 KiB, {number} requests/s",
            "http1",
            "request",
            partial(rate, per_second=number),
        )
        for number in (20, 200, 2000)
    ]
    close = "Connection: close"
    return [
        http1("c1-1k", "HTTP/1.1, 1 KiB, 1 connection", 1),
        http1("c16-1k", "HTTP/1.1, 1 KiB, 16 connections", 16),
        http1("c256-1k", "HTTP/1.1, 1 KiB, 256 connections", 256),
        http1("c16-100", "HTTP/1.1, 100 B, 16 connections", 16, "100"),
        http1("c16-16k", "HTTP/1.1, 16 KiB, 16 connections", 16, "16k"),
        http1("c16-chunked", "HTTP/1.1, 1 KiB in chunks, 16 connections", 16, "chunked/1k"),
        http1("c16-1m", "HTTP/1.1, 1 MiB, 16 connections", 16, "1m"),
        *fixed,
        Work(
            "h2-16x8",
            "HTTP/2, 16 connections x 8 streams",
            "http2",
            "request",
            partial(h2load, connections=16, streams=8),
        ),
        Work(
            "h2-bulk",
            "HTTP/2, one stream",
            "http2",
            "MiB",
            partial(bulk, flag="--http2-prior-knowledge"),
        ),
        Work(
            "tcp-1k",
            "opaque TCP, 1 KiB and back, 16 connections",
            "tcp",
            "request",
            partial(wrk, connections=16),
        ),
        Work("tcp-bulk", "opaque TCP, bulk", "tcp", "MiB", bulk),
        Work(
            "new-resumed",
            "new connections, TLS resumed",
            "tcp",
            "connection",
            partial(wrk, connections=8, header=close),
        ),
        Work(
            "new-full",
            "new connections, full handshake",
            "tcp",
            "connection",
            partial(wrk, connections=8, header=close),
            resume=False,
        ),
        Work("idle", f"{IDLE} idle mutual-TLS connections", "tcp", "connection", idle, fresh=True),
    ]
