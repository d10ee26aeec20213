"""One attempt: an exchange that is sent to one endpoint, and what the outcome says about the
endpoint.

Both paths use it, so an outcome counts the same on each. The fast path makes only the first attempt
of an exchange. It judges the attempt when the exchange has ended. The ordinary path judges each
attempt at the head of its response, because another attempt may follow (retries.py). After a
handoff, the ordinary path continues the attempt of the fast path."""

from __future__ import annotations

from math import inf

import trio

from proxy.balancing.circuit_breaker import Failure
from proxy.balancing.endpoint_set import ActiveRequest
from proxy.directory import Endpoint, Target
from proxy.directory.policy import DEFAULT_POLICY, Policy
from proxy.errors import unanswered
from proxy.exchange.exchange import Exchange
from proxy.exchange.replay import Replay
from proxy.settings.units import within
from proxy.wire import grpc
from proxy.wire.messages import Headers, ResponseHead

# The size in bytes of a response that arrives almost at once.
_SHORT = 65536


class Attempt:
    """`active`: the load and the circuit breaker of the endpoint; None for an address without a
    service, which has neither. The owner calls `end` or `finish` once."""

    __slots__ = ("_active", "_responding", "_seconds", "_sent", "endpoint", "target")

    def __init__(
        self,
        target: Target,
        endpoint: Endpoint,
        active: ActiveRequest | None,
        sent: float | None = None,
    ) -> None:
        """`sent`: trio's time when the request was sent. None: the timer of the exchange has the
        time. 0: it is not known."""
        self.target = target
        self.endpoint = endpoint
        self._active = active
        self._sent = sent
        self._seconds: float | None = None  # until the response head, if `answered` was called
        self._responding = False  # the response has begun well, and may still end with an error

    # On the fast path.

    @classmethod
    def on_fast_path(
        cls, target: Target, endpoint: Endpoint, active: ActiveRequest | None
    ) -> Attempt:
        """An attempt that is sent now. The time is read only if the response time counts."""
        measured = active is not None and active.load is not None
        return cls(target, endpoint, active, trio.current_time() if measured else 0.0)

    def answered(self) -> None:
        """The head of the response has arrived."""
        if self._sent:
            self._seconds = trio.current_time() - self._sent

    def end(self, exchange: Exchange) -> None:
        """The exchange has ended on the fast path. Judge its response, if there is one."""
        response = exchange.response
        if response is not None and self._active is not None:
            code, early = None, False
            if exchange.is_grpc:
                early = exchange.grpc_status is None  # a status in the head is the whole response
                code = grpc.code(exchange.grpc_status or response.headers.get(b"grpc-status"))
            self._judge(response, code, self._measured(exchange), early=early)
        self.finish()

    def _measured(self, exchange: Exchange) -> float | None:
        """Seconds until the response. Without a measurement for a long response: None, because its
        total time says little about when it began."""
        if self._seconds is None and self._sent and exchange.response_bytes <= _SHORT:
            return trio.current_time() - self._sent
        return self._seconds

    # On the ordinary path.

    @property
    def sent(self) -> float:
        """When the fast path sent it (trio's time). 0: not known."""
        return self._sent or 0.0

    def elapsed(self, exchange: Exchange) -> float | None:
        """Seconds since the request was sent. None: not known, or not needed."""
        sent = exchange.timer.since if self._sent is None else self._sent
        if not sent or self._active is None or self._active.load is None:
            return None
        return trio.current_time() - sent

    def judge_late(self) -> None:
        """The fast path has already passed the head on. The time of the response is not known."""
        self._sent = 0.0

    def judge_head(
        self, exchange: Exchange, head: ResponseHead, trailers: Headers | None, *, failing: bool
    ) -> int | None:
        """Judge the head of a response. `trailers`: see exchange.Judge. `failing`: an endpoint of
        the service failed recently. Returns the gRPC status, if the response has already ended with
        one."""
        seconds, grpc_call = self.elapsed(exchange), exchange.is_grpc
        if self.began(head, trailers):
            # A gRPC call has its status at the end. While nothing fails, do not wait for it.
            self._responding = True
            if self._active is not None:
                self._active.record_response(seconds, response_started=failing and grpc_call)
            return None
        ended = trailers is not None and grpc_call
        code = grpc.status(head.headers, trailers) if trailers is not None and grpc_call else None
        self._judge(head, code, seconds, early=ended)
        return code

    @staticmethod
    def began(head: ResponseHead, trailers: Headers | None) -> bool:
        """Whether this head begins a response that is no error so far."""
        return head.status < 400 and trailers is None

    def judge_trailers(self, exchange: Exchange) -> None:
        """The attempt has ended on the ordinary path. If it was a gRPC call whose response had
        begun, judge the status in the trailers: too late for another attempt, but it counts for the
        circuit breaker."""
        response, status = exchange.response, exchange.grpc_status
        if self._responding and status is not None and response is not None and exchange.is_grpc:
            self._judge(response, grpc.code(status), None, early=False)

    # On both paths.

    def _judge(
        self, head: ResponseHead, code: int | None, seconds: float | None, *, early: bool
    ) -> None:
        """Report a response to the circuit breaker and to the load of the endpoint. `code`: its
        gRPC status, if known. `early`: that status came instead of a message."""
        active = self._active
        if active is None:
            return
        breaker = active.policy.breaker
        if code is not None and code in breaker.grpc:
            why = f"gRPC status {code}"
        elif within(head.status, breaker.statuses):
            why = f"status {head.status}"
        else:
            active.record_response(seconds, bad=head.status >= 500 or (early and bool(code)))
            return
        active.record_failure(
            why, seconds, Failure.SILENCE if unanswered(head.headers) else Failure.RESPONSE
        )

    @property
    def has_outcome(self) -> bool:
        """Whether an outcome was reported."""
        return self._active is not None and self._active.has_outcome

    def record_failure(
        self, why: str, seconds: float | None = None, how: Failure = Failure.RESPONSE
    ) -> None:
        """Report that the attempt has failed. `why`: a reason of errors.py."""
        if self._active is not None:
            self._active.record_failure(why, seconds, how)

    def record_no_response(self, seconds: float | None) -> None:
        """Report that the client's deadline has passed, which does not count against the
        endpoint."""
        if self._active is not None:
            self._active.record_no_response(seconds)

    def finish(self) -> None:
        """The attempt has ended, whatever the result. Further calls have no effect."""
        active, self._active = self._active, None
        if active is not None:
            active.end()


def policy_deadline(exchange: Exchange, policy: Policy) -> float:
    """The time limit of `policy` for the whole exchange, in trio's time. inf: there is none."""
    return inf if policy is DEFAULT_POLICY else exchange.deadline(policy.timeouts.request)


def keep_body(exchange: Exchange, policy: Policy) -> Replay:
    """Keep the sent part of the request body until the response begins. The server may refuse the
    stream, and a sidecar may report that it could not connect to its application."""
    if not isinstance(exchange.body, Replay):  # otherwise the fast path has started to send it
        exchange.body = Replay(exchange.body, policy.retries.max_body, exchange.facts.share)
    return exchange.body
