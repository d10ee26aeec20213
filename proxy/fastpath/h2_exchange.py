"""One HTTP/2 exchange on the fast path: a stream of the client, joined to a stream of an endpoint.
The package docstring explains the design.

The readers of both connections (exchange/h2/connection.py) put the received data into the streams
and call this module after each read. It passes the data on in both directions, as long as it does
not have to wait. It has no buffer: what it has not passed on stays in the stream, where the
ordinary path will find it.

    REQUESTED   the request head is sent: the request body and the response head may arrive
    RESPONDING  the response head is sent: both bodies may continue
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack, nullcontext
from math import inf

import trio

from proxy.exchange import max_forwards
from proxy.exchange.exchange import Handoff
from proxy.exchange.h2.body import body_length, too_large
from proxy.exchange.h2.server import Http2Exchange, Http2Server
from proxy.exchange.h2.stream import Http2Stream
from proxy.exchange.reports import is_report
from proxy.exchange.upstream import oversized
from proxy.fastpath.host import Host
from proxy.fastpath.plan import Planner, StreamLease
from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.h2.frames import Code
from proxy.wire.messages import EndOfMessage, ResponseHead, strip_hop_by_hop

_log = logging.getLogger("isthmus.exchange")

_UNOPENED = nullcontext()


def begin_exchange(
    fast_path: Host, planner: Planner, server: Http2Server, exchange: Http2Exchange
) -> bool:
    """Implements exchange.h2.server.Http2FastPath."""
    request = exchange.request
    method = request.method
    if method == b"CONNECT" or (
        method in max_forwards.METHODS and max_forwards.left(request) is not None
    ):
        return False
    now = trio.current_time()
    limit = exchange.deadline(exchange.call_timeout)
    if limit < now + fast_path.patience:
        return False
    try:
        lease = planner.share(exchange)
        if lease is not None:
            fast_exchange = FastExchange(fast_path, server, exchange, lease)
            fast_exchange.moved, fast_exchange.limit, fast_exchange.began = (
                now,
                min(limit, lease.limit),
                now,
            )
            fast_exchange.begin(planner)
            return True
    except Exception as error:  # error boundary, as in `_on_client`
        _log.error("internal error while carrying an HTTP/2 stream", exc_info=error)
        exchange.stream.close(Code.INTERNAL_ERROR)
        return True
    return False


class FastExchange:
    """One exchange. It drops its streams when it ends or is handed over."""

    __slots__ = (
        "_account",
        "_client",
        "_endpoint",
        "_exchange",
        "_fast_path",
        "_lease",
        "_request_sent",
        "_server",
        "began",
        "limit",
        "moved",
    )

    def __init__(
        self, fast_path: Host, server: Http2Server, exchange: Http2Exchange, lease: StreamLease
    ) -> None:
        self._fast_path = fast_path
        self._server = server
        self._exchange = exchange
        self._lease = lease
        self._client = exchange.stream
        # replaced when the stream to the endpoint is open
        self._endpoint: Http2Stream = exchange.stream
        self._account: AbstractContextManager[object] = _UNOPENED
        self._request_sent = False  # the whole request has been sent
        self.began = 0.0  # trio's time
        self.moved = 0.0  # trio's time when data was last passed on
        self.limit = inf  # trio's time by which the exchange must have ended

    def begin(self, planner: Planner) -> None:
        """Send the head of the request."""
        try:
            account = planner.account(self._exchange)
            account.__enter__()
            self._account = account
            self._open_stream()
        except HeadTooLarge:  # nothing has been sent; the ordinary path reports the error
            self._end_lease()
            self._hand_off(Handoff())
        except Exception as error:  # error boundary, as in `_on_client`
            self._fail(error)

    def _open_stream(self) -> None:
        exchange, lease, client = self._exchange, self._lease, self._client
        if lease.plan is not None:
            lease.plan.begin(exchange)
        exchange.record_upstream(lease.mux.stream)
        self._request_sent = exchange.body.length == 0
        self._endpoint = endpoint = lease.open(exchange, end=self._request_sent)
        client.on_events, endpoint.on_events = self._on_client, self._on_endpoint
        # If the client has reset the stream, the ordinary path sees a cancelled exchange and cleans
        # up.
        client.on_lost = endpoint.on_lost = self.hand_over
        self._fast_path.exchange_began(self)
        if not self._request_sent:
            self._forward_request()  # the part of the body that arrived with the head

    # Called by the readers...

    def _on_client(self) -> None:
        """More of the request has arrived."""
        try:
            self._forward_request()
        except HeadTooLarge as error:
            self.hand_over(oversized(error))
        except Exception as error:  # error boundary: a bug in one stream must not affect the others
            self._fail(error)

    def _on_endpoint(self) -> None:
        """More of the response has arrived."""
        try:
            self._forward_response()
        except HeadTooLarge as error:
            self.hand_over(too_large(error))
        except Exception as error:
            self._fail(error)

    # The steps...

    def _forward_request(self) -> None:
        """Pass on the request body that has arrived, if the endpoint accepts it."""
        exchange, client, endpoint = self._exchange, self._client, self._endpoint
        while not self._request_sent:
            if not endpoint.takes(client.next_size):
                self.hand_over()
                return
            piece = exchange.body.receive_nowait()
            if piece is None:
                return
            self.moved = client.mux.last_read
            if isinstance(piece, EndOfMessage):
                self._request_sent = True
                if len(piece.trailers):
                    endpoint.send_trailers(piece.trailers)
                else:
                    endpoint.put(b"", end=True)
            else:
                self._request_sent = client.empty
                exchange.request_bytes += len(piece)
                endpoint.put(piece, end=self._request_sent)

    def _forward_response(self) -> None:
        exchange, client, endpoint = self._exchange, self._client, self._endpoint
        if exchange.response is None:
            head = endpoint.next_head
            if head is None:
                return
            if (
                head.informational
                or not client.takes(0)
                or (self._lease.plan is not None and self._lease.plan.declines(head))
                or is_report(head)
            ):
                self.hand_over()
                return
            if self._send_head(exchange, client, endpoint, head):
                return
        self._forward_body(exchange, client, endpoint)

    def _send_head(
        self,
        exchange: Http2Exchange,
        client: Http2Stream,
        endpoint: Http2Stream,
        head: ResponseHead,
    ) -> bool:
        """Send the response head. Returns True if it was the whole response."""
        endpoint.head_nowait()
        self.moved = endpoint.mux.last_read
        self._lease.response = head
        if self._lease.plan is not None:
            self._lease.plan.answered()
        strip_hop_by_hop(head.headers)
        bodiless = exchange.frame(head, body_length(head.headers, ended=endpoint.empty))
        ended = bodiless or endpoint.empty
        client.send_head(head, end=ended)
        exchange.response = head
        exchange.on_response(head.status)
        if ended:
            self._end(None)
        return ended

    def _forward_body(
        self, exchange: Http2Exchange, client: Http2Stream, endpoint: Http2Stream
    ) -> None:
        """Pass on the response body that has arrived, if the client accepts it."""
        while True:
            if not client.takes(endpoint.next_size):
                self.hand_over()
                return
            piece = endpoint.receive_nowait()
            if piece is None:
                return
            self.moved = endpoint.mux.last_read
            if isinstance(piece, EndOfMessage):
                if len(piece.trailers):
                    exchange.grpc_status = piece.trailers.get(b"grpc-status")
                    client.send_trailers(piece.trailers)
                else:
                    client.put(b"", end=True)
                self._end(None)
                return
            ended = endpoint.empty
            exchange.response_bytes += len(piece)
            client.put(piece, end=ended)
            if ended:
                self._end(None)
                return

    # The ends...

    def _forget_streams(self) -> None:
        client, endpoint = self._client, self._endpoint
        client.on_events = client.on_lost = endpoint.on_events = endpoint.on_lost = None

    def _end_lease(self) -> None:
        self._lease.end()
        if self._lease.plan is not None:
            self._lease.plan.end(self._exchange)

    def _end(self, kind: type[BaseException] | None) -> None:
        """End the exchange. `kind`: the type of the error that ended it; None: it ended well."""
        self._forget_streams()
        self._end_lease()
        self._account.__exit__(kind, None, None)
        self._client.close()
        self._fast_path.exchange_left(self, finished=kind is None)

    def _fail(self, error: Exception) -> None:
        """Internal error: reset the stream, as the ordinary path does."""
        _log.error("internal error while carrying an HTTP/2 stream", exc_info=error)
        self._client.mux.http.reset(self._client.number, Code.INTERNAL_ERROR)
        self._end(type(error))

    def hand_over(self, failure: Exception | None = None) -> None:
        """Let the ordinary path continue the exchange, or report `failure`."""
        plan, lease = self._lease.plan, self._lease
        self._hand_off(Handoff(plan, lease, self.began, self._request_sent, failure=failure))

    def _hand_off(self, handoff: Handoff) -> None:
        self._forget_streams()
        self._fast_path.exchange_left(self, finished=False)
        self._fast_path.count_handoff()
        exchange = self._exchange
        exchange.account = ExitStack()
        exchange.account.push(self._account)  # it is already open
        exchange.handoff = handoff
        self._server.serve(exchange)
