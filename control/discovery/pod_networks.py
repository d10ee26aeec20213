"""The networks in which nothing but pods and services has addresses.

They are configured. If none are, they are the networks of the pods that are known: /24 for IPv4,
/64 for IPv6.
"""

from __future__ import annotations

import functools
import ipaddress
from collections import Counter
from collections.abc import Iterable, Sequence


class PodNetworks:
    """See above. It also knows which addresses are unknown (catalog.py) in each network, because
    they mean something else when the network comes or goes."""

    def __init__(self, networks: Sequence[str]) -> None:
        """`networks` as CIDR. Raises ValueError."""
        self._networks = [ipaddress.ip_network(network) for network in networks]
        # If no networks are configured: the number of addresses of pods, and unknown addresses.
        self._pods: Counter[str] = Counter()
        self._unknown: dict[str, dict[str, None]] = {}

    def covers(self, address: str) -> bool:
        """Whether an address is in one of the networks."""
        if not self._networks:
            return _subnet(address) in self._pods
        literal = ipaddress.ip_address(address)
        return any(literal in network for network in self._networks)

    def move(self, before: Iterable[str], after: Iterable[str]) -> list[str]:
        """A pod has the addresses `after` instead of `before`. Returns the unknown addresses in
        networks that came or went."""
        if self._networks:
            return []
        counts = self._pods
        changed: set[str] = set()
        for subnet in map(_subnet, after):
            counts[subnet] += 1
            if counts[subnet] == 1:
                changed.add(subnet)
        for subnet in map(_subnet, before):
            counts[subnet] -= 1
            if not counts[subnet]:
                del counts[subnet]
                changed.add(subnet)
        return [address for subnet in changed for address in self._unknown.get(subnet, ())]

    def note_unknown(self, address: str, *, unknown: bool) -> None:
        """An address is unknown now, or no longer."""
        if self._networks:
            return
        subnet = _subnet(address)
        known = self._unknown.setdefault(subnet, {})
        if unknown:
            known[address] = None
        else:
            known.pop(address, None)
        if not known:
            del self._unknown[subnet]


def _subnet(address: str) -> str:
    """The network in which pods have addresses, if one of them has this one."""
    return _subnet6(address) if ":" in address else address.rpartition(".")[0]


@functools.lru_cache(maxsize=65536)
def _subnet6(address: str) -> str:
    return str(ipaddress.ip_network(f"{address}/64", strict=False))
