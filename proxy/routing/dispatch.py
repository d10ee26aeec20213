"""From a target to one of its endpoints: the choice, the next choice after a failure, and the
errors.

A flow provides two functions. `choose` returns the target of a request; it is called again before
each attempt, because the usable targets may have changed. `send` carries the request to an
endpoint. This module connects the two: the balancer picks an endpoint (balancing/balancer.py), and
retries.py decides whether another attempt follows, and endpoint_choice.py at which endpoint. If the
circuit breakers of all endpoints are open, the request waits until an endpoint is due for a trial
(endpoint_wait.py). A request whose attempt opened the last closed breaker waits too, if it was not
sent, or if its body can be sent again. If the wait fails, the client gets the error of that
attempt.

A wait helps only if an endpoint may recover. If mutual TLS with all endpoints fails, or a peer
refuses a connection, the client gets the error at once. The error is a decision about an identity,
and does not change with time. If no better endpoint is available, the proxy uses one that responds
with errors or closes the connection, and forwards its response.

An address without a service has one endpoint and no alternative. The proxy connects to it as the
application would without a proxy, and ignores earlier failures."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from types import TracebackType

import trio

from proxy.balancing.balancer import Balancer
from proxy.balancing.circuit_breaker import BreakerState, Failure
from proxy.balancing.endpoint_set import ActiveRequest, BreakerChange, EndpointSet
from proxy.directory import Endpoint, Target
from proxy.errors import (
    AllCircuitsOpen,
    NoEndpoint,
    QueueFull,
    TunnelRefused,
    UpstreamClosed,
    UpstreamProtocolError,
    describe,
)
from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import Exchange
from proxy.net.exceptions import ConnectFailed, release_frames
from proxy.net.socket_stream import Stream
from proxy.routing.attempt import Attempt
from proxy.routing.endpoint_choice import EndpointChoice, only_endpoint, pick_healthy
from proxy.routing.endpoint_wait import EndpointWait, Found
from proxy.routing.retries import (
    FAILURES,
    NOT_CONNECTED,
    Attempts,
    AttemptTimeout,
    unreachable,
)
from proxy.telemetry.log import RateLimit, warn
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus.endpoints")

# What `connect` raises if there is no connection and nothing was sent.
_NOT_CONNECTED = (*NOT_CONNECTED, TunnelRefused, UpstreamProtocolError)

Choose = Callable[[Exchange], Target]
Send = Callable[[Exchange, Target, Endpoint], Awaitable[None]]
Connect = Callable[[Target, Endpoint], Awaitable[Stream]]


class Dispatcher:
    """Finds endpoints for targets, for requests and for opaque connections."""

    def __init__(self, balancer: Balancer, metrics: Metrics, client: ClientSettings) -> None:
        """`client`: the limits for a server's response where the policy sets none."""
        self._balancer = balancer
        self._metrics = metrics.endpoints
        self._client = client
        self._opened, self._closed = RateLimit(5), RateLimit(5)
        balancer.on_change(self._changed)

    # Requests.

    async def exchange(
        self,
        exchange: Exchange,
        choose: Choose,
        send: Send,
        started: Attempt | None = None,
        first: Endpoint | None = None,
    ) -> None:
        """Send `exchange` with `send` to an endpoint of the target that `choose` returns. Repeats
        this as often as necessary and as the policy allows. `started`: an attempt of the fast path,
        which continues. `first`: the endpoint to try first, if it is still usable. Raises
        NoEndpoint, AllCircuitsOpen, QueueFull, RequestError, and what `choose` and `send` raise."""
        target = choose(exchange) if started is None else started.target
        if target.service is None:
            await send(exchange, target, _only(target) if started is None else started.endpoint)
            return
        endpoint_set = self._balancer.endpoint_set(target.service)
        endpoint_set.budget.requests += started is None
        attempts = Attempts(exchange, endpoint_set, target.policy, self._metrics, self._client)
        attempts.choice.first = first
        patience: EndpointWait | None = None
        while True:
            if started is not None:
                attempts.go_on(started)
                endpoint, started = started.endpoint, None
            else:
                picked = attempts.choice.pick(endpoint_set, target)
                if picked is None:
                    patience = patience or self._patience(lambda: choose(exchange))
                    target, endpoint_set, picked = await _wait(patience, attempts.choice.failure)
                    attempts.waited()
                endpoint, attempts.endpoint_set = picked, endpoint_set
                attempts.begin(target, endpoint)
            try:
                if attempts.timeout is None:
                    await send(exchange, target, endpoint)
                else:
                    await _timed(attempts, send(exchange, target, endpoint))
                return
            except FAILURES as error:
                pause = attempts.another(error)
                release_frames(error)
                failure = attempts.choice.failure or (
                    error if isinstance(error, UpstreamClosed) else None
                )
            finally:
                attempts.end()
            if pause:
                await trio.sleep(pause)
            target, endpoint_set = self._choose_again(lambda: choose(exchange), failure)
            attempts.remind()

    def _choose_again(
        self, choose: Callable[[], Target], failure: Exception | None
    ) -> tuple[Target, EndpointSet]:
        """Choose a target again after an attempt. If there is none any more, raises the earlier
        `failure`, which tells the client more."""
        try:
            target = choose()
        except NoEndpoint:
            if failure is not None:
                raise failure from None
            raise
        return target, self._endpoint_set(target)

    def _endpoint_set(self, target: Target) -> EndpointSet:
        # The new directory may not have the service. Then the target is an address without a
        # service, which has no history.
        return self._balancer.endpoint_set(target.service or "")

    def _patience(self, choose: Callable[[], Target]) -> EndpointWait:
        return EndpointWait(self._balancer, self._metrics, choose)

    # Requests on the fast path.

    def pick_healthy(self, target: Target) -> Endpoint | None:
        """An endpoint for a request on the fast path. None: no endpoint is ready, or a circuit
        breaker of the service is not closed, or requests wait."""
        if target.service is None:
            return only_endpoint(target)
        return pick_healthy(self._balancer.endpoint_set(target.service), target)

    def begin(self, target: Target, endpoint: Endpoint) -> Attempt:
        """Begin the first attempt of an exchange on the fast path. The caller must call `end` on
        it, or pass it to `exchange`."""
        if target.service is None:
            return Attempt.on_fast_path(target, endpoint, None)
        endpoint_set = self._balancer.endpoint_set(target.service)
        endpoint_set.budget.requests += 1
        active = endpoint_set.begin(target.policy, endpoint, alone=len(target.endpoints) == 1)
        return Attempt.on_fast_path(target, endpoint, active)

    # Opaque connections.

    def connection(self, choose: Callable[[], Target], connect: Connect) -> Connected:
        """A context manager: a stream to an endpoint of the target that `choose` returns, opened by
        `connect`. Tries another endpoint if a connection fails. The caller must close the stream
        within the block. Raises NoEndpoint, AllCircuitsOpen, QueueFull, and what `choose` and
        `connect` raise."""
        return Connected(self, choose, connect)

    async def connected(
        self, choose: Callable[[], Target], connect: Connect
    ) -> tuple[Stream, ActiveRequest | None]:
        """Open a stream to an endpoint of the target that `choose` returns. Tries another
        endpoint if a connection fails. The caller must call `end` on the returned request. An
        address without a service has no request. Raises what `connection` raises."""
        target = choose()
        if target.service is None:
            return await connect(target, _only(target)), None
        return await self._connected(target, choose, connect)

    async def _connected(
        self, target: Target, choose: Callable[[], Target], connect: Connect
    ) -> tuple[Stream, ActiveRequest]:
        endpoint_set, choice = self._endpoint_set(target), EndpointChoice()
        patience: EndpointWait | None = None
        while True:
            endpoint = choice.pick(endpoint_set, target)
            if endpoint is None:
                patience = patience or self._patience(choose)
                target, endpoint_set, endpoint = await _wait(patience, choice.failure)
                choice.waited()
            active = endpoint_set.begin(target.policy, endpoint, alone=len(target.endpoints) == 1)
            started = trio.current_time()
            try:
                stream = await connect(target, endpoint)
            except _NOT_CONNECTED as error:
                if isinstance(error, ConnectFailed) and error.reason == "local":
                    active.end()
                    raise
                gone = isinstance(error, NOT_CONNECTED)
                active.record_failure(
                    describe(error).reason, how=unreachable(error) if gone else Failure.RESPONSE
                )
                active.end()
                choice.not_connected(endpoint, error)
            except BaseException:
                active.end()
                raise
            else:
                active.record_response(trio.current_time() - started)
                return stream, active
            target, endpoint_set = self._choose_again(choose, choice.failure)

    def changed(self) -> None:
        """The directory has changed: wake the requests that wait."""
        self._balancer.wake()

    def _changed(self, change: BreakerChange) -> None:
        """A circuit breaker has changed its state: count it and log it."""
        self._metrics.count_breaker_change(change.state)
        if change.state is BreakerState.OPEN:
            warn(
                _log,
                self._opened,
                "%s of %s: circuit breaker opened for %.1f s: %s",
                change.address,
                change.service,
                change.penalty,
                change.why,
            )
        elif (
            change.state is BreakerState.CLOSED and (suppressed := self._closed.admit()) is not None
        ):
            more = f" ({suppressed} similar suppressed)" if suppressed else ""
            _log.info("%s of %s: circuit breaker closed%s", change.address, change.service, more)


