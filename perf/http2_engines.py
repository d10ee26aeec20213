"""CPU time of one unary exchange in this project's HTTP/2 engine, client and server together, and
in the h2 library.

Only the engines run: the output of one side is the input of the other, without a socket. The
request resembles gRPC: 100 bytes each way, trailers, a window update for every DATA. Rounds are
interleaved; the best of each counts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import h2.config
import h2.connection
import h2.events

from lab.console import print_table
from proxy.wire.h1.connection import Role
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.events import DataReceived, HeadReceived, Http2Limits, TrailersReceived
from proxy.wire.messages import Headers, RequestHead, ResponseHead

ROUNDS, EXCHANGES = 15, 2000
BODY = b"y" * 100
FIELDS = [
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
    (b"user-agent", b"grpc-python/1.85.1 grpc-c/56.0.0 (linux)"),
]
PSEUDO = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/perf.Echo/Call"),
    (b":authority", b"shop:50051"),
]
ANSWER = [
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b"identity, deflate, gzip"),
]
STATUS = [(b"grpc-status", b"0")]


def ours() -> Callable[[], None]:
    client, server = (Http2Connection(role, Http2Limits()) for role in (Role.CLIENT, Role.SERVER))
    server.receive_data(client.data_to_send(), 0.0)
    client.receive_data(server.data_to_send(), 0.0)
    now = 0.0

    def exchange() -> None:
        nonlocal now
        now += 0.001
        headers = Headers([(b"host", PSEUDO[3][1]), *FIELDS])
        number = client.send_request(RequestHead(b"POST", PSEUDO[2][1], headers, b"2"), end=False)
        client.send_data(number, BODY, end=True)
        for event in server.receive_data(client.data_to_send(), now):
            if isinstance(event, DataReceived):
                server.consumed(event.stream, event.credit)
        server.send_response(number, ResponseHead(200, Headers(list(ANSWER))), end=False)
        server.send_data(number, BODY, end=False)
        server.send_trailers(number, Headers(list(STATUS)))
        seen = client.receive_data(server.data_to_send(), now)
        for event in seen:
            if isinstance(event, DataReceived):
                client.consumed(event.stream, event.credit)
        if [
            type(event)
            for event in seen
            if type(event) in (HeadReceived, DataReceived, TrailersReceived)
        ] != _OURS:
            raise SystemExit(f"unexpected answer: {seen}")

    return exchange


_OURS = [HeadReceived, DataReceived, TrailersReceived]


def theirs() -> Callable[[], None]:
    client, server = (
        h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=client_side, header_encoding=None)
        )
        for client_side in (True, False)
    )
    client.initiate_connection()
    server.initiate_connection()
    server.receive_data(client.data_to_send())
    client.receive_data(server.data_to_send())

    def exchange() -> None:
        number = client.get_next_available_stream_id()
        client.send_headers(number, [*PSEUDO, *FIELDS])
        client.send_data(number, BODY, end_stream=True)
        for event in server.receive_data(client.data_to_send()):
            if isinstance(event, h2.events.DataReceived):
                server.acknowledge_received_data(event.flow_controlled_length, number)
        server.send_headers(number, [(b":status", b"200"), *ANSWER])
        server.send_data(number, BODY)
        server.send_headers(number, list(STATUS), end_stream=True)
        seen = client.receive_data(server.data_to_send())
        for event in seen:
            if isinstance(event, h2.events.DataReceived):
                client.acknowledge_received_data(event.flow_controlled_length, number)
        if not any(isinstance(event, h2.events.TrailersReceived) for event in seen):
            raise SystemExit(f"unexpected answer: {seen}")

    return exchange


def main() -> None:
    engines = {"ours": ours(), "h2": theirs()}
    best = dict.fromkeys(engines, float("inf"))
    for _ in range(ROUNDS):
        for name, exchange in engines.items():
            gc.collect()
            began = time.process_time()
            for _ in range(EXCHANGES):
                exchange()
            best[name] = min(best[name], (time.process_time() - began) / EXCHANGES)
    rows = [
        (name, f"{seconds * 1e6:.1f}", f"{seconds / best['ours']:.1f}")
        for name, seconds in best.items()
    ]
    print_table(("engine", "CPU us per exchange, client and server", "times ours"), rows)


if __name__ == "__main__":
    main()
