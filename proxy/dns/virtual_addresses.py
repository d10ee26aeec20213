"""Virtual addresses: services of other clusters resolve to them, so that every client and protocol
works.

An application connects to an address, and over TCP the proxy sees only that address. So each
service of another cluster gets an unused address: one of 240.0.0.0/4, reserved since 1989 (RFC
1112) and never used, and one of a unique local IPv6 prefix (RFC 4193). The redirection brings
connections to such an address to the proxy, and the proxy knows its service.

An address lives longer than the query for it: in the caches of resolvers and applications, and in
connections whose next request is routed by it. Therefore there are three rules.

*The address is computed from the name.* A hash of the name gives its position in the range. So all
proxies, also after a restart, give the same address to the same service, without stored state. All
names in the directory have an address from the start, before any query. So an address from before a
restart still works after it.

*An address has one owner, and a collision does not depend on the order.* Each name has a sequence
of hashes. Assume that on a collision the first of two names kept the address. After a restart, with
another order, the other name might get it. Then a request of an old client would go to the wrong
service. So an address that two names propose in one batch is contested and belongs to neither. Both
go on to their next hash. The result does not depend on the order: a name moves on only if its
address is contested, and a contested address stays contested. (One case remains: a name keeps its
address, and a new name finds it taken. After a restart both collide and both move. Old clients of
the first name then get an error. They are not sent to another service.)

*An address is not reused while a client may still have it.* A name that left the directory keeps
its address in quarantine, until no connection uses it. In addition, `quarantine` seconds must have
passed since the last connection, and since the last possible response with it. Until then, the
proxy knows the name behind such a connection and refuses it with that name. If the name returns, it
gets its address back.

How likely is a collision? With n names in 240.0.0.0/4, there are n * n / 2**29 pairs: one in 500
for a thousand names, and one pair in five for ten thousand names. In the IPv6 range, never.
Bounded: at most `most` names, and at most an eighth of the smaller range, so that a few steps find
a free address. Names beyond that have no address and are reported."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# With an eighth of the range in use, the probability that so many addresses in a row are taken is 8
# ** -64.
_PROBES = 64
_LOAD = 8

_UNASSIGNED = nullcontext()  # an address that is not assigned has no lease


class RemoteName(NamedTuple):
    """A service of another cluster."""

    cluster: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.name}.{self.namespace}.{self.cluster}"


@dataclass(slots=True)
class _Tenant:
    """The addresses of one name. `retired`: the start of the quarantine. None while the name
    exists."""

    hosts: tuple[str, ...]
    connections: int = 0
    retired: float | None = None


class _Range:
    """One address range, and the mapping from names to its addresses."""

    def __init__(self, network: Network) -> None:
        self._family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        self._octets = network.max_prefixlen // 8
        self.first = int(network.network_address)
        self.size = network.num_addresses

    def probe(self, remote: RemoteName, turn: int) -> str:
        """The address number `turn` of the name's sequence. Never the first or last of the range,
        which have special meanings."""
        digest = hashlib.blake2b(
            str(remote).encode(), digest_size=16, salt=turn.to_bytes(8, "big")
        ).digest()
        offset = 1 + int.from_bytes(digest, "big") % (self.size - 2)
        return socket.inet_ntop(self._family, (self.first + offset).to_bytes(self._octets, "big"))

    def covers(self, host: str) -> bool:
        try:
            packed = socket.inet_pton(self._family, host)
        except OSError:
            return False
        return 0 <= int.from_bytes(packed, "big") - self.first < self.size

    def place(
        self, newcomers: Iterable[RemoteName], taken: Collection[str]
    ) -> dict[RemoteName, str]:
        """Find an address that is not in `taken` for each new name, independent of their order.
        Omits names for which there is none."""
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
    """The addresses of other clusters' services. Synchronous, without a clock or socket. One event
    loop owns it.

    `ranges`: one or two networks of different families, with at least 16 addresses each.
    `quarantine`: in seconds of `clock`, longer than the TTL of the DNS responses with these
    addresses."""

    def __init__(
        self, ranges: Iterable[Network], most: int, quarantine: float, clock: Callable[[], float]
    ) -> None:
        self._ranges = [_Range(network) for network in ranges]
        self._quarantine = quarantine
        self._clock = clock
        self.capacity = min([most, *(space.size // _LOAD for space in self._ranges)])
        self._tenants: dict[RemoteName, _Tenant] = {}
        self._hosts: dict[str, RemoteName] = {}
        self._retired: set[RemoteName] = set()

    def publish(self, remotes: Collection[RemoteName]) -> int:
        """Set the services that exist now, and retire all others. Returns how many have no address
        because the limit is reached."""
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
        # Sorted, so that every proxy leaves out the same names.
        newcomers = sorted(existing - self._tenants.keys())
        self._settle(newcomers[: max(self.capacity - len(self._tenants), 0)])
        return sum(remote not in self._tenants for remote in newcomers)

    def _settle(self, newcomers: list[RemoteName]) -> None:
        placed: list[Mapping[RemoteName, str]] = [
            space.place(newcomers, self._hosts) for space in self._ranges
        ]
        for remote in newcomers:
            hosts = tuple(found[remote] for found in placed if remote in found)
            if len(hosts) == len(self._ranges):
                self._tenants[remote] = _Tenant(hosts)
                self._hosts.update(dict.fromkeys(hosts, remote))

    def addresses(self, remote: RemoteName) -> tuple[str, ...]:
        """The addresses of the name, one per range. Empty if it does not exist, or has none because
        of the limit."""
        tenant = self._tenants.get(remote)
        return tenant.hosts if tenant is not None and tenant.retired is None else ()

    def lookup(self, host: str) -> RemoteName | None:
        """The service of the address, also in quarantine. None: the address is not assigned."""
        return self._hosts.get(host)

    def covers(self, host: str) -> bool:
        """Whether the address is in the virtual ranges, assigned or not. No other connection may go
        there."""
        return any(space.covers(host) for space in self._ranges)

    def hold(self, host: str) -> Callable[[], None] | None:
        """A connection to the address begins. Returns a function that the caller must call at its
        end. None: the address is not assigned."""
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
        """`hold` as a context manager, for any address."""
        return self._held(host) if host in self._hosts else _UNASSIGNED

    @contextmanager
    def _held(self, host: str) -> Iterator[None]:
        release = self.hold(host)
        try:
            yield
        finally:
            if release is not None:
                release()

    def sweep(self) -> None:
        """End expired quarantines."""
        now = self._clock()
        for remote in [*self._retired]:
            tenant = self._tenants[remote]
            if (
                tenant.connections == 0
                and tenant.retired is not None
                and now - tenant.retired >= self._quarantine
            ):
                self._retired.remove(remote)
                del self._tenants[remote]
                for host in tenant.hosts:
                    del self._hosts[host]

    @property
    def counts(self) -> tuple[int, int]:
        """(services that exist, services in quarantine)"""
        return len(self._tenants) - len(self._retired), len(self._retired)
