"""Spans as a collector receives them: really exported, over HTTP, and decoded with OpenTelemetry's
own messages.

Collectors that are slow, full, dead, or no collectors at all: nothing waits for them, and every
span is counted once.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from lab.collector import Collector as Receiver
from tests.tracing.exports import FAST, Book, otlp, queue
from tests.tracing.records import PARENT, SPAN, TRACE, At, connection, grpc, http
from tracing import export
from tracing import queue as spans_queue
from tracing.otlp import Collector, Post, retry_after
from tracing.queue import Exporter, Outcome, QueueSettings, SpanQueue
from tracing.resource import About, Resource


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
    """A server that does what it likes with its connections."""
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


def test_a_full_queue_drops_what_comes_and_never_waits() -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.hold.clear()  # a slow collector
        for _ in range(10):
            spans.put(http())
        eventually(lambda: len(spans) == 0)  # the first batch is under way
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
def test_a_collector_that_comes_back_gets_what_has_waited() -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.answer = (503, {}, b"busy")
        spans.put(http())
        eventually(lambda: book.results["status_5xx"] >= 2)
        receiver.answer = (200, {}, b"")
        eventually(lambda: book.taken == 1)
        assert not book.lost
    assert len(book.said) == 2
    assert "answered 503" in book.said[0]
    assert book.said[1] == "spans are exported again"


@pytest.mark.usefixtures("impatient")
def test_nobody_at_the_address_is_tried_again_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans_queue, "MOST_TRIES", 3)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    with queue(lambda: otlp(f"http://127.0.0.1:{port}")) as (spans, book):
        spans.put(http())
        eventually(lambda: book.lost == {"unreachable": 1})
        assert book.results == {"unreachable": 3}
    assert len(book.said) == 1
    assert "Connection refused" in book.said[0]


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_refusal_that_will_not_change_is_not_repeated(status: int) -> None:
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.answer = (status, {}, b"no")
        spans.put(http())
        eventually(lambda: book.lost == {f"status_{status // 100}xx": 1})
    assert len(receiver.requests) == 1
    assert f"answered {status}" in book.said[0]


def test_a_collector_that_takes_a_part_is_believed() -> None:
    answer = ExportTraceServiceResponse(
        partial_success=ExportTracePartialSuccess(rejected_spans=2, error_message="too old")
    )
    with Receiver() as receiver, queue(lambda: otlp(receiver.endpoint)) as (spans, book):
        receiver.answer = (200, {}, answer.SerializeToString())
        for _ in range(10):
            spans.put(http())
        eventually(lambda: book.all == 10)
    assert (book.taken, book.lost) == (8, {"refused": 2})
    assert "too old" in book.said[0]


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
def test_what_is_no_collector_costs_no_more_than_the_timeout(
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


def test_the_end_sends_what_is_left() -> None:
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
        spans = SpanQueue(lambda: otlp(endpoint), FAST, book, book.said.append)
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
    assert book.said[0] == "spans cannot be exported: no such thing"


def test_the_packet_mark_is_set_or_its_lack_is_an_error_of_the_connection() -> None:
    with Receiver() as receiver:
        post = Post(Collector(f"{receiver.endpoint}/v1/traces", mark=77))
        outcome = post.send(b"", 10)
        post.close()
    # CAP_NET_ADMIN, which the sandbox has: without it the collector is not reached past the
    # redirection, and that is said
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
    (right, key), (wrong, _) = files
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(right, key)
    with Receiver() as receiver:
        receiver._server.socket = context.wrap_socket(receiver._server.socket, server_side=True)
        endpoint = receiver.endpoint.replace("http:", "https:") + "/v1/traces"
        for trusted in (wrong, None, right):
            post = Post(Collector(endpoint, certificate=trusted))
            outcome = post.send(b"", 10)
            post.close()
            if trusted == right:
                assert not isinstance(outcome, Outcome)
            else:
                assert isinstance(outcome, Outcome)
                assert outcome.reason == "tls"
                assert "certificate" in outcome.words


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


def test_jaegers_exporter_says_what_to_do_where_it_is_not_installed() -> None:
    spans = export.SpanFactory(Resource(About({}), print), "9")
    with pytest.raises(ImportError, match=r"install isthmus\[jaeger\]"):
        export.jaeger(spans, "127.0.0.1", 6831)
