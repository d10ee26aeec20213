"""The attempts at one exchange: what each one says about its endpoint, and whether there is another.

An attempt ends in one of these ways:

    it was not delivered    (the endpoint cannot be connected to,    another endpoint, a few of them, whatever the request is, if all
                             or its sidecar says that its            of its body can be sent again; when all are broken, the one that
                             application cannot)                     may be tried next (endpoint_wait.py), but not if mutual TLS with all
                                                                     of them fails
    the server refused it   (REFUSED_STREAM: it has not looked)      once more, whatever the request is (and its body, if that was kept)
    it broke off            (no response, or none in time)           once more, if the method is idempotent (RFC 9110 §9.2.2)
    it was answered         with a status of the policy's            once more, if that is what the policy wants for such a method

All but the first are retries: within the policy's limit, within the service's budget (balancing/retry_budget.py), not past the deadline of
the request, and only if the body can be sent again (exchange/replay.py). None is made once a byte of a response has been passed on.
Besides, the client (exchange/client.py) repeats a request once whose connection has gone away under it. So a server behind us
sees a request `limit` + 2 times at most, whatever it does.

The deadline of a gRPC call is its client's (`grpc-timeout`): no attempt outlives it, and a further one is told what is left of it.
"""

from __future__ import annotations

import random
from math import inf
from typing import TYPE_CHECKING

import trio

from proxy.balancing.circuit_breaker import Failure
from proxy.balancing.endpoint_set import EndpointSet, Work
from proxy.config.units import within
from proxy.directory import Endpoint
from proxy.directory.policy import DEFAULT_POLICY, Policy
from proxy.errors import (
    DeadlineExceeded,
    ResponseTooLarge,
    Undelivered,
    UpstreamClosed,
    UpstreamLeft,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
    UpstreamTLSError,
    describe,
    unanswered,
)  # fmt: skip
from proxy.exchange.client import IDEMPOTENT, ClientSettings, Declined
from proxy.exchange.exchange import Attempt, Exchange
from proxy.exchange.replay import Replay
from proxy.net.exceptions import ConnectFailed
from proxy.routing.request_overrides import overridden
from proxy.wire import grpc
from proxy.wire.h2.frames import Code
from proxy.wire.messages import Headers, ResponseHead

if TYPE_CHECKING:
    from proxy.telemetry.endpoint_metrics import EndpointMetrics

# More than a few tries to connect would only make the client wait: then the service is down, not an endpoint of it.
ENDPOINTS_TRIED = 3


# By these a server resets a stream whose request it holds to be malformed (RFC 9113 §8.1.1), or to ask too much of it (§7): a head over its
# SETTINGS_MAX_HEADER_LIST_SIZE, for one.
_UNACCEPTABLE = frozenset({Code.PROTOCOL_ERROR, Code.ENHANCE_YOUR_CALM})
# These say nothing against the endpoint: it goes away in good order, or the client takes less than others do.
_BLAMELESS = (UpstreamLeft, ResponseTooLarge)


class AttemptTimeout(Exception):
    """An attempt that was not the last did not bring a head in time."""


# There was no connection to the endpoint, or none from its sidecar to its application: nothing of the request has reached it.
NOT_CONNECTED = (ConnectFailed, UpstreamTLSError, Undelivered)
FAILURES = (*NOT_CONNECTED, UpstreamClosed, UpstreamProtocolError, Declined, AttemptTimeout)

# Attempts at one request that are remembered, for its spans. A request that waits may be sent to try once in a step of the breaker's.
_MOST_NOTED = 64

# Failures to connect that it takes long to find out.
_SLOW = frozenset({"connect_timeout", "connect_unreachable", "tls_timeout"})
# Failures to connect that are decisions about a peer, or about this proxy. To wait does not change them.
_REJECTED = frozenset({"tls_certificate", "tls_alert", "tls_protocol", "clear_text_refused"})


