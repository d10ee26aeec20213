"""The wide area: the network between clusters, and the few ports that it can reach.

    area = lab.wide_area()
    west, east = lab.cluster("west"), lab.cluster("east")
    area.border(west).publish(4143, gateway_of_west)     # behind NAT, with the border's address
    area.border(east)
    area.attach(gateway_of_east)                         # with its own address out here

It is a router in its own namespace, with a link (a leg) to each border and to each gateway with an
address here. It has routes to these links only: addresses inside the clusters mean nothing here,
and packets for them are answered with "unreachable".

A border is the router of a cluster. Traffic of its pods to the wide area leaves with the border's
address (masquerade). Traffic from there passes only if a port was published for it (dnat), or if it
is a reply.

Faults are made in the middle, where the two sides only see their effects (`Leg.fault`).
"""

import contextlib
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from lab import network
from lab.pod import Home, Pod
from lab.process import LabError

# Documentation addresses (RFC 5737, RFC 3849): unused, and unlike those of any cluster.
RANGE4 = ipaddress.IPv4Network("198.51.100.0/24")
RANGE6 = ipaddress.IPv6Network("2001:db8:15::/48")
_MAX_LEGS = 63  # four IPv4 addresses a leg

AREA_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/default/accept_dad": "0",
}


class Fault(Enum):
    """A fault of a leg."""

    SILENCE = "drop"  # packets vanish without an error: a broken firewall, a lost node
    # a router reports at once that there is no route
    REFUSAL = "reject with icmpx type host-unreachable"
    UNPLUGGED = ""  # the link is down, and the host at its end sees it


class Claims(Protocol):
    """The part of the laboratory (`Lab`) that the wide area uses."""

    def claim(self, name: str) -> str:
        """Make a network namespace that is removed with the laboratory."""
        ...


@dataclass(frozen=True, slots=True)
class Leg:
    """A link between the wide area and a namespace, in which it is called `wan0`; and the addresses
    of that end."""

    area: "WideArea"
    netns: str
    name: str  # of the end in the wide area
    ipv4: str
    ipv6: str

    def address(self, version: int) -> str:
        """The address of this end in the wide area, for IP version 4 or 6."""
        return {4: self.ipv4, 6: self.ipv6}[version]

    def near(self, version: int) -> str:
        """The address of the wide area's end: this end's next hop."""
        return str(ipaddress.ip_address(self.address(version)) - 1)

    @contextlib.contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """Apply a fault to this leg, in both directions, until the block ends.

        One fault at a time. TCP connections that survive it may stay slow until their
        retransmission timer fires.
        """
        if fault is Fault.UNPLUGGED:
            network.batch(f"link set {self.name} down", netns=self.area.netns)
        else:
            rules = (
                f"add rule inet legs {self.name} {way} {self.name} {fault.value}"
                for way in ("iifname", "oifname")
            )
            network.nft(self.area.netns, *rules)
        try:
            yield
        finally:
            if fault is Fault.UNPLUGGED:
                self.area.plug_in(self)
            else:
                network.nft(self.area.netns, f"flush chain inet legs {self.name}")


@dataclass(frozen=True, slots=True)
class Border:
    """The router between a cluster and the wide area."""

    cluster: Home
    leg: Leg
    published: dict[int, tuple[Pod, int]] = field(default_factory=dict)  # port -> pod and its port

    def publish(self, port: int, pod: Pod, target_port: int | None = None) -> None:
        """Forward a TCP port of the border's wide-area addresses to a pod. Replaces an earlier
        target.
        """
        if pod.cluster is not self.cluster:
            raise LabError(
                f"the border of cluster {self.cluster.name} cannot lead to pod {pod.name} of"
                f" cluster {pod.cluster.name}"
            )
        self.published[port] = (pod, target_port or port)
        self._write()

    def withdraw(self, port: int) -> None:
        """Stop forwarding a port; open connections stay."""
        del self.published[port]
        self._write()

    def _write(self) -> None:
        lines = []
        for version in (4, 6):
            elements = [
                f"{port} : {pod.address(version)} . {target}"
                for port, (pod, target) in self.published.items()
            ]
            lines.append(f"flush map inet border published{version}")
            lines += (
                [f"add element inet border published{version} {{ {', '.join(elements)} }}"]
                if elements
                else []
            )
        network.nft(self.cluster.netns, *lines)


