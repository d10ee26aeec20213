"""One lent connection, and the exchange that it is in. The theory stands in the package.

    IDLE      between two exchanges: a request may come
    ASKED     the request is sent, or on its way: the head of the response may come
    ANSWERED  the head of the response is sent, or on its way: the rest of its body may come

    IDLE --take--> ASKED --answer--> ANSWERED --finish--> IDLE
    IDLE --give_back--> the ordinary path, between two exchanges
    ASKED, ANSWERED --hand_over--> the ordinary path, within the exchange

Each step is called by the fast path when a socket is ready, does what can be done without waiting, and returns. A step that finds more than
it can do gives the connection back, and that is the last thing it does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from math import inf
from typing import TYPE_CHECKING

from trio.lowlevel import Abort, RaiseCancelT, Task, current_task, reschedule, wait_task_rescheduled

from proxy.errors import ClientGone
from proxy.exchange.exchange import Whole
from proxy.exchange.h1.server import Http1Exchange, Http1Server
from proxy.exchange.handoff import Handoff
from proxy.exchange.upstream import unreadable
from proxy.exchange.upstream_head import forwarded_request
from proxy.fastpath.chunked_body import Chunks
from proxy.fastpath.eligibility import Eligibility
from proxy.fastpath.h1_handoff import hand_off
from proxy.fastpath.plan import ConnectionLease, ExchangePlan
from proxy.fastpath.ready_socket import IN, OUT, Side, side_of
from proxy.net.exceptions import NetError
from proxy.net.memory_budget import SMALL, Charge
from proxy.net.nonblocking import Prompt
from proxy.wire.h1.connection import At
from proxy.wire.h1.fast_head import encode_request, encode_response, recognise_request, recognise_response
from proxy.wire.messages import strip_hop_by_hop

if TYPE_CHECKING:
    from proxy.fastpath.fast_path import FastPath

_NOTHING = Whole()  # the body of a request that goes on in one piece


class FastConnection:
    """Made with its connection's first lease and kept for all of them. `carry` is called by the connection's task, `give_back`, `recall`
    and `hand_over` by anybody, the rest by the fast path."""

    __slots__ = (
        "_account", "_chunks", "_client", "_endpoint", "_event_loop", "_exchange", "_fast_path", "_fault", "_kept", "_lease", "_lent",
        "_plan", "_remaining", "_rest", "_result", "_server", "_spare", "_task", "eligibility", "limit", "moved",
    )  # fmt: skip
    def __init__(self, fast_path: FastPath, plan: ExchangePlan, server: Http1Server, stream: Prompt) -> None:
        self._fast_path = fast_path
        self._plan = plan
        self._server = server
        self._event_loop = fast_path.event_loop
        self._client = Side(fast_path.event_loop, stream)
        self._kept = Charge(server.facts.share)  # what the client has not taken, and what it has sent ahead
        self._lent = False
        self._task: Task | None = None  # the connection's, while it is suspended here
        self._result: Http1Exchange | None = None  # that has been begun here, and goes on there
        self._fault: Exception | None = None
        self._rest = b""  # read behind the exchange that is under way
        self.eligibility = Eligibility()
        self.moved = 0.0  # trio's time at the last step of an exchange
        self.limit = inf  # and when that has to be over
        self._exchange: Http1Exchange | None = None
        self._account: AbstractContextManager[object] | None = None
        self._lease: ConnectionLease | None = None
        self._endpoint: Side | None = None
        self._remaining = 0  # bytes of the response's body that have not been read yet; in chunks: 1, until it has ended
        self._chunks: Chunks | None = None
        self._spare = False  # the server has sent more than its response

    def busy(self) -> bool:
        return self._exchange is not None or bool(self._rest)

    def due(self) -> float:
        """trio's time when the connection goes back if no request comes: when half of the time is over that it may wait for one."""
        return self._server.idle_since + self._server.settings.idle_timeout / 2

    async def carry(self) -> Http1Exchange | None:
        """See exchange.handoff.Carry."""
        self._lent, self._server.on_client_end = True, self.leave
        self._client.belongs(self._on_client)
        self._client.watch(IN)
        connection = self._server.connection
        connection.peer_version = b"1.1"  # of all requests here, whatever the last one was
        self._rest = connection.take_rest()
        self.next()
        try:
            if self._is_lent():  # what was read already may not have suited
                self._task = current_task()
                await wait_task_rescheduled(self._abort)
            if self._fault is not None:
                raise self._fault
            handoff, self._result = self._result, None
            return handoff
        except BaseException as error:  # cancelled, or a fault of this room's: either way the exchange ends here
            self._drop(error)
            raise

    def _is_lent(self) -> bool:
        return self._lent

    def _abort(self, _: RaiseCancelT) -> Abort:
        self._let_go()
        return Abort.SUCCEEDED

    def _drop(self, error: BaseException) -> None:
        if self._account is not None and self._lease is not None:
            self._account.__exit__(type(error), error, error.__traceback__)
            self._lease.end(usable=False)
            self._forget_exchange()

    def _let_go(self) -> None:
        self._lent, self._server.on_client_end = False, None
        self._kept.become(0)  # whoever goes on charges it anew
        self._client.forget()
        if self._endpoint is not None:
            self._endpoint.forget()
        self._fast_path.released(self)

    def _wake(self, handoff: Http1Exchange | None = None) -> None:
        task, self._task, self._result = self._task, None, handoff
        self._let_go()
        if task is not None:
            reschedule(task)

    def give_back(self, data: bytes = b"") -> None:
        """Between two exchanges: `data` was read and is the beginning of the next request."""
        self.eligibility.declined()
        if data:
            self._server.connection.receive_data(data)
        self._wake()

    def recall(self) -> None:
        """The proxy is going down, or the connection has been idle for long: the ordinary path knows what that means."""
        if not self.busy():
            self._wake()

    def leave(self) -> None:
        """Give back whatever there is: the fast path is closed, or the client has ended its direction of the connection."""
        if self._exchange is not None:
            self.hand_over()
        else:
            self.give_back(self._rest)

    def hand_over(self, data: bytes = b"", failure: Exception | None = None) -> None:
        """Within an exchange: `data` was read from the server and not looked at; `failure`: the exchange is over, because of this."""
        exchange, account, lease, endpoint = self._exchange, self._account, self._lease, self._endpoint
        if exchange is None or account is None or lease is None or endpoint is None:
            raise RuntimeError("there is no exchange to hand over")
        self._fast_path.hands_over()
        self.eligibility.declined()
        http = self._server.connection
        exchange.handoff = hand_off(http, exchange, lease, self._chunks or self._remaining, (endpoint.unsent, self._client.unsent, data))
        exchange.handoff.failure = failure
        http.receive_data_if(self._rest)
        exchange.account = ExitStack()
        exchange.account.push(account)  # it is open already
        self._wake(exchange)
        self._forget_exchange()

    def _pass_over(self, exchange: Http1Exchange, rest: bytes) -> None:
        """Before an exchange of which something has been decided already."""
        self.eligibility.declined()
        connection = self._server.connection
        connection.take_over(exchange.request.method, (At.DONE, 0), (At.HEAD, 0))
        connection.receive_data_if(rest)
        exchange.handoff = Handoff()
        self._wake(exchange)

    def fail(self, error: Exception) -> None:
        """A fault of this room's: it ends the connection, as it would on the ordinary path."""
        self._fault = error
        self._wake()

    def _forget_exchange(self) -> None:
        self._exchange = self._account = self._lease = self._endpoint = self._chunks = None
        self._client.unsent = self._rest = b""
        self._spare = False

    # The steps...

    def _on_client(self, _: int) -> None:
        if not self._lent:
            return  # it has been given back in this very turn
        try:
            if self._exchange is None:
                if not self._rest:  # otherwise that comes first: the last exchange has ended in this very turn, and `next` follows
                    self._receive()
            elif self._client.unsent:
                self.moved = self._event_loop.now
                self._send(self._client.unsent)
            else:
                self._client.watch(0)  # the client sends its next request, or has gone: that is looked at behind this exchange
        except Exception as error:  # this room's boundary: one connection's fault is not the others'
            self.fail(error)

    def _on_server(self, _: int) -> None:
        try:
            self._respond()
        except Exception as error:
            self.fail(error)

    def next(self) -> None:
        """Look at what was read behind the last exchange."""
        if not self._lent or self._exchange is not None or not self._rest:
            return  # it has been given back meanwhile
        data, self._rest = self._rest, b""
        try:
            self._take(data)
        except Exception as error:
            self.fail(error)

    def _receive(self) -> None:
        try:
            data = self._client.receive()
        except NetError:
            data = b""
        if data:
            self._take(data)
        elif data is not None:  # the end, of whichever kind: it is told again to the ordinary path
            self._wake()

    def _take(self, data: bytes) -> None:
        """IDLE: a request, as a rule whole."""
        server = self._server
        end = data.find(b"\r\n\r\n") + 4
        found = recognise_request(data[:end], server.settings.limits) if end > 3 else None
        if found is None or found[1] > len(data) - end or end > SMALL or server.leaving or server.facts.share.full:
            self.give_back(data)
            return
        request, length = found
        body = data[end : end + length]
        now = self._event_loop.now
        # The body is read from there only if it has to be sent again.
        exchange = Http1Exchange(server, request, Whole(body) if body else _NOTHING, now=now)
        rest = data[end + length :]
        lease = self._plan.take(exchange, now)
        if lease is None and (exchange.first is not None or exchange.trace is not None):
            # What chance has decided is not asked of it again: that would change the odds.
            self._pass_over(exchange, rest)
            return
        if lease is None:
            self.give_back(data)
            return
        account = self._plan.account(exchange)
        account.__enter__()
        if lease.on_begin is not None:
            lease.on_begin(exchange)
        self._exchange, self._account, self._lease = exchange, account, lease
        self._rest = rest
        if rest or self._kept.size:
            self._kept.become(len(rest))
        self._remaining = 0
        self._endpoint = endpoint = side_of(lease.upstream, self._event_loop)
        endpoint.belongs(self._on_server)
        exchange.carried_by(endpoint.peer, endpoint.tls)
        exchange.request_bytes = length
        self.moved, self.limit = now, lease.limit
        self._fast_path.begins(self)
        self._ask(endpoint, encode_request(forwarded_request(exchange)) + body)

    def _ask(self, endpoint: Side, data: bytes) -> None:
        try:
            sent = endpoint.send(data, sound=not endpoint.unsent)  # at first: it has just been found quiet
        except NetError:
            if self._lease is not None:
                self._lease.upstream.http.keep_alive = False
            self.hand_over()  # the server takes no more: it may have said why
            return
        endpoint.unsent = data[sent:]
        endpoint.watch(IN | OUT if endpoint.unsent else IN)

    def _respond(self) -> None:
        """ASKED or ANSWERED: the server's socket is ready."""
        exchange, endpoint = self._exchange, self._endpoint
        if exchange is None or endpoint is None:
            return
        self.moved = self._event_loop.now
        if endpoint.unsent:
            self._ask(endpoint, endpoint.unsent)
            return
        try:
            # Chunks are work: of small ones, one step would hold a larger read up for too long.
            data = endpoint.take(self._server.facts.share, bulk=exchange.response is not None and self._chunks is None)
        except NetError:
            data = b""
        if data is None:
            return
        if not data:
            self.hand_over()  # the end, of whichever kind: it is told again to the ordinary path
        elif exchange.response is None:
            self._answer(exchange, data)
        else:
            self._pass_on(exchange, b"", data)

    def _answer(self, exchange: Http1Exchange, data: bytes) -> None:
        """ASKED: the head of the response, and perhaps some of its body."""
        end = data.find(b"\r\n\r\n") + 4
        found = recognise_response(data[:end], self._server.settings.limits) if end > 3 else None
        if found is None or self._server.leaving or (self._lease is not None and self._lease.declines(found[0])):
            self.hand_over(data)
            return
        head, length = found
        chunks = None
        bodiless = head.status in (204, 304) or exchange.request.method == b"HEAD"
        length = 0 if bodiless else length
        if not isinstance(length, int):
            chunks = Chunks(self._server.settings.limits)
            chunks.pass_on(data[end:])
            if chunks.error is not None and not chunks.size:
                self.hand_over(data)  # the client has seen nothing of it: another response can still be given
                return
        strip_hop_by_hop(head.headers)
        if bodiless or not isinstance(length, int) or not self._server.connection.keep_alive:
            exchange.answer(head, length)
        else:
            exchange.answer_as_is(head)
        self._chunks = chunks
        self._remaining = length if isinstance(length, int) else 1
        self._pass_on(exchange, encode_response(head), data[end:])

    def _pass_on(self, exchange: Http1Exchange, head: bytes, body: bytes) -> None:
        """ANSWERED: `body` has been read from the server."""
        chunks = self._chunks
        if chunks is not None:
            if not head:  # behind which it has been read already
                chunks.pass_on(body)
            exchange.response_bytes += chunks.size
            body, self._spare = chunks.out, chunks.ended and bool(chunks.left)
            if chunks.error is not None:
                self._client.unsent = head + body
                self.hand_over(failure=unreadable(chunks.error))
                return
            self._remaining = 0 if chunks.ended else 1
            if not (head or body):
                return  # a part of a line
        else:
            if len(body) > self._remaining:
                body, self._spare = body[: self._remaining], True
            self._remaining -= len(body)
            exchange.response_bytes += len(body)
        self._send(head + body if head else body, sound=bool(head))  # a client that has gone before it has said nothing of use

    def _send(self, data: bytes, *, sound: bool = False) -> None:
        client = self._client
        try:
            sent = client.send(data, sound=sound)
        except NetError as error:
            self._server.connection.keep_alive = False
            failure = ClientGone(f"the client's connection broke within the response: {error}")
            failure.__cause__ = error
            client.unsent = data
            self.hand_over(failure=failure)
            return
        if sent < len(data):
            client.unsent = data[sent:]
            self._kept.become(len(client.unsent) + len(self._rest))
            client.watch(OUT)
            if self._endpoint is not None:
                self._endpoint.watch(0)  # what the client does not take stops the server
            return
        client.unsent = b""
        if self._kept.size:
            self._kept.become(len(self._rest))
        if not self._remaining:
            self._finish()
        elif self._endpoint is not None:
            self._endpoint.watch(IN)

    def _finish(self) -> None:
        """ANSWERED: all of it is with the client."""
        account, lease, endpoint, rest = self._account, self._lease, self._endpoint, self._rest
        if account is None or lease is None or endpoint is None:
            return
        endpoint.rest()
        account.__exit__(None, None, None)
        if self._spare:
            lease.end(usable=False)
        else:
            lease.done(self._event_loop.now)
        self._forget_exchange()
        self.eligibility.row = 0
        server = self._server
        server.served = True
        server.idle_since = self._event_loop.now
        self._fast_path.rests(self)
        if server.leaving:
            self.give_back(rest)
            return
        self._client.watch(IN)
        if rest:
            self._rest = rest
            self._event_loop.again(self)
