"""Records of connections and exchanges: each is recorded exactly once in the metrics and in the
log, however it ends.

A flow opens a record with `with` and adds what it learns; the record closes itself. Nothing here
decides anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Literal, Self

import trio

from proxy.errors import LoopDetected, MemoryShort, describe
from proxy.exchange.detect import Opening, detect
from proxy.exchange.exchange import ConnectionInfo, Exchange
from proxy.exchange.replay import Replay
from proxy.exchange.trace_layer import Tracing
from proxy.net.exceptions import ConnectionLost
from proxy.net.liveness import peer_ended
from proxy.net.memory_budget import CONNECTION_BYTES, MemoryBudget
from proxy.net.relay import Relayed
from proxy.net.socket_stream import SocketStream, Stream
from proxy.net.tls.handshake import TLSInfo, TLSStream
from proxy.telemetry.log import (
    ConnectionLine,
    RateLimit,
    RequestLine,
    connections_logged,
    log_connection,
    log_request,
    warn,
)
from proxy.telemetry.metrics import ConnectionRecord, Metrics, Tls
from proxy.telemetry.request_metrics import Direction, RequestRecord
from proxy.wire.sniff import Protocol as Spoken
from tracing.sampling import Trace
from tracing.spans import StreamRecord

_LOOPS = logging.getLogger("isthmus.loopguard")

# Relays between two streams until they have ended, and reports the bytes of each direction
# (net.relay).
Relay = Callable[[Stream, Stream, ConnectionInfo, Callable[[int, int], None]], Awaitable[Relayed]]


class Recorder:
    """Creates all records of one proxy. `access`: whether each request is logged."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        access: bool,
        tracing: Mapping[str, Tracing | None] | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        self.metrics = metrics
        self.budget = budget or MemoryBudget()
        self.access = access
        self.tracing = tracing or {}  # for connections, by direction; a layer traces requests
        self._loops: dict[str, RateLimit] = {}

    def connection(self, stream: SocketStream, facts: ConnectionInfo) -> ConnectionAccount:
        facts.share = self.budget.share(CONNECTION_BYTES, member=facts.direction == "outbound")
        facts.share.on_exhausted, facts.share.gone = stream.cut, partial(peer_ended, stream)
        return ConnectionAccount(self, stream, facts)

    def exchange(self, exchange: Exchange) -> ExchangeAccount:
        return ExchangeAccount(self, exchange)

    def upstream(self, direction: Direction, stream: Stream) -> StreamAccount:
        """Open the record of a connection to a server."""
        tls: Tls = "mutual" if isinstance(stream, TLSStream) else "none"
        return StreamAccount(self.metrics.connections[direction].connection("dst", tls), stream)

    def tls_established(self, direction: Direction, info: TLSInfo) -> None:
        side: Literal["client", "server"] = "client" if direction == "outbound" else "server"
        self.metrics.count_handshake(direction, side, (info.version, info.group, info.resumed))

    def tls_failed(self, direction: Direction, kind: str) -> None:
        self.metrics.count_failed_handshake(
            direction, "client" if direction == "outbound" else "server", kind
        )

    def loop(self, direction: Direction, kind: str, words: str) -> None:
        """A loop was stopped. Counts each; logs at most one of each kind per second."""
        self.metrics.count_loop(kind)
        # bounded: one for each kind of loopguard
        limit = self._loops.setdefault(kind, RateLimit(1))
        warn(_LOOPS, limit, "a loop was stopped (%s, %s): %s", kind, direction, words)

    def bridge(self, relay: Relay) -> Callable[[Exchange, Stream, Stream], Awaitable[None]]:
        """Relays the two streams of an upgraded exchange; their bytes count for the exchange."""

        async def join(exchange: Exchange, client: Stream, server: Stream) -> None:
            def moved(forward: int, backward: int) -> None:
                exchange.request_bytes += forward
                exchange.response_bytes += backward

            note_end(exchange, await relay(client, server, exchange.facts, moved))

        return join


def note_end(exchange: Exchange, ended: Relayed) -> None:
    """Note how the tunnel of an exchange ended."""
    if ended.how != "eof":
        exchange.failure, exchange.failure_words = f"tunnel_{ended.how}", describe_end(ended)


