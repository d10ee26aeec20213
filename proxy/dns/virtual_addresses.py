"""Virtual addresses: what the names of other clusters' services resolve to, so that any client and any protocol can use them.

An application connects to an address, and over TCP that is all that the proxy sees. So each service of another cluster gets an address that
belongs to nobody: one of 240.0.0.0/4, reserved since 1989 (RFC 1112) and never used, and one of a unique local IPv6 prefix (RFC 4193). The
redirection brings connections to it to the proxy, and the proxy knows which service it stands for.

An address outlives whoever asked for it: it sits in the caches of resolvers and applications, and in connections whose next request
is routed by it. From that follow three rules.

*It is made from the name.* A hash of the name says where in the range it lies, so all proxies, and a proxy after its restart, give the same
address to the same service, with nothing written down anywhere. All names of the directory have theirs from the moment they are known,
asked for or not: what was handed out before a restart still leads there after it.

*It is nobody else's, and a collision must not depend on who came first.* Where two hashes meet, each name has a next one, and a next.
If one of the two kept the address, then after a restart, with the names in another order, the other might: and what an old client
sends would go to the wrong service. So an address that two names propose in one batch is contested and belongs to neither; both go on
to their next. What comes of that does not depend on any order: a name moves on only if the place where it stands is contested, and
a contested place stays so. (One case is left: a name that keeps its place while a newcomer finds it taken. After a restart the two meet
as equals and both stand elsewhere: old clients of the first are told that nobody is there. They are not sent to another.)

*It is not given away while somebody may hold it.* A name that is no longer in the directory keeps its address in quarantine, until no
connection holds it and `quarantine` seconds have passed since the last moment that one did, or that an answer could name it. Until then a
connection to it is known to be for that name, and is refused in that name. If the name comes back it has its address back.

How likely is it that hashes meet? With n names in 240.0.0.0/4, n * n / 2**29 pairs: for a thousand names one in 500, for ten thousand one
pair in five. In the IPv6 range, never. Bounded: at most `most` names, and at most an eighth of the smaller range, so that
a free place is found in a few steps. Names beyond that have no address and are reported.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# With an eighth of the range in use, the chance to find so many places taken in a row is 8 ** -64.
_PROBES = 64
_LOAD = 8

_NOBODYS = nullcontext()  # held for an address that is nobody's


class RemoteName(NamedTuple):
    """A service of another cluster."""

    cluster: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.name}.{self.namespace}.{self.cluster}"


@dataclass(slots=True)
class _Tenant:
    """Who has which addresses. `retired` is the moment from which on the quarantine counts; None while the name exists."""

    hosts: tuple[str, ...]
    connections: int = 0
    retired: float | None = None


class _Range:
    """One address range: where the hash of a name points to."""

    def __init__(self, network: Network) -> None:
        self._family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        self._octets = network.max_prefixlen // 8
        self.first = int(network.network_address)
        self.size = network.num_addresses

    def probe(self, remote: RemoteName, turn: int) -> str:
        """The address that the name proposes at its `turn`; never the first or the last of the range, which mean no one place."""
        digest = hashlib.blake2b(str(remote).encode(), digest_size=16, salt=turn.to_bytes(8, "big")).digest()
        offset = 1 + int.from_bytes(digest, "big") % (self.size - 2)
        return socket.inet_ntop(self._family, (self.first + offset).to_bytes(self._octets, "big"))

    def covers(self, host: str) -> bool:
        try:
            packed = socket.inet_pton(self._family, host)
        except OSError:
            return False
        return 0 <= int.from_bytes(packed, "big") - self.first < self.size

    def place(self, newcomers: Iterable[RemoteName], taken: Collection[str]) -> dict[RemoteName, str]:
        """A place for each of the newcomers that is not in `taken`, whatever their order. Those that find none are left out."""
        turns = dict.fromkeys(newcomers, 0)
        waiting = list(turns)
        proposed: dict[str, RemoteName | None] = {}  # None: contested
        while waiting:
            remote = waiting.pop()
            if turns[remote] == _PROBES:
                continue
            host = self.probe(remote, turns[remote])
            turns[remote] += 1
            if host in taken:
                waiting.append(remote)
            elif host in proposed:
                before, proposed[host] = proposed[host], None
                waiting += [remote] if before is None else [remote, before]
            else:
                proposed[host] = remote
        return {remote: host for host, remote in proposed.items() if remote is not None}


class VirtualAddresses:
    """The addresses of other clusters' services. Synchronous, without a clock or a socket of its own; owned by one event loop.

    `ranges` are one or two networks, of different families, with at least 16 addresses each. `quarantine` is in seconds of `clock` and must
    be longer than the TTL of the answers that name the addresses.
    """

    def __init__(self, ranges: Iterable[Network], most: int, quarantine: float, clock: Callable[[], float]) -> None:
        self._ranges = [_Range(network) for network in ranges]
        self._quarantine = quarantine
        self._clock = clock
        self.capacity = min([most, *(space.size // _LOAD for space in self._ranges)])
        self._tenants: dict[RemoteName, _Tenant] = {}
        self._hosts: dict[str, RemoteName] = {}
        self._retired: set[RemoteName] = set()

    def publish(self, remotes: Collection[RemoteName]) -> int:
        """These are the services that exist now; all others are retired. Returns how many of them have no address, for want of room."""
        self.sweep()
        now = self._clock()
        existing = frozenset(remotes)
        for remote, tenant in self._tenants.items():
            if remote in existing:
                tenant.retired = None
                self._retired.discard(remote)
            elif tenant.retired is None:
                tenant.retired = now
                self._retired.add(remote)
        # Sorted, so that it is the same ones that find no room in every proxy.
        newcomers = sorted(existing - self._tenants.keys())
        self._settle(newcomers[: max(self.capacity - len(self._tenants), 0)])
        return sum(remote not in self._tenants for remote in newcomers)

    def _settle(self, newcomers: list[RemoteName]) -> None:
        placed: list[Mapping[RemoteName, str]] = [space.place(newcomers, self._hosts) for space in self._ranges]
        for remote in newcomers:
            hosts = tuple(found[remote] for found in placed if remote in found)
            if len(hosts) == len(self._ranges):
                self._tenants[remote] = _Tenant(hosts)
                self._hosts.update(dict.fromkeys(hosts, remote))

    def addresses(self, remote: RemoteName) -> tuple[str, ...]:
        """What the name resolves to: an address of each range; none if it does not exist, or there was no room."""
        tenant = self._tenants.get(remote)
        return tenant.hosts if tenant is not None and tenant.retired is None else ()

    def lookup(self, host: str) -> RemoteName | None:
        """Which service the address stands for, also in quarantine; None for an address that has not been given to anybody."""
        return self._hosts.get(host)

    def covers(self, host: str) -> bool:
        """Whether the address is of our ranges, given to somebody or not. Nobody else's connection may be sent there."""
        return any(space.covers(host) for space in self._ranges)

    def hold(self, host: str) -> Callable[[], None] | None:
        """A connection to the address begins; to be told of its end by the function returned. None: the address is nobody's."""
        remote = self._hosts.get(host)
        if remote is None:
            return None
        tenant = self._tenants[remote]
        tenant.connections += 1

        def release() -> None:
            tenant.connections -= 1
            if tenant.retired is not None:
                tenant.retired = self._clock()

        return release

    def held(self, host: str) -> AbstractContextManager[None]:
        """`hold` for a block, for any address."""
        return self._held(host) if host in self._hosts else _NOBODYS

    @contextmanager
    def _held(self, host: str) -> Iterator[None]:
        release = self.hold(host)
        try:
            yield
        finally:
            if release is not None:
                release()

    def sweep(self) -> None:
        """Ends the quarantines that are over."""
        now = self._clock()
        for remote in [*self._retired]:
            tenant = self._tenants[remote]
            if tenant.connections == 0 and tenant.retired is not None and now - tenant.retired >= self._quarantine:
                self._retired.remove(remote)
                del self._tenants[remote]
                for host in tenant.hosts:
                    del self._hosts[host]

    @property
    def counts(self) -> tuple[int, int]:
        """(services that exist, services in quarantine)."""
        return len(self._tenants) - len(self._retired), len(self._retired)
