"""The circuit breaker of an endpoint. Only endpoints that have failed have one.

    CLOSED    -> OPEN         too many failures
    OPEN      -> HALF_OPEN    a request is sent after the penalty, or because all breakers are open
    HALF_OPEN -> OPEN         the trial failed: the penalty doubles
                              the trial had no outcome: another trial is due at once
    HALF_OPEN -> CLOSED       the trial was answered

While a breaker is half-open, one trial request decides.

A failure to connect is conclusive: no request can reach the endpoint, so one failure opens the
breaker. A bad response may be caused by its request. So only a number of consecutive bad responses
opens the breaker, and each good one resets the count. The response to a request that was sent
before the breaker opened says nothing new. But a response from an endpoint that could not be
connected to shows that it can be reached, so it closes a breaker that opened for that reason.

Even consecutive bad responses may be caused by one client: seven requests that the server answers
with 502, or by closing the connection. So if an endpoint still *responds*, even if only in this
way, its open breaker applies only while other endpoints may do better. If all breakers of a service
are open, the endpoints that respond are used as if their breakers were closed, and the first
request that succeeds closes the breaker. An endpoint that does not respond (consecutive timeouts),
or cannot be connected to, gets no requests in any case, because each request would wait for the
timeout.

A refused connection costs almost nothing, and a process that restarts is soon available again. So
the first penalty of an endpoint that refuses connections is short (`connect_penalty`). For bad
responses or no response, it is `min_penalty`.

Penalties grow because other endpoints do the work meanwhile. If there are no others, a long penalty
would only prolong the outage. So after a step there may be an *early* trial. A step is as long as
the first penalty. After a refused connection the step grows to a tenth of the outage so far, but
not beyond `min_penalty`. A failed early trial does not make the penalty longer. If a trial has no
outcome after another step, a further one may follow.

All functions are synchronous. The caller provides the time and the random numbers."""

from __future__ import annotations

import enum

from proxy.directory.policy import Breaker as Rules

# The pause between two early trials, as a fraction of the outage so far.
_STEP = 0.1


class BreakerState(enum.StrEnum):
    """The state of a circuit breaker. Half-open: one trial request decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Failure(enum.Enum):
    """The kind of a failure."""

    RESPONSE = enum.auto()  # a response that counts as a failure, or the end of the connection
    SILENCE = enum.auto()  # no response in time, or a proxy reports that it gets no response
    UNREACHABLE = enum.auto()  # not sent: no connection to the endpoint
    REFUSED = (
        enum.auto()
    )  # as UNREACHABLE, but detected at once, so that another try costs almost nothing
    # mutual TLS failed: a certificate was rejected, or the peer does not speak TLS; time alone does
    # not help
    REJECTED = enum.auto()


_NOT_CONNECTED = (Failure.UNREACHABLE, Failure.REFUSED, Failure.REJECTED)


class CircuitBreaker:
    """The circuit breaker of one endpoint. Methods that may change the state return whether they
    did."""

    __slots__ = (
        "early",
        "failures",
        "last_failed_trial",
        "last_failure",
        "opened",
        "refused",
        "rejected",
        "responds",
        "silences",
        "since",
        "state",
        "unreachable",
        "until",
        "why",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self.failures = 0  # consecutive failures
        self.silences = 0  # consecutive timeouts, without any response between them
        self.opened = 0  # consecutive openings
        self.until = 0.0  # end of the penalty
        self.early = 0.0  # time of the next early trial, if all breakers are open
        self.unreachable = False  # a failure to connect opened the breaker
        self.refused = False  # and it was detected at once
        self.rejected = False  # the last failure: mutual TLS failed
        self.responds = True  # even if not correctly; False: no connection, or no responses
        self.since = 0.0  # when it opened after it had been closed
        self.last_failure = 0.0  # time of the last failure
        self.last_failed_trial = 0.0  # time of the last failed trial
        self.why = ""  # short reason of the last failure

    def due(self, now: float) -> bool:
        """Whether the penalty is over, so that the next request is the trial."""
        return self.state is BreakerState.OPEN and now >= self.until

    def begin_trial(self, now: float, rules: Rules, chance: float) -> bool:
        """A trial request is sent to an endpoint whose breaker is not closed. The caller must
        report its outcome with `record_failure` or `record_success` (with `probe`), or with
        `record_no_outcome`."""
        self.early = now + self._step(now, rules) * (1 + rules.jitter * chance)
        changed = self.state is not BreakerState.HALF_OPEN
        self.state = BreakerState.HALF_OPEN
        return changed

    def record_failure(
        self,
        now: float,
        rules: Rules,
        chance: float,
        how: Failure = Failure.RESPONSE,
        *,
        probe: bool = False,
    ) -> bool:
        """A request failed. `chance`: from 0 to 1, for the jitter. `probe`: the request was sent
        while the breaker was not closed."""
        self.last_failure = now
        responds = self._responds(how, rules.failures)
        over = True  # the last penalty, if there was one
        if probe and self.state is BreakerState.HALF_OPEN:
            over = now >= self.until
            self.opened += over
            self.last_failed_trial = now
        elif self.state is BreakerState.CLOSED:
            self.failures += 1
            if how not in _NOT_CONNECTED and (not rules.failures or self.failures < rules.failures):
                return False
            self.since = now
        elif not probe or responds is self.responds:
            return False
        else:
            over = False
        self.state = BreakerState.OPEN
        self.unreachable = how in _NOT_CONNECTED
        self.refused = how is Failure.REFUSED
        self.rejected = how is Failure.REJECTED
        self.responds = responds
        share = 1 + rules.jitter * chance
        self.early = now + self._step(now, rules) * share
        if over:
            self.until = (
                now
                + min(rules.max_penalty, self._first(rules) * 2.0 ** min(self.opened, 40)) * share
            )
        return True

    def _first(self, rules: Rules) -> float:
        """The first penalty in seconds."""
        return min(rules.connect_penalty, rules.min_penalty) if self.refused else rules.min_penalty

    def _step(self, now: float, rules: Rules) -> float:
        """The pause before the next early trial, in seconds."""
        return min(
            rules.min_penalty,
            rules.max_penalty,
            max(self._first(rules), (now - self.since) * _STEP),
        )

    def _responds(self, how: Failure, row: int) -> bool:
        if how is Failure.RESPONSE:
            self.silences = 0
        elif how is Failure.SILENCE:
            self.silences += 1
        return how is Failure.RESPONSE or (
            how is Failure.SILENCE and self.responds and not 0 < row <= self.silences
        )

    def record_success(self, *, probe: bool = False, response_started: bool = False) -> bool:
        """A request was answered. `response_started`: the response has started, and may still fail.
        That does not reset the count of consecutive failures, but it shows that the endpoint
        responds."""
        self.silences = 0
        if self.state is BreakerState.CLOSED:
            if not response_started:
                self.failures = 0
            return False
        if not self.unreachable and not probe:
            return False
        self.state = BreakerState.CLOSED
        self.failures = self.opened = 0
        self.unreachable, self.responds = False, True
        return True

    def record_no_outcome(self, now: float) -> bool:
        """The trial request ended without an outcome for the endpoint."""
        if self.state is not BreakerState.HALF_OPEN:
            return False
        self.state = BreakerState.OPEN
        self.early = now
        return True

    def shorten_penalty(self, now: float, rules: Rules, chance: float) -> None:
        """Another endpoint of the service has recovered: limit the rest of the penalty to one
        step."""
        self.until = min(self.until, now + self._step(now, rules) * (1 + rules.jitter * chance))
