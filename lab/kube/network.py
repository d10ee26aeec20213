"""Addresses of the clusters, and their links.

Each cluster's node is a network namespace with a link to the one that the test runs in. Pods and
services have the same ranges in all clusters: clusters share nothing but the link between their
nodes, as two networks of different owners would.

    the test 172.31.1.1 ---- 172.31.1.2 node of west 198.51.100.10
                                                          |
    the test 172.31.2.1 ---- 172.31.2.2 node of east 198.51.100.20
"""

import contextlib
import subprocess
from dataclasses import dataclass

from lab import network
from lab.process import LabError

PODS4, PODS6 = "10.244.0.0/24", "fd00:10:244::/64"
SERVICES4, SERVICES6 = "10.96.0.0/16", "fd00:10:96::/112"
API, DNS = "10.96.0.1", "10.96.0.10"
NAMES = ("west", "east")  # the clusters there can be; the order gives their numbers, from 1
BALANCED = 3  # addresses of a node for Services of type LoadBalancer
_LINK = "wan"
_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/default/accept_dad": "0",
}


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of the cluster with this number (1, 2)."""

    number: int

    @classmethod
    def of(cls, name: str) -> "Addresses":
        """Those of the cluster of this name. Raises LabError for a name that is not in NAMES."""
        if name not in NAMES:
            raise LabError(f"a cluster is called {' or '.join(NAMES)}, not {name}")
        return cls(NAMES.index(name) + 1)

    @property
    def node(self) -> str:
        """The node, as the test sees it: its API server listens at port 6443 there."""
        return f"172.31.{self.number}.2"

    @property
    def node6(self) -> str:
        """The IPv6 counterpart of the IPv4 property above it."""
        return f"fd31:{self.number}::2"

    @property
    def test(self) -> str:
        """The test's end of the link to the node."""
        return f"172.31.{self.number}.1"

    @property
    def test6(self) -> str:
        """The IPv6 counterpart of the IPv4 property above it."""
        return f"fd31:{self.number}::1"

    @property
    def wan(self) -> str:
        """The node, as the other clusters see it."""
        return f"198.51.100.{10 * self.number}"

    @property
    def balanced(self) -> tuple[str, ...]:
        """Addresses of the node on the link between clusters, for Services of type LoadBalancer."""
        return tuple(f"198.51.100.{10 * self.number + one}" for one in range(1, BALANCED + 1))


def namespace(cluster: str) -> str:
    """The name of a node's network namespace, for `ip netns exec`."""
    return f"kube-{cluster}"


def build(cluster: str) -> None:
    """The network namespace of a node, and its link to this one. Raises LabError."""
    own, inside = Addresses.of(cluster), namespace(cluster)
    network.batch(f"netns add {inside}")
    network.sysctl(inside, _SYSCTLS)
    network.batch(
        f"link add {inside} type veth peer name eth0 netns {inside}",
        f"address add {own.test}/24 dev {inside}",
        f"address add {own.test6}/64 dev {inside} nodad",
        f"link set {inside} up",
    )
    network.batch(
        "link set lo up",
        f"address add {own.node}/24 dev eth0",
        f"address add {own.node6}/64 dev eth0 nodad",
        "link set eth0 up",
        f"route add default via {own.test}",
        f"route add default via {own.test6}",
        netns=inside,
    )


def remove(cluster: str) -> None:
    """Undo `build`; good too when there is nothing."""
    inside = namespace(cluster)
    # The link first: a namespace is freed some time after its name is gone, and a link of this name
    # would be in the way of the next one.
    for command in (["link", "delete", inside], ["netns", "delete", inside]):
        subprocess.run(["ip", *command], capture_output=True, check=False)


def join(west: str, east: str) -> None:
    """A link between two nodes."""
    inside = [namespace(name) for name in (west, east)]
    network.batch(
        f"link add {_LINK} netns {inside[0]} type veth peer name {_LINK} netns {inside[1]}"
    )
    for name, netns in zip((west, east), inside, strict=True):
        own = Addresses.of(name)
        lines = [f"address add {address}/24 dev {_LINK}" for address in (own.wan, *own.balanced)]
        network.batch(*lines, f"link set {_LINK} up", netns=netns)


def part(cluster: str) -> None:
    """Take the link away again."""
    with contextlib.suppress(LabError):
        network.batch(f"link delete {_LINK}", netns=namespace(cluster))
