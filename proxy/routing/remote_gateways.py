"""The ways into other clusters as they are now: which addresses their gateways have, and which of the gateways answer.

The directory says how gateways are called. What changes while it stays the same is known here, and asked for each request that leaves the
cluster, without waiting.

*Names.* A gateway may be given by a DNS name (a load balancer's address changes; some have none but a name). It is looked up again every
`resolve_interval`, in a thread, of which there are few; all addresses found are gateways. A look-up that fails changes nothing: what
was found before is more likely right than nothing. (The system's resolver does not tell for how long an answer is good, and keeps to
that itself, if it caches.)

*Liveness.* A gateway that is in use is asked every `probe_interval`, give or take a tenth, over the port, the mutual TLS and the identity
of all other requests: what can be a way for them can be one for the question. Any answer but 503 says that it is alive, so gateways of
other make need not know the path. One that fails `probe_failures` times in a row gets no requests until it answers again. When none is
left, requests fail at once and say why, and a service with failover goes elsewhere. Clusters that nobody has asked for in `_IDLE`
seconds are left in peace: a thousand pods that know ten clusters do not knock at all their doors all day.

*Silence.* What is under way to a gateway that is paused, or to which no packet gets through any more, would wait for all of
`http.response_timeout`. So a connection on which no byte has come while `probe_failures` probes in a row had no answer at all is ended.
It fails as if the kernel had found out that the peer is gone (`SocketStream.fail`): whoever reads or writes is told so and closes it as
ever, be it an exchange, all streams of an HTTP/2 connection, a pool or a tunnel. So each connection keeps its one owner, and here is only
noted which ones there are, weakly, once for each. The errors are those of a connection that broke: 502 where no response has begun, and
another gateway if the method allows it.

Only silence ends what is under way. A gateway that is shutting down (503) or listens no more (refused) lets its last exchanges finish,
and one that answers the probe with a wrong certificate is there. One whose connections move, but not for probes, keeps those that move,
and loses the others, a tunnel on which nothing comes back included: from here they look the same as dead ones. Bytes that we send
do not count: the kernel takes them for a peer that is long gone.
"""

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

from proxy.config.schema import ClustersConfig
from proxy.directory import Cluster, Directory, Endpoint, Gateway, Target
from proxy.errors import IsthmusError, UpstreamTLSError
from proxy.exchange.client import Leases
from proxy.exchange.upstream import Carrier, Unanswered
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed, ConnectionLost, NetError
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream
from proxy.routing.router import Source
from proxy.telemetry.log import RateLimit, warn
from proxy.wire.messages import END, EndOfMessage, Headers, RequestHead, ResponseHead

_log = logging.getLogger("isthmus.gateways")
_TROUBLES = RateLimit(1)

# What a gateway answers for itself, to whoever may use it.
LIVE = b"/.well-known/isthmus/live"

_TICK = 0.25
_IDLE = 300.0
# A name that has more addresses than this is not one gateway's.
_MOST_ADDRESSES = 32
# Look-ups at a time; one that hangs keeps its thread until the system gives it up.
_LOOKUPS = 4
_LOOKUP_TIMEOUT = 5.0
# Of a probe's answer, which nobody reads.
_MOST_PIECES = 16


class Books(Protocol):
    """What is counted."""

    def gateway_probed(self, cluster: str, result: str) -> None: ...
    def gateways_usable(self, cluster: str, count: int) -> None: ...


@dataclass(slots=True)
class _Name:
    """What is known of a gateway's DNS name."""

    addresses: tuple[str, ...] = ()
    due: float = 0.0  # of the next look-up; infinite while one is under way
    failure: str = "is being looked up"


@dataclass(slots=True)
class _Pulse:
    """What is known of an endpoint's liveness."""

    due: float = 0.0  # of the next probe; infinite while one is under way
    failures: int = 0  # in a row
    silences: int = 0  # in a row: probes to which nothing was said at all
    words: str = ""


# Connections to a gateway: the bytes that had come on each when it was last looked at, and at how many silences that was.
_Lines = WeakKeyDictionary[SocketStream | TLSStream, tuple[int, int]]


