"""One lent connection and its current exchange. The package docstring explains the design.

    IDLE        between two exchanges: a request may arrive
    REQUESTED   the request is sent or being sent: the response head may arrive
    RESPONDING  the response head is sent or being sent: the rest of the body may arrive

    IDLE --start_exchange--> REQUESTED --start_response--> RESPONDING --finish--> IDLE
    IDLE --give_back--> the ordinary path, between two exchanges
    REQUESTED, RESPONDING --hand_over--> the ordinary path, within the exchange

The event loop calls a step when a socket is ready. A step does what it can without waiting, then
returns. If a step meets a case that the fast path does not handle, it gives the connection back,
and this is always its last action.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, ExitStack
from math import inf

from trio.lowlevel import Abort, RaiseCancelT, Task, current_task, reschedule, wait_task_rescheduled

from proxy.errors import ClientGone
from proxy.exchange.exchange import Whole
from proxy.exchange.h1.server import Http1Exchange, Http1Server
from proxy.exchange.upstream import unreadable
from proxy.exchange.upstream_head import forwarded_request
from proxy.fastpath.chunked_body import ChunkedTranscoder
from proxy.fastpath.eligibility import Eligibility
from proxy.fastpath.h1_handoff import hand_off
from proxy.fastpath.host import Host
from proxy.fastpath.plan import ConnectionLease, Planner
from proxy.fastpath.ready_socket import IN, OUT, ReadySocket, ready_socket_of
from proxy.net.exceptions import NetError
from proxy.net.memory_budget import SMALL, Charge
from proxy.net.nonblocking import NonblockingStream
from proxy.wire.h1.connection import At
from proxy.wire.h1.fast_head import (
    encode_request,
    encode_response,
    recognise_request,
    recognise_response,
)
from proxy.wire.messages import strip_hop_by_hop

_NOTHING = Whole()  # for a request whose body was sent together with its head


class FastConnection:
    """One connection. It is created with the first lease of the connection and kept for all later
    ones. The connection's task calls `carry`. Any code may call `give_back`, `recall` and
    `hand_over`. The fast path calls the rest."""

    __slots__ = (
        "_account",
        "_buffered",
        "_chunks",
        "_client",
        "_eligibility",
        "_endpoint",
        "_event_loop",
        "_exchange",
        "_fast_path",
        "_fault",
        "_lease",
        "_lent",
        "_planner",
        "_read_ahead",
        "_remaining",
        "_result",
        "_server",
        "_surplus",
        "_task",
        "limit",
        "moved",
    )  # fmt: skip

    def __init__(
        self, fast_path: Host, planner: Planner, server: Http1Server, stream: NonblockingStream
    ) -> None:
        self._fast_path = fast_path
        self._planner = planner
        self._server = server
        self._event_loop = fast_path.event_loop
        self._client = ReadySocket(fast_path.event_loop, stream)
        # unsent bytes to the client, and bytes that it sent ahead
        self._buffered = Charge(server.facts.share)
        self._lent = False
        self._task: Task | None = None  # the connection's task, while it is suspended in `carry`
        # an exchange that the ordinary path has to continue
        self._result: Http1Exchange | None = None
        self._fault: Exception | None = None
        self._read_ahead = b""  # bytes that were read after the current exchange
        self._eligibility = Eligibility()
        self.moved = 0.0  # trio's time at the last step of an exchange
        self.limit = inf  # trio's time when the exchange must have ended
        self._exchange: Http1Exchange | None = None
        self._account: AbstractContextManager[object] | None = None
        self._lease: ConnectionLease[Hashable] | None = None
        self._endpoint: ReadySocket | None = None
        self._remaining = 0  # bytes of the response body still to be read; chunked: 1 until the end
        self._chunks: ChunkedTranscoder | None = None
        self._surplus = False  # the server has sent bytes after its response

    def busy(self) -> bool:
        return self._exchange is not None or bool(self._read_ahead)

    def due(self) -> float:
        """Return the time (trio's) when the idle connection goes back to the ordinary path: after
        half of its idle timeout."""
        return self._server.idle_since + self._server.settings.idle_timeout / 2

    async def carry(self) -> Http1Exchange | None:
        """Implements exchange.h1.server.LentConnection. If it is cancelled within an exchange, the
        account of the exchange closes as cancelled."""
        server = self._server
        ended = server.leaving or server.client_ended
        if ended or not self._eligibility.admit() or not self._fast_path.lend(self):
            return None
        self._lent, server.on_client_end = True, self.leave
        self._client.set_step(self._on_client)
        self._client.watch(IN)
        connection = server.connection
        # the fast path handles HTTP/1.1 only; the last request may have been another version
        connection.peer_version = b"1.1"
        self._read_ahead = connection.take_rest()
        self.next()
        try:
            if self._is_lent():  # False if `next` has already given the connection back
                self._task = current_task()
                await wait_task_rescheduled(self._abort)
            if self._fault is not None:
                raise self._fault
            handoff, self._result = self._result, None
            return handoff
        # cancelled, or an internal error: in both cases the exchange ends here
        except BaseException as error:
            self._drop(error)
            raise

    def _is_lent(self) -> bool:
        return self._lent

    def _abort(self, _: RaiseCancelT) -> Abort:
        self._release()
        return Abort.SUCCEEDED

    def _drop(self, error: BaseException) -> None:
        exchange, account, lease = self._exchange, self._account, self._lease
        if exchange is not None and account is not None and lease is not None:
            account.__exit__(type(error), error, error.__traceback__)
            lease.end(usable=False)
            if lease.plan is not None:
                lease.plan.end(exchange)
            self._forget_exchange()

    def _release(self) -> None:
        self._lent, self._server.on_client_end = False, None
        self._buffered.become(0)  # the ordinary path charges its own buffers
        self._client.forget()
        if self._endpoint is not None:
            self._endpoint.forget()
        self._fast_path.connection_left(self)

    def _wake(self, handoff: Http1Exchange | None = None) -> None:
        task, self._task, self._result = self._task, None, handoff
        self._release()
        if task is not None:
            reschedule(task)

    def give_back(self, data: bytes = b"") -> None:
        """Give the connection back between two exchanges. `data`: bytes of the next request that
        were read."""
        self._eligibility.record_decline()
        if data:
            self._server.connection.receive_data(data)
        self._wake()

    def recall(self) -> None:
        """Give the connection back if it is between two exchanges. Called when the proxy shuts down
        or the connection has been idle for long; the ordinary path handles both."""
        if self._lent and not self.busy():
            self._wake()

    def leave(self) -> None:
        """Give everything back: the fast path closes, or the client has ended its direction of the
        connection."""
        if self._exchange is not None:
            self.hand_over()
        else:
            self.give_back(self._read_ahead)

    def hand_over(self, data: bytes = b"", failure: Exception | None = None) -> None:
        """Hand the current exchange over. `data`: bytes from the server that were not parsed.
        `failure`: the error that ends the exchange."""
        exchange, account, lease, endpoint = (
            self._exchange,
            self._account,
            self._lease,
            self._endpoint,
        )
        if exchange is None or account is None or lease is None or endpoint is None:
            raise RuntimeError("there is no exchange to hand over")
        self._fast_path.count_handoff()
        self._eligibility.record_decline()
        http = self._server.connection
        exchange.handoff = hand_off(
            http,
            exchange,
            lease,
            self._chunks or self._remaining,
            (endpoint.unsent, self._client.unsent, data),
        )
        exchange.handoff.failure = failure
        http.receive_data_if(self._read_ahead)
        exchange.account = ExitStack()
        exchange.account.push(account)  # it is already open
        self._wake(exchange)
        self._forget_exchange()

    def _hand_over_unsent(self, exchange: Http1Exchange, rest: bytes) -> None:
        """Give the connection back with a request for which decisions have been made, but nothing
        was sent."""
        self._eligibility.record_decline()
        connection = self._server.connection
        connection.take_over(exchange.request.method, (At.DONE, 0), (At.HEAD, 0))
        connection.receive_data_if(rest)
        self._wake(exchange)

    def fail(self, error: Exception) -> None:
        """Internal error: end the connection, as the ordinary path does."""
        self._fault = error
        self._wake()

    def _forget_exchange(self) -> None:
        self._exchange = self._account = self._lease = self._endpoint = self._chunks = None
        self._client.unsent = self._read_ahead = b""
        self._surplus = False

    # The steps...

    def _on_client(self, _: int) -> None:
        if not self._lent:
            return  # it was given back earlier in this turn
        try:
            if self._exchange is None:
                # otherwise an exchange ended in this turn, and `next` will process the bytes read
                # ahead
                if not self._read_ahead:
                    self._receive()
            elif self._client.unsent:
                self.moved = self._event_loop.now
                self._send(self._client.unsent)
            else:
                # the client sends its next request or has closed; handled after this exchange
                self._client.watch(0)
        # error boundary: a bug in one connection must not affect the others
        except Exception as error:
            self.fail(error)

    def _on_server(self, _: int) -> None:
        try:
            self._receive_response()
        except Exception as error:
            self.fail(error)

    def next(self) -> None:
        """Process the bytes that were read after the last exchange."""
        if not self._lent or self._exchange is not None or not self._read_ahead:
            return  # it was given back in the meantime
        data, self._read_ahead = self._read_ahead, b""
        try:
            self._start_exchange(data)
        except Exception as error:
            self.fail(error)

    def _receive(self) -> None:
        try:
            data = self._client.receive()
        except NetError:
            data = b""
        if data:
            self._start_exchange(data)
        elif data is not None:  # the end or an error: the ordinary path will see it again
            self._wake()

    def _start_exchange(self, data: bytes) -> None:
        """IDLE: process a request, which usually arrives whole."""
        server = self._server
        end = data.find(b"\r\n\r\n") + 4
        found = recognise_request(data[:end], server.settings.limits) if end > 3 else None
        if (
            found is None
            or found[1] > len(data) - end
            or end > SMALL
            or server.leaving
            or server.facts.share.full
        ):
            self.give_back(data)
            return
        request, length = found
        body = data[end : end + length]
        now = self._event_loop.now
        # The exchange's body is only read if the request has to be sent again.
        exchange = Http1Exchange(server, request, Whole(body) if body else _NOTHING, now=now)
        rest = data[end + length :]
        lease = self._planner.take(exchange, now)
        if lease is None:
            if exchange.handoff is not None:
                self._hand_over_unsent(exchange, rest)
            else:
                self.give_back(data)
            return
        account = self._planner.account(exchange)
        account.__enter__()
        if lease.plan is not None:
            lease.plan.begin(exchange)
        self._exchange, self._account, self._lease = exchange, account, lease
        self._read_ahead = rest
        if rest or self._buffered.size:
            self._buffered.become(len(rest))
        self._remaining = 0
        self._endpoint = endpoint = ready_socket_of(lease.upstream, self._event_loop)
        endpoint.set_step(self._on_server)
        exchange.record_upstream_address(endpoint.peer, endpoint.tls)
        exchange.request_bytes = length
        self.moved, self.limit = now, lease.limit
        self._fast_path.exchange_began(self)
        self._send_request(endpoint, encode_request(forwarded_request(exchange)) + body)

    def _send_request(self, endpoint: ReadySocket, data: bytes) -> None:
        try:
            # the first send: the connection was just found quiet
            sent = endpoint.send(data, sound=not endpoint.unsent)
        except NetError:
            if self._lease is not None:
                self._lease.upstream.http.keep_alive = False
            # the server accepts no more data; it may have sent a response that says why
            self.hand_over()
            return
        endpoint.unsent = data[sent:]
        endpoint.watch(IN | OUT if endpoint.unsent else IN)

    def _receive_response(self) -> None:
        """REQUESTED or RESPONDING: the server's socket is ready."""
        exchange, endpoint = self._exchange, self._endpoint
        if exchange is None or endpoint is None:
            return
        self.moved = self._event_loop.now
        if endpoint.unsent:
            self._send_request(endpoint, endpoint.unsent)
            return
        try:
            # Chunks cost work per chunk. With small chunks, a larger read would make one step too
            # long.
            data = endpoint.take(
                self._server.facts.share,
                bulk=exchange.response is not None and self._chunks is None,
            )
        except NetError:
            data = b""
        if data is None:
            return
        if not data:
            self.hand_over()  # the end or an error: the ordinary path will see it again
        elif exchange.response is None:
            self._start_response(exchange, data)
        else:
            self._forward_body(exchange, b"", data)

    def _start_response(self, exchange: Http1Exchange, data: bytes) -> None:
        """REQUESTED: process the response head, and the part of the body that arrived with it."""
        end = data.find(b"\r\n\r\n") + 4
        found = recognise_response(data[:end], self._server.settings.limits) if end > 3 else None
        plan = self._lease.plan if self._lease is not None else None
        if found is None or self._server.leaving or (plan is not None and plan.declines(found[0])):
            self.hand_over(data)
            return
        head, length = found
        chunks = None
        bodiless = head.status in (204, 304) or exchange.request.method == b"HEAD"
        length = 0 if bodiless else length
        if not isinstance(length, int):
            chunks = ChunkedTranscoder(self._server.settings.limits)
            chunks.pass_on(data[end:])
            if chunks.error is not None and not chunks.size:
                # the client has received nothing yet, so the ordinary path can send an error
                # response
                self.hand_over(data)
                return
        strip_hop_by_hop(head.headers)
        if bodiless or not isinstance(length, int) or not self._server.connection.keep_alive:
            exchange.answer(head, length)
        else:
            exchange.answer_as_is(head)
        self._chunks = chunks
        self._remaining = length if isinstance(length, int) else 1
        self._forward_body(exchange, encode_response(head), data[end:])

    def _forward_body(self, exchange: Http1Exchange, head: bytes, body: bytes) -> None:
        """RESPONDING: pass on `head`, if it was not sent yet, and `body`, which was read from the
        server."""
        chunks = self._chunks
        if chunks is not None:
            if not head:  # `_start_response` has already passed the first chunks to the reader
                chunks.pass_on(body)
            exchange.response_bytes += chunks.size
            body, self._surplus = chunks.out, chunks.ended and bool(chunks.left)
            if chunks.error is not None:
                self._client.unsent = head + body
                self.hand_over(failure=unreadable(chunks.error))
                return
            self._remaining = 0 if chunks.ended else 1
            if not (head or body):
                return  # only part of a framing line has arrived
        else:
            if len(body) > self._remaining:
                body, self._surplus = body[: self._remaining], True
            self._remaining -= len(body)
            exchange.response_bytes += len(body)
        # `sound`: before the response, nothing useful can be pending from the client
        self._send(head + body if head else body, sound=bool(head))

    def _send(self, data: bytes, *, sound: bool = False) -> None:
        client = self._client
        try:
            sent = client.send(data, sound=sound)
        except NetError as error:
            self._server.connection.keep_alive = False
            failure = ClientGone(f"the client's connection broke during the response: {error}")
            failure.__cause__ = error
            client.unsent = data
            self.hand_over(failure=failure)
            return
        if sent < len(data):
            client.unsent = data[sent:]
            self._buffered.become(len(client.unsent) + len(self._read_ahead))
            client.watch(OUT)
            if self._endpoint is not None:
                self._endpoint.watch(0)  # backpressure: stop reading from the server
            return
        client.unsent = b""
        if self._buffered.size:
            self._buffered.become(len(self._read_ahead))
        if not self._remaining:
            self._finish()
        elif self._endpoint is not None:
            self._endpoint.watch(IN)

    def _finish(self) -> None:
        """RESPONDING: the whole response has been sent to the client."""
        exchange, account, lease = self._exchange, self._account, self._lease
        endpoint, rest = self._endpoint, self._read_ahead
        if exchange is None or account is None or lease is None or endpoint is None:
            return
        endpoint.park()
        account.__exit__(None, None, None)
        if self._surplus:
            lease.end(usable=False)
        else:
            lease.done(self._event_loop.now)
        if lease.plan is not None:
            lease.plan.end(exchange)
        self._forget_exchange()
        self._eligibility.declined = 0
        server = self._server
        server.served = True
        server.idle_since = self._event_loop.now
        self._fast_path.exchange_left(self)
        if server.leaving:
            self.give_back(rest)
            return
        self._client.watch(IN)
        if rest:
            self._read_ahead = rest
            self._event_loop.call_next(self)
