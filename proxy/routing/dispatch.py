"""From a target to one of its endpoints: which one, which other one if that does not do, and what happens if there is none.

A flow knows what may serve a request (a target, asked for anew before each attempt, since what is usable may have changed) and how to
carry it to an endpoint. What lies between the two is here: the balancer picks (balancing/balancer.py), retries.py says whether there is
another attempt, and a request that finds all endpoints broken waits for one of them to be tried again (endpoint_wait.py). So does one that
has found the last of them broken, if it was not sent or its body can be sent again: it is told why it could not be sent if the wait is in
vain.

Waiting helps only where an endpoint may come back. Where mutual TLS with all endpoints fails, or a peer refuses a connection, the failure
is told at once: it is a decision about an identity, and time does not change it.

An endpoint that responds, though by errors or by closing, is used for want of a better one: what it says is the answer.

An address of no service has one endpoint and nobody else: it is connected to as it would be without a proxy, whatever became of it last
time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from types import TracebackType

import trio

from proxy.balancing.balancer import Balancer
from proxy.balancing.circuit_breaker import Failure, State
from proxy.balancing.endpoint_set import Change, EndpointSet, Work
from proxy.config.units import within
from proxy.directory import Endpoint, Target
from proxy.errors import (
    AllBroken,
    NoEndpoint,
    QueueFull,
    TunnelRefused,
    UpstreamClosed,
    UpstreamProtocolError,
    describe,
    unanswered,
)  # fmt: skip
from proxy.exchange.client import ClientSettings
from proxy.exchange.exchange import Exchange
from proxy.net.exceptions import ConnectFailed
from proxy.net.socket_stream import Stream
from proxy.routing.endpoint_wait import Found, Patience
from proxy.routing.retries import ENDPOINTS_TRIED, FAILURES, NOT_CONNECTED, Attempts, AttemptTimeout, unreachable
from proxy.telemetry.log import RateLimit, warn
from proxy.telemetry.metrics import Metrics
from proxy.wire import grpc
from proxy.wire.messages import ResponseHead

_log = logging.getLogger("isthmus.endpoints")

# What `connect` raises when there is no connection, and nothing has been sent.
_NOT_CONNECTED = (*NOT_CONNECTED, TunnelRefused, UpstreamProtocolError)
# Bytes of a response that comes nearly at once.
_SHORT = 65536

Choose = Callable[[Exchange], Target]
Send = Callable[[Exchange, Target, Endpoint], Awaitable[None]]
Connect = Callable[[Target, Endpoint], Awaitable[Stream]]


class Dispatcher:
    """The way from targets to endpoints, for requests and for connections."""

    def __init__(self, balancer: Balancer, metrics: Metrics, client: ClientSettings) -> None:
        """`client`: how long a server may take where a policy does not say."""
        self._balancer = balancer
        self._metrics = metrics.endpoints
        self._client = client
        self._opened, self._closed = RateLimit(5), RateLimit(5)
        balancer.on_change(self._changed)

    # Requests...

    async def exchange(self, exchange: Exchange, choose: Choose, send: Send) -> None:
        """Carry `exchange` by `send` to an endpoint of what `choose` says, as often as it takes and its policy allows. Raises NoEndpoint,
        AllBroken, QueueFull, RequestError, and what `choose` and `send` raise."""
        handoff = _underway(exchange)
        target = choose(exchange) if handoff is None else handoff.target
        if target.service is None:
            await send(exchange, target, _only(target) if handoff is None else handoff.endpoint)
            return
        endpoint_set = self._balancer.endpoint_set(target.service)
        endpoint_set.budget.requests += handoff is None
        attempts = Attempts(exchange, endpoint_set, target.policy, self._metrics, self._client)
        patience: Patience | None = None
        while True:
            if handoff is not None:
                endpoint, handoff = handoff.go_on(attempts), None
            else:
                picked = _pick(exchange, endpoint_set, target, attempts)
                if picked is None and attempts.failure is not None and not endpoint_set.may_return(target):
                    raise attempts.failure
                if picked is None or endpoint_set.queue:
                    patience = patience or self._patience(lambda: choose(exchange))
                    target, endpoint_set, picked = await _wait(patience, attempts.failure)
                    attempts.waited()
                elif len(attempts.unreached) >= ENDPOINTS_TRIED and attempts.failure is not None:
                    raise attempts.failure
                endpoint, attempts.endpoint_set = picked, endpoint_set
                attempts.begin(endpoint, alone=len(target.endpoints) == 1)
            try:
                if attempts.timeout is None:
                    await send(exchange, target, endpoint)
                else:
                    await _timed(attempts, send(exchange, target, endpoint))
                return
            except FAILURES as error:
                pause = attempts.another(error)
                failure = attempts.failure or (error if isinstance(error, UpstreamClosed) else None)
            finally:
                attempts.end()
            if pause:
                await trio.sleep(pause)
            target, endpoint_set = self._choose_again(lambda: choose(exchange), failure)
            attempts.remind()

    def _choose_again(self, choose: Callable[[], Target], failure: Exception | None) -> tuple[Target, EndpointSet]:
        """Another look at what may serve, after an attempt. If nothing does any more, what has failed before is the better answer."""
        try:
            target = choose()
        except NoEndpoint:
            if failure is not None:
                raise failure from None
            raise
        return target, self._endpoint_set(target)

    def _endpoint_set(self, target: Target) -> EndpointSet:
        # The directory may have forgotten the service meanwhile. What is chosen then is an address of no service, with no history.
        return self._balancer.endpoint_set(target.service or "")

    def _patience(self, choose: Callable[[], Target]) -> Patience:
        return Patience(self._balancer, self._metrics, choose)

    # Requests on the fast path, which has steps instead of attempts...

    def sound(self, target: Target) -> Endpoint | None:
        """An endpoint for a request that needs no care; None: there is none, or something of the service is broken."""
        if target.service is None:
            return target.endpoints[0] if target.endpoints and target.endpoints[0].ready else None
        endpoint_set = self._balancer.endpoint_set(target.service)
        return None if endpoint_set.broken or endpoint_set.queue else endpoint_set.pick(target)

    def watch(self, exchange: Exchange, target: Target, endpoint: Endpoint) -> Underway:
        """`exchange` is being sent to `endpoint`; what is returned is to be told when that has `ended`."""
        if target.service is None:
            return Underway(exchange, target, endpoint, None)
        endpoint_set = self._balancer.endpoint_set(target.service)
        endpoint_set.budget.requests += 1
        return Underway(exchange, target, endpoint, endpoint_set.begin(target.policy, endpoint, alone=len(target.endpoints) == 1))

    # Connections...

    def connection(self, choose: Callable[[], Target], connect: Connect) -> Connected:
        """A stream to an endpoint of what `choose` says, opened by `connect`, for a block, at whose end the caller has closed it; another
        endpoint if one cannot be connected to. Raises NoEndpoint, AllBroken, QueueFull, and what `choose` and `connect` raise."""
        return Connected(self, choose, connect)

    async def connected(self, choose: Callable[[], Target], connect: Connect) -> tuple[Stream, Work | None]:
        """The same without a block: the work is to be told when it is `finished`; an address of no service makes none."""
        target = choose()
        if target.service is None:
            return await connect(target, _only(target)), None
        return await self._connected(target, choose, connect)

    async def _connected(self, target: Target, choose: Callable[[], Target], connect: Connect) -> tuple[Stream, Work]:
        endpoint_set, failure = self._endpoint_set(target), None
        tried: tuple[Endpoint, ...] = ()
        patience: Patience | None = None
        while True:
            endpoint = endpoint_set.pick(target, tried)
            if endpoint is None and failure is not None and not endpoint_set.may_return(target):
                raise failure
            if endpoint is None or endpoint_set.queue:
                patience = patience or self._patience(choose)
                target, endpoint_set, endpoint = await _wait(patience, failure)
                tried = ()
            elif len(tried) >= ENDPOINTS_TRIED and failure is not None:
                raise failure
            work = endpoint_set.begin(target.policy, endpoint, alone=len(target.endpoints) == 1)
            started = trio.current_time()
            try:
                stream = await connect(target, endpoint)
            except _NOT_CONNECTED as error:
                if isinstance(error, ConnectFailed) and error.reason == "local":
                    work.finished()
                    raise
                gone = isinstance(error, NOT_CONNECTED)
                work.failed(describe(error).reason, how=unreachable(error) if gone else Failure.RESPONSE)
                work.finished()
                failure, tried = error, (*tried, endpoint)
            except BaseException:
                work.finished()
                raise
            else:
                work.answered(trio.current_time() - started)
                return stream, work
            target, endpoint_set = self._choose_again(choose, failure)

    def changed(self) -> None:
        """The directory has changed: whoever waits may look again."""
        self._balancer.wake()

    def _changed(self, change: Change) -> None:
        """A breaker has."""
        self._metrics.breaker_changed(change.state)
        if change.state is State.OPEN:
            warn(_log, self._opened, "%s of %s is left alone for %.1f s: %s", change.address, change.service, change.penalty, change.why)
        elif change.state is State.CLOSED and (suppressed := self._closed.admit()) is not None:
            more = f" ({suppressed} similar suppressed)" if suppressed else ""
            _log.info("%s of %s is used again%s", change.address, change.service, more)


class Connected:
    """What Dispatcher.connection gives."""

    __slots__ = ("_choose", "_connect", "_dispatcher", "_work")

    def __init__(self, dispatcher: Dispatcher, choose: Callable[[], Target], connect: Connect) -> None:
        self._dispatcher = dispatcher
        self._choose = choose
        self._connect = connect
        self._work: Work | None = None

    async def __aenter__(self) -> Stream:
        stream, self._work = await self._dispatcher.connected(self._choose, self._connect)
        return stream

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._work is not None:
            self._work.finished()


async def _wait(patience: Patience, failure: Exception | None) -> Found:
    """Wait for an endpoint. If there is none, the `failure` of the last attempt to connect is the better answer."""
    try:
        return await patience.wait()
    except (AllBroken, NoEndpoint, QueueFull):
        if failure is None:
            raise
    raise failure


async def _timed(attempts: Attempts, sending: Awaitable[None]) -> None:
    """An attempt with a timeout of its own, which ends with the head of the response."""
    with trio.CancelScope(deadline=trio.current_time() + (attempts.timeout or 0.0)) as scope:
        attempts.scope = scope
        await sending
    attempts.scope = None
    if scope.cancelled_caught:
        raise AttemptTimeout


class Underway:
    """An exchange on the fast path, which is its first attempt. That path tells that it has `ended`; if it hands it over, what comes of
    it is this room's matter again."""

    __slots__ = ("_exchange", "_seconds", "_started", "_work", "endpoint", "target")

    def __init__(self, exchange: Exchange, target: Target, endpoint: Endpoint, work: Work | None) -> None:
        self._exchange = exchange
        self._work = work
        self._started = trio.current_time() if work is not None and work.load is not None else 0.0
        self._seconds: float | None = None  # until the response's head came, if anybody has said so
        self.target = target
        self.endpoint = endpoint

    def answered(self) -> None:
        """The head of the response is there."""
        if self._started:
            self._seconds = trio.current_time() - self._started

    def ended(self) -> None:
        work = self._work
        if work is None:
            return
        response = self._exchange.response
        if response is not None:
            breaker, seconds = work.policy.breaker, self._waited()
            code = _grpc_code(self._exchange, response)
            if code is not None and code in breaker.grpc:
                work.failed(f"gRPC status {code}", seconds)
            elif within(response.status, breaker.statuses):
                how = Failure.SILENCE if unanswered(response.headers) else Failure.RESPONSE
                work.failed(f"status {response.status}", seconds, how)
            else:
                work.answered(seconds, bad=response.status >= 500 or bool(code and self._exchange.grpc_status is None))
        work.finished()

    def _waited(self) -> float | None:
        """For the response, in seconds. The time of a long one says little about when it began."""
        if self._seconds is None and self._started and self._exchange.response_bytes <= _SHORT:
            return trio.current_time() - self._started
        return self._seconds

    def go_on(self, attempts: Attempts) -> Endpoint:
        """It has been handed over, from this endpoint: the rest is told to `attempts`."""
        work, self._work = self._work, None
        if work is not None:
            attempts.go_on(work, self._started)
        return self.endpoint


