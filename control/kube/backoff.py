"""How long to wait before the next attempt.

Delays double from `first` to `most`. A random part is added to each, so that clients that lost the
same server do not all reconnect at the same time. After `healthy` seconds without a failure the
delays start again at `first`. The numbers are those of client-go's reflector.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackoffRules:
    """In seconds, but for `jitter`: the largest random part of a delay, as a fraction of it."""

    first: float = 0.8
    most: float = 30.0
    jitter: float = 1.0
    healthy: float = 120.0  # without a failure; then the delays start again at `first`


class Backoff:
    """One sequence of delays."""

    __slots__ = ("_chance", "_failed", "_next", "_rules")

    def __init__(
        self, rules: BackoffRules | None = None, chance: random.Random | None = None
    ) -> None:
        self._rules = rules or BackoffRules()
        self._chance = chance or random.Random()  # noqa: S311  # it spreads load, and keeps no secret
        self._next = self._rules.first
        self._failed = float("-inf")

    def failed(self, now: float) -> float:
        """Record a failure at time `now`. Returns the seconds to wait."""
        rules = self._rules
        if now - self._failed > rules.healthy:
            self._next = rules.first
        delay, self._next = self._next, min(self._next * 2, rules.most)
        delay *= 1 + rules.jitter * self._chance.random()
        self._failed = now + delay
        return delay
