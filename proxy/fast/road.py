"""The one task, its epoll set, and who is lent. The theory stands in the package."""

from __future__ import annotations

import math
import select
from collections.abc import Callable

import trio
from trio.lowlevel import checkpoint, wait_readable

from proxy.exchange.server import Drain, Http1Exchange, Http1Server
from proxy.exchange.server2 import Http2Exchange, Http2Server
from proxy.fast.course import Course
from proxy.fast.lane import Lane
from proxy.fast.strand import Strand, begin
from proxy.net.streams import SocketStream
from proxy.net.tls import TLSStream

# Turns of the loop before trio's other tasks get theirs. A turn serves each ready connection once, so this bounds what a new connection
# or a deadline waits by a few milliseconds; and it saves a pass of the scheduler where the next events are there already.
TURNS = 8
# Events taken from the kernel in one turn.
EVENTS = 256
# Seconds without a step after which an exchange is not plain any more. It is looked at twice as often.
PATIENCE = 1.0


class Road:
    """Made before the flows, `run` beside them."""

    def __init__(self, drain: Drain, idle_timeout: float) -> None:
        """Of the servers that lend; `idle_timeout` in seconds."""
        drain.on_begin.add(self._recall)
        self._idle = idle_timeout / 2
        self._epoll = select.epoll()
        self.steps: dict[int, Callable[[int], None]] = {}  # by descriptor: what to do when it is ready
        self._lanes: set[Lane] = set()
        self._again: list[Lane] = []  # lanes that have bytes of a next request already
        self._busy: set[Lane | Strand] = set()  # in an exchange
        self._doze: trio.Event | None = None  # what the watch waits for while nothing is under way
        self._running = False
        self._finished = self._handed_over = 0  # exchanges, since they were last asked for
        self.now = 0.0  # trio's time at the beginning of this turn

    async def run(self) -> None:
        """Carry what is lent, until cancelled."""
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                await self._serve()
        finally:
            self._running = False
            for lane in list(self._lanes):
                lane.leave()
            self._epoll.close()

    async def carry(self, course: Course, server: Http1Server) -> Http1Exchange | None:
        """See exchange.begun.Carry. Cancelled within an exchange, it closes the exchange's account as such."""
        stream = server.stream
        if not self._running or server.drain.draining or not isinstance(stream, SocketStream | TLSStream):
            return None
        lane = server.lane
        if not isinstance(lane, Lane):
            server.lane = lane = Lane(self, course, server, stream)
        if not lane.willing():
            return None
        self._lanes.add(lane)
        if self._doze is not None:
            self._doze.set()
        return await lane.carry()

    def fork(self, course: Course, server: Http2Server, exchange: Http2Exchange) -> bool:
        """See exchange.begun.Fork."""
        return self._running and not server.drain.draining and begin(self, course, server, exchange)

    def counts(self) -> tuple[int, int]:
        """Exchanges that have been finished here since this was last asked, and such that have been handed over."""
        counts, self._finished, self._handed_over = (self._finished, self._handed_over), 0, 0
        return counts

    def _recall(self) -> None:
        """The proxy is going down: give back the connections that are between two exchanges. The others see it behind theirs."""
        for lane in list(self._lanes):
            lane.recall()

    # For lanes...

    def watch(self, descriptor: int, before: int, events: int) -> None:
        """Wait for these events (0: none) instead of those `before`. A descriptor that is closed leaves the set by itself (epoll(7)), and
        its step is replaced when its number is used again."""
        if not events:
            self.steps.pop(descriptor, None)
            self._epoll.unregister(descriptor)
        elif before:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)

    def released(self, lane: Lane) -> None:
        self._lanes.discard(lane)
        self._busy.discard(lane)

    @property
    def patience(self) -> float:
        """Seconds that an exchange must have left."""
        return PATIENCE

    def begins(self, lane: Lane | Strand) -> None:
        """`lane` is in an exchange."""
        self._busy.add(lane)
        if self._doze is not None:
            self._doze.set()

    def rests(self, lane: Lane | Strand, *, finished: bool = True) -> None:
        """Its exchange is not here any more; `finished`: it has ended here, and well."""
        self._busy.discard(lane)
        self._finished += finished

    def hands_over(self) -> None:
        """An exchange goes on elsewhere."""
        self._handed_over += 1

    def again(self, lane: Lane) -> None:
        self._again.append(lane)

    # The loop...

    async def _serve(self) -> None:
        epoll, steps = self._epoll, self.steps
        while True:
            if self._again:
                await checkpoint()
            else:
                await wait_readable(epoll.fileno())
            self.now = trio.current_time()
            for _ in range(TURNS):
                events = epoll.poll(0, EVENTS)
                if self._again:
                    again, self._again = self._again, []
                    for lane in again:
                        lane.next()
                elif not events:
                    break
                for descriptor, mask in events:
                    step = steps.get(descriptor)
                    if step is not None:  # otherwise it was forgotten in this very turn
                        step(mask)

    async def _watch(self) -> None:
        """Give back what does not move. The interval is long while no exchange is under way."""
        while True:
            if self._busy:
                await trio.sleep(PATIENCE / 2)
                self.give_up(trio.current_time() - PATIENCE)
            else:
                self._doze = trio.Event()
                with trio.move_on_after(self._give_back(trio.current_time() - self._idle)):
                    await self._doze.wait()
                self._doze = None

    def give_up(self, latest: float) -> None:
        """Hand over the exchanges that have not moved since, and those that will be over soon in any case."""
        soon = latest + 2 * PATIENCE
        for lane in list(self._busy):
            if lane.moved <= latest or lane.limit <= soon:
                lane.hand_over()

    def _give_back(self, latest: float) -> float:
        """Give back the connections that have been idle for half their time; seconds until it is time for the next."""
        oldest = math.inf
        for lane in list(self._lanes):
            if lane.idle_since <= latest:
                lane.recall()
            else:
                oldest = min(oldest, lane.idle_since)
        return max(oldest - latest, self._idle / 8)
