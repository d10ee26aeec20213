"""Loops that addresses show.

A proxy that connects to its own listener sends the traffic to itself again and again. Each round
needs a connection, two descriptors and CPU time, until one of them is exhausted. Users of Linkerd
and Istio know this as 100 % CPU without an explanation (linkerd2 #3785, #4269; istio #14443,
#28058). There are three causes. Each is visible in one address before a byte is read or sent:

- A client connects to a listener directly, without redirection. Then there is no original
  destination, or it is the listener itself.
- The original destination is one of our listeners: the packet filter redirected a connection that
  was meant for the proxy.
- We are about to connect to one of our listeners: the directory, an override or the application
  names the proxy's port as a service.

All three are the same check: is it one of our addresses, or loopback, with a port of our listeners?

The admin listener is not included: it forwards nothing.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Loop:
    """A verdict: the traffic is a loop.

    `kind`: a metric label. `words`: a message. `cycle`: the names in the cycle, if known.
    """

    kind: str
    words: str
    cycle: str = ""


@lru_cache(maxsize=4096)
def loopback(host: str) -> bool:
    """Whether an IP literal is loopback or unspecified (which connects to loopback).

    IPv4-mapped addresses count as IPv4.
    """
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


@lru_cache(maxsize=4096)
def _plain(host: str) -> str:
    """The normal form of a literal; IPv4-mapped IPv6 as IPv4. So two spellings are equal."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


@dataclass(frozen=True, slots=True)
class OwnListeners:
    """The ports from which a proxy forwards traffic, and the pod's addresses (except loopback)."""

    ports: frozenset[int]
    addresses: frozenset[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", frozenset(_plain(host) for host in self.addresses))

    def own(self, host: str) -> bool:
        """Whether a connection to `host` stays in this pod."""
        return loopback(host) or _plain(host) in self.addresses

    def check_accept(self, host: str, port: int, *, ours: bool = False) -> Loop | None:
        """Return the verdict on a connection with the original destination (host, port).

        `ours`: the host is known to be an address of this pod, even if it is not in the list,
        because the connection arrived there. A pod may have addresses that the proxy does not know.
        """
        if port in self.ports and (ours or self.own(host)):
            return Loop(
                "own_listener",
                f"the connection was made to {_join(host, port)}, which is this proxy's own"
                " listener",
            )
        return None

    def check_dial(self, host: str, port: int) -> Loop | None:
        """Return the verdict on a connection that is about to be made to (host, port)."""
        if port in self.ports and self.own(host):
            return Loop(
                "own_target",
                f"connecting to {_join(host, port)} would reach this proxy's own listener",
            )
        return None


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
