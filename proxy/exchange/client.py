"""Sends one exchange to an endpoint and returns its response. upstream.py has the carriers, one for
each protocol.

The task of the exchange sends the head together with the part of the body that has arrived, then
reads the response. Only if more of the body has to come, a second task (the pump) sends it at the
same time. It runs in a nursery that ends here: an upload may take long, and the server may answer
before its end.

If a connection cannot be opened, the request was not sent: the caller may try another endpoint.
Two cases are repeated here, once for each exchange, at however many endpoints it is tried:

- If the server closes a reused connection just as we send on it, the close says nothing about the
request. The request is repeated on a new connection if this is safe (RFC 9110 §9.2.2): the method
is idempotent, there was no body, and no byte of a response has arrived.

- Streams above the last stream of a GOAWAY were not processed by the server (RFC 9113 §6.8). They
are repeated on a new connection with any method, unless a part of the body has been sent.

A refused stream (REFUSED_STREAM) on a connection that stays open was not processed either, but it
counts as the response. It is not repeated here. The client gets the refusal and may repeat the
request. If each hop repeated it, two hops would make four requests of one.

All other retries (other endpoints, statuses, refused streams) are decided by the caller, which
calls `send` again. The exchange's `judge` sees the head before any byte of the response is passed
on, and may decline the response.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager, suppress
from math import inf
from typing import Generic, Protocol, TypeVar

import trio

from proxy.errors import (
    Undelivered,
    UpstreamClosed,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from proxy.exchange import max_forwards
from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import Exchange, Handoff, Lease
from proxy.exchange.reports import reported
from proxy.exchange.upstream import Carrier, Unanswered
from proxy.exchange.upstream_head import forwarded_request, offered
from proxy.net.exceptions import ConnectionLost
from proxy.net.socket_stream import Stream
from proxy.wire import websocket
from proxy.wire.h1.body import Framing, Length
from proxy.wire.h2.frames import Code
from proxy.wire.messages import END, EndOfMessage, strip_hop_by_hop, upgrade_offer

K = TypeVar("K", bound=Hashable)
K_contra = TypeVar("K_contra", bound=Hashable, contravariant=True)

# The most interim responses for one request. Each is passed on, so there has to be a limit.
_INTERIM = 32

# RFC 9110 §9.2.2.
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})

_GATHER = 65536


# Limits for reading the rest of a dropped response, so that its connection can be reused.
_DROP_BYTES = 65536
_DROP_SECONDS = 0.25


class Declined(Exception):
    """The response was dropped because the exchange's judge requires another attempt."""


Bridge = Callable[[Exchange, Stream, Stream], Awaitable[None]]


class Leases(Protocol[K_contra]):
    """Leases carriers: the pooled connections of one protocol."""

    def carrier(
        self, endpoint: K_contra, *, fresh: bool, limit: float = inf
    ) -> AbstractAsyncContextManager[Carrier]:
        """Lease a carrier for one exchange; the end of the block returns it. `fresh`: on a
        connection that has not been used before. `limit`: the request's deadline in trio's time, if
        it has one."""
        ...


class Client(Generic[K]):
    """Sends exchanges to endpoints. `bridge` joins the two streams of an upgraded connection until
    they end (net.relay)."""

    def __init__(self, settings: ClientSettings, bridge: Bridge) -> None:
        self._settings = settings
        self._bridge = bridge

    async def send(self, exchange: Exchange, endpoint: K, leases: Leases[K]) -> None:
        """Send `exchange` to `endpoint` and pass the response on. An exchange that the fast path
        has begun continues in its current state. Raises the errors of the dial, the Upstream*
        errors, UpgradeFailed, NoExtendedConnect, Undelivered, and Declined."""
        handoff, exchange.handoff = exchange.handoff, None
        if (
            exchange.request.method in max_forwards.METHODS
            and max_forwards.left(exchange.request) == 0
        ):
            exchange.upstream = None  # it is answered here
            await max_forwards.answer(exchange)
            return
        bodiless = exchange.body.length == 0
        try:
            if handoff is not None and handoff.lease is not None:
                await self._go_on(exchange, handoff, handoff.lease)
            else:
                await self._attempt(exchange, endpoint, leases)
        except Unanswered as error:
            harmless = (
                not exchange.request_bytes
                if error.untouched
                else bodiless and exchange.request.method in IDEMPOTENT
            )
            if exchange.fresh or not (error.again and harmless):
                raise _closed(error) from error
            exchange.fresh = True
            exchange.timer.rest()  # no timeout until the request is sent again
            try:
                await self._attempt(exchange, endpoint, leases)
            except Unanswered as second:
                raise _closed(second) from second

    async def _go_on(self, exchange: Exchange, handoff: Handoff, lease: Lease) -> None:
        usable, carrier = False, lease.carrier()
        attempt = _Attempt(self._settings, exchange, carrier, self._bridge)
        try:
            taken = await attempt.go_on(handoff)
            usable = True
        finally:
            exchange.pass_half_close(None)
            exchange.facts.declined_responses += carrier.declined
            lease.end(usable=usable)
        if not taken:
            raise attempt.reported or Declined

    async def _attempt(self, exchange: Exchange, endpoint: K, leases: Leases[K]) -> None:
        async with leases.carrier(
            endpoint, fresh=exchange.fresh, limit=exchange.timer.limit
        ) as carrier:
            if websocket.extends(exchange.request):
                await carrier.admit()
            exchange.record_upstream(carrier.stream)
            attempt = _Attempt(exchange.times or self._settings, exchange, carrier, self._bridge)
            try:
                taken = await attempt.run()
            finally:
                exchange.pass_half_close(None)
                exchange.facts.declined_responses += carrier.declined
        if not taken:
            raise attempt.reported or Declined


