"""The loop guard as this process has it: the facts that loopguard's verdicts need, kept where connections are opened and accepted.

loopguard/ knows no socket, no configuration and no exchange. Here are the one table of our own connections, the one of the calls of this
pod to itself, our addresses and ports, and the secret of our tokens; and the places where a verdict becomes an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from secrets import token_bytes

from loopguard import HopLimits, Loop, OwnConnections, OwnListeners, SelfCalls, Waypoint, Who
from loopguard.forwarded_loops import noted
from loopguard.l7 import HEADER, Side, from_outside
from loopguard.nesting import ConnectionTable, LocalConnectionTable
from proxy.config.load import Config
from proxy.errors import LoopDetected
from proxy.exchange.exchange import Exchange, Facts, Layer
from proxy.exchange.loop_layer import guard
from proxy.net.accept import Connection
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from proxy.telemetry.metrics import Metrics
from proxy.wire.messages import Field
from proxy.workers.protocol import WorkerInfo


class LoopGuard:
    """Owned by the application; `listeners` is replaced when the pod's addresses change. `worker`: what it is as
    one of several workers, which have to know each other's tokens and connections."""

    def __init__(self, config: Config, listeners: OwnListeners, metrics: Metrics, worker: WorkerInfo | None = None) -> None:
        who, limits = Who(config.cluster, config.pod.namespace, config.pod.name), config.loops
        self.listeners = listeners
        table: ConnectionTable = worker.connection_table if worker is not None else LocalConnectionTable()
        self.connections = OwnConnections(limits.max_nesting, who.name, table)
        self._self_calls = SelfCalls(limits.max_self_calls, who.name)
        self._who = who
        self._hops = limits.max_hops
        self._returns: dict[Side, int] = {"outbound": limits.max_returns, "inbound": limits.max_returns, "gateway": 0}
        self._secret = worker.secret if worker is not None else token_bytes(32)
        self._outbound = self.waypoint("outbound")
        self._gateway = self.waypoint("gateway")
        self._notes = limits.max_returns
        self._metrics = metrics

    def layer(self, side: Side) -> Layer:
        """The guard around the exchanges of a flow."""
        return guard(self.waypoint(side), self._metrics.hops_dropped)

    def waypoint(self, side: Side) -> Waypoint:
        """This proxy, as the tokens of a flow name it."""
        return Waypoint(side, self._who, self._secret, HopLimits(self._returns[side], self._hops))

    def fields(self, method: bytes, target: bytes) -> list[Field]:
        """The token of a request that the outbound side makes up itself, to a peer of the trust domain."""
        return [(HEADER, self._outbound.named(self._outbound.token(method, target, target)))]

    def noted(self, exchange: Exchange, way: Sequence[tuple[bytes, bytes]], own: tuple[bytes, bytes]) -> None:
        """A gateway reads in Forwarded the way of a request that has its token already: (by, host) of each element. Raises LoopDetected if
        it has been on it too often, and no older token of its own is there to know better."""
        field = exchange.request.headers.get(HEADER) or b""
        if not self._gateway.lost(field):
            return
        loop = noted(way, own, self._who.name, self._notes)
        if loop is not None:
            exchange.outside = from_outside(field)
        _judge(loop)

    def own(self, host: str) -> bool:
        """Whether connecting to `host` stays in this pod."""
        return self.listeners.own(host)

    def calls_itself(self, host: str) -> bool:
        """Whether what goes to `host` is a call of the pod to itself. To a loopback address it is not: the redirection leaves those alone,
        so it was configured to go there (several proxies on one machine)."""
        return self.listeners.own(host) and not (host.startswith("127.") or host == "::1")

    def accepted(self, connection: Connection, about: Facts) -> None:
        """Raises LoopDetected for a connection that was made to one of our own listeners: one that was not redirected, with no other
        destination configured, or one that was redirected although it was meant for us; and for one that is our own, and came back."""
        destination = about.destination
        ours = destination == connection.local or about.direction == "inbound"
        _judge(self.listeners.accepted(destination.host, destination.port, ours=ours))
        self._nested(about)

    def begun(self, about: Facts) -> None:
        """Look again, now that the client has had time to send its first bytes. A worker enters a connection in the table behind the first
        packet and before the first byte. Another worker on another core may have accepted it in between. Raises LoopDetected."""
        if not about.depth:
            self._nested(about)

    def _nested(self, about: Facts) -> None:
        about.depth = self.connections.depth(about.peer, about.destination)
        loop = self.connections.accepted(about.depth, about.destination)
        if loop is not None:
            self.stop(about)
            _judge(loop)

    def stop(self, about: Facts) -> None:
        """An accepted connection is refused because of a loop. If it is our own, its opener is told. Call it before the connection is
        closed."""
        if about.depth:
            self.connections.stop(about.peer, about.destination)

    def follow(self, stream: SocketStream, address: Address) -> Followed:
        """Watch a new connection of our own to `address` until it is known whether it can be used."""
        return Followed(self.connections, stream, address)

    def dialled(self, address: Address) -> None:
        """Raises LoopDetected if we are about to connect to ourselves."""
        _judge(self.listeners.dialled(address.host, address.port))

    @contextmanager
    def self_call(self, port: int) -> Iterator[SelfCall]:
        """A call of this pod to its own `port`, counted as waiting until it is `answered` or over. Raises LoopDetected."""
        call = self.call_self(port)
        try:
            yield call
        finally:
            call.answered()

    def call_self(self, port: int) -> SelfCall:
        """The same for whoever sees to its `answered`."""
        _judge(self._self_calls.begin(port))
        self._metrics.self_calls.at().inc()
        return SelfCall(self._self_calls, port)

    @property
    def waiting(self) -> int:
        """Self-calls without an answer, now."""
        return self._self_calls.waiting


