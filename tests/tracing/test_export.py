"""Spans as a collector receives them: exported over HTTP, and decoded with OpenTelemetry's own
messages. With collectors that are slow, full or dead, and servers that are not collectors: nothing
waits for them, and every span is counted once."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lab.collector import Collector as Receiver
from tests.tracing.exports import FAST, Book, otlp, queue
from tests.tracing.records import PARENT, SPAN, TRACE, At, connection, grpc, http
from tracing import export
from tracing import queue as spans_queue
from tracing.otlp import Collector, Post, _Timed, retry_after
from tracing.queue import TAKEN, Exporter, Outcome, QueueSettings, SpanQueue
from tracing.resource import About, Resource
from tracing.spans import Record


def eventually(probe: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := probe():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off in milliseconds."""
    monkeypatch.setattr(spans_queue, "_FIRST_PAUSE", 0.02)


@contextmanager
def strange(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that treats its connections as the test says."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        held = []

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                held.append(sock)
                threading.Thread(target=behave, args=(sock,), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for sock in held:
            sock.close()


def test_a_collector_receives_the_whole_span() -> None:
    with (
        Receiver() as receiver,
        queue(lambda: otlp(receiver.endpoint, headers={"authorization": "Bearer x"})) as (
            spans,
            book,
        ),
    ):
        spans.put(
            http(
                "client",
                state=(b"a=1,b=2",),
                follows=b"1" * 16,
                attempt=1,
                status=503,
                peer=At("10.0.0.9", 8080),
            )
        )
        (span,) = receiver.wait(1)
        eventually(lambda: book.taken == 1)
    assert (span.name, span.kind, span.scope, span.status, span.message) == (
        "GET",
        "client",
        "isthmus 9",
        "error",
        "",
    )
    ids = (span.trace_id, span.span_id, span.parent_id)
    assert ids == (TRACE.decode(), SPAN.decode(), PARENT.decode())
    assert (span.start, span.end, span.state, span.remote, span.links) == (
        1_000,
        3_000,
        "a=1,b=2",
        True,
        ["1" * 16],
    )
    assert [(event.name, event.at) for event in span.events] == [("isthmus.response.head", 2_000)]
    assert span.attributes["network.peer.address"] == "10.0.0.9"
    assert (span.pod, span.cluster) == ("web-7d4b9c6f5d-x2x9k", "east")
    assert (span.resource["service.name"], span.resource["k8s.deployment.name"]) == ("web", "web")
    assert receiver.requests[0]["content-type"] == "application/x-protobuf"
    assert receiver.requests[0]["authorization"] == "Bearer x"
    assert receiver.requests[0][":path"] == "/v1/traces"


def test_all_kinds_of_records_are_sent_in_batches_over_one_connection() -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint, gzip=True)) as (spans, book):
        for _ in range(10):
            for record in (http(), grpc(), connection()):
                spans.put(record)
        received = receiver.wait(30)
        eventually(lambda: book.taken == 30)
    assert Counter(span.name for span in received) == {"GET": 10, "shop.Stock/Get": 10, "TCP": 10}
    assert all(request["content-encoding"] == "gzip" for request in receiver.requests)
    assert len(receiver.requests) < 10


def test_a_full_queue_drops_new_spans_and_never_waits() -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.hold.clear()  # a slow collector
        for _ in range(10):
            spans.put(http())
        eventually(lambda: len(spans) == 0)  # the first batch is in flight
        began = time.perf_counter()
        for _ in range(1000):
            spans.put(http())
        assert time.perf_counter() - began < 5
        assert book.lost == {"queue_full": 900}
        assert len(spans) == 100
        receiver.hold.set()
        eventually(lambda: book.all == 1010)
    assert book.lost == {"queue_full": 900}


@pytest.mark.usefixtures("impatient")
def test_a_collector_that_comes_back_gets_the_waiting_spans() -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.answer = (503, {}, b"busy")
        spans.put(http())
        eventually(lambda: book.results["status_5xx"] >= 2)
        receiver.answer = (200, {}, b"")
        eventually(lambda: book.taken == 1)
        assert not book.lost
    assert len(book.reports) == 2
    assert "answered 503" in book.reports[0]
    assert book.reports[1] == "spans are exported again"