def _closed(error: Unanswered) -> UpstreamClosed:
    """The error for a request that is not repeated."""
    return (
        UpstreamReset(str(error), Code.REFUSED_STREAM)
        if error.untouched
        else UpstreamClosed(str(error))
    )


class _Attempt:
    """One exchange on one carrier."""

    __slots__ = (
        "_bridge",
        "_carrier",
        "_exchange",
        "_fault",
        "_settings",
        "_to_client",
        "reported",
    )

    def __init__(
        self, settings: ClientSettings, exchange: Exchange, carrier: Carrier, bridge: Bridge
    ) -> None:
        self._settings = settings
        self._exchange = exchange
        self._carrier = carrier
        carrier.share = exchange.facts.share
        self._bridge = bridge
        self._to_client = b""  # response bytes that the fast path has not sent
        self._fault: Exception | None = None  # the first error of the pump or the reader
        # the failure that the next proxy reported by a response, which was then declined
        self.reported: Undelivered | UpstreamClosed | None = None

    async def run(self) -> bool:
        """Send the request and pass the response on. Returns False if the response was declined."""
        exchange = self._exchange
        # The bytes after a CONNECT are not a body but the tunnel, which belongs to the final
        # recipient.
        length = 0 if exchange.request.method == b"CONNECT" else exchange.body.length
        self._carrier.begin(forwarded_request(exchange), length)
        return await self._carry()

    async def _carry(self) -> bool:
        if await self._send_ready():
            return await self._receive_or_drop()
        group, taken = None, True
        try:
            taken = await self._receive_and_pump()
        except BaseExceptionGroup as error:
            group = error
        if group is not None:
            # Cancelled in both tasks: raise a single Cancelled, not a group.
            try:
                await trio.lowlevel.checkpoint_if_cancelled()
                raise group
            finally:
                del group  # it holds this frame
        if self._fault is not None:
            raise self._fault
        return taken

    async def go_on(self, handoff: Handoff) -> bool:
        """Continue an attempt that the fast path has begun: it has sent at least the head of the
        request. Returns False if the response was declined."""
        exchange, carrier = self._exchange, self._carrier
        # if the client has disconnected, this is a cancellation, not a failure
        await trio.lowlevel.checkpoint_if_cancelled()
        if handoff.failure is not None:
            # the client gets the bytes before the failure first
            if handoff.to_client and isinstance(handoff.failure, UpstreamClosed):
                await exchange.go_on(handoff.to_client, _Failed(handoff.failure))
            raise handoff.failure
        self._to_client = handoff.to_client
        if not handoff.request_sent:
            return await self._carry()
        if handoff.to_server:
            carrier.put(handoff.to_server)
            carrier.finish(END)
            exchange.timer.expect(self._stalls, self._settings.stream_timeout)
            with suppress(ConnectionLost):  # the response may say why: read it
                await carrier.flush()
        self._sent()
        return await self._receive_or_drop()

    def _sent(self) -> None:
        """The whole request has been sent."""
        exchange = self._exchange
        if exchange.response is None:
            exchange.timer.expect(self._silent, self._settings.response_timeout)
        if exchange.request.method != b"CONNECT":
            exchange.pass_half_close(self._carrier.half_close)

    async def _receive_or_drop(self) -> bool:
        taken = await self._receive()
        if not taken:
            await self._drop()
        return taken

    async def _receive_and_pump(self) -> bool:
        taken = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, nursery.cancel_scope)
            try:
                taken = await self._receive()
            except Exception as error:  # raised by the caller: the nursery would wrap it in a group
                self._fault = self._fault or error
            else:
                # The client has its response, so an error in the rest of its request no longer
                # matters.
                self._fault = None
            # The response has ended, so the server needs no more of the request.
            nursery.cancel_scope.cancel()
        return taken

    async def _send_ready(self) -> bool:
        """Send the head with the part of the body that has arrived. Returns True if that was the
        whole request."""
        exchange, carrier = self._exchange, self._carrier
        gathered, whole = 0, exchange.request.method == b"CONNECT"
        if whole:
            carrier.finish(END)
        while not whole and gathered < _GATHER:
            piece = exchange.body.receive_nowait()
            if piece is None:
                break
            if isinstance(piece, EndOfMessage):
                carrier.finish(piece)
                whole = True
            else:
                gathered += len(piece)
                carrier.put(piece)
        exchange.request_bytes += gathered
        exchange.timer.expect(self._stalls, self._settings.stream_timeout)
        try:
            await carrier.flush()
        except ConnectionLost:
            whole = True  # The server accepts no more data. Its response may say why: read it.
        if whole:
            self._sent()
        return whole

    async def _pump(self, attempt: trio.CancelScope) -> None:
        """Send the rest of the body as it arrives."""
        exchange, carrier = self._exchange, self._carrier
        try:
            while True:
                exchange.timer.await_client()
                piece = await exchange.body.receive()
                exchange.timer.expect(self._stalls, self._settings.stream_timeout)
                if isinstance(piece, EndOfMessage):
                    carrier.finish(piece)
                    await carrier.flush()
                    self._sent()
                    return
                exchange.request_bytes += len(piece)
                carrier.put(piece)
                await carrier.flush()
        except ConnectionLost:
            # The server accepts no more data. Its response may say why: read it.
            exchange.timer.expect(self._silent, self._settings.response_timeout)
        except Exception as error:  # the attempt raises it
            self._fault = error
            attempt.cancel()

    async def _receive(self) -> bool:
        """Read the response, with interim responses first, and pass it on. Returns False if it was
        declined; nothing of it was passed on then."""
        exchange, carrier = self._exchange, self._carrier
        if exchange.response is not None:  # the fast path has sent the head
            await exchange.go_on(self._to_client, _ResponseBody(self._settings, exchange, carrier))
            return True
        for _ in range(_INTERIM):
            head = await carrier.head()
            failure = reported(head, carrier.stream)
            protocol = upgrade_offer(head.headers) if head.status == 101 else None
            strip_hop_by_hop(head.headers)
            if head.status < 200:
                # RFC 9110 §8.6: no body follows, whatever Content-Length says
                head.headers.remove(b"content-length")
            if not head.informational:
                break
            exchange.informed = True
            await exchange.inform(head)
        else:
            raise UpstreamProtocolError(f"more than {_INTERIM} interim responses")
        # Last point at which a timeout or a failed request can still become an error response.
        await trio.lowlevel.checkpoint_if_cancelled()
        if failure is not None:
            self.reported = failure
            exchange.timer.rest()
            return False
        if exchange.judge is not None and exchange.judge(head, carrier.bare_end()):
            exchange.timer.rest()
            return False
        tunnel = carrier.tunnel()
        if tunnel is None:
            await exchange.respond(head, _ResponseBody(self._settings, exchange, carrier))
            return True
        if head.status == 101:
            if protocol is None or offered(exchange.request) is None:
                raise UpstreamProtocolError("a 101 response to a request that offered no upgrade")
            head.headers.add(b"Connection", b"Upgrade")
            head.headers.add(b"Upgrade", protocol)
        exchange.pass_half_close(None)
        client = await exchange.switch(head)
        exchange.timer.unlimit()
        await self._bridge(exchange, client, tunnel)
        return True

    async def _drop(self) -> None:
        """Read the rest of a declined response if it is short, so that its connection can be
        reused."""
        length, left = self._carrier.length, _DROP_BYTES
        if isinstance(length, int) and length > left:
            return
        with trio.move_on_after(_DROP_SECONDS), suppress(UpstreamClosed, UpstreamProtocolError):
            while left > 0 and isinstance(piece := await self._carrier.body(), bytes):
                left -= len(piece)

    def _stalls(self) -> Exception:
        return UpstreamTimeout(
            f"the server accepted no data of the request for {self._settings.stream_timeout} s"
        )

    def _silent(self) -> Exception:
        return UpstreamTimeout(
            f"the server did not answer within {self._settings.response_timeout} s"
        )


class _Failed:
    """The rest of a response body that cannot be read, because of `error`. An exchange.Body."""

    __slots__ = ("_error", "length")

    def __init__(self, error: UpstreamClosed) -> None:
        self._error = error
        self.length: Length = Framing.CHUNKED  # only a chunked body can have invalid framing

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        raise self._error

    async def receive(self) -> bytes | EndOfMessage:
        raise self._error


class _ResponseBody:
    """The response body as an exchange.Body, with the timeouts of the exchange's timer."""

    __slots__ = ("_carrier", "_patience", "_timer", "length")

    def __init__(self, settings: ClientSettings, exchange: Exchange, carrier: Carrier) -> None:
        self._carrier = carrier
        self._timer = exchange.timer
        self._patience = settings.stream_timeout
        self.length: Length = carrier.length

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        return self._carrier.body_nowait()

    async def receive(self) -> bytes | EndOfMessage:
        piece = self._carrier.body_nowait()
        if piece is None:
            self._timer.expect(self._stops, self._patience)
            piece = await self._carrier.body()
            self._timer.rest()
        return piece

    def _stops(self) -> Exception:
        return UpstreamTimeout(f"the response paused for {self._patience} s")
