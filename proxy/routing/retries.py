"""The attempts of one exchange: the outcome of each, and whether another one follows.

An attempt ends in one of these ways:

    not delivered   The proxy cannot connect to the endpoint, or the endpoint's sidecar reports that
                    it cannot connect to its application. The proxy tries another endpoint, up to a
                    small number, for any request whose whole body can be sent again. If all circuit
                    breakers are open, it waits for the next trial (endpoint_wait.py), but not if
                    mutual TLS with all endpoints fails.
    refused         REFUSED_STREAM: the server has not processed the request. The proxy retries any
                    request whose body can be sent again.
    broken          No response, or none in time. The proxy retries idempotent methods (RFC 9110
                    §9.2.2).
    answered        The status is one that the policy retries. The proxy retries if the policy
                    allows it for the method.

All but the first are retries. They are made within the policy's limit and the service's budget
(balancing/retry_budget.py), before the deadline of the request, and only if the body can be sent
again (exchange/replay.py). The proxy never retries after a byte of a response was forwarded.

In addition, the client (exchange/client.py) repeats a request once if its connection was lost. So a
server gets a request at most `limit` + 2 times.

The client sets the deadline of a gRPC call (`grpc-timeout`). No attempt continues after it. A
further attempt carries the remaining time."""

from __future__ import annotations

import random
from math import inf
from typing import TYPE_CHECKING

import trio

from proxy.balancing.circuit_breaker import Failure
from proxy.balancing.endpoint_set import EndpointSet
from proxy.directory import Endpoint, Target
from proxy.directory.policy import DEFAULT_POLICY, Policy
from proxy.errors import (
    DeadlineExceeded,
    ResponseTooLarge,
    Undelivered,
    UpstreamClosed,
    UpstreamGoaway,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
    UpstreamTLSError,
    describe,
)  # fmt: skip
from proxy.exchange.client import IDEMPOTENT, Declined
from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import Exchange, FailedAttempt
from proxy.exchange.replay import Replay
from proxy.net.exceptions import ConnectFailed
from proxy.routing.attempt import Attempt, keep_body, policy_deadline
from proxy.routing.endpoint_choice import EndpointChoice
from proxy.routing.request_overrides import overridden
from proxy.settings.units import within
from proxy.wire import grpc
from proxy.wire.h2.frames import Code
from proxy.wire.messages import Headers, ResponseHead

if TYPE_CHECKING:
    from proxy.telemetry.endpoint_metrics import EndpointMetrics

# Codes with which a server resets a stream because the request is malformed (RFC 9113 §8.1.1), or
# too expensive (§7), for example because its head exceeds SETTINGS_MAX_HEADER_LIST_SIZE.
_UNACCEPTABLE = frozenset({Code.PROTOCOL_ERROR, Code.ENHANCE_YOUR_CALM})
# These do not count against the endpoint: it shuts down gracefully, or the client's own limit is
# small.
_BLAMELESS = (UpstreamGoaway, ResponseTooLarge)


class AttemptTimeout(Exception):
    """An attempt, not the last one, got no response head in time."""


# No connection to the endpoint, or none from its sidecar to its application. No byte of the request
# has reached the application.
NOT_CONNECTED = (ConnectFailed, UpstreamTLSError, Undelivered)
FAILURES = (*NOT_CONNECTED, UpstreamClosed, UpstreamProtocolError, Declined, AttemptTimeout)

# Maximum number of attempts of one request that are kept for its spans. A request that waits may
# make one trial in each step of the circuit breaker.
_MOST_NOTED = 64

# Failures to connect that take long to detect.
_SLOW = frozenset({"connect_timeout", "connect_unreachable", "tls_timeout"})
# Failures to connect that are decisions about a peer or this proxy. They do not change with time.
_REJECTED = frozenset({"tls_certificate", "tls_alert", "tls_protocol", "clear_text_refused"})


def unreachable(error: Exception) -> Failure:
    """The kind of failure of the endpoint, for an error in `NOT_CONNECTED`."""
    reason = describe(error).reason
    if reason in _REJECTED:
        return Failure.REJECTED
    return Failure.UNREACHABLE if reason in _SLOW else Failure.REFUSED