@pytest.mark.usefixtures("impatient")
def test_a_refused_connection_is_retried_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans_queue, "MOST_TRIES", 3)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    with queue(lambda: otlp(f"http://127.0.0.1:{port}")) as (spans, book):
        spans.put(http())
        eventually(lambda: book.lost == {"unreachable": 1})
        assert book.results == {"unreachable": 3}
    assert len(book.reports) == 1
    assert "Connection refused" in book.reports[0]


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_refusal_that_will_not_change_is_not_repeated(status: int) -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.answer = (status, {}, b"no")
        spans.put(http())
        eventually(lambda: book.lost == {f"status_{status // 100}xx": 1})
    assert len(receiver.requests) == 1
    assert f"answered {status}" in book.reports[0]


def test_a_partial_success_is_counted_as_the_collector_reports_it() -> None:
    answer = ExportTraceServiceResponse(
        partial_success=ExportTracePartialSuccess(rejected_spans=2, error_message="too old")
    )
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.answer = (200, {}, answer.SerializeToString())
        for _ in range(10):
            spans.put(http())
        eventually(lambda: book.all == 10)
    assert (book.taken, book.lost) == (8, {"refused": 2})
    assert "too old" in book.reports[0]


def test_a_collector_that_asks_for_time_is_given_it() -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.answer = (429, {"Retry-After": "3600"}, b"")
        spans.put(http())
        eventually(lambda: book.results["status_4xx"] == 1)
        for _ in range(50):
            spans.put(http())  # full batches do not make it impatient
        time.sleep(0.2)
        assert book.results == {"status_4xx": 1}
        receiver.answer = (200, {}, b"")
        spans.close(10)  # but the end does
        assert (book.taken, sum(book.lost.values())) == (51, 0)


def _rubbish(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"\x15\x03\x01\x00\x02\x02\x16 what is this?\r\n\r\n")


def _silence(sock: socket.socket) -> None:
    sock.recv(65536)


def _trickle(sock: socket.socket) -> None:
    try:
        sock.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            sock.sendall(b"x")
            time.sleep(0.02)
    except OSError:
        pass


def _endless(sock: socket.socket) -> None:
    try:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            sock.sendall(b"\0" * 65536)
    except OSError:
        pass


def _reset(sock: socket.socket) -> None:
    sock.close()


@pytest.mark.parametrize(
    ("behave", "timeout", "reason"),
    [
        (_rubbish, 30, "invalid_response"),
        (_silence, 0.3, "timeout"),
        (_trickle, 0.3, "timeout"),
        (_reset, 30, "unreachable|invalid_response"),
    ],
)
def test_a_server_that_is_not_a_collector_takes_no_more_than_the_timeout(
    behave: Callable[[socket.socket], None], timeout: float, reason: str
) -> None:
    with strange(behave) as endpoint:
        post = Post(Collector(f"{endpoint}/v1/traces"))
        began = time.monotonic()
        outcome = post.send(b"x", timeout)
        assert time.monotonic() - began < 8
        post.close()
    assert isinstance(outcome, Outcome)
    assert outcome.reason in reason.split("|")
    assert outcome.again


def test_an_answer_without_an_end_is_not_read_to_its_end() -> None:
    with strange(_endless) as endpoint, queue(lambda: otlp(endpoint)) as (spans, book):
        spans.put(http())
        eventually(lambda: book.taken == 1)  # it said 200


def test_a_kept_connection_that_has_died_is_replaced() -> None:
    with Receiver() as receiver:
        post = Post(Collector(f"{receiver.endpoint}/v1/traces"))
        assert not isinstance(post.send(b"", 10), Outcome)
        assert post._timed is not None
        post._timed._sock.shutdown(socket.SHUT_RDWR)
        assert not isinstance(post.send(b"", 10), Outcome)
        post.close()


