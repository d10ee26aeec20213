"""The layer that gives an exchange its spans.

It stands inside `measure` and outside `rescue`: what the proxy answers itself is traced like everything else, and how it ended is known
here. On the path of a request there is no more than it takes to find the context, to put our span's id into the headers, and to note
references and times in a record for the queue; tracing/ makes a span of it later, in a thread of its own.

A server's span is one for the exchange. A client's is one for each attempt, as the conventions ask: what is sent again has a header, a span
id and a record of its own, beside the others under the same parent, with a link to the attempt before. A gateway has both: its
client spans hang under its server span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import time_ns
from typing import Literal

import trio

from proxy.exchange.exchange import Attempt, Exchange, Handler, Layer
from proxy.wire.messages import Headers
from tracing.sampling import Trace, Tracer
from tracing.spans import HttpRecord, Kind, Record

Side = Literal["server", "client", "both"]

# As much of a request as a span can show: the queue holds many records, and has to stay small.
_METHOD, _TARGET, _AUTHORITY, _AGENT, _WORDS, _PROXY_STATUS = 64, 1024, 300, 256, 1024, 512
_AGENT_LINE = b"\nuser-agent: "


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
        tracer, put = tracing.tracer, tracing.put

        async def handle(exchange: Exchange) -> None:
            if exchange.handoff is None:  # otherwise it has been asked on the fast path
                exchange.trace = _found(exchange, tracer)
            found = exchange.trace
            if found is None or not found.sampled:
                await handler(exchange)
                return
            server = _accepted(exchange, found) if side != "client" else None
            client = _ClientSpans(exchange, found, tracing, own=side == "client") if side != "server" else None
            try:
                await handler(exchange)
            except BaseException:
                end(exchange, server, client, exchange.failure or "cancelled")
                raise
            end(exchange, server, client, exchange.failure)

        def end(exchange: Exchange, server: HttpRecord | None, client: _ClientSpans | None, failure: str | None) -> None:
            if client is not None:
                client.finish(exchange, failure)
            if server is not None:
                put(_closed(server, exchange, failure))

        return handle

    return layer


def untraced(exchange: Exchange, tracing: Tracing | None) -> bool:
    """The same on the fast path. False: the exchange has spans, which it gets on the ordinary path."""
    if tracing is None:
        return True
    exchange.trace = _found(exchange, tracing.tracer)
    return exchange.trace is None or not exchange.trace.sampled


def _found(exchange: Exchange, tracer: Tracer) -> Trace | None:
    """What the request has of a trace. Nearly always its head can stay the lines that it came as."""
    headers = exchange.request.headers
    if headers.block is not None:
        seen = tracer.glance(headers.block)
        if seen is not None:
            trace, headers.block = seen
            return trace
    return tracer.begin(headers.items)


def _opened(kind: Kind, exchange: Exchange, trace: Trace, parent: bytes) -> HttpRecord:
    """What is known of a request before it goes anywhere."""
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
    """And how it ended."""
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
    """The one span of an exchange that was accepted. Nothing of it holds the exchange, which holds its `on_response`: that would leave a
    cycle for the collector."""
    facts = exchange.facts
    record = _opened("server", exchange, trace, trace.parent)
    record.peer, record.tls, record.identity = facts.peer, facts.tls, facts.identity
    agent = _agent(exchange.request.headers)
    record.agent = agent and agent[:_AGENT]
    heard = exchange.on_response

    def on_response(status: int) -> None:
        record.head_at = time_ns()
        heard(status)

    exchange.on_response = on_response
    return record


def _agent(headers: Headers) -> bytes | None:
    """The User-Agent. It has to be looked for with care only where it may be the first line: that is a matter of 0.1 us."""
    block = headers.block
    if block is not None and block[:1] in b"Hh":  # of Host, nearly always
        begins = block.lower().find(_AGENT_LINE) + len(_AGENT_LINE)
        return block[begins : block.index(b"\r", begins)] if begins >= len(_AGENT_LINE) else None
    return headers.get(b"user-agent")


class _ClientSpans:
    """The spans of an exchange that is sent on: one for each attempt. `own`: the first one is the trace's own span; otherwise that is
    the server's, and all attempts hang under it.

    Attempts that another one followed stand in `exchange.tried`, also those that got no connection. Only what is repeated without anybody's
    policy (client.py: a kept connection that broke) does not, and shows by another attempt being sent.
    """

    __slots__ = ("_heard", "_last", "_own", "_parent", "_record", "_seen", "_sent", "_trace", "_tracing")

    def __init__(self, exchange: Exchange, trace: Trace, tracing: Tracing, *, own: bool) -> None:
        self._trace = trace
        self._tracing = tracing
        self._own = own
        self._parent = trace.parent if own else trace.span_id
        self._record = _opened("client", exchange, trace, self._parent) if own else None  # of the attempt that is under way
        self._last: HttpRecord | None = None  # of the one before
        self._sent = False
        self._seen = 0  # of exchange.tried
        self._heard = exchange.on_response
        exchange.on_response = self._on_response
        exchange.on_attempt = self._on_attempt

    def _on_response(self, status: int) -> None:
        if self._record is not None:
            self._record.head_at = time_ns()
        self._heard(status)

    def _on_attempt(self, exchange: Exchange) -> None:
        """The exchange has a connection to an endpoint, and is about to be sent."""
        if exchange.tried is not None:
            self._catch_up(exchange, exchange.tried)
        if self._sent and self._record is not None:
            self._record.ended, self._record.failure = time_ns(), "unanswered"
            self._hand_over(self._record, exchange.service, exchange.chosen)  # it goes to the same place again
        record = self._record or self._open(exchange)
        self._sent = True
        tls = exchange.upstream_tls
        record.peer, record.tls = exchange.upstream, tls
        if tls is not None:
            record.identity = tls.peer_identity

    def _open(self, exchange: Exchange) -> HttpRecord:
        """The record of another attempt, whose id is in the headers from now on."""
        trace = self._trace
        tracer, headers = self._tracing.tracer, exchange.request.headers
        lines = tracer.next_glance(trace, headers.block, self._parent) if headers.block is not None else None
        if lines is not None:
            headers.block = lines
        else:
            tracer.next_attempt(trace, headers.items, self._parent)
        record = self._record = _opened("client", exchange, trace, self._parent)
        record.remote = self._own
        if self._last is not None:
            record.attempt, record.follows = self._last.attempt + 1, self._last.span_id
        return record

    def _catch_up(self, exchange: Exchange, tried: Sequence[Attempt]) -> None:
        """Hand over the attempts that have failed since the last look."""
        for attempt in tried[self._seen :]:
            record = self._record or self._open(exchange)
            record.started, record.ended = _unix(attempt.started), _unix(attempt.ended)
            record.peer, record.status, record.request_bytes = attempt.upstream, attempt.status, attempt.request_bytes
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
        """Hand over the last attempt; or what became of the request without any, where no other span says so."""
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
    """A time of trio's clock, in nanoseconds since 1970."""
    return time_ns() - int((trio.current_time() - moment) * 1e9)
