"""How quickly the streams that a client gives up are reset on a connection to a server.

The connection carries the requests of many clients, and a server ends one on which streams are reset too quickly: nghttp2 at 33 a second
behind the first 1000, Envoy when most of 500 streams were reset within a second, a proxy like this one by its frame budget. A few clients
with short deadlines are enough for that, and all others would lose their streams.

So the first resets go at once, and so do as many a second as no server minds. Beyond that a stream that is given up stays open for a
while, and is reset when there is credit again, or when its time is over. Most servers have answered by then, and no reset is needed. A
proxy like this one does not mind the resets of streams that have lived for a tenth of a second, so towards one the time is short.
Meanwhile the stream counts among those that the server allows. A client that opens and cancels without end is thereby limited by the
number of streams, as one that waits for its answers is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.frames import Code

# Streams of one connection that may wait for their reset. Half of what the server allows is always left for requests.
_MOST = 256
# Seconds between two looks, at the least: what is missing of the credit for one may be less than the clock can show.
_SOONEST = 0.001


@dataclass(frozen=True, slots=True)
class ResetPace:
    """`rate`: resets a second that go at once; `burst`: as many in a row; `hold`: seconds until one goes in any case."""

    rate: float = 25.0
    burst: float = 100.0
    hold: float = 1.0


def _nothing() -> None:
    pass


class Resets:
    """Of one connection. `run` is to be started when `add` says so. `sent` is told when streams have been reset."""

    __slots__ = ("_credit", "_hold", "_http", "_pace", "_refilled", "_running", "_sent", "_waiting")

    def __init__(self, http: Http2Connection, pace: ResetPace, hold: float, sent: Callable[[], object]) -> None:
        self._http = http
        self._pace = pace
        self._hold = hold
        self._sent = sent
        self._credit = pace.burst
        self._refilled = 0.0
        self._running = False
        self._waiting: OrderedDict[int, float] = OrderedDict()  # streams, and when they are reset in any case (trio's time)

    @property
    def waiting(self) -> int:
        """Streams that are given up, and not reset."""
        return len(self._waiting)

    def add(self, number: int) -> bool:
        """A stream is given up. True: `run` has to be started."""
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
        """Reset those that wait, until none is left."""
        try:
            while self._waiting:
                now = trio.current_time()
                self._refill(now)
                while self._waiting and (self._credit >= 1 or next(iter(self._waiting.values())) <= now):
                    self._reset(self._waiting.popitem(last=False)[0])
                self._sent()
                if self._waiting:
                    soon = now + max(_SOONEST, (1 - self._credit) / self._pace.rate)
                    await trio.sleep_until(min(soon, next(iter(self._waiting.values()))))
        finally:
            self._running = False

    def stop(self) -> None:
        """The connection has ended: nothing more is reset, and nothing is told."""
        self._waiting.clear()
        self._sent = _nothing

    def _refill(self, now: float) -> None:
        self._credit = min(self._pace.burst, self._credit + (now - self._refilled) * self._pace.rate)
        self._refilled = now

    def _reset(self, number: int) -> None:
        if self._http.is_open(number):  # otherwise the server has ended it meanwhile
            self._credit = max(0.0, self._credit - 1)
            self._http.reset(number, Code.CANCEL)
