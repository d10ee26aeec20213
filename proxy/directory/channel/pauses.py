"""When a proxy connects to the control plane again: the pauses between two attempts.

Pauses grow from `min_pause` to `max_pause` and are varied at random, so that the proxies of a
cluster do not return at the same moment. A connection that worked starts them again.

Changes that are missed in a pause cost requests: the endpoints that the proxy knows may be gone. So
a pause ends early when the directory is in doubt: an endpoint does not answer, or is another peer.
Only proxies that notice this return early, each at another moment, and each only once in
`_HURRY` times `min_pause`.
"""

from __future__ import annotations

import random

import trio

from proxy.config.schema_files import ControlPlaneConfig

_HURRY = 4


class Pauses:
    """The pauses of one proxy."""

    def __init__(self, settings: ControlPlaneConfig, chance: random.Random) -> None:
        self._settings = settings
        self._chance = chance
        self._pause = 0.0
        self._urgent = trio.Event()
        self._may_hurry = float("-inf")  # when a pause may end early again
        self._may_leave = float("-inf")  # when another replica may be tried again

    def next(self, *, worked: bool) -> float:
        """The length of the next pause, in seconds. `worked`: the last attempt was a connection
        that worked. Then the next one comes soon."""
        low, high = self._settings.min_pause, self._settings.max_pause
        grown = min(high, self._pause * 2 if self._pause else low)
        self._pause = 0.0 if worked else grown
        return (self._pause or low) * (0.5 + self._chance.random() / 2)

    async def wait(self, seconds: float) -> None:
        """Wait for this time, or until shortly after `hurry`."""
        end = trio.current_time() + seconds
        with trio.move_on_after(seconds):
            await self._urgent.wait()
        if self._urgent.is_set():
            self._urgent = trio.Event()
            soon = trio.current_time() + self._settings.min_pause * self._chance.random()
            await trio.sleep_until(min(end, soon))

    def hurry(self) -> None:
        """End this pause, or the next one, early. Does nothing if the last time was just now."""
        now = trio.current_time()
        if now >= self._may_hurry:
            self._may_hurry = now + _HURRY * self._settings.min_pause
            self._urgent.set()

    def may_leave(self) -> bool:
        """Whether to leave a replica that cannot answer, for another one. True at most about once
        in `max_pause`: all replicas may be in the same state."""
        now = trio.current_time()
        if now < self._may_leave:
            return False
        self._may_leave = now + self._settings.max_pause * (0.5 + self._chance.random() / 2)
        return True
