"""Datagrams as a Jaeger agent receives them, decoded with the Thrift code of the exporter's own
package.

Runs in the environment of the extra (`make jaeger`), whose OpenTelemetry is older than that of all
other tests. The proxies here are real ones."""

from __future__ import annotations

import http.server
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "opentelemetry.exporter.jaeger.thrift",
    reason="the extra isthmus[jaeger] has an environment of its own: make jaeger",
)

from opentelemetry.exporter.jaeger.thrift.gen.agent import Agent
from thrift.protocol.TCompactProtocol import TCompactProtocolFactory
from thrift.transport.TTransport import TMemoryBuffer

from perf.pair import HOST, isthmus_pair, make_identities
from tests.tracing.records import PARENT, SPAN, TRACE, Agreed, grpc
from tests.tracing.records import http as record_of
from tracing import export
from tracing.queue import QueueSettings, SpanQueue
from tracing.resource import About, Resource

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # it is deprecated, and warns about that


class JaegerAgent:
    """Receives what is sent to an agent's port."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((HOST, 0))
        self.port: int = self.socket.getsockname()[1]
        self.batches: list[Any] = []

    def emitBatch(self, batch: Any) -> None:  # the method of the Thrift service
        self.batches.append(batch)

    def wait(self, count: int, seconds: float = 30.0) -> list[tuple[Any, Any]]:
        """Wait for spans; (process, span) of each. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while (
            len(found := [(batch.process, span) for batch in self.batches for span in batch.spans])
            < count
        ):
            self.socket.settimeout(max(0.01, until - time.monotonic()))
            protocol = TCompactProtocolFactory().getProtocol(TMemoryBuffer(self.socket.recv(65536)))
            Agent.Processor(self).process(protocol, protocol)
        return found


@pytest.fixture
def agent() -> Iterator[JaegerAgent]:
    found = JaegerAgent()
    with closing(found.socket):
        yield found


def tags(thing: Any) -> dict[str, object]:
    """The tags of a span or process; each has its value in the field of its type."""
    return {
        tag.key: next(v for v in (tag.vStr, tag.vBool, tag.vLong, tag.vDouble) if v is not None)
        for tag in thing.tags or ()
    }


def identifier(number: int, digits: int) -> str:
    """Thrift's integers are signed."""
    return f"{number % 2**64:0{digits}x}"


class Counts:
    def __init__(self) -> None:
        self.taken, self.lost = 0, 0

    def exported(self, spans: int) -> None:
        self.taken += spans

    def dropped(self, reason: str, spans: int) -> None:
        self.lost += spans

    def attempted(self, result: str) -> None:
        pass


def test_an_agent_receives_the_whole_span(agent: JaegerAgent) -> None:
    spans = export.SpanFactory(
        Resource(About({"POD_NAME": "web-7d4b9c6f5d-x2x9k"}, cluster="east"), print), "9"
    )
    exporter, counts = export.jaeger(spans, HOST, agent.port), Counts()
    queue = SpanQueue(lambda: exporter, QueueSettings(), counts, print)
    queue.put(record_of("client", tls=Agreed(), status=503, follows=b"1" * 16))
    queue.put(grpc())
    queue.close(20)
    (process, span), (_, call) = agent.wait(2)
    assert (counts.taken, counts.lost) == (2, 0)
    assert process.serviceName == "web"
    assert (span.operationName, call.operationName) == ("GET", "shop.Stock/Get")
    assert identifier(span.traceIdHigh, 16) + identifier(span.traceIdLow, 16) == TRACE.decode()
    assert (identifier(span.spanId, 16), identifier(span.parentSpanId, 16)) == (
        SPAN.decode(),
        PARENT.decode(),
    )
    assert [identifier(reference.spanId, 16) for reference in span.references] == ["1" * 16]
    found = tags(span)
    assert (found["span.kind"], found["error"], found["error.type"]) == ("client", True, "503")
    assert (found["http.response.status_code"], found["tls.curve"], found["url.full"]) == (
        503,
        "X25519MLKEM768",
        "http://shop:8080/a",
    )
    resource = {**tags(process), **found}  # this exporter puts the resource on the span
    assert (resource["k8s.pod.name"], resource["k8s.cluster.name"]) == (
        "web-7d4b9c6f5d-x2x9k",
        "east",
    )
    assert [
        [field.vStr for field in log.fields if field.key == "message"] for log in span.logs
    ] == [["isthmus.response.head"]]


@contextmanager
def application() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_spans_of_two_proxies_are_one_tree(agent: JaegerAgent) -> None:
    settings = {"tracing": {"exporter": "jaeger", "agent": f"{HOST}:{agent.port}", "delay": "50ms"}}
    with tempfile.TemporaryDirectory() as name, application() as port:
        folder = Path(name)
        make_identities(folder)
        with isthmus_pair(folder, port, {"settings": settings}) as pair:
            context = {"traceparent": f"00-{TRACE.decode()}-{PARENT.decode()}-01"}
            request = urllib.request.Request(
                f"http://{HOST}:{pair.outbound.port}/path?t=hunter2", headers=context
            )
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  (of our own making)
                assert answer.read() == b"ok"
            found = {tags(span)["span.kind"]: (process, span) for process, span in agent.wait(2)}
    (near_process, near), (far_process, far) = found["client"], found["server"]
    assert (near_process.serviceName, far_process.serviceName) == ("outbound", "inbound")
    for span in (near, far):
        assert identifier(span.traceIdHigh, 16) + identifier(span.traceIdLow, 16) == TRACE.decode()
        assert span.operationName == "GET"
        assert tags(span)["http.response.status_code"] == 200
    assert identifier(near.parentSpanId, 16) == PARENT.decode()
    assert far.parentSpanId == near.spanId
    assert tags(far)["isthmus.peer.identity"] == "spiffe://perf.test/ns/perf/sa/client"
    assert tags(near)["isthmus.peer.identity"] == "spiffe://perf.test/ns/perf/sa/server"
    assert "hunter2" not in repr(agent.batches)
