"""The gateways of other clusters: their current addresses, and which of them answer.

The directory has the names or addresses of the gateways. This module keeps the state that changes
while the directory stays the same. Each request that leaves the cluster reads it without waiting.

*Names.* A gateway may have a DNS name, because the address of a load balancer can change. The proxy
resolves the name every `resolve_interval`, in one of a few threads. All addresses found are
gateways. If a lookup fails, the previous addresses stay in use, because they are more likely right
than none. (The system resolver does not report the TTL of an answer. If it caches, it applies the
TTL itself.)

*Liveness.* The proxy probes each gateway in use every `probe_interval`, plus or minus a tenth, over
the same port, mutual TLS and identity as other requests. Every answer except 503 means that the
gateway is alive, so gateways of other vendors need not know the path. A gateway that fails
`probe_failures` probes in a row gets no requests until it answers again. If no gateway is left,
requests fail at once with the reason, and a service with failover uses another cluster. The proxy
does not probe a cluster that got no requests for `_IDLE` seconds. Otherwise a thousand pods that
know ten clusters would probe all their gateways all day.

*Silence.* If a gateway hangs, or no packets reach it any more, requests in progress would wait for
the whole `http.response_timeout`. So the proxy ends a connection on which no byte arrived while
`probe_failures` probes in a row got no answer at all. The connection fails as if the kernel had
detected that the peer is gone (`SocketStream.fail`). Its readers and writers get the error and
close it as usual: an exchange, all streams of an HTTP/2 connection, a pool or a tunnel. So each
connection keeps its one owner. This module only keeps weak references to the connections. The
errors are those of a broken connection: 502 if no response has started, or another gateway if the
method allows it.

Only silence ends requests in progress. A gateway that shuts down (503) or refuses connections
finishes its last exchanges, and one that answers the probe with a wrong certificate is alive. If a
gateway answers other traffic but no probes, it keeps the connections with traffic. It loses the
others, for example a tunnel that receives nothing, because this side cannot distinguish them from
dead ones. Bytes that this proxy sends do not count, because the kernel accepts them long after the
peer is gone."""

from __future__ import annotations

import logging
import math
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol
from weakref import WeakKeyDictionary

import trio

from proxy.config.schema_clusters import ClustersConfig
from proxy.directory import Cluster, Directory, Endpoint, Gateway, Target
from proxy.errors import IsthmusError, UpstreamTLSError
from proxy.exchange.client import Leases
from proxy.exchange.upstream import Carrier, Unanswered
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed, ConnectionLost, NetError
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream
from proxy.routing.router import CurrentDirectory
from proxy.telemetry.log import RateLimit, warn
from proxy.wire.messages import END, EndOfMessage, Headers, RequestHead, ResponseHead

_log = logging.getLogger("isthmus.gateways")
_TROUBLES = RateLimit(1)

# The path that a gateway answers itself, for peers that may use it.
LIVE = b"/.well-known/isthmus/live"

_TICK = 0.25
_IDLE = 300.0
# A name with more addresses than this does not belong to one gateway.
_MOST_ADDRESSES = 32
# Concurrent lookups. A lookup that hangs keeps its thread until the system ends it.
_LOOKUPS = 4
_LOOKUP_TIMEOUT = 5.0
# Maximum number of body pieces of a probe's answer, which the proxy discards.
_MOST_PIECES = 16


class GatewayMetrics(Protocol):
    """The metrics of gateways."""

    def count_gateway_probe(self, cluster: str, result: str) -> None: ...
    def set_usable_gateways(self, cluster: str, count: int) -> None: ...


@dataclass(slots=True)
class _Name:
    """The state of a gateway's DNS name."""

    addresses: tuple[str, ...] = ()
    due: float = 0.0  # time of the next lookup; infinite during a lookup
    failure: str = "is being looked up"


@dataclass(slots=True)
class _Pulse:
    """The liveness of a gateway endpoint."""

    due: float = 0.0  # time of the next probe; infinite during a probe
    failures: int = 0  # consecutive
    silences: int = 0  # consecutive probes without any answer
    words: str = ""


# The connections to a gateway. For each: bytes received at the last check, and the count of silent
# probes at that time.
_Lines = WeakKeyDictionary[SocketStream | TLSStream, tuple[int, int]]


