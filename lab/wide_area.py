"""The wide area: what lies between clusters, and the little of them that can be reached from it.

    area = lab.wide_area()
    west, east = lab.cluster("west"), lab.cluster("east")
    area.border(west).publish(4143, gateway_of_west)     # behind NAT: its address out here is the border's
    area.border(east)
    area.attach(gateway_of_east)                         # with an address of its own out here

It is a router in a namespace of its own, with a link (a leg) to each border and to each gateway that has an address here, and with routes
to these links and to nothing else: the addresses inside the clusters mean nothing here, and packets for them are answered by
"unreachable".

A border is the router of a cluster, as a cluster's nodes are: what its pods send to the wide area leaves under the border's address
(masquerade), and what comes in from there is let through only if a port was published for it (dnat), or if it is an answer.

Faults are made here, in the middle, where neither side can see them otherwise than by their effects (`Leg.fault`).
"""

import contextlib
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from lab import network
from lab.pod import Pod
from lab.process import LabError

if TYPE_CHECKING:
    from lab.cluster import Cluster, Lab

# Addresses for documentation (RFC 5737, RFC 3849): nobody's, and unlike those of any cluster.
RANGE4 = ipaddress.IPv4Network("198.51.100.0/24")
RANGE6 = ipaddress.IPv6Network("2001:db8:15::/48")
_MAX_LEGS = 63  # four IPv4 addresses a leg

AREA_SYSCTLS = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv6/conf/default/accept_dad": "0"}


class Fault(Enum):
    """What can happen to a leg."""

    SILENCE = "drop"  # packets vanish, and nobody says so: a broken firewall, a lost node
    REFUSAL = "reject with icmpx type host-unreachable"  # a router says at once that there is no way
    UNPLUGGED = ""  # the link is down, and who is at its end sees it


@dataclass(frozen=True, slots=True)
class Leg:
    """A link between the wide area and a namespace, in which it is called `wan0`; and the addresses of that end."""

    area: "WideArea"
    netns: str
    name: str  # of the wide area's end
    ipv4: str
    ipv6: str

    def address(self, version: int) -> str:
        """The address of IP version 4 or 6 by which the wide area knows this end."""
        return {4: self.ipv4, 6: self.ipv6}[version]

    def near(self, version: int) -> str:
        """The address of the wide area's end, over which this end reaches everything else there."""
        return str(ipaddress.ip_address(self.address(version)) - 1)

    @contextlib.contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """Let something happen to this leg, in both directions, until the block ends.

        One fault at a time; the effect on TCP connections that survive it lasts as long as their retransmission timer.
        """
        if fault is Fault.UNPLUGGED:
            network.batch(f"link set {self.name} down", netns=self.area.netns)
        else:
            rules = (f"add rule inet legs {self.name} {way} {self.name} {fault.value}" for way in ("iifname", "oifname"))
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

    cluster: "Cluster"
    leg: Leg
    published: dict[int, tuple[Pod, int]] = field(default_factory=dict)  # port -> pod and its port

    def publish(self, port: int, pod: Pod, target_port: int | None = None) -> None:
        """Lead a TCP port of the border's wide-area addresses to a pod.  Replaces what the port led to before."""
        if pod.cluster is not self.cluster:
            raise LabError(f"the border of cluster {self.cluster.name} cannot lead to pod {pod.name} of cluster {pod.cluster.name}")
        self.published[port] = (pod, target_port or port)
        self._write()

    def withdraw(self, port: int) -> None:
        """Lead a port nowhere any more; connections that are open stay."""
        del self.published[port]
        self._write()

    def _write(self) -> None:
        lines = []
        for version in (4, 6):
            elements = [f"{port} : {pod.address(version)} . {target}" for port, (pod, target) in self.published.items()]
            lines.append(f"flush map inet border published{version}")
            lines += [f"add element inet border published{version} {{ {', '.join(elements)} }}"] if elements else []
        network.nft(self.cluster.netns, *lines)


class WideArea:
    """The network between the clusters of a laboratory.  Made by `Lab.wide_area`."""

    def __init__(self, lab: "Lab") -> None:
        self.netns = lab.claim("wide-area")
        self.borders: dict[str, Border] = {}
        self._legs = 0
        network.batch(f"netns add {self.netns}")
        network.sysctl(self.netns, AREA_SYSCTLS)
        network.batch("link set lo up", netns=self.netns)
        network.nft(self.netns, "add table inet legs", "add chain inet legs between { type filter hook forward priority 0; }")

    def border(self, cluster: "Cluster") -> Border:
        """The border of a cluster, made at the first call: from then on its pods reach the wide area."""
        if cluster.name not in self.borders:
            leg = self._leg(cluster.netns)
            network.nft(
                cluster.netns,
                "add table inet border",
                "add map inet border published4 { type inet_service : ipv4_addr . inet_service; }",
                "add map inet border published6 { type inet_service : ipv6_addr . inet_service; }",
                "add chain inet border inward { type nat hook prerouting priority dstnat; }",
                'add rule inet border inward iifname "wan0" dnat ip addr . port to tcp dport map @published4',
                'add rule inet border inward iifname "wan0" dnat ip6 addr . port to tcp dport map @published6',
                "add chain inet border outward { type nat hook postrouting priority srcnat; }",
                'add rule inet border outward oifname "wan0" masquerade',
                "add chain inet border between { type filter hook forward priority 0; }",
                "add rule inet border between ct status dnat accept",
                'add rule inet border between iifname "wan0" ct state new drop',
            )
            self.borders[cluster.name] = Border(cluster, leg)
        return self.borders[cluster.name]

    def attach(self, pod: Pod) -> Leg:
        """Give a pod a link of its own to the wide area, beside the one to its cluster: it does not route between them."""
        return self._leg(pod.netns)

    def _leg(self, netns: str) -> Leg:
        if self._legs >= _MAX_LEGS:
            raise LabError(f"the wide area has no room for more than {_MAX_LEGS} legs")
        number, self._legs = self._legs, self._legs + 1
        net4, net6 = list(RANGE4.subnets(new_prefix=30))[number], ipaddress.IPv6Network((int(RANGE6[0]) + (number << 64), 64))
        leg = Leg(self, netns, f"leg{number}", str(net4[2]), str(net6[2]))
        network.batch(f"link add {leg.name} type veth peer name wan0 netns {netns}", netns=self.netns)
        network.sysctl(netns, {"net/ipv6/conf/wan0/accept_dad": "0"})
        network.batch(
            f"address add {net4[1]}/30 dev {leg.name}",
            f"address add {net6[1]}/64 dev {leg.name} nodad",
            f"link set {leg.name} up",
            netns=self.netns,
        )
        network.batch(f"address add {leg.ipv4}/30 dev wan0", "link set wan0 up", netns=netns)
        self.plug_in(leg)
        network.nft(self.netns, f"add chain inet legs {leg.name}", f"add rule inet legs between jump {leg.name}")
        return leg

    def plug_in(self, leg: Leg) -> None:
        """The link is up, with its routes; the kernel forgets those, and IPv6 addresses, when a link goes down."""
        network.batch(f"link set {leg.name} up", netns=self.netns)
        network.batch(f"address replace {leg.near(6)}/64 dev {leg.name} nodad", netns=self.netns)
        network.batch(
            f"address replace {leg.ipv6}/64 dev wan0 nodad",
            f"route replace {RANGE4} via {leg.near(4)} dev wan0",
            f"route replace {RANGE6} via {leg.near(6)} dev wan0",
            netns=leg.netns,
        )

    def close(self) -> None:
        """Free the namespace; the legs go with it."""
        network.batch(f"netns delete {self.netns}")