class StreamAccount:
    """The metrics record of one connection. Call `close` once the stream is closed; a second call
    has no effect.
    """

    __slots__ = ("_handed_over", "_open", "_record", "stream")

    def __init__(self, record: ConnectionRecord, stream: Stream) -> None:
        self._record = record.__enter__()
        self._open = True
        self._handed_over = False
        self.stream = stream

    def secured(self, tls: Tls) -> None:
        self._record.secured(tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._handed_over:
            self.close()

    def handed_over(self) -> StreamAccount:
        """Another owner will close the connection: the end of the `with` block no longer does."""
        self._handed_over = True
        return self

    def close(self) -> None:
        if self._open:
            self._open = False
            self._record.transferred(self.stream.bytes_read, self.stream.bytes_written)
            self._record.__exit__(None, None, None)


class ConnectionAccount:
    """The record of a downstream connection. Its log line is written when it ends."""

    __slots__ = (
        "_account",
        "_began",
        "_facts",
        "_recorder",
        "_relayed",
        "_started",
        "_tracing",
        "detection",
    )

    def __init__(self, recorder: Recorder, stream: SocketStream, facts: ConnectionInfo) -> None:
        self._recorder = recorder
        self._facts = facts
        self._started = time.perf_counter()
        self._account = StreamAccount(
            recorder.metrics.connections[facts.direction].connection("src"), stream
        )
        self._relayed: Relayed | None = None
        self.detection = "none"
        self._tracing = recorder.tracing.get(facts.direction)
        if self._tracing is not None:
            facts.trace = self._tracing.tracer.connection()
            self._began = time.time_ns()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._account.close()
        self._facts.share.close()
        metrics, facts = self._recorder.metrics, self._facts
        metrics.count_declined_heads(facts.direction, "request", facts.declined_requests)
        metrics.count_declined_heads(facts.direction, "response", facts.declined_responses)
        if isinstance(error, LoopDetected):
            self._recorder.loop(facts.direction, error.kind, str(error))
        # an eviction is already counted, and it is the cause of any error
        evicted = facts.slot is not None and facts.slot.evicted
        if error is not None and not isinstance(error, trio.Cancelled) and not evicted:
            metrics.count_error(facts.direction, describe(error).reason)
        reason, words = self._ending(error)
        # Only an opaque connection has its own span; other connections have one span per request.
        traced = facts.trace if facts.protocol is Spoken.OPAQUE else None
        if traced is not None and self._tracing is not None:
            self._tracing.put(self._span(traced, reason, words, error))
        if connections_logged():
            log_connection(self._line(reason, words, traced))

    async def detect(self, stream: SocketStream, silence: float | None, patience: float) -> Opening:
        """Detect the connection's protocol. None if there is no detection: the port is declared
        opaque.
        """
        started = time.perf_counter()
        opening = (
            Opening(Spoken.OPAQUE, "declared")
            if silence is None
            else await detect(stream, silence, patience)
        )
        self.detection = opening.how
        self._recorder.metrics.count_detection(
            self._facts.direction, opening.how, time.perf_counter() - started
        )
        return opening

    def plain(self, opening: Opening) -> None:
        """The connection is not decrypted here. Raises MemoryShort if the process is short of
        memory.
        """
        self._account.secured("passthrough" if opening.hello is not None else "none")
        self._admit(opening.how)

    def secured(self, stream: TLSStream) -> None:
        """The connection was decrypted; bytes are counted after decryption. Raises MemoryShort like
        `plain`.
        """
        self._account.secured("mutual")
        self._account.stream = stream
        self._admit("tls")

    def _admit(self, how: str) -> None:
        if how != "closed" and self._facts.share.refuses("connection"):
            raise MemoryShort("this proxy is short of memory")

    def upstream(self, stream: Stream) -> StreamAccount:
        """The record of the connection to a server that this one is relayed to; use it with
        `with`."""
        self._facts.record_upstream(stream)
        return self._recorder.upstream(self._facts.direction, stream)

    def relayed(self, ended: Relayed) -> None:
        self._relayed = ended

    def _ending(self, error: BaseException | None) -> tuple[str, str]:
        """How it ended: a label and a description."""
        if self._facts.slot is not None and self._facts.slot.evicted:
            return "evicted", "a connection limit was reached"
        if error is not None:
            return "cancelled" if isinstance(error, trio.Cancelled) else describe(
                error
            ).reason, str(error)
        if (
            self._relayed is not None
            and isinstance(lost := self._relayed.error, ConnectionLost)
            and lost.reason == "expired"
        ):
            return "certificate_ended", str(lost)
        if self._relayed is not None and self._relayed.how != "eof":
            return self._relayed.how, describe_end(self._relayed)
        return "closed", ""

    def _span(
        self, trace: Trace, reason: str, words: str, error: BaseException | None
    ) -> StreamRecord:
        """The data for the connection's span."""
        facts, stream = self._facts, self._account.stream
        outbound = facts.direction == "outbound"
        tls = facts.upstream_tls if outbound else facts.tls
        return StreamRecord(
            kind="client" if outbound else "server",
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            started=self._began,
            ended=time.time_ns(),
            direction=facts.direction,
            peer=facts.upstream if outbound else facts.peer,
            destination=facts.destination,
            tls=tls,
            identity=tls.peer_identity if tls is not None else None,
            service=facts.service,
            chosen=facts.chosen,
            failure=None if reason == "closed" else reason,
            words=words,
            loop=error.kind if isinstance(error, LoopDetected) else None,
            protocol=self.detection,
            read=stream.bytes_read,
            written=stream.bytes_written,
        )

    def _line(self, reason: str, words: str, trace: Trace | None) -> ConnectionLine:
        facts, stream = self._facts, self._account.stream
        return ConnectionLine(
            direction=facts.direction,
            peer=str(facts.peer),
            destination=str(facts.destination),
            upstream=str(facts.upstream or ""),
            upstream_identity=_identity(facts.upstream_tls),
            upstream_tls=facts.upstream_tls,
            protocol=self.detection
            if facts.tls is None
            else facts.tls.alpn.decode("ascii", "replace"),
            identity=facts.identity or "",
            tls=facts.tls,
            read=stream.bytes_read,
            written=stream.bytes_written,
            seconds=time.perf_counter() - self._started,
            reason=reason,
            words=words,
            trace_id=trace.trace_id if trace is not None else b"",
            span_id=trace.span_id if trace is not None else b"",
        )


class ExchangeAccount:
    """The record of one request and its response."""

    __slots__ = ("_exchange", "_record", "_recorder", "_started")

    def __init__(self, recorder: Recorder, exchange: Exchange) -> None:
        self._recorder = recorder
        self._exchange = exchange
        self._started = time.perf_counter()
        self._record: RequestRecord = recorder.metrics.http[exchange.facts.direction].request(
            exchange.request.method
        )
        exchange.on_response = self._record.head

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        exchange = self._exchange
        self._record.failed = (
            exchange.failure is not None
            and exchange.response is not None
            and exchange.response.status < 400
        )
        self._record.__exit__(kind, error, trace)
        if isinstance(exchange.body, Replay):
            exchange.body.drop()
        if exchange.failure is not None:
            self._recorder.metrics.count_error(exchange.facts.direction, exchange.failure)
        if exchange.loop is not None:
            self._recorder.loop(exchange.facts.direction, exchange.loop, exchange.failure_words)
        if self._recorder.access:
            log_request(self._line())

    def _line(self) -> RequestLine:
        exchange = self._exchange
        trace = exchange.trace
        identity, caller = (
            exchange.facts.identity or "",
            (exchange.caller or b"").decode("ascii", "replace"),
        )
        return RequestLine(
            direction=exchange.facts.direction,
            peer=str(exchange.facts.peer),
            identity=identity,
            caller=caller if caller != identity else "",
            method=exchange.request.method,
            target=exchange.request.target,
            authority=exchange.request.authority or b"",
            status=exchange.response.status if exchange.response is not None else 0,
            upstream=str(exchange.upstream or ""),
            upstream_identity=_identity(exchange.upstream_tls),
            request_bytes=exchange.request_bytes,
            response_bytes=exchange.response_bytes,
            seconds=time.perf_counter() - self._started,
            reason=exchange.failure or "",
            words=exchange.failure_words,
            trace_id=trace.trace_id if trace is not None else b"",
            span_id=trace.span_id if trace is not None else b"",
        )


def describe_end(ended: Relayed) -> str:
    """The description of a relay that did not end cleanly, with the side of the error."""
    if ended.error is None:
        return "neither side sent data for too long"
    return f"{ended.side}: {ended.error}" if ended.side is not None else str(ended.error)


def _identity(tls: TLSInfo | None) -> str:
    return tls.peer_identity or "" if tls is not None else ""
