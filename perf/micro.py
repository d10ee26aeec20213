"""The steps of a request: microseconds of each, and its share of the request.

    python -m perf.micro

The baseline is the whole: the CPU of one hop for one request (HTTP/1.1, 1 KiB, 16 connections,
mutual TLS), measured first in the same run. Each step is timed in a loop with warm caches, so the
shares are lower bounds. The loop guard, routing, the balancer and spans have their own programs
(perf.loopguard, perf.routing, perf.balancer, perf.tracing).
"""

from __future__ import annotations

import io
import itertools
import logging
import socket
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from OpenSSL import SSL

from lab.console import print_table
from perf.loads import wrk
from perf.pair import Proxy, pair
from proxy.config.schema_process import LogConfig
from proxy.telemetry.log import RequestLine, configure, log_request
from proxy.telemetry.metrics import Metrics
from proxy.wire.h1.fast_head import (
    encode_request,
    encode_response,
    recognise_request,
    recognise_response,
)
from proxy.wire.h1.strict_head import decide_request
from proxy.wire.messages import Limits
from tests.kit.certs import Authority, spiffe

NUMBER, REPEATS = 5000, 7
# Different heads, more than the parser caches.
NEW = 2000

REQUEST = (
    b"GET /api/items/123?expand=all HTTP/1.1\r\nHost:"
    b" shop.default.svc.cluster.local:8080\r\nUser-Agent: python-httpx/0.28.1\r\nAccept:"
    b" */*\r\nAccept-Encoding: gzip, deflate, br\r\nConnection: keep-alive\r\nX-Request-Id:"
    b" 3f1c2d4e-0000-4000-8000-123456789abc\r\ntraceparent:"
    b" 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nCookie: session="
    + b"y" * 64
    + b"\r\n\r\n"
)
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Mon, 02 Nov 2026 10:00:00"
    b" GMT\r\nContent-Type: application/json\r\nContent-Length: 1024\r\nConnection:"
    b" keep-alive\r\nCache-Control: no-store\r\n\r\n"
)
BODY = b"x" * 1024


def microseconds(call: Callable[[], object], number: int = NUMBER) -> float:
    return min(timeit.repeat(call, number=number, repeat=REPEATS)) / number * 1e6


def heads() -> Iterator[tuple[str, float]]:
    limits = Limits()
    request, response = recognise_request(REQUEST, limits), recognise_response(RESPONSE, limits)
    if request is None or response is None:
        raise SystemExit("the fast parser declines the test head")
    requests = itertools.cycle(
        [REQUEST.replace(b"3f1c2d4e", b"%08x" % number) for number in range(NEW)]
    )
    yield "a request's head parsed", microseconds(lambda: recognise_request(next(requests), limits))
    yield "with known fields", microseconds(lambda: recognise_request(REQUEST, limits))
    yield "the same with h11", microseconds(lambda: decide_request(REQUEST, limits), 500)
    responses = itertools.cycle(
        [RESPONSE.replace(b"no-store", b"max-age=%d" % number) for number in range(NEW)]
    )
    yield (
        "a response's head parsed",
        microseconds(lambda: recognise_response(next(responses), limits)),
    )
    yield "with known fields", microseconds(lambda: recognise_response(RESPONSE, limits))
    yield "a request's head written", microseconds(lambda: encode_request(request[0]))
    yield "a response's head written", microseconds(lambda: encode_response(response[0]))


def metrics_and_logs() -> Iterator[tuple[str, float]]:
    measures = Metrics().http["outbound"]

    def count() -> None:
        with measures.request(b"GET") as record:
            record.head(200)

    yield "a request in the metrics", microseconds(count)
    close = configure(LogConfig(queue=1_000_000), io.StringIO())
    logging.getLogger("isthmus.access").propagate = True
    line = RequestLine(
        "outbound",
        "10.0.0.1:1",
        method=b"GET",
        target=b"/api",
        authority=b"shop",
        status=200,
        upstream="10.0.0.2:80",
    )
    yield "its log line (optional), queued", microseconds(lambda: log_request(line), 2000)
    close()


@contextmanager
def connected() -> Iterator[tuple[SSL.Connection, SSL.Connection]]:
    """Two ends of a TLS 1.3 connection over a local socket."""
    authority = Authority()
    leaf = authority.issue(spiffe("perf"))
    contexts = []
    for method in (SSL.TLS_CLIENT_METHOD, SSL.TLS_SERVER_METHOD):
        context = SSL.Context(method)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.use_certificate(leaf.certificate)
        context.use_privatekey(leaf.key)
        contexts.append(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    for sock in (one, two):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
    client, server = SSL.Connection(contexts[0], one), SSL.Connection(contexts[1], two)
    client.set_connect_state()
    server.set_accept_state()
    done = [False, False]
    while not all(done):
        for index, end in enumerate((client, server)):
            try:
                end.do_handshake()
                done[index] = True
            except SSL.WantReadError:
                pass
    yield client, server
    one.close()
    two.close()


def tls() -> Iterator[tuple[str, float]]:
    with connected() as (client, server):

        def both() -> None:
            client.send(BODY)
            server.recv(65536)

        yield "1 KiB sent and received with TLS, both ends", microseconds(both)


def whole() -> float:
    """Microseconds of CPU for one request and hop."""
    with pair() as running:
        wrk(running, 1, 16)
        before = sum(map(Proxy.cpu, running.proxies))
        done = wrk(running, 4, 16)
        return (sum(map(Proxy.cpu, running.proxies)) - before) / done.units / 2 * 1e6


def main() -> None:
    baseline = whole()
    rows = [("baseline: one request, one hop", f"{baseline:.2f}", "")]
    for part in (heads, metrics_and_logs, tls):
        rows += [(name, f"{value:.2f}", f"{value / baseline:.1%}") for name, value in part()]
    print_table(["step", "us", "share"], rows)


if __name__ == "__main__":
    main()
