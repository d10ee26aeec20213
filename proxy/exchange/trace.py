"""The layer that gives an exchange its spans.

It stands inside `measure` and outside `rescue`: what the proxy answers itself is traced like everything else, and how it ended is known
here. On the path of a request there is no more than it takes to find the context, to put our span's id into the headers, and to note
references and times in a record for the queue; tracing/ makes a span of it later, in a thread of its own.

A server's span is one for the exchange. A client's is one for each attempt, as the conventions ask: what is sent again has a header, a span
id and a record of its own, beside the others under the same parent, with a link to the attempt before. A gateway has both: its
client spans hang under its server span.
"""

from __future__ import annotations

from collections.abc import Callable
from time import time_ns
from typing import Literal

from proxy.exchange.exchange import Exchange, Handler, Layer
from proxy.net.address import Address
from proxy.net.tls import TLSInfo
from tracing.sampling import Trace, Tracer
from tracing.spans import HttpRecord, Kind, Record

Side = Literal["server", "client", "both"]

# As much of a request as a span can show: the queue holds many records, and has to stay small.
_METHOD, _TARGET, _AUTHORITY, _AGENT, _WORDS, _PROXY_STATUS = 64, 1024, 300, 256, 1024, 512


class Tracing:
    """What a flow needs to trace: who decides and draws ids, and where records go (which takes them or drops them, and never waits)."""

    __slots__ = ("put", "tracer")

    def __init__(self, tracer: Tracer, put: Callable[[Record], None]) -> None:
        self.tracer = tracer
        self.put = put


def trace(tracing: Tracing | None, side: Side) -> Layer:
    """Open spans for each exchange that is traced, and hand over their records when they have ended. Without `tracing` the layer is not
    there at all."""

    def layer(handler: Handler) -> Handler:
        if tracing is None:
            return handler
        begin = tracing.tracer.begin

        async def handle(exchange: Exchange) -> None:
            found = exchange.trace = begin(exchange.request.headers.items)
            if found is None or not found.sampled:
                await handler(exchange)
                return
            spans = _Spans(exchange, found, tracing, side)
            try:
                await handler(exchange)
                spans.whole = True
            finally:
                spans.finish()

        return handle

    return layer


class _Spans:
    """The spans of one exchange while it is under way."""

    __slots__ = (
        "_attempt_started", "_attempts", "_before", "_exchange", "_head_at", "_heard", "_server", "_started", "_trace", "_tracing",
        "_upstream", "_upstream_tls", "whole",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, trace: Trace, tracing: Tracing, side: Side) -> None:
        self._exchange = exchange
        self._trace = trace
        self._tracing = tracing
        self._server = b"" if side == "client" else trace.span_id
        self._attempts = 0  # that have been sent
        self._before = b""  # the attempt before this one
        self._head_at = 0
        self._heard = exchange.on_response
        self.whole = False  # the handler has returned; otherwise it was cancelled
        exchange.on_response = self._on_response
        if side != "server":
            exchange.on_attempt = self._on_attempt
            self._upstream: Address | None = None
            self._upstream_tls: TLSInfo | None = None
        self._started = self._attempt_started = time_ns()

    def _on_response(self, status: int) -> None:
        self._head_at = time_ns()
        self._heard(status)

    def _on_attempt(self) -> None:
        """The exchange has a connection to an endpoint, and is about to be sent."""
        exchange, trace = self._exchange, self._trace
        if self._attempts or self._server:
            now = time_ns()
            if self._attempts:
                self._tracing.put(self._client(now, "unanswered"))
                self._before = trace.span_id
            self._attempt_started = now
            self._tracing.tracer.next_attempt(trace, exchange.request.headers.items)
        self._attempts += 1
        self._upstream, self._upstream_tls = exchange.upstream, exchange.upstream_tls

    def finish(self) -> None:
        """All of it has ended: hand over what is still open."""
        exchange, ended = self._exchange, time_ns()
        failure = exchange.failure if self.whole or exchange.failure is not None else "cancelled"
        if self._attempts or not self._server:
            self._tracing.put(self._client(ended, failure, last=True))
        if self._server:
            facts = exchange.facts
            record = self._record("server", self._server, failure)
            record.ended, record.parent = ended, self._trace.parent
            record.peer, record.tls, record.identity = facts.peer, facts.tls, facts.identity
            agent = exchange.request.headers.get(b"user-agent")
            record.agent = agent and agent[:_AGENT]
            self._tracing.put(record)

    def _client(self, ended: int, failure: str | None, *, last: bool = False) -> HttpRecord:
        """The record of the attempt that is under way."""
        trace = self._trace
        record = self._record("client", trace.span_id, failure, answered=last)
        record.parent, record.remote = self._server or trace.parent, not self._server
        record.started, record.ended = self._attempt_started, ended
        record.attempt = max(0, self._attempts - 1)
        record.follows = self._before
        record.service, record.chosen = self._exchange.service, self._exchange.chosen
        record.peer, record.tls = self._upstream or self._exchange.upstream, self._upstream_tls
        if record.tls is not None:
            record.identity = record.tls.peer_identity
        return record

    def _record(self, kind: Kind, span_id: bytes, failure: str | None, *, answered: bool = True) -> HttpRecord:
        """What both kinds have. One call with all of it: this is on the path of the request."""
        exchange, trace, request = self._exchange, self._trace, self._exchange.request
        facts, authority, response = exchange.facts, request.authority, exchange.response
        record = HttpRecord(
            kind=kind,
            trace_id=trace.trace_id,
            span_id=span_id,
            state=trace.state,
            started=self._started,
            direction=facts.direction,
            destination=facts.destination,
            failure=failure,
            method=request.method[:_METHOD],
            target=request.target[:_TARGET],
            authority=authority and authority[:_AUTHORITY],
            version=request.version,
            request_bytes=exchange.request_bytes,
        )
        if request.version == b"2" and exchange.is_grpc:
            record.grpc = True
            record.grpc_status = exchange.grpc_status
        if answered:
            record.response_bytes, record.head_at = exchange.response_bytes, self._head_at
            if failure is not None:
                record.words, record.loop, record.cycle = exchange.failure_words[:_WORDS], exchange.loop, exchange.cycle
            if response is not None:
                record.status = response.status
                if failure is not None or response.status >= 500:
                    status = response.headers.get(b"proxy-status")
                    record.proxy_status = status and status[:_PROXY_STATUS]
                if record.grpc and record.grpc_status is None:
                    record.grpc_status = response.headers.get(b"grpc-status")
        return record
