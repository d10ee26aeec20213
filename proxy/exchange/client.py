"""One exchange carried to an endpoint over a pooled HTTP/1 connection, and its response brought back.

The task of the exchange sends the head together with what there is of the body, then reads the response. Only if more of the body
is to come, a second task (the pump) sends it meanwhile, in a nursery that ends here: an upload takes as long as it takes, and the
server may answer before its end.

What is tried again, and when: a connection that cannot be opened leaves the request untouched, so another endpoint may have it. A
kept connection that the server closes just as we use it says nothing about our request; it is repeated once on a new connection if
that is safe (RFC 9110 §9.2.2): the method is idempotent, there was no body, and not a byte of a response has come.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic

import trio

from proxy.errors import UpstreamClosed, UpstreamProtocolError, UpstreamTimeout
from proxy.exchange.exchange import Exchange
from proxy.exchange.pool import K, Pool, Upstream
from proxy.exchange.server import READ_SIZE, Resumed
from proxy.net.address import Address
from proxy.net.errors import ConnectionLost
from proxy.net.streams import Stream
from proxy.wire.bodies import Framing, Length
from proxy.wire.http1 import At
from proxy.wire.messages import (
    EndOfMessage,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
    absolute_authority,
    strip_hop_by_hop,
    upgrade_offer,
    wants_trailers,
)

# RFC 9110 §9.2.2.
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})

_GATHER = 65536


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Times in seconds."""

    response_timeout: float = 300.0  # from the end of the request to the response's head
    stream_timeout: float = 3600.0  # between two pieces of a body, either way


Bridge = Callable[[Exchange, Stream, Stream], Awaitable[None]]


class _Unanswered(Exception):
    """The server closed before it sent one byte of a final response: (words, whether it may just have been closing an idle connection)."""


class Client(Generic[K]):
    """Carries exchanges to endpoints. `bridge` joins the two streams of an upgraded connection until they end (net.relay)."""

    def __init__(self, pool: Pool[K], settings: ClientSettings, bridge: Bridge) -> None:
        self._pool = pool
        self._settings = settings
        self._bridge = bridge

    async def send(self, exchange: Exchange, endpoint: K) -> None:
        """Carry `exchange` to `endpoint` and back. Raises what dialling raises, and the Upstream* errors."""
        again = exchange.request.method in IDEMPOTENT and exchange.body.length == 0
        try:
            await self._attempt(exchange, endpoint, fresh=False)
        except _Unanswered as error:
            if not (again and error.args[1]):
                raise UpstreamClosed(error.args[0]) from error
            try:
                await self._attempt(exchange, endpoint, fresh=True)
            except _Unanswered as second:
                raise UpstreamClosed(second.args[0]) from second

    async def _attempt(self, exchange: Exchange, endpoint: K, *, fresh: bool) -> None:
        upstream = await self._pool.acquire(endpoint, fresh=fresh)
        exchange.carried(upstream.stream)
        usable, declined = False, upstream.http.declined
        try:
            await _Attempt(self._settings, exchange, upstream, self._bridge).run()
            usable = True
        finally:
            exchange.facts.declined_responses += upstream.http.declined - declined
            self._pool.give_back(endpoint, upstream, usable=usable)