class Connected:
    """The context manager that Dispatcher.connection returns."""

    __slots__ = ("_active", "_choose", "_connect", "_dispatcher")

    def __init__(
        self, dispatcher: Dispatcher, choose: Callable[[], Target], connect: Connect
    ) -> None:
        self._dispatcher = dispatcher
        self._choose = choose
        self._connect = connect
        self._active: ActiveRequest | None = None

    async def __aenter__(self) -> Stream:
        stream, self._active = await self._dispatcher.connected(self._choose, self._connect)
        return stream

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active is not None:
            self._active.end()


async def _wait(patience: EndpointWait, failure: Exception | None) -> Found:
    """Wait for an endpoint. If the wait fails, raises the `failure` of the last attempt to connect,
    if there is one, because it tells the client more."""
    try:
        return await patience.wait()
    except (AllCircuitsOpen, NoEndpoint, QueueFull):
        if failure is None:
            raise
    raise failure


async def _timed(attempts: Attempts, sending: Awaitable[None]) -> None:
    """Send with the attempt's own timeout. The timeout ends with the response head."""
    with trio.CancelScope(deadline=trio.current_time() + (attempts.timeout or 0.0)) as scope:
        attempts.scope = scope
        await sending
    attempts.scope = None
    if scope.cancelled_caught:
        raise AttemptTimeout


def _only(target: Target) -> Endpoint:
    endpoint = only_endpoint(target)
    if endpoint is not None:
        return endpoint
    raise NoEndpoint(f"none of the {len(target.endpoints)} endpoints of the destination is ready")
