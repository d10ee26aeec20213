"""How fast the proxy resets abandoned streams on a connection to a server.

The connection carries requests of many clients, and a server closes a connection on which streams
are reset too fast. nghttp2 does so at 33 a second after the first 1000, Envoy when most of 500
streams were reset within a second, and another proxy of the mesh by its frame budget. A few clients
with short deadlines are enough to reach that, and all other clients would lose their streams.

So the first resets are sent immediately, and then as many a second as every server accepts. Beyond
this rate, an abandoned stream stays open until there is credit again, or until its time is over.
Most servers have answered by then, and no reset is needed. A proxy of the mesh accepts any number
of resets of streams that have lived for a tenth of a second, so the time is short for those. Until
then the stream counts towards the server's limit. So a client that opens and cancels streams
without end is limited by the number of streams, like a client that waits for its responses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.frames import Code

# The most streams of one connection that wait for their reset. At least half of what the server
# allows remains for requests.
_MOST = 256
# The shortest sleep in seconds: the time until the next credit may be below the resolution of the
# clock.
_SOONEST = 0.001


@dataclass(frozen=True, slots=True)
class ResetLimits:
    """`rate`: resets a second that are sent immediately. `burst`: how many at once. `hold`: seconds
    after which a reset is sent in any case."""

    rate: float = 25.0
    burst: float = 100.0
    hold: float = 1.0


def _nothing() -> None:
    pass


class ResetQueue:
    """The resets of one connection. The caller must start `run` when `add` returns True. `sent` is
    called when streams have been reset."""

    __slots__ = ("_credit", "_hold", "_http", "_pace", "_refilled", "_running", "_sent", "_waiting")

    def __init__(
        self, http: Http2Connection, pace: ResetLimits, hold: float, sent: Callable[[], object]
    ) -> None:
        self._http = http
        self._pace = pace
        self._hold = hold
        self._sent = sent
        self._credit = pace.burst
        self._refilled = 0.0
        self._running = False
        # by stream: when it is reset in any case (trio's time)
        self._waiting: OrderedDict[int, float] = OrderedDict()

    @property
    def waiting(self) -> int:
        """The number of abandoned streams that are not reset yet."""
        return len(self._waiting)

    def add(self, number: int) -> bool:
        """Abandon a stream. Returns True if `run` has to be started."""
        if not self._http.is_open(number):
            return False
        now = trio.current_time()
        self._refill(now)
        if self._credit >= 1 and not self._waiting:
            self._reset(number)
            return False
        self._waiting[number] = now + self._hold
        if len(self._waiting) > min(_MOST, self._http.streams_allowed // 2):
            self._reset(self._waiting.popitem(last=False)[0])
        start = not self._running and bool(self._waiting)
        self._running = self._running or start
        return start

    async def run(self) -> None:
        """Reset the waiting streams, until none is left."""
        try:
            while self._waiting:
                now = trio.current_time()
                self._refill(now)
                while self._waiting and (
                    self._credit >= 1 or next(iter(self._waiting.values())) <= now
                ):
                    self._reset(self._waiting.popitem(last=False)[0])
                self._sent()
                if self._waiting:
                    soon = now + max(_SOONEST, (1 - self._credit) / self._pace.rate)
                    await trio.sleep_until(min(soon, next(iter(self._waiting.values()))))
        finally:
            self._running = False

    def stop(self) -> None:
        """The connection has ended: send no more resets, and make no more calls of `sent`."""
        self._waiting.clear()
        self._sent = _nothing

    def _refill(self, now: float) -> None:
        self._credit = min(
            self._pace.burst, self._credit + (now - self._refilled) * self._pace.rate
        )
        self._refilled = now

    def _reset(self, number: int) -> None:
        if self._http.is_open(number):  # otherwise the server has ended it in the meantime
            self._credit = max(0.0, self._credit - 1)
            self._http.reset(number, Code.CANCEL)
