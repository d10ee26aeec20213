"""The entry to the fast path: which connections, exchanges and relays are on it, and how they enter
and leave. The package docstring explains the design."""

from __future__ import annotations

import logging
import math

import trio

from proxy.exchange.h1.server import Http1Server
from proxy.exchange.h2.server import Http2Exchange, Http2Server
from proxy.exchange.server_settings import Drain
from proxy.fastpath.event_loop import EventLoop, enter, leave
from proxy.fastpath.fast_relay import FastRelay
from proxy.fastpath.h1_connection import FastConnection
from proxy.fastpath.h2_exchange import begin_exchange
from proxy.fastpath.host import Carried, Host, LentHttp1, Relay
from proxy.fastpath.plan import Planner
from proxy.net.relay import RelayState
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream

_log = logging.getLogger("isthmus.exchange")

# Seconds without a step after which an exchange is handed over. Checked every half of this time.
PATIENCE = 1.0


class FastPath(Host):
    """The fast path of one process. Create it before the flows and run it beside them."""

    def __init__(self, drain: Drain, idle_timeout: float, silence: float) -> None:
        """`idle_timeout`: the shortest idle timeout of the servers that lend connections.
        `silence`: how long a relay may be silent. Both in seconds."""
        drain.on_begin.add(self._recall)
        self._idle = idle_timeout / 2
        self._silence = silence
        self._event_loop: EventLoop | None = None  # while it runs
        self._connections: set[LentHttp1] = set()
        self._busy: set[Carried] = set()  # within an exchange
        self._relays: set[Relay] = set()
        # the watch task waits for it while no exchange is active
        self._wakeup: trio.Event | None = None
        self.running = False  # accepts connections
        self._finished = self._handed_over = 0  # exchanges

    async def open(self) -> None:
        """Accept connections from now on. The caller must call `run` afterwards."""
        self._event_loop = await enter(self)
        if self._event_loop is None:
            _log.warning(
                "trio's epoll set was not found in /proc: HTTP/1.1 and relays take the ordinary"
                " path"
            )
        self.running = True

    async def run(self) -> None:
        """Watch the connections on the fast path until cancelled, then return them to the ordinary
        path."""
        try:
            await self._watch()
        finally:
            self.close()
            if self._event_loop is not None:
                leave(self, self._event_loop)

    def close(self) -> None:
        """Accept nothing more, and return everything to the ordinary path."""
        self.running = False
        for connection in list(self._connections):
            connection.leave()
        for fast_relay in list(self._relays):
            fast_relay.leave()

    def prepare(self, planner: Planner, server: Http1Server) -> FastConnection | None:
        """Implements exchange.h1.server.Http1FastPath."""
        stream = server.stream
        if self._event_loop is None or not isinstance(stream, SocketStream | TLSStream):
            return None
        return FastConnection(self, planner, server, stream)

    def fork(self, planner: Planner, server: Http2Server, exchange: Http2Exchange) -> bool:
        """Implements exchange.h2.server.Http2FastPath."""
        return (
            self.running
            and not server.drain.draining
            and begin_exchange(self, planner, server, exchange)
        )

    async def join(self, state: RelayState) -> None:
        """Implements net.relay.RelayFastPath."""
        client, server = state.sides
        event_loop = self._event_loop
        if not self.running or event_loop is None:
            return
        if isinstance(client, SocketStream | TLSStream) and isinstance(
            server, SocketStream | TLSStream
        ):
            fast_relay = FastRelay(self, state, client, server)
            self._relays.add(fast_relay)
            event_loop.add_lent()
            await fast_relay.carry()

    def counts(self) -> tuple[int, int]:
        """Return the numbers of exchanges finished here and handed over."""
        return self._finished, self._handed_over

    def _recall(self) -> None:
        """The proxy is shutting down: return the connections that are between two exchanges. The
        others return after their exchange."""
        for connection in list(self._connections):
            connection.recall()

    # For connections, exchanges and relays on the fast path...

    @property
    def event_loop(self) -> EventLoop:
        """The event loop. Raises RuntimeError if the fast path is not open."""
        if self._event_loop is None:
            raise RuntimeError("the fast path is not running")
        return self._event_loop

    def lend(self, connection: LentHttp1) -> bool:
        if not self.running:
            return False
        self._connections.add(connection)
        self.event_loop.add_lent()
        if self._wakeup is not None:
            self._wakeup.set()
        return True

    def connection_left(self, connection: LentHttp1) -> None:
        self._connections.discard(connection)
        self._busy.discard(connection)
        self.event_loop.lent -= 1

    def relay_left(self, relay: Relay) -> None:
        """`relay` has left the fast path."""
        self._relays.discard(relay)
        self.event_loop.lent -= 1

    @property
    def patience(self) -> float:
        """The time in seconds that an exchange must have until its deadline."""
        return PATIENCE

    def exchange_began(self, carried: Carried) -> None:
        """An exchange of `record_upstream` has begun."""
        self._busy.add(carried)
        if self._wakeup is not None:
            self._wakeup.set()

    def exchange_left(self, carried: Carried, *, finished: bool = True) -> None:
        """The exchange of `record_upstream` is no longer on the fast path. `finished`: it ended
        here without an error."""
        self._busy.discard(carried)
        self._finished += finished

    def count_handoff(self) -> None:
        """Count one exchange that was handed over to the ordinary path."""
        self._handed_over += 1

    # Timeouts...

    async def _watch(self) -> None:
        """Hand over exchanges that do not move, return idle connections, and end silent relays.
        Long timeouts are checked at a fraction of their length, so events do not have to wake this
        task."""
        due = -math.inf
        while True:
            now = trio.current_time()
            if now >= due:
                due = now + min(self._return_idle(now), self._expire(now))
            if self._busy:
                await trio.sleep(PATIENCE / 2)
                self.give_up(trio.current_time() - PATIENCE)
            else:
                self._wakeup = trio.Event()
                with trio.move_on_at(due):
                    await self._wakeup.wait()
                self._wakeup = None

    def give_up(self, latest: float) -> None:
        """Hand over the exchanges that have not moved since `latest` (trio's time), and those whose
        deadline is near."""
        soon = latest + 2 * PATIENCE
        for connection in list(self._busy):
            if connection.moved <= latest or connection.limit <= soon:
                try:
                    connection.hand_over()
                # error boundary: a bug in one exchange must not end the process
                except Exception as error:
                    _log.error("internal error while handing over an exchange", exc_info=error)
                    self._busy.discard(connection)

    def _return_idle(self, now: float) -> float:
        """Return the connections that have been idle for half of the idle timeout. Returns the
        seconds until the next check."""
        due = now + self._idle
        for connection in list(self._connections):
            if connection.due() <= now:
                connection.recall()
            else:
                due = min(due, connection.due())
        return max(due - now, self._idle / 8)

    def _expire(self, now: float) -> float:
        """End the relays that have been silent for too long. Returns the seconds until the next
        check."""
        least = self._silence
        for fast_relay in list(self._relays):
            least = min(least, fast_relay.expire(now))
        return max(least, self._silence / 8)