def unreachable(error: Exception) -> Failure:
    """What one of `NOT_CONNECTED` says about the endpoint."""
    reason = describe(error).reason
    if reason in _REJECTED:
        return Failure.REJECTED
    return Failure.UNREACHABLE if reason in _SLOW else Failure.REFUSED


class Attempts:
    """At one exchange with one service. `judge` is the exchange's while one of them is under way."""

    __slots__ = (
        "_begun",
        "_body",
        "_cause",
        "_client",
        "_client_limit",
        "_exchange",
        "_metrics",
        "_retries",
        "_since",
        "_started",
        "_status",
        "_work",
        "endpoint_set",
        "failure",
        "policy",
        "scope",
        "tried",
        "unreached",
    )  # fmt: skip

    def __init__(
        self, exchange: Exchange, endpoint_set: EndpointSet, policy: Policy, metrics: EndpointMetrics, client: ClientSettings
    ) -> None:
        """`client`: how long a server may take, where the policy does not say. Raises RequestError."""
        self._exchange = exchange
        self._metrics = metrics
        self._client = client
        self._retries = 0
        self._cause = ""
        self._client_limit = inf
        self._body: Replay | None = None
        self._status = 0
        self._begun = False  # it is being answered; how that ends is not known
        self._started = 0.0
        self._since: float | None = None  # when it was sent, if the clock does not say
        self._work: Work | None = None
        self.endpoint_set = endpoint_set
        self.policy = policy
        self.failure: Exception | None = None  # the last endpoint could not be connected to, because of this
        self.scope: trio.CancelScope | None = None  # of an attempt with a timeout of its own
        self.tried: tuple[Endpoint, ...] = ()
        self.unreached: tuple[Endpoint, ...] = ()
        if policy is not DEFAULT_POLICY:
            self._limits()
        if exchange.request.version == b"2":
            self._call_deadline()
        if exchange.body.length != 0:
            self._keep_body()

    # Before...

    def _limits(self) -> None:
        exchange = self._exchange
        allowed = self.policy.timeouts.request
        if self.policy.overrides:
            self.policy = overridden(self.policy, exchange.request.headers)
        times = self.policy.timeouts
        if times.response_head is not None or times.idle is not None:
            exchange.times = ClientSettings(times.response_head or self._client.response_timeout, times.idle or self._client.stream_timeout)
        whole = times.request
        if whole is not None:
            begun = exchange.handoff.since if exchange.handoff is not None else None
            limit = (begun or trio.current_time()) + whole
            if whole != allowed:
                self._client_limit = limit
            exchange.clock.limit_to(limit, lambda: DeadlineExceeded(f"the request was not over within {whole:g} s"))

    def _call_deadline(self) -> None:
        exchange = self._exchange
        value = exchange.request.headers.get(b"grpc-timeout")
        seconds = grpc.parse_timeout(value) if value is not None and exchange.is_grpc else None
        if seconds is not None:
            begun = exchange.handoff.since if exchange.handoff is not None else None
            self._client_limit = min(self._client_limit, (begun or trio.current_time()) + seconds)
            exchange.clock.limit_to(self._client_limit, lambda: DeadlineExceeded(f"the call's deadline of {seconds:g} s has passed"))

    def _keep_body(self) -> None:
        """Keep what is sent of the body until the response begins: a sidecar may say that it could not connect to its application."""
        exchange = self._exchange
        if not isinstance(exchange.body, Replay):  # otherwise the fast path has begun to send it
            exchange.body = Replay(exchange.body, self.policy.retries.max_body, exchange.facts.share)
        self._body = exchange.body

    @property
    def _repeatable(self) -> bool:
        return self._exchange.request.method in IDEMPOTENT

    @property
    def _sendable(self) -> bool:
        """The request can be sent once more, its body included."""
        return self._body.rewindable if self._body is not None else self._exchange.request_bytes == 0

    # One attempt...

    def begin(self, endpoint: Endpoint, *, alone: bool) -> None:
        """An attempt at `endpoint` begins; `end` has to follow. `alone`: the service has no other."""
        self._exchange.judge = self.judge
        self._work = self.endpoint_set.begin(self.policy, endpoint, alone=alone)
        self._since = None
        self._status = 0
        self._begun = False
        self.failure = None
        self._started = trio.current_time()
        if self._exchange.tried:
            self._exchange.request_bytes = 0
            if self._body is not None:
                self._body.rewind()

    def go_on(self, work: Work, since: float) -> None:
        """The first attempt has been begun by the fast path, at `since` (trio's time); `end` has to follow."""
        self._exchange.judge = self.judge
        self._work, self._since = work, since
        self._started = since or trio.current_time()
        response = self._exchange.response
        if response is not None:
            self._since = 0.0  # when that came is not known any more
            self.judge(response, None)

    @property
    def timeout(self) -> float | None:
        """Seconds that this attempt may take to the head; None: as many as any."""
        retries = self.policy.retries
        if retries.attempt_timeout is None or self._retries >= retries.limit or not (self._repeatable or retries.all_methods):
            return None
        return retries.attempt_timeout

    def remind(self) -> None:
        """Time has passed: the next hop is told what is left of the call's deadline."""
        headers = self._exchange.request.headers
        if self._client_limit < inf and self._exchange.is_grpc and b"grpc-timeout" in headers:
            headers.replace(b"grpc-timeout", grpc.write_timeout(self._exchange.clock.limit - trio.current_time()))

    def waited(self) -> None:
        """It has waited for an endpoint, which may be one that has failed before."""
        self.tried = self.unreached = ()
        self.remind()

    def judge(self, head: ResponseHead, trailers: Headers | None) -> bool:
        """See exchange.Judge."""
        declined = self._judge(head, trailers)
        if self._body is not None and not declined:
            self._body.release()
        return declined

    def _judge(self, head: ResponseHead, trailers: Headers | None) -> bool:
        work = self._work
        if work is None:
            return False
        if self.scope is not None:
            self.scope.deadline = inf
        seconds = self._elapsed(work)
        if head.status < 400 and trailers is None:
            # A gRPC call has a status at its end. While nothing fails, nobody has to wait for it to know that.
            self._begun = True
            work.answered(seconds, begun=self.endpoint_set.failing and self._exchange.is_grpc)
            return False
        return self._judge_error(work, head, trailers, seconds)

    def _elapsed(self, work: Work) -> float | None:
        """Since the request was sent, in seconds; None: that is not known, or of no use."""
        since = self._exchange.clock.since if self._since is None else self._since
        return trio.current_time() - since if since and work.load is not None else None

    def _judge_error(self, work: Work, head: ResponseHead, trailers: Headers | None, seconds: float | None) -> bool:
        status, retries, breaker = head.status, self.policy.retries, self.policy.breaker
        code = grpc.status(head.headers, trailers) if trailers is not None and self._exchange.is_grpc else None
        if within(status, breaker.statuses) or code in breaker.grpc:
            why = f"status {status}" if code is None else f"gRPC status {code}"
            work.failed(why, seconds, Failure.SILENCE if unanswered(head.headers) else Failure.RESPONSE)
        else:
            work.answered(seconds, bad=status >= 500 or bool(code))
        if code in retries.grpc:
            cause = "grpc_status"
        elif retries.statuses and within(status, retries.statuses) and (self._repeatable or retries.all_methods):
            cause = "status"
        else:
            return False
        self._status = status
        return self._again(cause)

    def end(self) -> None:
        """The attempt is over, however. The exchange lets go of it too: in a circle both would stay until the next garbage collection."""
        self._exchange.judge = None
        work, self._work = self._work, None
        if work is None:
            return
        if self._begun and self._exchange.grpc_status is not None and self._exchange.is_grpc:
            self._judge_end(work, grpc.code(self._exchange.grpc_status))
        if not work.told and self._exchange.clock.ran_out and not self._exchange.clock.client_awaited:
            if trio.current_time() < self._client_limit:
                work.failed("upstream_timeout", self._elapsed(work), Failure.SILENCE)
            else:
                work.silent(self._elapsed(work))  # the client's impatience says nothing against the endpoint
        work.finished()

    def _judge_end(self, work: Work, code: int | None) -> None:
        """A call has ended whose response had begun: too late for another attempt, but not for the breaker."""
        if code in self.policy.breaker.grpc:
            work.failed(f"gRPC status {code}")
        else:
            work.answered(None)

    # And another...

    def another(self, error: Exception) -> float:
        """What has ended an attempt; returns the pause (seconds) before the next one, or raises what the client is told."""
        work = self._work
        if work is None:
            raise error
        endpoint = work.endpoint
        if isinstance(error, NOT_CONNECTED):
            if isinstance(error, ConnectFailed) and error.reason == "local":
                raise error  # another endpoint would not help, and this one is not to be avoided for it
            work.failed(describe(error).reason, how=unreachable(error))
            if not self._sendable:
                raise error
            self.unreached += (endpoint,)
            self.failure = error
            pause, reason = 0.0, describe(error).reason
        else:
            reason = self._sort(work, error)
            pause = self._pause(self._retries - 1) * (0.5 + 0.5 * random.random())  # noqa: S311  (no secret depends on it)
        self.tried += (endpoint,)
        self._note(endpoint, reason)
        return pause

    def _sort(self, work: Work, error: Exception) -> str:
        """Whether to go on after `error`, which is raised if not; the reason to note."""
        if isinstance(error, Declined):
            return self._cause  # it was declined because there is to be another
        if isinstance(error, UpstreamReset) and error.code in _UNACCEPTABLE:
            raise error  # it would do so again, and that is the client's doing
        refused = isinstance(error, UpstreamReset) and error.code == Code.REFUSED_STREAM
        if not refused and not work.told and not isinstance(error, _BLAMELESS):
            if isinstance(error, AttemptTimeout):
                work.failed("attempt_timeout", self._elapsed(work), Failure.SILENCE)
            else:
                work.failed(describe(error).reason)
        cause = "refused" if refused else "timeout" if isinstance(error, AttemptTimeout) else "broken"
        safe = refused or self._repeatable or (cause == "timeout" and self.policy.retries.all_methods)
        if isinstance(error, UpstreamProtocolError) or not safe or not self._again(cause):
            if isinstance(error, AttemptTimeout):
                raise UpstreamTimeout(f"the server did not answer within {self.policy.retries.attempt_timeout:g} s") from error
            raise error
        return "upstream_timeout" if cause == "timeout" else describe(error).reason

    def _again(self, cause: str) -> bool:
        """Whether there is a retry because of `cause`. If so it is counted, and has to be made."""
        exchange, retries, now = self._exchange, self.policy.retries, trio.current_time()
        if not retries.limit:
            return False
        if self._retries >= retries.limit:
            why = "limit"
        elif exchange.response is not None or exchange.informed:
            why = "begun"
        elif not self._sendable:
            why = "body"
        elif now + self._pause(self._retries) >= exchange.clock.limit:
            why = "deadline"
        elif not self.endpoint_set.budget.withdraw(now, retries.budget):
            why = "budget"
        else:
            self._retries += 1
            self._cause = cause
            self._metrics.retried(cause)
            return True
        self._metrics.not_retried(why)
        return False

    def _pause(self, before: int) -> float:
        """The longest pause in front of a retry that has so many `before` it."""
        return min(self.policy.retries.max_backoff, self.policy.retries.backoff * 2.0**before)

    def _note(self, endpoint: Endpoint, reason: str) -> None:
        exchange, now = self._exchange, trio.current_time()
        if exchange.tried is None:
            exchange.tried = []
        elif len(exchange.tried) >= _MOST_NOTED:
            return
        attempt = Attempt(endpoint.address, self._started, now, self._status, reason, exchange.chosen, exchange.request_bytes)
        exchange.tried.append(attempt)