class Followed:
    """One connection of our own, until it can be used. It is asked about when it is closed, since the table forgets it then."""

    __slots__ = ("_address", "_connections", "_loop", "_on_close", "_stream")

    def __init__(self, connections: OwnConnections, stream: SocketStream, address: Address) -> None:
        self._connections = connections
        self._stream = stream
        self._address = address
        self._loop: Loop | None = None
        self._on_close = stream.on_close
        stream.on_close = self._closing

    def _closing(self) -> None:
        self._loop = self._connections.stopped(self._stream.local, self._address)
        if self._on_close is not None:
            self._on_close()

    def check(self) -> None:
        """The connection has failed and is closed. Raises LoopDetected if it was refused because of a loop."""
        _judge(self._loop)

    def end(self) -> None:
        """The connection can be used."""
        self._stream.on_close = self._on_close


class SelfCall:
    """One call of the pod to itself."""

    __slots__ = ("_calls", "_port", "_waits")

    def __init__(self, calls: SelfCalls, port: int) -> None:
        self._calls = calls
        self._port = port
        self._waits = True

    def answered(self) -> None:
        """The first of an answer has come; later calls change nothing."""
        if self._waits:
            self._waits = False
            self._calls.end(self._port)

    def then(self, ends: Callable[[], None]) -> Callable[[], None]:
        """Be answered at the latest when something else `ends`."""

        def both() -> None:
            self.answered()
            ends()

        return both

    def moved(self, _: int, backward: int) -> None:
        """Bytes of a relay have been passed on."""
        if backward:
            self.answered()

    def follow(self, exchange: Exchange) -> None:
        """Be answered when the exchange is."""
        told = exchange.on_response

        def on_response(status: int) -> None:
            self.answered()
            told(status)

        exchange.on_response = on_response


def _judge(loop: Loop | None) -> None:
    if loop is not None:
        raise LoopDetected(loop.words, loop.kind, loop.cycle)
