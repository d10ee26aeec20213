"""Whether an endpoint is left alone: a circuit breaker, one for each endpoint that has failed.

                  a failure that is one too many                 the penalty is over, and a request is sent
        CLOSED ----------------------------------> OPEN ----------------------------------------------> PROBATION
          ^                                         ^  ^                                                  |  |  |
          |                                         |  +-- it never came to an answer (at once due again) +  |  |
          |                                         +----- it failed: twice the penalty ---------------------+  |
          +----------------------------------------------- it was answered -------------------------------------+

A failure to connect is conclusive: nobody is there, and the next request need not find that out again. A response can be bad for its
request's sake, so only a row of bad ones opens, and any good one ends the row. What was sent before the breaker opened says nothing new
when it comes back; but an answer from an endpoint that could not be connected to says that it can be, so it closes what that has opened.

Everything here is synchronous; the time comes from outside, and so does chance.
"""

from __future__ import annotations

import enum

from proxy.mesh.policy import Breaker as Rules


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    PROBATION = "probation"


class Breaker:
    """Of one endpoint. What changes the state returns whether it did."""

    __slots__ = ("failures", "opened", "seen", "state", "unreachable", "until", "why")

    def __init__(self) -> None:
        self.state = State.CLOSED
        self.failures = 0  # in a row
        self.opened = 0  # times in a row
        self.until = 0.0  # when the penalty is over
        self.unreachable = False  # it was a failure to connect that opened it
        self.seen = 0.0  # the last failure
        self.why = ""  # it failed, in a word or two

    def due(self, now: float) -> bool:
        """The penalty is over: the next request is the one that decides."""
        return self.state is State.OPEN and now >= self.until

    def blocks(self, now: float) -> bool:
        """The endpoint gets nothing now."""
        return self.state is State.PROBATION or (self.state is State.OPEN and now < self.until)

    def probe(self) -> bool:
        """A request is sent on probation, which has to end in `failed`, `succeeded` or `abandoned`, each with `probe`."""
        if self.state is not State.OPEN:
            return False
        self.state = State.PROBATION
        return True

    def failed(self, now: float, rules: Rules, chance: float, *, unreachable: bool = False, probe: bool = False) -> bool:
        """A request has failed. `chance` is from 0 to 1, for the jitter."""
        self.seen = now
        if probe and self.state is State.PROBATION:
            self.opened += 1
        elif self.state is State.CLOSED:
            self.failures += 1
            if not unreachable and (not rules.failures or self.failures < rules.failures):
                return False
        else:
            return False
        self.state = State.OPEN
        self.unreachable = unreachable
        penalty = min(rules.max_penalty, rules.min_penalty * 2.0 ** min(self.opened, 40))
        self.until = now + penalty * (1 + rules.jitter * chance)
        return True

    def succeeded(self, *, probe: bool = False) -> bool:
        """A request was answered."""
        if self.state is State.CLOSED:
            self.failures = 0
            return False
        if not self.unreachable and not (probe and self.state is State.PROBATION):
            return False
        self.state = State.CLOSED
        self.failures = self.opened = 0
        self.unreachable = False
        return True

    def abandoned(self, now: float) -> bool:
        """The request on probation ended without saying anything about the endpoint."""
        if self.state is not State.PROBATION:
            return False
        self.state = State.OPEN
        self.until = now
        return True