def test_the_end_sends_the_remaining_spans() -> None:
    with (
        Receiver() as receiver,
        queue(lambda: otlp(receiver.endpoint), QueueSettings(delay=3600)) as (spans, book),
    ):
        for _ in range(100):
            spans.put(http())
        spans.close(20)
        assert len(receiver.spans) == book.taken == 100
        spans.put(http())
        assert book.lost == {"shutdown": 1}


def test_the_end_does_not_wait_for_a_collector_that_hangs() -> None:
    with strange(_silence) as endpoint:
        book = Book()
        spans = SpanQueue(lambda: otlp(endpoint), FAST, book, book.reports.append)
        for _ in range(30):
            spans.put(http())
        began = time.monotonic()
        spans.close(0.5)
        assert time.monotonic() - began < 8
        eventually(lambda: book.all >= 30)
        assert book.taken == 0


def test_a_span_that_cannot_be_made_is_counted_and_the_others_go_on() -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        spans.put(http(trace_id=b"this is no number"))
        eventually(lambda: book.lost == {"unencodable": 1})
        spans.put(http())
        eventually(lambda: book.taken == 1)


def test_an_exporter_that_cannot_be_made_is_said_once_and_every_span_counted() -> None:
    def broken() -> Exporter:
        raise ValueError("no such thing")

    with queue(broken) as (spans, book):
        spans.put(http())
        eventually(lambda: book.lost == {"no_exporter": 1})
    assert book.reports[0] == "spans cannot be exported: no such thing"


def test_the_packet_mark_is_set_or_its_lack_is_an_error_of_the_connection() -> None:
    with Receiver() as receiver:
        post = Post(Collector(f"{receiver.endpoint}/v1/traces", mark=77))
        outcome = post.send(b"", 10)
        post.close()
    # CAP_NET_ADMIN, which the sandbox has: without it the exporter cannot bypass the redirection,
    # and reports that
    assert not isinstance(outcome, Outcome) or "not permitted" in outcome.words


