"""Traces in the lab: a collector in its own pod, the tree of a trace as text, and forwarding to a
Jaeger outside.

    collector = await TraceCollector.start(cluster)
    mesh.join(pod, tracing=collector.settings())
    spans = await collector.trace(trace_id, 2)
    print("\n".join(tree(spans)))

The sandbox has its own network and cannot reach anything outside. To send spans to the user's
Jaeger, a process outside the sandbox forwards them: it gets the collector's requests through a
pipe, unchanged.
"""

import os
import struct
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import trio

from lab.cluster import Cluster
from lab.collector import RAW, Span, read
from lab.pod import ROOT, Pod
from lab.process import LabError

PORT = 4318
PIPE = "ISTHMUS_LAB_JAEGER"  # the environment variable with the pipe's file descriptor
PATIENCE = 15.0  # seconds
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class TraceCollector:
    """A pod without a sidecar that receives spans."""

    pod: Pod
    file: Path

    @classmethod
    async def start(cls, cluster: Cluster) -> Self:
        pod = cluster.pod("collector")
        file = pod.directory / "spans"
        command = [sys.executable, "-m", "lab.collector", str(PORT), str(file)]
        await pod.start("collector", command, port=PORT, env={"PYTHONPATH": str(ROOT)})
        return cls(pod, file)

    def settings(self, **more: Any) -> dict[str, Any]:
        """The section `tracing` of a proxy that exports to this collector, with short delays."""
        return {"endpoint": f"http://{self.pod.ipv4}:{PORT}", "delay": "100ms", **more}

    async def trace(self, trace_id: str, count: int) -> list[Span]:
        """Wait for `count` spans of a trace; returns all, by start time. Raises LabError."""
        return await gathered([self], trace_id, count)

    def all(self) -> list[Span]:
        return read(self.file)

    def spans(self, trace_id: str) -> list[Span]:
        return sorted(
            (span for span in self.all() if span.trace_id == trace_id), key=lambda span: span.start
        )

    def raw(self) -> Iterator[bytes]:
        """The export requests as received."""
        path = self.file.with_suffix(RAW)
        data = path.read_bytes() if path.exists() else b""
        while len(data) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(data)
            yield data[_LENGTH.size : _LENGTH.size + size]
            data = data[_LENGTH.size + size :]


async def gathered(collectors: Sequence[TraceCollector], trace_id: str, count: int) -> list[Span]:
    """Wait for `count` spans of a trace in several collectors together; returns all, by start time.
    Raises LabError.
    """
    found: list[Span] = []
    with trio.move_on_after(PATIENCE):
        while True:
            found = [span for collector in collectors for span in collector.spans(trace_id)]
            if len(found) >= count:
                return sorted(found, key=lambda span: span.start)
            await trio.sleep(0.05)
    raise LabError(f"there are {len(found)} spans of the trace {trace_id}, and not {count}")


def tree(spans: list[Span]) -> list[str]:
    """A trace as lines: each span under its parent, with its pod, facts and duration."""
    known = {span.span_id for span in spans}
    below: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        below.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)

    def lines(parent: str, stem: str) -> Iterator[str]:
        children = below.get(parent, [])
        for number, span in enumerate(children):
            last = number == len(children) - 1
            branch, further = (
                ("", "")
                if not stem and not parent
                else ("`- " if last else "|- ", "   " if last else "|  ")
            )
            yield f"{stem}{branch}{_headline(span)}"
            yield from (f"{stem}{further}   {text}" for text in _facts(span))
            yield from lines(span.span_id, stem + further)

    return list(lines("", ""))


def _headline(span: Span) -> str:
    outcome = span.attributes.get("rpc.response.status_code") or span.attributes.get(
        "http.response.status_code", ""
    )
    failed = f"  ERROR {span.attributes.get('error.type', '')}" if span.status == "error" else ""
    where = f"{span.cluster}/{span.pod}" if span.cluster else span.pod
    return (
        f"{span.name}  {span.kind.upper()}  {where}  {outcome}  {(span.end - span.start) / 1e6:.2f}"
        f" ms{failed}"
    )


def _facts(span: Span) -> Iterator[str]:
    at = span.attributes
    peer = f"{at.get('network.peer.address', '?')}:{at.get('network.peer.port', '?')}"
    yield (
        f"{'to' if span.kind == 'client' else 'from'} {at.get('isthmus.peer.identity', 'unknown')}"
        f" at {peer}"
    )
    if at.get("tls.established"):
        yield f"TLS {at['tls.protocol.version']}, {at['tls.cipher']}, {at['tls.curve']}"
    for name in (
        "isthmus.service",
        "isthmus.split.backend",
        "isthmus.cluster",
        "http.request.resend_count",
        "isthmus.proxy_status",
    ):
        if name in at:
            yield f"{name.removeprefix('isthmus.')}: {at[name]}"
    for event in span.events:
        more = "".join(
            f" {value}" for key, value in event.attributes.items() if key.startswith("isthmus.")
        )
        yield f"+{(event.at - span.start) / 1e6:.2f} ms {event.name}{more}"


def forward_outside(url: str) -> None:
    """Start a process that posts to `url` what it gets through a pipe. Call it before entering the
    sandbox.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            _forward(url, pipe.read())
        os._exit(0)
    os.close(reader)
    os.set_inheritable(writer, True)
    os.environ[PIPE] = str(writer)


def hand_over(bodies: Iterator[bytes]) -> bool:
    """Give export requests to the process outside, once; False if there is none."""
    descriptor = os.environ.pop(PIPE, "")
    if not descriptor:
        return False
    with os.fdopen(int(descriptor), "wb") as pipe:
        for body in bodies:
            pipe.write(_LENGTH.pack(len(body)) + body)
    return True


def traces_url(url: str) -> str:
    """The OTLP traces URL of a collector given without a path."""
    return url.rstrip("/") + "/v1/traces" if urlsplit(url).path in ("", "/") else url


def _forward(url: str, data: bytes) -> None:
    while len(data) >= _LENGTH.size:
        (size,) = _LENGTH.unpack_from(data)
        body, data = data[_LENGTH.size : _LENGTH.size + size], data[_LENGTH.size + size :]
        # S310: the user gave this URL
        request = urllib.request.Request(  # noqa: S310
            traces_url(url), body, {"Content-Type": "application/x-protobuf"}
        )
        try:
            urllib.request.urlopen(request, timeout=10).close()  # noqa: S310  (the user has named it)
        except (OSError, urllib.error.URLError) as error:
            os.write(2, f"isthmus demo: the spans could not be sent to {url}: {error}\n".encode())
            return