class Attempts:
    """The attempts of one exchange with one service. During an attempt, `exchange.judge` is this
    `judge`."""

    __slots__ = (
        "_attempt",
        "_body",
        "_cause",
        "_client",
        "_client_limit",
        "_exchange",
        "_metrics",
        "_retries",
        "_started",
        "_status",
        "choice",
        "endpoint_set",
        "policy",
        "scope",
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange,
        endpoint_set: EndpointSet,
        policy: Policy,
        metrics: EndpointMetrics,
        client: ClientSettings,
    ) -> None:
        """`client`: the limits for a server's response where the policy sets none. Raises
        RequestError."""
        self._exchange = exchange
        self._metrics = metrics
        self._client = client
        self._retries = 0
        self._cause = ""
        self._client_limit = inf
        self._body: Replay | None = None
        self._status = 0
        self._started = 0.0
        self._attempt: Attempt | None = None  # the current one
        self.endpoint_set = endpoint_set
        self.policy = policy
        self.scope: trio.CancelScope | None = None  # of an attempt with its own timeout
        self.choice = EndpointChoice()
        if policy is not DEFAULT_POLICY:
            self._limits()
        self._call_deadline()
        if exchange.body.length != 0:
            self._body = keep_body(exchange, self.policy)

    # Before the first attempt.

    def _limits(self) -> None:
        exchange = self._exchange
        allowed = self.policy.timeouts.request
        if self.policy.overrides:
            self.policy = overridden(self.policy, exchange.request.headers)
        times = self.policy.timeouts
        if times.response_head is not None or times.idle is not None:
            exchange.times = ClientSettings(
                times.response_head or self._client.response_timeout,
                times.idle or self._client.stream_timeout,
            )
        whole, limit = times.request, policy_deadline(exchange, self.policy)
        if whole is not None:
            if whole != allowed:
                self._client_limit = limit
            exchange.timer.limit_to(
                limit, lambda: DeadlineExceeded(f"the request did not finish within {whole:g} s")
            )

    def _call_deadline(self) -> None:
        exchange = self._exchange
        seconds = exchange.call_timeout
        if seconds is not None:
            self._client_limit = min(self._client_limit, exchange.deadline(seconds))
            exchange.timer.limit_to(
                self._client_limit,
                lambda: DeadlineExceeded(f"the call's deadline of {seconds:g} s has passed"),
            )

    @property
    def _repeatable(self) -> bool:
        return self._exchange.request.method in IDEMPOTENT

    @property
    def _sendable(self) -> bool:
        """Whether the request, with its body, can be sent again."""
        return (
            self._body.rewindable if self._body is not None else self._exchange.request_bytes == 0
        )

    # One attempt.

    def begin(self, target: Target, endpoint: Endpoint) -> None:
        """Begin an attempt at `endpoint`, which belongs to `target`. The caller must call `end`."""
        self._exchange.judge = self.judge
        alone = len(target.endpoints) == 1
        active = self.endpoint_set.begin(self.policy, endpoint, alone=alone)
        self._attempt = Attempt(target, endpoint, active)
        self._status = 0
        self.choice.failure = None
        self._started = trio.current_time()
        if self._exchange.tried:
            self._exchange.request_bytes = 0
            if self._body is not None:
                self._body.rewind()

    def go_on(self, attempt: Attempt) -> None:
        """Continue the first attempt, which the fast path began. The caller must call `end`."""
        self._exchange.judge = self.judge
        self._attempt = attempt
        self._started = attempt.sent or trio.current_time()
        response = self._exchange.response
        if response is not None:
            attempt.judge_late()
            self.judge(response, None)

    @property
    def timeout(self) -> float | None:
        """Maximum seconds of this attempt to the response head. None: no limit of its own."""
        retries = self.policy.retries
        if (
            retries.attempt_timeout is None
            or self._retries >= retries.limit
            or not (self._repeatable or retries.all_methods)
        ):
            return None
        return retries.attempt_timeout

    def remind(self) -> None:
        """Update `grpc-timeout` for the next hop: send the remaining time of the call's
        deadline."""
        headers = self._exchange.request.headers
        if self._client_limit < inf and self._exchange.is_grpc and b"grpc-timeout" in headers:
            headers.replace(
                b"grpc-timeout",
                grpc.write_timeout(self._exchange.timer.limit - trio.current_time()),
            )

    def waited(self) -> None:
        """The exchange has waited for an endpoint."""
        self.choice.waited()
        self.remind()

    def judge(self, head: ResponseHead, trailers: Headers | None) -> bool:
        """See exchange.Judge."""
        declined = self._judge(head, trailers)
        if self._body is not None and not declined:
            self._body.release()
        return declined

    def _judge(self, head: ResponseHead, trailers: Headers | None) -> bool:
        attempt = self._attempt
        if attempt is None:
            return False
        if self.scope is not None:
            self.scope.deadline = inf
        code = attempt.judge_head(self._exchange, head, trailers, failing=self.endpoint_set.failing)
        if attempt.began(head, trailers):
            return False
        retries = self.policy.retries
        if code in retries.grpc:
            cause = "grpc_status"
        elif (
            retries.statuses
            and within(head.status, retries.statuses)
            and (self._repeatable or retries.all_methods)
        ):
            cause = "status"
        else:
            return False
        self._status = head.status
        return self._again(cause)

    def end(self) -> None:
        """End the attempt, whatever its result. Clears the exchange's reference to this object: the
        cycle would keep both in memory until the next garbage collection."""
        exchange = self._exchange
        exchange.judge = None
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        attempt.judge_trailers(exchange)
        if not attempt.has_outcome and exchange.timer.ran_out and not exchange.timer.client_awaited:
            if trio.current_time() < self._client_limit:
                attempt.record_failure(
                    "upstream_timeout", attempt.elapsed(exchange), Failure.SILENCE
                )
            else:  # the client's short limit does not count against the endpoint
                attempt.record_no_response(attempt.elapsed(exchange))
        attempt.finish()

    # The next attempt.

    def another(self, error: Exception) -> float:
        """Handle the error that ended an attempt. Returns the pause (seconds) before the next
        attempt, or raises the error for the client."""
        attempt = self._attempt
        if attempt is None:
            raise error
        endpoint = attempt.endpoint
        if isinstance(error, NOT_CONNECTED):
            if isinstance(error, ConnectFailed) and error.reason == "local":
                raise error  # another endpoint does not help, and this endpoint is not the cause
            attempt.record_failure(describe(error).reason, how=unreachable(error))
            if not self._sendable:
                raise error
            self.choice.not_connected(endpoint, error)
            pause, reason = 0.0, describe(error).reason
        else:
            reason = self._sort(attempt, error)
            pause = self._pause(self._retries - 1) * (0.5 + 0.5 * random.random())  # noqa: S311  (no secret depends on it)
            self.choice.answered(endpoint)
        self._note(endpoint, reason)
        return pause

    def _sort(self, attempt: Attempt, error: Exception) -> str:
        """Decide whether to retry after `error`. Returns the reason for the attempt's record, or
        raises the error for the client."""
        if isinstance(error, Declined):
            return self._cause  # it was declined because a retry follows
        if isinstance(error, UpstreamReset) and error.code in _UNACCEPTABLE:
            raise error  # a retry would fail too: the client caused the error
        refused = isinstance(error, UpstreamReset) and error.code == Code.REFUSED_STREAM
        if not refused and not attempt.has_outcome and not isinstance(error, _BLAMELESS):
            if isinstance(error, AttemptTimeout):
                elapsed = attempt.elapsed(self._exchange)
                attempt.record_failure("attempt_timeout", elapsed, Failure.SILENCE)
            else:
                attempt.record_failure(describe(error).reason)
        cause = (
            "refused"
            if refused
            else "timeout"
            if isinstance(error, AttemptTimeout)
            else "connection_lost"
        )
        safe = (
            refused or self._repeatable or (cause == "timeout" and self.policy.retries.all_methods)
        )
        if isinstance(error, UpstreamProtocolError) or not safe or not self._again(cause):
            if isinstance(error, AttemptTimeout):
                raise UpstreamTimeout(
                    f"the server did not answer within {self.policy.retries.attempt_timeout:g} s"
                ) from error
            raise error
        return "upstream_timeout" if cause == "timeout" else describe(error).reason

    def _again(self, cause: str) -> bool:
        """Whether a retry follows because of `cause`. If so, counts it, and the caller must make
        it."""
        exchange, retries, now = self._exchange, self.policy.retries, trio.current_time()
        if not retries.limit:
            return False
        if self._retries >= retries.limit:
            why = "limit"
        elif exchange.response is not None or exchange.informed:
            why = "response_started"
        elif not self._sendable:
            why = "body"
        elif now + self._pause(self._retries) >= exchange.timer.limit:
            why = "deadline"
        elif not self.endpoint_set.budget.withdraw(now, retries.budget):
            why = "budget"
        else:
            self._retries += 1
            self._cause = cause
            self._metrics.count_retry(cause)
            return True
        self._metrics.count_skipped_retry(why)
        return False

    def _pause(self, before: int) -> float:
        """Maximum pause in seconds before a retry that follows `before` other retries."""
        return min(self.policy.retries.max_backoff, self.policy.retries.backoff * 2.0**before)

    def _note(self, endpoint: Endpoint, reason: str) -> None:
        exchange, now = self._exchange, trio.current_time()
        if exchange.tried is None:
            exchange.tried = []
        elif len(exchange.tried) >= _MOST_NOTED:
            return
        attempt = FailedAttempt(
            endpoint.address,
            self._started,
            now,
            self._status,
            reason,
            exchange.chosen,
            exchange.request_bytes,
        )
        exchange.tried.append(attempt)
