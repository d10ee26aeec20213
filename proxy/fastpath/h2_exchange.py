"""One exchange of HTTP/2 on the fast path: a stream of the client's, tied to one of an endpoint's. The theory stands in the package.

The connections are the muxes' (exchange/h2/connection.py): their readers file what comes on a stream, and tell us when all of one read is
filed. Then it is passed on, in both directions, as long as nothing has to be waited for. There is nothing of its own that this room keeps:
what it has not passed on lies where the ordinary path will find it.

    ASKED     the head of the request is sent: its body may come, and the response's head
    ANSWERED  the head of the response is sent: the bodies may go on
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack, nullcontext
from math import inf
from typing import TYPE_CHECKING

import trio

from proxy.exchange import max_forwards
from proxy.exchange.h2.server import Http2Exchange, Http2Server, body_length, too_large
from proxy.exchange.h2.stream import MuxStream
from proxy.exchange.handoff import Handoff
from proxy.exchange.reports import is_report
from proxy.exchange.upstream import oversized
from proxy.fastpath.plan import ExchangePlan, StreamLease
from proxy.wire import grpc
from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.h2.frames import Code
from proxy.wire.messages import EndOfMessage, ResponseHead, strip_hop_by_hop

if TYPE_CHECKING:
    from proxy.fastpath.fast_path import FastPath

_log = logging.getLogger("isthmus.exchange")

_UNOPENED = nullcontext()


def begin(fast_path: FastPath, plan: ExchangePlan, server: Http2Server, exchange: Http2Exchange) -> bool:
    """See exchange.handoff.Fork."""
    request = exchange.request
    method = request.method
    if method == b"CONNECT" or (method in max_forwards.METHODS and max_forwards.left(request) is not None):
        return False
    now = trio.current_time()
    limit = _limit(exchange, now)
    if limit < now + fast_path.patience:
        return False
    try:
        lease = plan.share(exchange)
        if lease is not None:
            fast_exchange = FastExchange(fast_path, server, exchange, lease)
            fast_exchange.moved, fast_exchange.limit, fast_exchange.began = now, min(limit, lease.limit), now
            fast_exchange.begin(plan)
            return True
    except Exception as error:  # as below
        _log.error("a stream failed by a fault of this proxy's", exc_info=error)
        exchange.stream.close(Code.INTERNAL_ERROR)
        return True
    if exchange.first is not None or exchange.trace is not None:
        exchange.handoff = Handoff()  # what chance has decided is not asked of it again: that would change the odds
    return False


def _limit(exchange: Http2Exchange, now: float) -> float:
    """When the call's deadline is."""
    value = exchange.request.headers.get(b"grpc-timeout")
    seconds = grpc.parse_timeout(value) if value is not None and exchange.is_grpc else None
    return inf if seconds is None else now + seconds


