"""Loops that addresses show.

A proxy that is sent to its own listener sends itself there again, and again: each round takes a connection, two descriptors and
some processor time, until one of them runs out. Linkerd's and Istio's users know it as 100 % CPU without a hint (linkerd2 #3785, #4269;
istio #14443, #28058). It begins in three ways, all of them visible in one address before a byte is read or sent:

- somebody connects to a listener directly instead of being redirected to it. Then there is no original destination, or it is the
  listener itself, and "where it was going" is here;
- the original destination is a listener of ours: the packet filter redirects a connection that was meant for us;
- we are about to dial a listener of ours: directory, override or application name the proxy's port as a service.

All three are the same question: is this (one of our addresses, or loopback) x (one of our listeners' ports)?

The administration listener is not one of these ports: it ends connections and passes nothing on.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Loop:
    """A verdict against the traffic. `kind` is a metric's label, `words` are for people, `cycle` is the way round in names, if known."""

    kind: str
    words: str
    cycle: str = ""


@lru_cache(maxsize=4096)
def loopback(host: str) -> bool:
    """Whether an IP literal never leaves this machine: loopback, or unspecified (which connects to it), IPv4-mapped ones too."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


@lru_cache(maxsize=4096)
def _plain(host: str) -> str:
    """The literal in its one normal form, IPv4-mapped IPv6 as IPv4: two spellings of an address are one address."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


@dataclass(frozen=True, slots=True)
class OwnListeners:
    """What a proxy knows of itself: the ports it forwards traffic from, and the addresses of its pod (besides loopback)."""

    ports: frozenset[int]
    addresses: frozenset[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", frozenset(_plain(host) for host in self.addresses))

    def own(self, host: str) -> bool:
        """Whether connecting to `host` stays in this pod."""
        return loopback(host) or _plain(host) in self.addresses

    def accepted(self, host: str, port: int, *, ours: bool = False) -> Loop | None:
        """The verdict on a connection whose destination, before any redirection, was (host, port). `ours`: it is known to be an address of
        this pod, whatever the list says: it came in by it. Pods have addresses that nobody has told them of."""
        if port in self.ports and (ours or self.own(host)):
            return Loop("own_listener", f"the connection was made to {_join(host, port)}, which is this proxy's own listener")
        return None

    def dialled(self, host: str, port: int) -> Loop | None:
        """The verdict on a connection that is about to be made to (host, port)."""
        if port in self.ports and self.own(host):
            return Loop("own_target", f"connecting to {_join(host, port)} would reach this proxy's own listener")
        return None


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
