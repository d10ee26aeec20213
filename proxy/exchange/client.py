"""One exchange carried to an endpoint, and its response brought back; upstream.py has the protocols that it may be carried by.

The task of the exchange sends the head together with what there is of the body, then reads the response. Only if more of the body
is to come, a second task (the pump) sends it meanwhile, in a nursery that ends here: an upload takes as long as it takes, and the
server may answer before its end.

What is tried again, and when: a connection that cannot be opened leaves the request untouched, so another endpoint may have it. A
kept connection that the server closes just as we use it says nothing about our request; it is repeated on a new connection if
that is safe (RFC 9110 §9.2.2): the method is idempotent, there was no body, and not a byte of a response has come. What was above the
last stream of a GOAWAY the server has not looked at (RFC 9113 §6.8): it is repeated on a new connection whatever it is, unless a part of
its body is gone. Either is done once for an exchange, at however many endpoints that is tried.

A stream that a server refuses on a connection that goes on (REFUSED_STREAM) is an answer, though to a request that it has not looked at.
It is not repeated here but told to the client, who may repeat it; were it repeated at each hop, two hops would make four of one.

Anything further (other endpoints, statuses, refused streams) is decided by whoever calls `send` again; the exchange's `judge` sees the head
before a byte of the response is passed on, and may decline it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from math import inf
from typing import Generic, Protocol, TypeVar

import trio

from proxy.errors import Undelivered, UpstreamClosed, UpstreamProtocolError, UpstreamReset, UpstreamTimeout
from proxy.exchange import max_forwards
from proxy.exchange.exchange import Exchange
from proxy.exchange.handoff import Handoff, Lease
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

# More interim responses than anybody needs; each is passed on, so they may not go on for ever.
_INTERIM = 32

# RFC 9110 §9.2.2.
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})

_GATHER = 65536


# Of a response that is dropped: so much is read, for so many seconds, that its connection may be kept.
_DROP_BYTES = 65536
_DROP_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How long a server may take. Times in seconds."""

    response_timeout: float = 300.0  # from the end of the request to the response's head
    stream_timeout: float = 3600.0  # between two pieces of a body, either way


class Declined(Exception):
    """The response that came was dropped because the exchange's judge wants another attempt."""


Bridge = Callable[[Exchange, Stream, Stream], Awaitable[None]]


class Leases(Protocol[K_contra]):
    """Where carriers come from: the kept connections of one protocol."""

    def carrier(self, endpoint: K_contra, *, fresh: bool, limit: float = inf) -> AbstractAsyncContextManager[Carrier]:
        """A carrier for one exchange, given back behind the block. `fresh`: on a connection that has not been used before. `limit`: trio's
        time of the request's deadline, if it has one."""
        ...


class Client(Generic[K]):
    """Carries exchanges to endpoints. `bridge` joins the two streams of an upgraded connection until they end (net.relay)."""

    def __init__(self, settings: ClientSettings, bridge: Bridge) -> None:
        self._settings = settings
        self._bridge = bridge

    async def send(self, exchange: Exchange, endpoint: K, leases: Leases[K]) -> None:
        """Carry `exchange` to `endpoint` and back; one that the fast path has begun goes on where it stands. Raises what dialling raises,
        the Upstream* errors, UpgradeFailed, NoExtendedConnect, Undelivered, and Declined."""
        handoff, exchange.handoff = exchange.handoff, None
        if exchange.request.method in max_forwards.METHODS and max_forwards.left(exchange.request) == 0:
            exchange.upstream = None  # it goes no further
            await max_forwards.answer(exchange)
            return
        bodiless = exchange.body.length == 0
        try:
            if handoff is not None and handoff.lease is not None:
                await self._go_on(exchange, handoff, handoff.lease)
            else:
                await self._attempt(exchange, endpoint, leases)
        except Unanswered as error:
            harmless = not exchange.request_bytes if error.untouched else bodiless and exchange.request.method in IDEMPOTENT
            if exchange.fresh or not (error.again and harmless):
                raise _told(error) from error
            exchange.fresh = True
            exchange.clock.rest()  # nothing is waited for until this one has been sent
            try:
                await self._attempt(exchange, endpoint, leases)
            except Unanswered as second:
                raise _told(second) from second

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
        async with leases.carrier(endpoint, fresh=exchange.fresh, limit=exchange.clock.limit) as carrier:
            if websocket.extends(exchange.request):
                await carrier.admit()
            exchange.carried(carrier.stream)
            attempt = _Attempt(exchange.times or self._settings, exchange, carrier, self._bridge)
            try:
                taken = await attempt.run()
            finally:
                exchange.pass_half_close(None)
                exchange.facts.declined_responses += carrier.declined
        if not taken:
            raise attempt.reported or Declined


