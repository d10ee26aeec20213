"""How long to wait before the next attempt.

Delays double from `min_delay` to `max_delay`. A random part is added to each, so that clients that
lost the same server do not all reconnect at the same time. After `reset_after` seconds without a
failure the delays start again at `min_delay`. The numbers are those of client-go's reflector.
"""

from __future__ import annotations

import random
from typing import Annotated

from proxy.settings.declare import Section, ratio, seconds


class BackoffRules(Section, frozen=True):
    """Delays between attempts of a list or a watch."""

    min_delay: Annotated[float, seconds(0.1, 60, "first delay; each failure doubles it")] = 0.8
    max_delay: Annotated[float, seconds(0.1, 600, "maximum delay, without jitter")] = 30.0
    jitter: Annotated[
        float, ratio(0, 10, "maximum random part that is added to a delay, as a fraction of it")
    ] = 1.0
    reset_after: Annotated[
        float, seconds(0, 3600, "time without a failure after which delays start at `min_delay`")
    ] = 120.0


class Backoff:
    """One sequence of delays."""

    __slots__ = ("_chance", "_failed", "_next", "_rules")

    def __init__(
        self, rules: BackoffRules | None = None, chance: random.Random | None = None
    ) -> None:
        self._rules = rules or BackoffRules()
        self._chance = chance or random.Random()  # noqa: S311  # it spreads load, and keeps no secret
        self._next = self._rules.min_delay
        self._failed = float("-inf")

    def failed(self, now: float) -> float:
        """Record a failure at time `now`. Returns the seconds to wait."""
        rules = self._rules
        if now - self._failed > rules.reset_after:
            self._next = rules.min_delay
        delay, self._next = self._next, min(self._next * 2, rules.max_delay)
        delay *= 1 + rules.jitter * self._chance.random()
        self._failed = now + delay
        return delay
