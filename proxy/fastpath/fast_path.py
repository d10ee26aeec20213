"""Who is on the fast path, and how it comes there and leaves. The theory stands in the package."""

from __future__ import annotations

import logging
import math

import trio

from proxy.exchange.h1.server import Drain, Http1Exchange, Http1Server
from proxy.exchange.h2.server import Http2Exchange, Http2Server
from proxy.fastpath.event_loop import EventLoop, enter, leave
from proxy.fastpath.fast_relay import FastRelay
from proxy.fastpath.h1_connection import FastConnection
from proxy.fastpath.h2_exchange import FastExchange, begin
from proxy.fastpath.plan import ExchangePlan
from proxy.net.relay import Joint
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream

_log = logging.getLogger("isthmus.exchange")

# Seconds without a step after which an exchange is not plain any more. It is looked at twice as often.
PATIENCE = 1.0


class FastPath:
    """Made before the flows, `run` beside them."""

    def __init__(self, drain: Drain, idle_timeout: float, silence: float) -> None:
        """The shortest of the servers that lend, and how long a relay may be silent; both in seconds."""
        drain.on_begin.add(self._recall)
        self._idle = idle_timeout / 2
        self._silence = silence
        self._event_loop: EventLoop | None = None  # while it runs
        self._connections: set[FastConnection] = set()
        self._busy: set[FastConnection | FastExchange] = set()  # in an exchange
        self._relays: set[FastRelay] = set()
        self._doze: trio.Event | None = None  # what the watch waits for while nothing is under way
        self.running = False  # it takes what is lent
        self._finished = self._handed_over = 0  # exchanges, since they were last asked for

    async def open(self) -> None:
        """From here on it takes what is lent; `run` has to follow."""
        self._event_loop = await enter(self)
        if self._event_loop is None:
            _log.warning("trio's epoll set is not to be found in /proc: HTTP/1.1 and relays take the ordinary path")
        self.running = True

    async def run(self) -> None:
        """See to what is on the fast path, until cancelled: then that is given back."""
        try:
            await self._watch()
        finally:
            self.close()
            if self._event_loop is not None:
                leave(self, self._event_loop)

    def close(self) -> None:
        """Take nothing more, and give back what is on the fast path."""
        self.running = False
        for connection in list(self._connections):
            connection.leave()
        for fast_relay in list(self._relays):
            fast_relay.leave()

    async def carry(self, plan: ExchangePlan, server: Http1Server) -> Http1Exchange | None:
        """See exchange.handoff.Carry. Cancelled within an exchange, it closes the exchange's account as such."""
        stream = server.stream
        event_loop = self._event_loop
        ends = server.leaving or server.client_ended
        if not self.running or event_loop is None or ends or not isinstance(stream, SocketStream | TLSStream):
            return None
        connection = server.lent
        if not isinstance(connection, FastConnection):
            server.lent = connection = FastConnection(self, plan, server, stream)
        if not connection.eligibility.willing():
            return None
        self._connections.add(connection)
        event_loop.lends()
        if self._doze is not None:
            self._doze.set()
        return await connection.carry()

    def fork(self, plan: ExchangePlan, server: Http2Server, exchange: Http2Exchange) -> bool:
        """See exchange.handoff.Fork."""
        return self.running and not server.drain.draining and begin(self, plan, server, exchange)

    async def join(self, joint: Joint) -> None:
        """See net.relay.Carry."""
        client, server = joint.sides
        event_loop = self._event_loop
        if not self.running or event_loop is None:
            return
        if isinstance(client, SocketStream | TLSStream) and isinstance(server, SocketStream | TLSStream):
            fast_relay = FastRelay(self, joint, client, server)
            self._relays.add(fast_relay)
            event_loop.lends()
            await fast_relay.carry()

    def counts(self) -> tuple[int, int]:
        """Exchanges that have been finished here since this was last asked, and such that have been handed over."""
        counts, self._finished, self._handed_over = (self._finished, self._handed_over), 0, 0
        return counts

    @staticmethod
    def recall(server: Http1Server) -> None:
        """Give back its connection, if it is between two exchanges."""
        if isinstance(server.lent, FastConnection):
            server.lent.recall()

    def _recall(self) -> None:
        """The proxy is going down: give back the connections that are between two exchanges. The others see it behind theirs."""
        for connection in list(self._connections):
            connection.recall()

    # For what is carried...

    @property
    def event_loop(self) -> EventLoop:
        """The event loop, for what is carried by it."""
        if self._event_loop is None:
            raise RuntimeError("the fast path does not run")
        return self._event_loop

    def released(self, connection: FastConnection) -> None:
        self._connections.discard(connection)
        self._busy.discard(connection)
        self.event_loop.lent -= 1

    def parts(self, fast_relay: FastRelay) -> None:
        """It is not on the fast path any more."""
        self._relays.discard(fast_relay)
        self.event_loop.lent -= 1

    @property
    def patience(self) -> float:
        """Seconds that an exchange must have left."""
        return PATIENCE

    def begins(self, connection: FastConnection | FastExchange) -> None:
        """`connection` is in an exchange."""
        self._busy.add(connection)
        if self._doze is not None:
            self._doze.set()

    def rests(self, connection: FastConnection | FastExchange, *, finished: bool = True) -> None:
        """Its exchange is not here any more; `finished`: it has ended here, and well."""
        self._busy.discard(connection)
        self._finished += finished

    def hands_over(self) -> None:
        """An exchange goes on elsewhere."""
        self._handed_over += 1

    # What does not move...

    async def _watch(self) -> None:
        """Give back what does not move, and end what is silent. What lasts is looked at seldom: within a share of the time that it may
        last, so nobody has to say when there is something new."""
        due = -math.inf
        while True:
            now = trio.current_time()
            if now >= due:
                due = now + min(self._give_back(now), self._expire(now))
            if self._busy:
                await trio.sleep(PATIENCE / 2)
                self.give_up(trio.current_time() - PATIENCE)
            else:
                self._doze = trio.Event()
                with trio.move_on_at(due):
                    await self._doze.wait()
                self._doze = None

    def give_up(self, latest: float) -> None:
        """Hand over the exchanges that have not moved since, and those that will be over soon in any case."""
        soon = latest + 2 * PATIENCE
        for connection in list(self._busy):
            if connection.moved <= latest or connection.limit <= soon:
                connection.hand_over()

    def _give_back(self, now: float) -> float:
        """Give back the connections that have been idle for half their time; seconds until it is time for the next."""
        due = now + self._idle
        for connection in list(self._connections):
            if connection.due() <= now:
                connection.recall()
            else:
                due = min(due, connection.due())
        return max(due - now, self._idle / 8)

    def _expire(self, now: float) -> float:
        """End the relays in which nothing has moved for too long; seconds until it is time for the next."""
        least = self._silence
        for fast_relay in list(self._relays):
            least = min(least, fast_relay.expire(now))
        return max(least, self._silence / 8)
