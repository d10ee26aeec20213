"""The retry budget of a service.

A limit per request does not bound the effect of retries on a service that fails: if every request
is sent twice, an overloaded service gets twice the load. So retries are also limited in proportion
to the requests: to a fraction (`ratio`) of the requests of the last `ttl` seconds. In addition, a
few per second are always allowed, for services with few requests (`min_per_second`).

The window moves in tenths. To count a request must cost almost nothing, so the caller adds one to
`requests` and reads no clock. Only when a retry is requested, the requests since the last time are
spread evenly over the tenths that have passed. For bursts, the error is at most the part of the
window that has passed in between."""

from __future__ import annotations

from proxy.directory.policy import Budget

_SLOTS = 10


class RetryBudget:
    """The retry budget of one service."""

    __slots__ = ("_arrived", "_counted", "_retries", "_updated", "requests")

    def __init__(self, now: float) -> None:
        self.requests = 0  # the caller adds one for each request
        self._counted = 0  # how many of them are in the window already
        self._updated = now
        self._arrived = [0.0] * _SLOTS  # requests in each tenth, newest first
        self._retries = [0] * _SLOTS  # retries in each tenth

    def withdraw(self, now: float, rules: Budget) -> bool:
        """Whether one more retry is allowed now. If so, counts it."""
        self.move(now, rules)
        allowed = rules.ratio * sum(self._arrived) + rules.min_per_second * rules.ttl
        if sum(self._retries) + 1 > allowed:
            return False
        self._retries[0] += 1
        return True

    def move(self, now: float, rules: Budget) -> None:
        """Move the end of the window to `now`."""
        width = rules.ttl / _SLOTS
        moved = int(now / width) - int(self._updated / width)
        each = (self.requests - self._counted) / (moved + 1)
        self._counted, self._updated = self.requests, now
        shift = min(moved, _SLOTS)
        self._arrived = [each] * shift + self._arrived[: _SLOTS - shift]
        self._retries = [0] * shift + self._retries[: _SLOTS - shift]
        if moved < _SLOTS:  # the tenth that was the newest gets its share too
            self._arrived[moved] += each
