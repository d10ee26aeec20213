"""Whether an endpoint is left alone: a circuit breaker, one for each endpoint that has failed.

                  a failure that is one too many                 the penalty is over, and a request is sent
        CLOSED ----------------------------------> OPEN ----------------------------------------------> PROBATION
          ^                                         ^  ^      (or: nobody else is left)                   |  |  |
          |                                         |  +-- it never came to an answer (at once due again) +  |  |
          |                                         +----- it failed: twice the penalty ---------------------+  |
          +----------------------------------------------- it was answered -------------------------------------+

A failure to connect is conclusive: nobody is there, and the next request need not find that out again. A response can be bad for its
request's sake, so only a row of bad ones opens, and any good one ends the row. What was sent before the breaker opened says nothing new
when it comes back; but an answer from an endpoint that could not be connected to says that it can be, so it closes what that has opened.

Even a row may be one client's: seven requests that the server answers by closing, or by 502. So an open endpoint that still *responds*,
if only in this way, is left alone for the sake of others that may do better, and never as the last: where all of a service are broken,
those that respond are used as if they were not, and the first request that does well closes the breaker. One that does not respond (a row
of silences), or cannot be connected to, is left alone in any case: to ask it costs everybody his time.

A refused connection costs next to nothing, and a process that restarts is back soon. So the first penalty of an endpoint that refuses
connections is short (`connect_penalty`). That of one that responds badly, or not at all, is `min_penalty`.

Penalties grow because others do the work meanwhile. Where there are none, to wait for the end of a long one would only prolong the outage:
so there are steps behind which the endpoint may be tried *early*. A step is as long as the first penalty. After a refused connection it
grows to a tenth of the outage so far, and to `min_penalty` at most. That such a probe has failed does not make the penalty longer, and one
that has no answer after another step may be followed by a further one.

Everything here is synchronous; the time comes from outside, and so does chance.
"""

from __future__ import annotations

import enum

from proxy.directory.policy import Breaker as Rules

# Of the time that an endpoint has been unreachable: the pause between two early probes.
_STEP = 0.1


class State(enum.StrEnum):
    """Of a breaker: used; left alone; a request is out that decides."""

    CLOSED = "closed"
    OPEN = "open"
    PROBATION = "probation"


class Failure(enum.Enum):
    """How a request has failed."""

    RESPONSE = enum.auto()  # it was answered by what counts as a failure, or by the end of its connection
    SILENCE = enum.auto()  # there was no answer in the time that it had, or a proxy in front says that it gets none
    UNREACHABLE = enum.auto()  # it was not sent: the endpoint could not be connected to
    REFUSED = enum.auto()  # the same, and that was known at once: to try again costs next to nothing
    REJECTED = enum.auto()  # mutual TLS failed: a certificate was refused, or the peer does not speak TLS. Time alone does not change that


_NOT_CONNECTED = (Failure.UNREACHABLE, Failure.REFUSED, Failure.REJECTED)


class Breaker:
    """Of one endpoint. What changes the state returns whether it did."""

    __slots__ = (
        "early", "failures", "in_vain", "opened", "refused", "rejected", "responds", "seen", "silences", "since", "state", "unreachable",
        "until", "why",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = State.CLOSED
        self.failures = 0  # in a row
        self.silences = 0  # in a row, with no response of any kind between them
        self.opened = 0  # times in a row
        self.until = 0.0  # when the penalty is over
        self.early = 0.0  # when it may be tried if there is nobody else
        self.unreachable = False  # it was a failure to connect that opened it
        self.refused = False  # and that was known at once
        self.rejected = False  # by the last failure: mutual TLS failed
        self.responds = True  # though not as it should; False: it cannot be connected to, or answers nobody
        self.since = 0.0  # when it opened, and was closed before
        self.seen = 0.0  # the last failure
        self.in_vain = 0.0  # the last failure of a request on probation
        self.why = ""  # it failed, in a word or two

    def due(self, now: float) -> bool:
        """The penalty is over: the next request is the one that decides."""
        return self.state is State.OPEN and now >= self.until

    def probe(self, now: float, rules: Rules, chance: float) -> bool:
        """A request is sent to an endpoint that is not closed, to find out whether it can be again: on probation. It has to end in
        `failed`, `succeeded` or `abandoned`, each with `probe`."""
        self.early = now + self._step(now, rules) * (1 + rules.jitter * chance)
        changed = self.state is not State.PROBATION
        self.state = State.PROBATION
        return changed

    def failed(self, now: float, rules: Rules, chance: float, how: Failure = Failure.RESPONSE, *, probe: bool = False) -> bool:
        """A request has failed. `chance` is from 0 to 1, for the jitter; `probe`: it was sent while the breaker was not closed."""
        self.seen = now
        responds = self._responds(how, rules.failures)
        over = True  # the last penalty, if there was one
        if probe and self.state is State.PROBATION:
            over = now >= self.until
            self.opened += over
            self.in_vain = now
        elif self.state is State.CLOSED:
            self.failures += 1
            if how not in _NOT_CONNECTED and (not rules.failures or self.failures < rules.failures):
                return False
            self.since = now
        elif not probe or responds is self.responds:
            return False
        else:
            over = False
        self.state = State.OPEN
        self.unreachable = how in _NOT_CONNECTED
        self.refused = how is Failure.REFUSED
        self.rejected = how is Failure.REJECTED
        self.responds = responds
        share = 1 + rules.jitter * chance
        self.early = now + self._step(now, rules) * share
        if over:
            self.until = now + min(rules.max_penalty, self._first(rules) * 2.0 ** min(self.opened, 40)) * share
        return True

    def _first(self, rules: Rules) -> float:
        """The first penalty, in seconds."""
        return min(rules.connect_penalty, rules.min_penalty) if self.refused else rules.min_penalty

    def _step(self, now: float, rules: Rules) -> float:
        """The pause before the next early probe, in seconds."""
        return min(rules.min_penalty, rules.max_penalty, max(self._first(rules), (now - self.since) * _STEP))

    def _responds(self, how: Failure, row: int) -> bool:
        if how is Failure.RESPONSE:
            self.silences = 0
        elif how is Failure.SILENCE:
            self.silences += 1
        return how is Failure.RESPONSE or (how is Failure.SILENCE and self.responds and not 0 < row <= self.silences)

    def succeeded(self, *, probe: bool = False, begun: bool = False) -> bool:
        """A request was answered. `begun`: so far, and its end may still say that it has failed: that does not end a row of failures, but
        whoever begins to answer is there."""
        self.silences = 0
        if self.state is State.CLOSED:
            if not begun:
                self.failures = 0
            return False
        if not self.unreachable and not probe:
            return False
        self.state = State.CLOSED
        self.failures = self.opened = 0
        self.unreachable, self.responds = False, True
        return True

    def abandoned(self, now: float) -> bool:
        """The request on probation ended without saying anything about the endpoint."""
        if self.state is not State.PROBATION:
            return False
        self.state = State.OPEN
        self.early = now
        return True

    def hasten(self, now: float, rules: Rules, chance: float) -> None:
        """There is reason to hope: the rest of the penalty is one step at most."""
        self.until = min(self.until, now + self._step(now, rules) * (1 + rules.jitter * chance))