@dataclass(slots=True)
class RemoteGateways:
    """All remote gateways in the directory of one proxy. `watch` keeps the state up to date. All
    other methods are synchronous."""

    source: CurrentDirectory
    settings: ClustersConfig
    leases: Leases[Endpoint]
    metrics: GatewayMetrics
    chance: random.Random = field(default_factory=random.Random)
    _seen: Directory | None = field(default=None, init=False)
    _names: dict[str, _Name] = field(default_factory=dict, init=False)
    _pulses: dict[Endpoint, _Pulse] = field(default_factory=dict, init=False)
    _lines: dict[Endpoint, _Lines] = field(default_factory=dict, init=False)
    _asked: dict[str, float] = field(
        default_factory=dict, init=False
    )  # time of the last request for a cluster
    _made: dict[int, tuple[Target, Target]] = field(
        default_factory=dict, init=False
    )  # by id of the snapshot's target
    _gateways: dict[Address, str] = field(default_factory=dict, init=False)
    _changed: dict[str, tuple[Endpoint, ...]] = field(
        default_factory=dict, init=False
    )  # where it differs from the snapshot

    def through(self, target: Target) -> Target:
        """The target with the gateways that are usable now, if it is in another cluster. Otherwise
        `target`."""
        remote = target.remote
        if remote is None:
            return target
        self._asked[remote.cluster] = trio.current_time()
        if self.source.current is not self._seen:
            self._recompute()
        endpoints = self._changed.get(remote.cluster)
        if endpoints is None:
            return target
        made = self._made.get(id(target))
        if made is None:
            # Return the same object until something changes, because the balancer keeps state per
            # target.
            made = self._made[id(target)] = target, replace(target, endpoints=endpoints)
        return made[1]

    def why(self, cluster: str) -> str:
        """The reason why no gateway of a cluster is usable, for error messages."""
        found = self.source.current.clusters.get(cluster)
        if found is None or not found.gateways:
            return f"the directory has no gateway of {cluster}"
        words = [
            f"{name.failure} ({gateway.host})"
            for gateway in found.gateways
            if (name := self._unresolved(gateway)) is not None
        ]
        words += [
            f"{end.address}: {self._pulses[end].words}"
            for end in self._endpoints(found)
            if self._dead(end)
        ]
        return f"no gateway of {cluster} is usable: {'; '.join(words)}"

    def connected(self, endpoint: Endpoint, stream: SocketStream | TLSStream) -> None:
        """Register a new connection to `endpoint`, which may be a gateway. The caller keeps
        ownership."""
        if (lines := self._lines.get(endpoint)) is not None:
            pulse = self._pulses.get(endpoint)
            lines[stream] = stream.bytes_read, pulse.silences if pulse is not None else 0

    def cluster(self, address: Address) -> str | None:
        """The cluster whose gateway has this literal or resolved address. None: not a gateway's
        address."""
        if self.source.current is not self._seen:
            self._recompute()
        return self._gateways.get(address)

    def _unresolved(self, gateway: Gateway) -> _Name | None:
        name = None if gateway.literal else self._names.get(gateway.host, _Name())
        return name if name is not None and not name.addresses else None

    # Usable gateways.

    def _endpoints(self, cluster: Cluster) -> Iterator[Endpoint]:
        for gateway in cluster.gateways:
            name = None if gateway.literal else self._names.get(gateway.host)
            for host in (
                (gateway.host,) if gateway.literal else name.addresses if name is not None else ()
            ):
                yield gateway.at(host)

    def _dead(self, endpoint: Endpoint) -> bool:
        pulse = self._pulses.get(endpoint)
        return pulse is not None and pulse.failures >= self.settings.probe_failures

    def _recompute(self) -> None:
        """Compute the usable gateways again, after a change of the directory or of a gateway's
        state."""
        directory = self._seen = self.source.current
        hosts = {
            gateway.host
            for cluster in directory.clusters.values()
            for gateway in cluster.gateways
            if not gateway.literal
        }
        self._names = {host: self._names.get(host) or _Name() for host in hosts}
        every = {
            name: tuple(self._endpoints(cluster)) for name, cluster in directory.clusters.items()
        }
        self._gateways = {
            endpoint.address: name for name, endpoints in every.items() for endpoint in endpoints
        }
        known = {endpoint for endpoints in every.values() for endpoint in endpoints}
        self._pulses = {
            endpoint: pulse for endpoint, pulse in self._pulses.items() if endpoint in known
        }
        self._lines = {endpoint: self._lines.get(endpoint, _Lines()) for endpoint in known}
        self._asked = {name: when for name, when in self._asked.items() if name in every}
        self._changed, self._made = {}, {}
        for name, endpoints in every.items():
            alive = tuple(endpoint for endpoint in endpoints if not self._dead(endpoint))
            if len(alive) < len(endpoints) or not all(
                gateway.literal for gateway in directory.clusters[name].gateways
            ):
                self._changed[name] = alive
            self.metrics.set_usable_gateways(name, len(alive))

    # Updates.

    async def watch(self) -> None:
        """Resolve names and probe gateways, until cancelled."""
        limit = trio.CapacityLimiter(_LOOKUPS)
        async with trio.open_nursery() as nursery:
            while True:
                if self.source.current is not self._seen:
                    self._recompute()
                now = trio.current_time()
                for host, name in self._names.items():
                    if name.due <= now:
                        name.due = math.inf
                        nursery.start_soon(self._look_up, host, name, limit)
                for cluster, endpoint in self._to_probe(now):
                    self._pulses[endpoint].due = math.inf
                    nursery.start_soon(self._probe, cluster, endpoint)
                await trio.sleep(_TICK)

    def _to_probe(self, now: float) -> list[tuple[str, Endpoint]]:
        if not self.settings.probe_interval or self._seen is None:
            return []
        due = []
        for cluster in self._seen.clusters.values():
            if now - self._asked.get(cluster.name, -math.inf) > _IDLE:
                continue
            for endpoint in self._endpoints(cluster):
                pulse = self._pulses.get(endpoint)
                if pulse is None:
                    self._pulses[endpoint] = _Pulse(
                        now + self.chance.random() * self.settings.probe_interval
                    )
                elif pulse.due <= now:
                    due.append((cluster.name, endpoint))
        return due

    def _spread(self, seconds: float) -> float:
        """Vary `seconds` by up to a tenth, so that tasks that start together do not stay in
        step."""
        return seconds * (0.9 + 0.2 * self.chance.random())

    async def _look_up(self, host: str, name: _Name, limit: trio.CapacityLimiter) -> None:
        found: list[str] = []
        failure = f"was not resolved within {_LOOKUP_TIMEOUT:g} s"
        with trio.move_on_after(_LOOKUP_TIMEOUT):
            try:
                found = await trio.to_thread.run_sync(
                    _addresses, host, abandon_on_cancel=True, limiter=limit
                )
            except OSError as error:  # includes gaierror
                failure = f"does not resolve: {error.strerror or error}"
        name.due = trio.current_time() + self._spread(self.settings.resolve_interval)
        if not found:
            name.failure = failure
            warn(
                _log,
                _TROUBLES,
                "the gateway name %s %s; using %d known addresses",
                host,
                failure,
                len(name.addresses),
            )
        elif name.addresses != (addresses := tuple(sorted(found)[:_MOST_ADDRESSES])):
            _log.info("the gateway name %s resolves to %s", host, ", ".join(addresses))
            name.addresses = addresses
            self._recompute()

    async def _probe(self, cluster: str, endpoint: Endpoint) -> None:
        failure: str | None = f"no answer within {self.settings.probe_timeout:g} s"
        silent = True
        self._listen(cluster, endpoint)
        with trio.move_on_after(self.settings.probe_timeout):
            try:
                # Use a new connection: a pooled one does not show that new connections work.
                async with self.leases.carrier(endpoint, fresh=True) as carrier:
                    status = (await _ask(carrier, str(endpoint.address))).status
                failure, silent = "it is shutting down (503)" if status == 503 else None, False
            except (NetError, IsthmusError, Unanswered) as error:
                failure, silent = str(error), _says_nothing(error)
        self.metrics.count_gateway_probe(cluster, "ok" if failure is None else "failed")
        pulse = self._pulses.get(endpoint)
        if pulse is None:  # the gateway has left the directory
            return
        before = self._dead(endpoint)
        pulse.failures, pulse.words = (0, "") if failure is None else (pulse.failures + 1, failure)
        pulse.silences = pulse.silences + 1 if silent else 0
        pulse.due = trio.current_time() + self._spread(self.settings.probe_interval)
        if self._dead(endpoint) is not before:
            _log.warning(
                "the gateway %s of %s %s",
                endpoint.address,
                cluster,
                "is usable again" if before else f"is not usable: {failure}",
            )
            self._recompute()
        if silent:
            self._listen(cluster, endpoint)

    def _listen(self, cluster: str, endpoint: Endpoint) -> None:
        """Check the connections to a gateway, before a probe and after a silent one. End the dead
        ones."""
        pulse, lines = self._pulses.get(endpoint), self._lines.get(endpoint)
        if pulse is None or not lines:
            return
        ended = 0
        for stream, (read, since) in list(lines.items()):
            if not pulse.silences or stream.bytes_read != read:
                lines[stream] = stream.bytes_read, pulse.silences
            elif pulse.silences - since >= self.settings.probe_failures:
                del lines[stream]
                words = (
                    f"the gateway {endpoint.address} of {cluster} does not answer its probes"
                    f" ({pulse.words})"
                )
                stream.fail(ConnectionLost(words, "timeout"))
                ended += 1
        if ended:
            warn(
                _log,
                _TROUBLES,
                "closed %d silent connections to the gateway %s of %s",
                ended,
                endpoint.address,
                cluster,
            )


def _says_nothing(error: Exception) -> bool:
    """Whether a probe failed without any answer. A refused connection is an answer."""
    if isinstance(error, ConnectFailed):
        return error.reason in ("timeout", "unreachable")
    return isinstance(error, UpstreamTLSError) and error.kind == "timeout"


async def _ask(carrier: Carrier, host: str) -> ResponseHead:
    """Send the probe request, and read the whole answer."""
    carrier.begin(RequestHead(b"GET", LIVE, Headers([(b"Host", host.encode("ascii"))])), 0)
    carrier.finish(END)
    await carrier.flush()
    head = await carrier.head()
    while head.informational:
        head = await carrier.head()
    for _ in range(_MOST_PIECES):
        if isinstance(await carrier.body(), EndOfMessage):
            break
    return head


def _addresses(host: str) -> list[str]:
    """Resolve `host`. Runs in a thread. Raises OSError."""
    return list(
        {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    )
