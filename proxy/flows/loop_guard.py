"""The loop guard of this process: it holds the facts that loopguard's verdicts need.

loopguard/ has no sockets, no configuration and no exchanges. This module holds the table of the
proxy's own connections, the count of calls from this pod to itself, the proxy's addresses and
ports, and the secret of its tokens. It turns a verdict into an error."""

from __future__ import annotations

from collections.abc import Sequence
from secrets import token_bytes

from loopguard import HopLimits, HopTokens, Loop, OwnConnections, OwnListeners, ProxyName, SelfCalls
from loopguard.forwarded_loops import check_forwarded
from loopguard.l7 import HEADER, Direction, from_outside
from loopguard.nesting import ConnectionTable, LocalConnectionTable
from proxy.config.schema import Config
from proxy.errors import LoopDetected
from proxy.exchange.exchange import ConnectionInfo, Exchange, Layer
from proxy.exchange.loop_layer import guard
from proxy.net.accept import Connection
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from proxy.telemetry.metrics import Metrics
from proxy.wire.messages import Field
from proxy.workers.protocol import WorkerInfo


class LoopGuard:
    """Owned by the application. app.py replaces `listeners` when the pod's addresses change.
    `worker`: set if this process is one of several workers, which must recognise each other's
    tokens and connections."""

    def __init__(
        self,
        config: Config,
        listeners: OwnListeners,
        metrics: Metrics,
        worker: WorkerInfo | None = None,
    ) -> None:
        who, limits = ProxyName(config.cluster, config.pod.namespace, config.pod.name), config.loops
        self.listeners = listeners
        table: ConnectionTable = (
            worker.connection_table if worker is not None else LocalConnectionTable()
        )
        self.connections = OwnConnections(limits.max_nesting, who.name, table)
        self._self_calls = SelfCalls(limits.max_self_calls, who.name)
        self._who = who
        self._hops = limits.max_hops
        self._returns: dict[Direction, int] = {
            "outbound": limits.max_returns,
            "inbound": limits.max_returns,
            "gateway": 0,
        }
        self._secret = worker.secret if worker is not None else token_bytes(32)
        self._outbound = self.hop_tokens("outbound")
        self._gateway = self.hop_tokens("gateway")
        self._notes = limits.max_returns
        self._metrics = metrics

    def layer(self, side: Direction) -> Layer:
        """The layer that guards the exchanges of a flow."""
        return guard(self.hop_tokens(side), self._metrics.count_dropped_tokens)

    def hop_tokens(self, side: Direction) -> HopTokens:
        """The object that creates and checks the tokens of a flow."""
        return HopTokens(side, self._who, self._secret, HopLimits(self._returns[side], self._hops))

    def fields(self, method: bytes, target: bytes) -> list[Field]:
        """The token field of a request that the outbound side creates itself, for a peer of the
        trust domain."""
        return [(HEADER, self._outbound.with_name(self._outbound.token(method, target, target)))]

    def check_forwarded(
        self, exchange: Exchange, path: Sequence[tuple[bytes, bytes]], own: tuple[bytes, bytes]
    ) -> None:
        """Check the path that a gateway reads from Forwarded: (by, host) of each element. The
        request already has its token. Raises LoopDetected if the request has passed this gateway
        too often, and no older token of the gateway is present to give the exact count."""
        field = exchange.request.headers.get(HEADER) or b""
        if not self._gateway.is_first_hop(field):
            return
        loop = check_forwarded(path, own, self._who.name, self._notes)
        if loop is not None:
            exchange.outside = from_outside(field)
        _raise_for(loop)

    def own(self, host: str) -> bool:
        """Whether connecting to `host` stays in this pod."""
        return self.listeners.own(host)

    def calls_itself(self, host: str) -> bool:
        """Whether a connection to `host` is a call of the pod to itself. A connection to a loopback
        address is not: the redirection skips loopback, so the connection was configured to go there
        (several proxies on one machine)."""
        return self.listeners.own(host) and not (host.startswith("127.") or host == "::1")

    def check_accepted(self, connection: Connection, about: ConnectionInfo) -> None:
        """Check an accepted connection. Raises LoopDetected in three cases. The connection was made
        to one of the proxy's own listeners without redirection and without another configured
        destination. It was redirected although its destination was the proxy. Or the proxy itself
        opened it, and it is nested deeper than `loops.max_nesting`."""
        destination = about.destination
        ours = destination == connection.local or about.direction == "inbound"
        _raise_for(self.listeners.check_accept(destination.host, destination.port, ours=ours))
        self._check_nesting(about)

    def check_again(self, about: ConnectionInfo) -> None:
        """Check again after the client has had time to send its first bytes. Raises LoopDetected. A
        worker enters a connection in the table after the first packet and before the first byte. So
        another worker on another core may accept the connection before the entry exists."""
        if not about.depth:
            self._check_nesting(about)

    def _check_nesting(self, about: ConnectionInfo) -> None:
        about.depth = self.connections.depth(about.peer, about.destination)
        loop = self.connections.check_depth(about.depth, about.destination)
        if loop is not None:
            self.stop(about)
            _raise_for(loop)

    def stop(self, about: ConnectionInfo) -> None:
        """Record that an accepted connection is refused because of a loop. If this proxy opened it,
        the opener finds the record. Call this before the connection is closed."""
        if about.depth:
            self.connections.stop(about.peer, about.destination)

    def follow(self, stream: SocketStream, address: Address) -> GuardedConnection:
        """Watch a new connection of this proxy to `address` until it is known whether it can be
        used."""
        return GuardedConnection(self.connections, stream, address)

    def check_dial(self, address: Address) -> None:
        """Raises LoopDetected if the proxy would connect to itself."""
        _raise_for(self.listeners.check_dial(address.host, address.port))

    def call_self(self, port: int) -> SelfCall:
        """Begin a call of this pod to its own `port`. The caller must call `end` on the
        result. Raises LoopDetected."""
        _raise_for(self._self_calls.begin(port))
        self._metrics.self_calls.at().inc()
        return SelfCall(self._self_calls, port)

    @property
    def waiting(self) -> int:
        """Number of self-calls that wait for an answer."""
        return self._self_calls.waiting


class GuardedConnection:
    """One connection of this proxy, until it can be used. It reads the verdict when the connection
    is closed, because the table drops the connection then."""

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
        """Call this after the connection failed and was closed. Raises LoopDetected if it was
        refused because of a loop."""
        _raise_for(self._loop)

    def end(self) -> None:
        """The connection can be used. Stop watching it."""
        self._stream.on_close = self._on_close


class SelfCall:
    """One call of the pod to itself."""

    __slots__ = ("_calls", "_port", "_waits")

    def __init__(self, calls: SelfCalls, port: int) -> None:
        self._calls = calls
        self._port = port
        self._waits = True

    def end(self) -> None:
        """The first part of an answer has arrived, or none will. Further calls have no effect."""
        if self._waits:
            self._waits = False
            self._calls.end(self._port)

    def end_at_bytes(self, _: int, backward: int) -> None:
        """The relay's callback: bytes have been forwarded."""
        if backward:
            self.end()

    def end_at_response(self, exchange: Exchange) -> None:
        """End when the exchange gets its response, if not before."""
        previous = exchange.on_response

        def on_response(status: int) -> None:
            self.end()
            previous(status)

        exchange.on_response = on_response


def _raise_for(loop: Loop | None) -> None:
    if loop is not None:
        raise LoopDetected(loop.words, loop.kind, loop.cycle)