def _told(error: Unanswered) -> UpstreamClosed:
    """What has become of a request that is not repeated."""
    return UpstreamReset(str(error), Code.REFUSED_STREAM) if error.untouched else UpstreamClosed(str(error))


class _Attempt:
    """One exchange on one carrier."""

    __slots__ = ("_bridge", "_carrier", "_exchange", "_fault", "_settings", "_to_client", "reported")

    def __init__(self, settings: ClientSettings, exchange: Exchange, carrier: Carrier, bridge: Bridge) -> None:
        self._settings = settings
        self._exchange = exchange
        self._carrier = carrier
        carrier.share = exchange.facts.share
        self._bridge = bridge
        self._to_client = b""  # what the fast path could not send of its response
        self._fault: Exception | None = None  # of the pump or of the reader, whichever failed first
        self.reported: Undelivered | UpstreamClosed | None = None  # what a proxy has said by a response that was declined for it

    async def run(self) -> bool:
        """False: the response was declined."""
        exchange = self._exchange
        # What follows a CONNECT is not its body but the tunnel, and belongs to whoever answers it.
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
            # Cancelled in both tasks: one Cancelled for all, so that it counts as what it is.
            await trio.lowlevel.checkpoint_if_cancelled()
            raise group
        if self._fault is not None:
            raise self._fault
        return taken

    async def go_on(self, handoff: Handoff) -> bool:
        """The same behind the fast path, which has sent the request's head at least."""
        exchange, carrier = self._exchange, self._carrier
        await trio.lowlevel.checkpoint_if_cancelled()  # a client that has gone is no failure, whatever it has left unsaid
        if handoff.failure is not None:
            if handoff.to_client and isinstance(handoff.failure, UpstreamClosed):  # which the client is told behind what came before it
                await exchange.go_on(handoff.to_client, _Failed(handoff.failure))
            raise handoff.failure
        self._to_client = handoff.to_client
        if not handoff.asked:
            return await self._carry()
        if handoff.to_server:
            carrier.put(handoff.to_server)
            carrier.finish(END)
            exchange.clock.expect(self._stalls, self._settings.stream_timeout)
            with suppress(ConnectionLost):  # it may have said why: the response is still to be read
                await carrier.flush()
        self._sent()
        return await self._receive_or_drop()

    def _sent(self) -> None:
        """All of the request has been sent."""
        exchange = self._exchange
        if exchange.response is None:
            exchange.clock.expect(self._silent, self._settings.response_timeout)
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
            except Exception as error:  # raised by the caller: out of a nursery it would come as a group
                self._fault = self._fault or error
            else:
                # The client has its response: what became of the rest of its request in the same moment changes nothing any more.
                self._fault = None
            # A server that wants no more of the request has said so by ending its response.
            nursery.cancel_scope.cancel()
        return taken

    async def _send_ready(self) -> bool:
        """Send the head with what there is of the body. True: that was all of it."""
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
        exchange.clock.expect(self._stalls, self._settings.stream_timeout)
        try:
            await carrier.flush()
        except ConnectionLost:
            whole = True  # The server takes no more. It may have said why: the response is still to be read.
        if whole:
            self._sent()
        return whole

    async def _pump(self, attempt: trio.CancelScope) -> None:
        """Send the rest of the body as it comes."""
        exchange, carrier = self._exchange, self._carrier
        try:
            while True:
                exchange.clock.await_client()
                piece = await exchange.body.receive()
                exchange.clock.expect(self._stalls, self._settings.stream_timeout)
                if isinstance(piece, EndOfMessage):
                    carrier.finish(piece)
                    await carrier.flush()
                    self._sent()
                    return
                exchange.request_bytes += len(piece)
                carrier.put(piece)
                await carrier.flush()
        except ConnectionLost:
            # The server takes no more. It may have said why: the response is still to be read.
            exchange.clock.expect(self._silent, self._settings.response_timeout)
        except Exception as error:  # handed over to the attempt, which raises it
            self._fault = error
            attempt.cancel()

    async def _receive(self) -> bool:
        """Read the response, the interim ones first, and hand it on. False: it will not do, and nothing of it was handed on."""
        exchange, carrier = self._exchange, self._carrier
        if exchange.response is not None:  # the fast path has begun with it
            await exchange.go_on(self._to_client, _ResponseBody(self._settings, exchange, carrier))
            return True
        for _ in range(_INTERIM):
            head = await carrier.head()
            failure = reported(head, carrier.stream)
            protocol = upgrade_offer(head.headers) if head.status == 101 else None
            strip_hop_by_hop(head.headers)
            if head.status < 200:
                head.headers.remove(b"content-length")  # RFC 9110 §8.6: no body follows, whatever it says
            if not head.informational:
                break
            exchange.informed = True
            await exchange.inform(head)
        else:
            raise UpstreamProtocolError(f"more than {_INTERIM} interim responses")
        # If it is too late already, or the request has failed meanwhile, the client is told so. From here on it can only be told this.
        await trio.lowlevel.checkpoint_if_cancelled()
        if failure is not None:
            self.reported = failure
            exchange.clock.rest()
            return False
        if exchange.judge is not None and exchange.judge(head, carrier.bare_end()):
            exchange.clock.rest()
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
        exchange.clock.unlimit()
        await self._bridge(exchange, client, tunnel)
        return True

    async def _drop(self) -> None:
        """Read the rest of a response that was declined, if it is short: then its connection can be used again."""
        length, left = self._carrier.length, _DROP_BYTES
        if isinstance(length, int) and length > left:
            return
        with trio.move_on_after(_DROP_SECONDS), suppress(UpstreamClosed, UpstreamProtocolError):
            while left > 0 and isinstance(piece := await self._carrier.body(), bytes):
                left -= len(piece)

    def _stalls(self) -> Exception:
        return UpstreamTimeout(f"the server took nothing of the request for {self._settings.stream_timeout} s")

    def _silent(self) -> Exception:
        return UpstreamTimeout(f"the server did not answer within {self._settings.response_timeout} s")


class _Failed:
    """The rest of a response's body that cannot be read, because of `error`. An exchange.Body."""

    __slots__ = ("_error", "length")

    def __init__(self, error: UpstreamClosed) -> None:
        self._error = error
        self.length: Length = Framing.CHUNKED  # no other one can be broken by what it says

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        raise self._error

    async def receive(self) -> bytes | EndOfMessage:
        raise self._error


class _ResponseBody:
    """The response's body as an exchange.Body, with the exchange's clock."""

    __slots__ = ("_carrier", "_clock", "_patience", "length")

    def __init__(self, settings: ClientSettings, exchange: Exchange, carrier: Carrier) -> None:
        self._carrier = carrier
        self._clock = exchange.clock
        self._patience = settings.stream_timeout
        self.length: Length = carrier.length

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        return self._carrier.body_nowait()

    async def receive(self) -> bytes | EndOfMessage:
        piece = self._carrier.body_nowait()
        if piece is None:
            self._clock.expect(self._stops, self._patience)
            piece = await self._carrier.body()
            self._clock.rest()
        return piece

    def _stops(self) -> Exception:
        return UpstreamTimeout(f"the response paused for {self._patience} s")
