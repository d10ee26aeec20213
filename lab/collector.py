"""A trace collector: receives spans by OTLP over HTTP, decodes them with OpenTelemetry's own
messages, and shows them.

    python -m lab.collector PORT FILE      in a pod; appends spans to FILE, a JSON object per line
    with Collector() as collector: ...     in a test, on its own port

It uses the standard library's HTTP server and shares no code with the proxies.
"""

import gzip
import json
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}
RAW = ".raw"  # suffix of a second file: the raw requests, each preceded by its length in four bytes
MOST_BODY = 64 * 1024 * 1024


@dataclass(slots=True)
class Event:
    name: str
    at: int
    attributes: dict[str, Any]


@dataclass(slots=True)
class Span:
    """A span as received. Ids are hexadecimal, times are nanoseconds since 1970."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    status: str = "unset"
    message: str = ""
    state: str = ""
    remote: bool = False
    scope: str = ""
    links: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def pod(self) -> str:
        return str(self.resource.get("k8s.pod.name", ""))

    @property
    def cluster(self) -> str:
        return str(self.resource.get("k8s.cluster.name", ""))


def decode(body: bytes) -> list[Span]:
    """The spans of an export request. Raises google.protobuf's DecodeError if it is invalid."""
    spans = []
    for group in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                events = [
                    Event(event.name, event.time_unix_nano, _attributes(event.attributes))
                    for event in span.events
                ]
                spans.append(
                    Span(
                        name=span.name,
                        kind=KINDS.get(span.kind, "unspecified"),
                        trace_id=span.trace_id.hex(),
                        span_id=span.span_id.hex(),
                        parent_id=span.parent_span_id.hex(),
                        start=span.start_time_unix_nano,
                        end=span.end_time_unix_nano,
                        attributes=_attributes(span.attributes),
                        resource=resource,
                        status={0: "unset", 1: "ok", 2: "error"}[span.status.code],
                        message=span.status.message,
                        state=span.trace_state,
                        remote=bool(span.flags & 0x200),
                        scope=f"{scope.scope.name} {scope.scope.version}",
                        links=[link.span_id.hex() for link in span.links],
                        events=events,
                    )
                )
    return spans


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


def read(path: Path) -> list[Span]:
    """The spans that a collector program has written so far, without an incomplete last line."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text("utf-8").rpartition("\n")
    spans = []
    for line in whole.splitlines():
        found = json.loads(line)
        found["events"] = [Event(**event) for event in found["events"]]
        spans.append(Span(**found))
    return spans


class Collector:
    """Receives on a port of 127.0.0.1 (0: any free one), or on all addresses. `answer` is the
    response status; tests may change it.
    """

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.spans: list[Span] = []
        self.requests: list[dict[str, str]] = []  # the headers of each
        self.answer: tuple[int, dict[str, str], bytes] = (
            200,
            {},
            ExportTraceServiceResponse().SerializeToString(),
        )
        self.hold = threading.Event()  # while cleared, responses wait
        self.hold.set()
        self.arrived = threading.Condition()
        self._server = ThreadingHTTPServer((host, port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self, count: int, seconds: float = 15.0) -> list[Span]:
        """Wait until there are at least `count` spans; returns all. Raises TimeoutError."""
        with self.arrived:
            if not self.arrived.wait_for(lambda: len(self.spans) >= count, seconds):
                raise TimeoutError(f"{len(self.spans)} of {count} spans came within {seconds:g} s")
            return list(self.spans)

    def received(self, body: bytes) -> None:
        """Handle one accepted request."""
        self.spans += decode(body)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(min(int(self.headers.get("content-length", 0)), MOST_BODY))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.hold.wait(30)
                status, headers, answer = collector.answer
                seen = {name.lower(): value for name, value in self.headers.items()} | {
                    ":path": self.path
                }
                with collector.arrived:
                    collector.requests.append(seen)
                    if 200 <= status < 300:
                        collector.received(body)
                    collector.arrived.notify_all()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/x-protobuf",
                    "Content-Length": str(len(answer)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class _Writer(Collector):
    """Appends to a file instead of keeping spans in memory."""

    def __init__(self, port: int, path: Path) -> None:
        super().__init__(port, "0.0.0.0")
        self._path = path

    def received(self, body: bytes) -> None:
        with (
            self._path.open("a", encoding="utf-8") as file,
            self._path.with_suffix(RAW).open("ab") as raw,
        ):
            raw.write(len(body).to_bytes(4, "big") + body)
            file.write("".join(json.dumps(asdict(span)) + "\n" for span in decode(body)))


def main() -> None:
    with _Writer(int(sys.argv[1]), Path(sys.argv[2])):
        threading.Event().wait()


if __name__ == "__main__":
    main()