class FastExchange:
    """Made for an exchange; forgets its streams when that ends, or is handed over."""

    __slots__ = ("_account", "_asked", "_client", "_endpoint", "_exchange", "_fast_path", "_lease", "_server", "began", "limit", "moved")

    def __init__(self, fast_path: FastPath, server: Http2Server, exchange: Http2Exchange, lease: StreamLease) -> None:
        self._fast_path = fast_path
        self._server = server
        self._exchange = exchange
        self._lease = lease
        self._client = exchange.stream
        self._endpoint: MuxStream = exchange.stream  # until it has its own
        self._account: AbstractContextManager[object] = _UNOPENED
        self._asked = False  # all of the request has been sent
        self.began = 0.0  # trio's time
        self.moved = 0.0  # when something was passed on last
        self.limit = inf  # when it must not be here any more

    def begin(self, plan: ExchangePlan) -> None:
        """Send the head of the request."""
        try:
            account = plan.account(self._exchange)
            account.__enter__()
            self._account = account
            self._set_out()
        except HeadTooLarge:  # which the ordinary path will say: nothing has been sent
            self._lease.end()
            self._give(Handoff())
        except Exception as error:  # as below
            self._fail(error)

    def _set_out(self) -> None:
        exchange, lease, client = self._exchange, self._lease, self._client
        if lease.on_begin is not None:
            lease.on_begin(exchange)
        exchange.carried(lease.mux.stream)
        self._asked = exchange.body.length == 0
        self._endpoint = endpoint = lease.open(exchange, end=self._asked)
        client.on_news, endpoint.on_news = self._on_client, self._on_endpoint
        # Where the client does not want it any more, the ordinary path finds the exchange cancelled, and closes what is open.
        client.on_lost = endpoint.on_lost = self.hand_over
        self._fast_path.begins(self)
        if not self._asked:
            self._ask()  # what has come with the head

    # What the muxes tell...

    def _on_client(self) -> None:
        """More of the request is there."""
        try:
            self._ask()
        except HeadTooLarge as error:
            self.hand_over(oversized(error))
        except Exception as error:  # this room's boundary: one stream's fault is not the others'
            self._fail(error)

    def _on_endpoint(self) -> None:
        """More of the response is there."""
        try:
            self._answer()
        except HeadTooLarge as error:
            self.hand_over(too_large(error))
        except Exception as error:
            self._fail(error)

    # The steps...

    def _ask(self) -> None:
        """Send what there is of the request's body, if it is taken."""
        exchange, client, endpoint = self._exchange, self._client, self._endpoint
        while not self._asked:
            if not endpoint.takes(client.next_size):
                self.hand_over()
                return
            piece = exchange.body.receive_nowait()
            if piece is None:
                return
            self.moved = client.mux.heard
            if isinstance(piece, EndOfMessage):
                self._asked = True
                if len(piece.trailers):
                    endpoint.send_trailers(piece.trailers)
                else:
                    endpoint.put(b"", end=True)
            else:
                self._asked = client.empty
                exchange.request_bytes += len(piece)
                endpoint.put(piece, end=self._asked)

    def _answer(self) -> None:
        exchange, client, endpoint = self._exchange, self._client, self._endpoint
        if exchange.response is None:
            head = endpoint.next_head
            if head is None:
                return
            if head.informational or not client.takes(0) or self._lease.declines(head) or is_report(head):
                self.hand_over()
                return
            if self._send_head(exchange, client, endpoint, head):
                return
        self._pass_on(exchange, client, endpoint)

    def _send_head(self, exchange: Http2Exchange, client: MuxStream, endpoint: MuxStream, head: ResponseHead) -> bool:
        """Whether that was all of the response."""
        endpoint.head_nowait()
        self.moved = endpoint.mux.heard
        self._lease.response = head
        self._lease.on_answer()
        strip_hop_by_hop(head.headers)
        bodiless = exchange.frame(head, body_length(head.headers, ended=endpoint.empty))
        ended = bodiless or endpoint.empty
        client.send_head(head, end=ended)
        exchange.response = head
        exchange.on_response(head.status)
        if ended:
            self._end(None)
        return ended

    def _pass_on(self, exchange: Http2Exchange, client: MuxStream, endpoint: MuxStream) -> None:
        """Send what there is of the response's body, if it is taken."""
        while True:
            if not client.takes(endpoint.next_size):
                self.hand_over()
                return
            piece = endpoint.receive_nowait()
            if piece is None:
                return
            self.moved = endpoint.mux.heard
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
        client.on_news = client.on_lost = endpoint.on_news = endpoint.on_lost = None

    def _end(self, kind: type[BaseException] | None) -> None:
        """The exchange is over; `kind`: of what ended it."""
        self._forget_streams()
        self._lease.end()
        self._account.__exit__(kind, None, None)
        self._client.close()
        self._fast_path.rests(self, finished=kind is None)

    def _fail(self, error: Exception) -> None:
        """A fault of this room's: it ends the stream, as it would on the ordinary path."""
        _log.error("a stream failed by a fault of this proxy's", exc_info=error)
        self._client.mux.http.reset(self._client.number, Code.INTERNAL_ERROR)
        self._end(type(error))

    def hand_over(self, failure: Exception | None = None) -> None:
        """The ordinary path goes on with it, or says that it has failed."""
        self._give(Handoff(self._lease, self.began, self._asked, failure=failure))

    def _give(self, handoff: Handoff) -> None:
        self._forget_streams()
        self._fast_path.rests(self, finished=False)
        self._fast_path.hands_over()
        exchange = self._exchange
        exchange.account = ExitStack()
        exchange.account.push(self._account)  # it is open already
        exchange.handoff = handoff
        self._server.serve(exchange)