def _grpc_code(exchange: Exchange, response: ResponseHead) -> int | None:
    """How a gRPC call has ended, as far as its server has said it; None: it is none, or that is not known."""
    if exchange.request.version != b"2" or not exchange.is_grpc:
        return None
    said = exchange.grpc_status or response.headers.get(b"grpc-status")
    return None if said is None else grpc.code(said)


def _underway(exchange: Exchange) -> Underway | None:
    handoff = exchange.handoff
    attempt = handoff.lease.attempt if handoff is not None and handoff.lease is not None else None
    return attempt if isinstance(attempt, Underway) else None


def _pick(exchange: Exchange, endpoint_set: EndpointSet, target: Target, attempts: Attempts) -> Endpoint | None:
    """The endpoint of the next attempt; None: there is none now."""
    first, exchange.first = exchange.first, None
    if isinstance(first, Endpoint) and endpoint_set.sound(first, target):
        return first
    endpoint = endpoint_set.pick(target, attempts.tried)
    return endpoint_set.pick(target, attempts.unreached) if endpoint is None and attempts.tried else endpoint


def _only(target: Target) -> Endpoint:
    for endpoint in target.endpoints:
        if endpoint.ready:
            return endpoint
    raise NoEndpoint(f"none of the {len(target.endpoints)} endpoints of the destination is ready")
