"""Token buckets, one for each key, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict


class RateLimit:
    """Each key has `burst` units at first, and gets `rate` units per second up to `burst`. At most
    `most` keys are remembered; the one that was used least recently is forgotten, and so starts
    again with `burst`.
    """

    def __init__(self, rate: float, burst: int, most: int = 65536) -> None:
        self._rate, self._burst, self._most = rate, burst, most
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # units, and when

    def __len__(self) -> int:
        return len(self._left)

    def take(self, key: str, now: float) -> float:
        """Take one unit. Returns 0.0, or the seconds until there is one. `now`: a monotonic
        time.
        """
        units, since = self._left.get(key, (float(self._burst), now))
        units = min(self._burst, units + (now - since) * self._rate)
        taken = units >= 1
        self._left[key] = units - 1 if taken else units, now
        self._left.move_to_end(key)
        if len(self._left) > self._most:
            self._left.popitem(last=False)
        return 0.0 if taken else (1 - units) / self._rate
