"""The layer that records the spans of an exchange.

It stands inside `measure` and outside `rescue`. So responses of the proxy itself are traced too,
and the layer knows how the exchange ended. During the request it only finds the trace context,
writes the span's id into the headers, and puts references and times into a record for the queue.
tracing/ creates the span from it later, in a thread of its own.

A server records one span for each exchange. A client records one span for each attempt, as the
conventions require. Each attempt has its own header, span id and record. All have the same parent,
and each has a link to the attempt before. A gateway records both; its client spans are children of
its server span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import time_ns
from typing import Literal

import trio

from proxy.exchange.exchange import Exchange, FailedAttempt, Handler, Layer
from proxy.wire.messages import Headers
from tracing.sampling import Trace, Tracer
from tracing.spans import HttpRecord, Kind, Record

Side = Literal["server", "client", "both"]

# Limits of a request's texts in a record, in bytes: the queue holds many records, so they must be
# small.
_METHOD, _TARGET, _AUTHORITY, _AGENT, _WORDS, _PROXY_STATUS = 64, 1024, 300, 256, 1024, 512
_AGENT_LINE = b"\nuser-agent: "


class Tracing:
    """What a flow needs to trace. `tracer` makes the sampling decision and draws ids. `put` queues
    or drops a record and never waits."""

    __slots__ = ("put", "tracer")

    def __init__(self, tracer: Tracer, put: Callable[[Record], None]) -> None:
        self.tracer = tracer
        self.put = put


def trace(tracing: Tracing | None, side: Side) -> Layer:
    """Return the layer, which opens spans for each sampled exchange and queues their records at the
    end. Without `tracing`, there is no layer."""

    def layer(handler: Handler) -> Handler:
        if tracing is None:
            return handler
        tracer, put = tracing.tracer, tracing.put

        async def handle(exchange: Exchange) -> None:
            if exchange.handoff is None:  # otherwise the fast path has already done this
                exchange.trace = _begin(exchange, tracer)
            found = exchange.trace
            if found is None or not found.sampled:
                await handler(exchange)
                return
            server = _accepted(exchange, found) if side != "client" else None
            client = (
                _ClientSpans(exchange, found, tracing, own=side == "client")
                if side != "server"
                else None
            )
            try:
                await handler(exchange)
            except BaseException:
                end(exchange, server, client, exchange.failure or "cancelled")
                raise
            end(exchange, server, client, exchange.failure)

        def end(
            exchange: Exchange,
            server: HttpRecord | None,
            client: _ClientSpans | None,
            failure: str | None,
        ) -> None:
            if client is not None:
                client.finish(exchange, failure)
            if server is not None:
                put(_closed(server, exchange, failure))

        return handle

    return layer


def begin_trace(exchange: Exchange, tracing: Tracing | None) -> bool:
    """Begin the trace of an exchange on the fast path, and write our span's id into the head of the
    request. Returns whether the trace is sampled; then the ordinary path has to record its
    spans."""
    if tracing is None:
        return False
    exchange.trace = _begin(exchange, tracing.tracer)
    return exchange.trace is not None and exchange.trace.sampled


def _begin(exchange: Exchange, tracer: Tracer) -> Trace | None:
    """Begin the trace of the request, and write our span's id into its head. In most cases, the
    header block is not split into fields."""
    headers = exchange.request.headers
    if headers.block is not None:
        seen = tracer.glance(headers.block)
        if seen is not None:
            trace, headers.block = seen
            return trace
    return tracer.begin(headers.items)


def _opened(kind: Kind, exchange: Exchange, trace: Trace, parent: bytes) -> HttpRecord:
    """Create a record with what is known before the request is sent."""
    request, facts = exchange.request, exchange.facts
    authority = request.authority
    return HttpRecord(
        kind,
        trace.trace_id,
        trace.span_id,
        parent,
        trace.state,
        time_ns(),
        facts.direction,
        facts.destination,
        request.method[:_METHOD],
        request.target[:_TARGET],
        authority and authority[:_AUTHORITY],
        request.version,
    )


def _closed(record: HttpRecord, exchange: Exchange, failure: str | None) -> HttpRecord:
    """Complete a record with the result of the exchange."""
    request, response = exchange.request, exchange.response
    record.ended = time_ns()
    record.request_bytes, record.response_bytes = exchange.request_bytes, exchange.response_bytes
    if failure is not None:
        record.failure, record.words = failure, exchange.failure_words[:_WORDS]
        record.loop, record.cycle = exchange.loop, exchange.cycle
    if request.version == b"2" and exchange.is_grpc:
        record.grpc, record.grpc_status = True, exchange.grpc_status
    if response is not None:
        record.status = response.status
        if failure is not None or response.status >= 500:
            status = response.headers.get(b"proxy-status")
            record.proxy_status = status and status[:_PROXY_STATUS]
        if record.grpc and record.grpc_status is None:
            record.grpc_status = response.headers.get(b"grpc-status")
    return record


def _accepted(exchange: Exchange, trace: Trace) -> HttpRecord:
    """Open the server span of an exchange. It must not reference the exchange, which references
    `on_response`: the reference cycle would wait for the garbage collector."""
    facts = exchange.facts
    record = _opened("server", exchange, trace, trace.parent)
    record.peer, record.tls, record.identity = facts.peer, facts.tls, facts.identity
    agent = _agent(exchange.request.headers)
    record.agent = agent and agent[:_AGENT]
    before = exchange.on_response

    def on_response(status: int) -> None:
        record.head_at = time_ns()
        before(status)

    exchange.on_response = on_response
    return record


def _agent(headers: Headers) -> bytes | None:
    """Return the User-Agent. The slower search is needed only if it may be the first line; the
    faster one saves 0.1 µs."""
    block = headers.block
    if block is not None and block[:1] in b"Hh":  # almost always Host
        begins = block.lower().find(_AGENT_LINE) + len(_AGENT_LINE)
        return block[begins : block.index(b"\r", begins)] if begins >= len(_AGENT_LINE) else None
    return headers.get(b"user-agent")


class _ClientSpans:
    """The client spans of an exchange: one for each attempt. `own`: the first one is the trace's
    own span. Otherwise that is the server's span, and all attempts are its children.

    `exchange.tried` has all attempts that were followed by another one, including those without a
    connection. It does not have the automatic repetition in client.py (a reused connection was
    closed); that is detected when another attempt is sent.
    """

    __slots__ = (
        "_last",
        "_own",
        "_parent",
        "_previous_on_response",
        "_record",
        "_seen",
        "_sent",
        "_trace",
        "_tracing",
    )

    def __init__(self, exchange: Exchange, trace: Trace, tracing: Tracing, *, own: bool) -> None:
        self._trace = trace
        self._tracing = tracing
        self._own = own
        self._parent = trace.parent if own else trace.span_id
        # of the current attempt
        self._record = _opened("client", exchange, trace, self._parent) if own else None
        self._last: HttpRecord | None = None  # of the previous attempt
        self._sent = False
        self._seen = 0  # attempts in `exchange.tried` that have been processed
        self._previous_on_response = exchange.on_response
        exchange.on_response = self._on_response
        exchange.on_attempt = self._on_attempt

    def _on_response(self, status: int) -> None:
        if self._record is not None:
            self._record.head_at = time_ns()
        self._previous_on_response(status)

    def _on_attempt(self, exchange: Exchange) -> None:
        """The exchange has a connection to an endpoint and is about to be sent."""
        if exchange.tried is not None:
            self._catch_up(exchange, exchange.tried)
        if self._sent and self._record is not None:
            self._record.ended, self._record.failure = time_ns(), "unanswered"
            # the next attempt goes to the same service
            self._hand_over(self._record, exchange.service, exchange.chosen)
        record = self._record or self._open(exchange)
        self._sent = True
        tls = exchange.upstream_tls
        record.peer, record.tls = exchange.upstream, tls
        if tls is not None:
            record.identity = tls.peer_identity

    def _open(self, exchange: Exchange) -> HttpRecord:
        """Open the record of another attempt and write its span id into the headers."""
        trace = self._trace
        tracer, headers = self._tracing.tracer, exchange.request.headers
        lines = (
            tracer.next_glance(trace, headers.block, self._parent)
            if headers.block is not None
            else None
        )
        if lines is not None:
            headers.block = lines
        else:
            tracer.next_attempt(trace, headers.items, self._parent)
        record = self._record = _opened("client", exchange, trace, self._parent)
        record.remote = self._own
        if self._last is not None:
            record.attempt, record.follows = self._last.attempt + 1, self._last.span_id
        return record

    def _catch_up(self, exchange: Exchange, tried: Sequence[FailedAttempt]) -> None:
        """Queue the records of the attempts that have failed since the last call."""
        for attempt in tried[self._seen :]:
            record = self._record or self._open(exchange)
            record.started, record.ended = _unix(attempt.started), _unix(attempt.ended)
            record.peer, record.status, record.request_bytes = (
                attempt.upstream,
                attempt.status,
                attempt.request_bytes,
            )
            if attempt.status:
                record.head_at = record.ended
            record.grpc = exchange.is_grpc
            if attempt.reason != "status":
                record.failure = attempt.reason
            self._hand_over(record, exchange.service, attempt.chosen)
        self._seen = len(tried)

    def _hand_over(self, record: HttpRecord, service: str | None, chosen: str | None) -> None:
        record.service, record.chosen = service, chosen
        self._tracing.put(record)
        self._last, self._record, self._sent = record, None, False

    def finish(self, exchange: Exchange, failure: str | None) -> None:
        """Queue the record of the last attempt. If there was none, queue the result of the request,
        unless a server span has it."""
        if exchange.tried is not None:
            self._catch_up(exchange, exchange.tried)
        record = self._record
        if record is None:
            if not self._own:
                return
            record = self._open(exchange)
        if not self._sent:
            record.peer = exchange.upstream
        self._hand_over(_closed(record, exchange, failure), exchange.service, exchange.chosen)


def _unix(moment: float) -> int:
    """Convert a time of trio's clock to nanoseconds since 1970."""
    return time_ns() - int((trio.current_time() - moment) * 1e9)
