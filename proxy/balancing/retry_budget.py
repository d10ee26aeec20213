"""How many retries a service gets.

A limit for each request does not bound what retries do to a service that is failing: if every request is sent twice, a service that is
down for its load gets twice of it. So retries are also held against the requests: of those of the last `ttl` seconds a part (`ratio`) may
be tried again, and a few each second in any case (`min_per_second`), for a service that is seldom called.

The window moves in tenths. Counting a request must cost next to nothing, so whoever sends one adds one to `requests` and looks at no
clock; only when a retry is asked for, the requests since the last time are laid into the tenths that have passed, evenly. Where they came
in bursts this is off by what the window has moved in between.
"""

from __future__ import annotations

from proxy.directory.policy import Budget

_SLOTS = 10


class RetryBudget:
    """Of one service."""

    __slots__ = ("_counted", "_made", "_passed", "_updated", "requests")

    def __init__(self, now: float) -> None:
        self.requests = 0  # to be counted up by whoever sends one
        self._counted = 0  # of them, in the window already
        self._updated = now
        self._passed = [0.0] * _SLOTS  # requests in each tenth, the newest first
        self._made = [0] * _SLOTS  # and retries

    def withdraw(self, now: float, rules: Budget) -> bool:
        """Whether one more retry may be made now; it is counted if so."""
        self.move(now, rules)
        if sum(self._made) + 1 > rules.ratio * sum(self._passed) + rules.min_per_second * rules.ttl:
            return False
        self._made[0] += 1
        return True

    def move(self, now: float, rules: Budget) -> None:
        """Let the window end `now`."""
        width = rules.ttl / _SLOTS
        moved = int(now / width) - int(self._updated / width)
        each = (self.requests - self._counted) / (moved + 1)
        self._counted, self._updated = self.requests, now
        shift = min(moved, _SLOTS)
        self._passed = [each] * shift + self._passed[: _SLOTS - shift]
        self._made = [0] * shift + self._made[: _SLOTS - shift]
        if moved < _SLOTS:  # the tenth that was the newest has its share too
            self._passed[moved] += each