@pytest.mark.real
def test_a_collector_in_tls_is_believed_by_its_certificate_only(tmp_path: Path) -> None:
    files = []
    for name in ("right", "wrong"):
        key, certificate = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        subject = [
            "-subj",
            f"/CN={name}",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-days",
            "2",
            "-nodes",
        ]
        new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        subprocess.run(
            [*new, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True
        )
        files.append((str(certificate), str(key)))
    (right, right_key), (wrong, _) = files
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(right, right_key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(right)
    with Receiver() as receiver:
        receiver._server.socket = context.wrap_socket(receiver._server.socket, server_side=True)
        endpoint = receiver.endpoint.replace("http:", "https:") + "/v1/traces"
        for trusted in (wrong, None, right):
            post = Post(
                Collector(
                    endpoint, certificate=trusted, client_certificate=right, client_key=right_key
                )
            )
            outcome = post.send(b"", 10)
            post.close()
            if trusted == right:
                assert not isinstance(outcome, Outcome)
            else:
                assert isinstance(outcome, Outcome)
                assert outcome.reason == "tls"
                assert "certificate" in outcome.words
        without = Post(Collector(endpoint, certificate=right))
        assert isinstance(without.send(b"", 10), Outcome)  # the receiver demands a certificate
        without.close()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("x", 0),
        ("7", 7),
        ("-1", 0),
        ("nan", 0),
        ("1e9", 300),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date_within_reason(value: str | None, seconds: float) -> None:
    assert retry_after(value) == seconds


def test_the_console_has_a_line_of_json_for_each_span() -> None:
    program = (
        "from tests.tracing.records import http\nfrom tests.tracing.exports import Book\nfrom"
        " tracing import export\nfrom tracing.queue import QueueSettings, SpanQueue\nfrom"
        " tracing.resource import About, Resource\nspans = export.SpanFactory(Resource(About({}), print),"
        " '9')\nqueue = SpanQueue(lambda: export.console(spans), QueueSettings(), Book(),"
        " print)\nqueue.put(http())\nqueue.close(20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    (line,) = done.stdout.splitlines()
    assert TRACE.decode() in line


class Picky(InMemorySpanExporter):
    """An exporter of the SDK that takes one batch, refuses the next one, and raises after that."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0
        self.ended = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.batches += 1
        if self.batches == 2:
            return SpanExportResult.FAILURE
        if self.batches == 3:
            raise RuntimeError("out of order")
        return super().export(spans)

    def shutdown(self) -> None:
        self.ended = True


def test_an_exporter_of_the_sdk_gets_the_spans_and_its_failures_are_told() -> None:
    factory, picky = export.SpanFactory(Resource(About({}), print), "9"), Picky()
    exporter = export.SdkExporter(factory, picky)
    outcomes = []
    for _ in range(3):
        exporter.prepare([http(), connection()])
        outcomes.append(exporter.send(1))
        exporter.forget()
    assert outcomes == [
        TAKEN,
        Outcome("failed", words="Picky could not send"),
        Outcome("failed", words="RuntimeError: out of order"),
    ]
    assert [span.name for span in picky.get_finished_spans()] == ["GET", "TCP"]
    exporter.close()
    assert picky.ended


def test_the_console_writes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    exporter = export.console(export.SpanFactory(Resource(About({}), print), "9"))
    exporter.prepare([http()])
    assert exporter.send(1) == TAKEN
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["name"] == "GET"


@pytest.mark.parametrize("endpoint", ["ftp://collector/", "http:///v1/traces", "collector:4318"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="is not an http or https URL"):
        Post(Collector(endpoint))


def test_a_collector_that_has_gone_is_tried_on_a_new_connection_and_given_up() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    post = Post(Collector(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"))

    def answer_once() -> None:
        sock, _ = listener.accept()
        with listener, sock:
            sock.recv(65536)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=answer_once)
    thread.start()
    assert not isinstance(post.send(b"", 10), Outcome)
    thread.join()
    outcome = post.send(b"", 10)
    post.close()
    assert isinstance(outcome, Outcome)
    assert outcome.reason == "unreachable"


def test_a_closed_socket_stays_open_until_its_reader_is_closed() -> None:
    near, far = socket.socketpair()
    with far:
        timed = _Timed(near)
        reader = timed.makefile("rb")
        timed.close()
        assert near.fileno() >= 0
        reader.close()
        reader.raw.close()  # no effect
        assert near.fileno() < 0


def test_what_is_queued_before_the_exporter_is_made_is_sent_by_the_end() -> None:
    go = threading.Event()

    def slowly() -> Exporter:
        go.wait(60)
        return otlp(receiver.endpoint)

    with Receiver() as receiver, queue(slowly) as (spans, book):
        spans.put(http())
        closing = threading.Thread(target=spans.close, args=(30,))
        closing.start()
        eventually(lambda: spans._closing)
        go.set()
        closing.join()
        assert (book.taken, book.lost) == (1, {})


def test_a_batch_that_is_not_ready_by_the_end_is_not_sent() -> None:
    class Slow:
        """Its batch is ready when the time of `close` is over."""

        def prepare(self, _: Sequence[Record]) -> None:
            eventually(lambda: time.monotonic() >= spans._deadline)

        def send(self, _: float) -> Outcome:
            raise AssertionError("there is no time")

        def forget(self) -> None: ...

        def close(self) -> None: ...

    with queue(Slow) as (spans, book):
        spans.put(http())
        eventually(lambda: spans._held == 1)
        spans.close(0.05)
        eventually(lambda: book.lost == {"shutdown": 1})


def test_there_is_no_time_left_after_the_deadline() -> None:
    with Receiver() as receiver:
        post = Post(Collector(f"{receiver.endpoint}/v1/traces"))
        assert not isinstance(post.send(b"", 10), Outcome)
        outcome = post.send(b"", -1)
        post.close()
    assert isinstance(outcome, Outcome)
    assert (outcome.reason, outcome.again) == ("timeout", True)


def test_jaegers_exporter_says_what_to_do_where_it_is_not_installed() -> None:
    spans = export.SpanFactory(Resource(About({}), print), "9")
    with pytest.raises(ImportError, match=r"install isthmus\[jaeger\]"):
        export.jaeger(spans, "127.0.0.1", 6831)