@dataclass(slots=True)
class RemoteGateways:
    """All gateways of one proxy's directory. `watch` keeps them; everything else is synchronous."""

    source: Source
    settings: ClustersConfig
    leases: Leases[Endpoint]
    books: Books
    chance: random.Random = field(default_factory=random.Random)
    _seen: Directory | None = field(default=None, init=False)
    _names: dict[str, _Name] = field(default_factory=dict, init=False)
    _pulses: dict[Endpoint, _Pulse] = field(default_factory=dict, init=False)
    _lines: dict[Endpoint, _Lines] = field(default_factory=dict, init=False)
    _asked: dict[str, float] = field(default_factory=dict, init=False)  # when a cluster was last in demand
    _made: dict[int, tuple[Target, Target]] = field(default_factory=dict, init=False)  # by the snapshot's target, which is kept alive here
    _gateways: dict[Address, str] = field(default_factory=dict, init=False)
    _changed: dict[str, tuple[Endpoint, ...]] = field(default_factory=dict, init=False)  # where the snapshot alone is not the truth

    def through(self, target: Target) -> Target:
        """A target, by the gateways that can be used now if it is another cluster's."""
        remote = target.remote
        if remote is None:
            return target
        self._asked[remote.cluster] = trio.current_time()
        if self.source.current is not self._seen:
            self._look()
        endpoints = self._changed.get(remote.cluster)
        if endpoints is None:
            return target
        made = self._made.get(id(target))
        if made is None:
            # One and the same until something changes: what is known of a target's endpoints hangs on it.
            made = self._made[id(target)] = target, replace(target, endpoints=endpoints)
        return made[1]

    def why(self, cluster: str) -> str:
        """Why no gateway of a cluster can be used, in words."""
        found = self.source.current.clusters.get(cluster)
        if found is None or not found.gateways:
            return f"the directory names no gateway of {cluster}"
        words = [f"{name.failure} ({gateway.host})" for gateway in found.gateways if (name := self._unresolved(gateway)) is not None]
        words += [f"{end.address}: {self._pulses[end].words}" for end in self._endpoints(found) if self._dead(end)]
        return f"no gateway of {cluster} can be used: {'; '.join(words)}"

    def connected(self, endpoint: Endpoint, stream: SocketStream | TLSStream) -> None:
        """There is a new connection to `endpoint`, which may be a gateway; it stays its owner's."""
        if (lines := self._lines.get(endpoint)) is not None:
            pulse = self._pulses.get(endpoint)
            lines[stream] = stream.bytes_read, pulse.silences if pulse is not None else 0

    def cluster(self, address: Address) -> str | None:
        """The cluster whose gateway has this address, literal or resolved; None: it is not the address of a gateway."""
        if self.source.current is not self._seen:
            self._look()
        return self._gateways.get(address)

    def _unresolved(self, gateway: Gateway) -> _Name | None:
        name = None if gateway.literal else self._names.get(gateway.host, _Name())
        return name if name is not None and not name.addresses else None

    # What can be used...

    def _endpoints(self, cluster: Cluster) -> Iterator[Endpoint]:
        for gateway in cluster.gateways:
            name = None if gateway.literal else self._names.get(gateway.host)
            for host in (gateway.host,) if gateway.literal else name.addresses if name is not None else ():
                yield gateway.at(host)

    def _dead(self, endpoint: Endpoint) -> bool:
        pulse = self._pulses.get(endpoint)
        return pulse is not None and pulse.failures >= self.settings.probe_failures

    def _look(self) -> None:
        """Work out anew what can be used: the directory has changed, or what is known of its gateways."""
        directory = self._seen = self.source.current
        hosts = {gateway.host for cluster in directory.clusters.values() for gateway in cluster.gateways if not gateway.literal}
        self._names = {host: self._names.get(host) or _Name() for host in hosts}
        every = {name: tuple(self._endpoints(cluster)) for name, cluster in directory.clusters.items()}
        self._gateways = {endpoint.address: name for name, endpoints in every.items() for endpoint in endpoints}
        known = {endpoint for endpoints in every.values() for endpoint in endpoints}
        self._pulses = {endpoint: pulse for endpoint, pulse in self._pulses.items() if endpoint in known}
        self._lines = {endpoint: self._lines.get(endpoint, _Lines()) for endpoint in known}
        self._asked = {name: when for name, when in self._asked.items() if name in every}
        self._changed, self._made = {}, {}
        for name, endpoints in every.items():
            alive = tuple(endpoint for endpoint in endpoints if not self._dead(endpoint))
            if len(alive) < len(endpoints) or not all(gateway.literal for gateway in directory.clusters[name].gateways):
                self._changed[name] = alive
            self.books.gateways_usable(name, len(alive))

    # Keeping it true...

    async def watch(self) -> None:
        """Look names up, and probe gateways, until cancelled."""
        limit = trio.CapacityLimiter(_LOOKUPS)
        async with trio.open_nursery() as nursery:
            while True:
                if self.source.current is not self._seen:
                    self._look()
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
                    self._pulses[endpoint] = _Pulse(now + self.chance.random() * self.settings.probe_interval)
                elif pulse.due <= now:
                    due.append((cluster.name, endpoint))
        return due

    def _spread(self, seconds: float) -> float:
        """Give or take a tenth, so that those who began together do not go on together."""
        return seconds * (0.9 + 0.2 * self.chance.random())

    async def _look_up(self, host: str, name: _Name, limit: trio.CapacityLimiter) -> None:
        found: list[str] = []
        failure = f"was not resolved within {_LOOKUP_TIMEOUT:g} s"
        with trio.move_on_after(_LOOKUP_TIMEOUT):
            try:
                found = await trio.to_thread.run_sync(_addresses, host, abandon_on_cancel=True, limiter=limit)
            except OSError as error:  # gaierror is one
                failure = f"does not resolve: {error.strerror or error}"
        name.due = trio.current_time() + self._spread(self.settings.resolve_interval)
        if not found:
            name.failure = failure
            warn(_log, _TROUBLES, "the gateway's name %s %s; %d addresses are known", host, failure, len(name.addresses))
        elif name.addresses != (addresses := tuple(sorted(found)[:_MOST_ADDRESSES])):
            _log.info("the gateway's name %s is %s", host, ", ".join(addresses))
            name.addresses = addresses
            self._look()

    async def _probe(self, cluster: str, endpoint: Endpoint) -> None:
        failure: str | None = f"no answer within {self.settings.probe_timeout:g} s"
        silent = True
        self._listen(cluster, endpoint)
        with trio.move_on_after(self.settings.probe_timeout):
            try:
                # On a connection of its own: a kept one says little about whether there can be new ones.
                async with self.leases.carrier(endpoint, fresh=True) as carrier:
                    status = (await _ask(carrier, str(endpoint.address))).status
                failure, silent = "it is shutting down (503)" if status == 503 else None, False
            except (NetError, IsthmusError, Unanswered) as error:
                failure, silent = str(error), _says_nothing(error)
        self.books.gateway_probed(cluster, "ok" if failure is None else "failed")
        pulse = self._pulses.get(endpoint)
        if pulse is None:  # it has left the directory meanwhile
            return
        before = self._dead(endpoint)
        pulse.failures, pulse.words = (0, "") if failure is None else (pulse.failures + 1, failure)
        pulse.silences = pulse.silences + 1 if silent else 0
        pulse.due = trio.current_time() + self._spread(self.settings.probe_interval)
        if self._dead(endpoint) is not before:
            _log.warning("the gateway %s of %s %s", endpoint.address, cluster, "is back" if before else f"is not used: {failure}")
            self._look()
        if silent:
            self._listen(cluster, endpoint)

    def _listen(self, cluster: str, endpoint: Endpoint) -> None:
        """Look at the connections to a gateway, before a probe and after one to which nothing was said, and end those that are dead."""
        pulse, lines = self._pulses.get(endpoint), self._lines.get(endpoint)
        if pulse is None or not lines:
            return
        ended = 0
        for stream, (read, since) in list(lines.items()):
            if not pulse.silences or stream.bytes_read != read:
                lines[stream] = stream.bytes_read, pulse.silences
            elif pulse.silences - since >= self.settings.probe_failures:
                del lines[stream]
                words = f"the gateway {endpoint.address} of {cluster} does not answer its probes ({pulse.words})"
                stream.fail(ConnectionLost(words, "timeout"))
                ended += 1
        if ended:
            warn(_log, _TROUBLES, "%d silent connections to the gateway %s of %s are ended", ended, endpoint.address, cluster)


def _says_nothing(error: Exception) -> bool:
    """Whether a probe has failed for want of any answer: a refusal is one."""
    if isinstance(error, ConnectFailed):
        return error.reason in ("timeout", "unreachable")
    return isinstance(error, UpstreamTLSError) and error.kind == "timeout"


async def _ask(carrier: Carrier, host: str) -> ResponseHead:
    """One small request, and its whole answer."""
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
    """Runs in a thread. Raises OSError."""
    return list({str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