class _Attempt:
    """One exchange on one connection."""

    __slots__ = ("_bridge", "_exchange", "_fault", "_http", "_settings", "_silence", "_stream", "_upstream")

    def __init__(self, settings: ClientSettings, exchange: Exchange, upstream: Upstream, bridge: Bridge) -> None:
        self._settings = settings
        self._exchange = exchange
        self._upstream = upstream
        self._stream = upstream.stream
        self._http = upstream.http
        self._bridge = bridge
        self._fault: Exception | None = None  # of the pump or of the reader, whichever failed first
        self._silence = True  # the server has not sent anything yet

    async def run(self) -> None:
        exchange = self._exchange
        length = exchange.body.length
        head = forwarded_request(exchange.request, length, exchange.facts.destination)
        out = [self._http.send_request(head, length)]
        if await self._send_ready(out):
            await self._receive()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, nursery.cancel_scope)
            try:
                await self._receive()
            except Exception as error:  # raised below: out of a nursery it would come as a group
                self._fault = self._fault or error
            else:
                # The client has its response: what became of the rest of its request in the same moment changes nothing any more.
                self._fault = None
            # A server that wants no more of the request has said so by ending its response.
            nursery.cancel_scope.cancel()
        if self._fault is not None:
            raise self._fault

    async def _send_ready(self, out: list[bytes]) -> bool:
        """Send the head with what there is of the body. True: that was all of it."""
        gathered, whole = 0, False
        while gathered < _GATHER:
            piece = self._exchange.body.receive_nowait()
            if piece is None:
                break
            if isinstance(piece, EndOfMessage):
                out.append(self._http.send_end(piece))
                whole = True
                break
            gathered += len(piece)
            out.append(self._http.send_data(piece))
        self._exchange.request_bytes += gathered
        self._exchange.clock.expect(self._stalls, self._settings.stream_timeout)
        try:
            await self._stream.send_all(out[0] if len(out) == 1 else b"".join(out))
        except ConnectionLost as error:
            raise self._unanswered(f"the connection broke while the request was sent: {error}") from error
        if whole:
            self._exchange.clock.expect(self._silent, self._settings.response_timeout)
        return whole

    async def _pump(self, attempt: trio.CancelScope) -> None:
        """Send the rest of the body as it comes."""
        exchange, http, stream = self._exchange, self._http, self._stream
        try:
            while True:
                exchange.clock.rest()  # the client's own deadlines rule while it is waited for
                piece = await exchange.body.receive()
                exchange.clock.expect(self._stalls, self._settings.stream_timeout)
                if isinstance(piece, EndOfMessage):
                    if last := http.send_end(piece):
                        await stream.send_all(last)
                    if exchange.response is None:
                        exchange.clock.expect(self._silent, self._settings.response_timeout)
                    return
                exchange.request_bytes += len(piece)
                await stream.send_all(http.send_data(piece))
        except ConnectionLost:
            # The server takes no more. It may have said why: the response is still to be read.
            http.keep_alive = False
            exchange.clock.expect(self._silent, self._settings.response_timeout)
        except Exception as error:  # handed over to the attempt, which raises it
            self._fault = error
            attempt.cancel()

    async def _receive(self) -> None:
        """Read the response, the interim ones first, and hand it on."""
        exchange = self._exchange
        while True:
            head = await self._read_head()
            strip = upgrade_offer(head.headers) if head.status == 101 else None
            strip_hop_by_hop(head.headers)
            if head.informational:
                self._silence = False
                await exchange.inform(head)
                continue
            break
        if self._http.reading is At.TUNNEL:
            await self._tunnel(head, strip)
            return
        await exchange.respond(head, _ResponseBody(self))

    async def _tunnel(self, head: ResponseHead, protocol: bytes | None) -> None:
        if self._http.writing is not At.DONE:
            raise UpstreamProtocolError("the server switched protocols before it had the whole request")
        if head.status == 101:
            if protocol is None or offered(self._exchange.request) is None:
                raise UpstreamProtocolError("a 101 response to a request that offered no upgrade")
            head.headers.add(b"Connection", b"Upgrade")
            head.headers.add(b"Upgrade", protocol)
        self._http.keep_alive = False
        client = await self._exchange.switch(head)
        self._exchange.clock.rest()
        await self._bridge(self._exchange, client, Resumed(self._stream, self._http.take_rest()))

    async def _read_head(self) -> ResponseHead:
        http = self._http
        while True:
            try:
                head = http.next_response()
            except ProtocolError as error:
                raise UpstreamProtocolError(f"the response's head: {error}") from error
            if isinstance(head, ResponseHead):
                return head
            if head is Signal.CLOSED:
                raise self._unanswered("the server closed the connection without a response")
            try:
                http.receive_data(await self._stream.receive_some(READ_SIZE))
            except ConnectionLost as error:
                if http.buffered:
                    raise UpstreamClosed(f"the connection broke within the response's head: {error}") from error
                raise self._unanswered(f"the connection broke before a response came: {error}") from error

    def _unanswered(self, words: str) -> _Unanswered:
        return _Unanswered(words, self._upstream.reused and self._silence)

    async def read_body(self) -> bytes | EndOfMessage:
        """The next piece of the response's body, waited for."""
        while (piece := self.read_body_nowait()) is None:
            self._exchange.clock.expect(self._silent, self._settings.stream_timeout)
            try:
                self._http.receive_data(await self._stream.receive_some(READ_SIZE))
            except ConnectionLost as error:
                raise UpstreamClosed(f"the connection broke within the response's body: {error}") from error
        self._exchange.clock.rest()
        return piece

    def read_body_nowait(self) -> bytes | EndOfMessage | None:
        try:
            piece = self._http.next_body()
        except ProtocolError as error:
            raise UpstreamClosed(f"the response's body: {error}") from error
        return None if isinstance(piece, Signal) else piece

    @property
    def body_length(self) -> Length:
        return self._http.body_length

    def _stalls(self) -> Exception:
        return UpstreamTimeout(f"the server took nothing of the request for {self._settings.stream_timeout} s")

    def _silent(self) -> Exception:
        return UpstreamTimeout("the server did not answer in time, or stopped within its response")


class _ResponseBody:
    """The response's body as an exchange.Body."""

    __slots__ = ("_attempt", "length")

    def __init__(self, attempt: _Attempt) -> None:
        self._attempt = attempt
        self.length: Length = attempt.body_length

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        return self._attempt.read_body_nowait()

    async def receive(self) -> bytes | EndOfMessage:
        return await self._attempt.read_body()


def offered(request: RequestHead) -> bytes | None:
    """The protocols that the client would rather speak. HTTP/1.0 knows no 101 (RFC 9110 §7.8)."""
    return None if request.version == b"1.0" else upgrade_offer(request.headers)


def forwarded_request(request: RequestHead, length: Length, destination: Address) -> RequestHead:
    """The head as it goes to the next hop: without what belonged to the last one, with what belongs to this one (RFC 9110 §7.6).
    `destination`, where the client went, is the authority of a request that names none."""
    headers = Headers(request.headers.items)
    offer, trailers = offered(request), wants_trailers(headers)
    strip_hop_by_hop(headers)
    if request.target[:1] not in (b"/", b"*") and request.method != b"CONNECT":
        # RFC 9112 §3.2.2: the absolute-form's authority is the one that counts, whatever Host said.
        headers.replace(b"Host", absolute_authority(request.target) or b"")
    elif request.version == b"1.0" and b"host" not in headers:
        # HTTP/1.0 may do without, and we speak 1.1 from here on, which may not (RFC 9112 §3.2).
        headers.items.insert(0, (b"Host", request.authority or str(destination).encode("ascii")))
    if length is Framing.CHUNKED:
        headers.add(b"Transfer-Encoding", b"chunked")
    options = []
    if trailers:
        headers.add(b"TE", b"trailers")
        options.append(b"TE")
    if offer is not None:
        headers.add(b"Upgrade", offer)
        options.append(b"Upgrade")
    if options:
        headers.add(b"Connection", b", ".join(options))
    return RequestHead(request.method, request.target, headers)