class WideArea:
    """The network between the clusters of a lab. Created by `Lab.wide_area`."""

    def __init__(self, lab: Claims) -> None:
        self.netns = lab.claim("wide-area")
        self.borders: dict[str, Border] = {}
        self._legs = 0
        network.batch(f"netns add {self.netns}")
        network.sysctl(self.netns, AREA_SYSCTLS)
        network.batch("link set lo up", netns=self.netns)
        network.nft(
            self.netns,
            "add table inet legs",
            "add chain inet legs between { type filter hook forward priority 0; }",
        )

    def border(self, cluster: Home) -> Border:
        """The border of a cluster, created at the first call: from then on its pods reach the wide
        area.
        """
        if cluster.name not in self.borders:
            leg = self._leg(cluster.netns)
            network.nft(
                cluster.netns,
                "add table inet border",
                "add map inet border published4 { type inet_service : ipv4_addr . inet_service; }",
                "add map inet border published6 { type inet_service : ipv6_addr . inet_service; }",
                "add chain inet border inward { type nat hook prerouting priority dstnat; }",
                'add rule inet border inward iifname "wan0" dnat ip addr . port to tcp dport map'
                " @published4",
                'add rule inet border inward iifname "wan0" dnat ip6 addr . port to tcp dport map'
                " @published6",
                "add chain inet border outward { type nat hook postrouting priority srcnat; }",
                'add rule inet border outward oifname "wan0" masquerade',
                "add chain inet border between { type filter hook forward priority 0; }",
                "add rule inet border between ct status dnat accept",
                'add rule inet border between iifname "wan0" ct state new drop',
            )
            self.borders[cluster.name] = Border(cluster, leg)
        return self.borders[cluster.name]

    def attach(self, pod: Pod) -> Leg:
        """Give a pod its own link to the wide area in addition to its cluster's; it does not route
        between them.
        """
        return self._leg(pod.netns)

    def _leg(self, netns: str) -> Leg:
        if self._legs >= _MAX_LEGS:
            raise LabError(f"the wide area has no room for more than {_MAX_LEGS} legs")
        number, self._legs = self._legs, self._legs + 1
        net4, net6 = (
            list(RANGE4.subnets(new_prefix=30))[number],
            ipaddress.IPv6Network((int(RANGE6[0]) + (number << 64), 64)),
        )
        leg = Leg(self, netns, f"leg{number}", str(net4[2]), str(net6[2]))
        network.batch(
            f"link add {leg.name} type veth peer name wan0 netns {netns}", netns=self.netns
        )
        network.sysctl(netns, {"net/ipv6/conf/wan0/accept_dad": "0"})
        network.batch(
            f"address add {net4[1]}/30 dev {leg.name}",
            f"address add {net6[1]}/64 dev {leg.name} nodad",
            f"link set {leg.name} up",
            netns=self.netns,
        )
        network.batch(f"address add {leg.ipv4}/30 dev wan0", "link set wan0 up", netns=netns)
        self.plug_in(leg)
        network.nft(
            self.netns,
            f"add chain inet legs {leg.name}",
            f"add rule inet legs between jump {leg.name}",
        )
        return leg

    def plug_in(self, leg: Leg) -> None:
        """Bring the link up, with its routes; the kernel drops those and IPv6 addresses when a link
        goes down.
        """
        network.batch(f"link set {leg.name} up", netns=self.netns)
        network.batch(f"address replace {leg.near(6)}/64 dev {leg.name} nodad", netns=self.netns)
        network.batch(
            f"address replace {leg.ipv6}/64 dev wan0 nodad",
            f"route replace {RANGE4} via {leg.near(4)} dev wan0",
            f"route replace {RANGE6} via {leg.near(6)} dev wan0",
            netns=leg.netns,
        )

    def close(self) -> None:
        """Delete the namespace and its legs."""
        network.batch(f"netns delete {self.netns}")
