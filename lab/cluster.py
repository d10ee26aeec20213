"""The lab and its clusters.

    async with Lab() as lab:
        west = lab.cluster("west")
        web = west.pod("web")

A cluster is a bridge in its own network namespace, with subnets for its pods and for the virtual
addresses of its services. No host answers at the virtual addresses; only the sidecars know them.
Clusters cannot reach each other. lab/wide_area.py is the network between them (`Lab.wide_area`),
and defines which of their ports it can reach.

The `async with` block ends everything: it stops the programs and deletes the namespaces. If the
process is killed, the sandbox does that.
"""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from lab import network
from lab.network import Subnets
from lab.pod import Pod
from lab.process import LabError
from lab.sandbox import inside
from lab.wide_area import WideArea

_FIRST_POD = 10  # host number of the first pod; .1 is the bridge
_MAX_PODS = 200
# one directory per lab: several test processes may share one sandbox
_LABS = Path("/run/isthmus-lab")

POD_SYSCTLS = {
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/eth0/accept_dad": "0",
}
BRIDGE_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/default/accept_dad": "0",
    # By default the bridge rejects only six DNS queries in a row, then one per second. Reject each.
    "net/ipv4/icmp_ratelimit": "0",
}


class Cluster:
    """A failure domain: a bridge with pods. Created by `Lab.cluster`."""

    def __init__(self, lab: "Lab", name: str, subnets: Subnets) -> None:
        self.lab = lab
        self.name = name
        self.subnets = subnets
        self.netns = lab.claim(name)
        self.directory = lab.directory / name
        self.directory.mkdir(mode=0o755)
        self.pods: dict[str, Pod] = {}
        self.hosts: dict[str, list[str]] = {}
        self.hosts_file = self.directory / "hosts"
        self.resolver_file = self.directory / "resolv.conf"
        # The bridge has no resolver: a name that neither the hosts file nor a sidecar knows is
        # unknown at once. A sidecar may be slow and a datagram may be lost, so allow a second
        # attempt, the C library's default.
        self.resolver_file.write_text(
            f"nameserver {self.router()[0]}\noptions attempts:2 timeout:10\n"
        )
        self._write_hosts()
        self._services = 0
        self._build()

    def _build(self) -> None:
        network.batch(f"netns add {self.netns}")
        network.sysctl(self.netns, BRIDGE_SYSCTLS)
        router4, router6 = self.router()
        network.batch(
            "link set lo up",
            "link add br0 type bridge",
            f"address add {router4}/{self.subnets.pods4.prefixlen} dev br0",
            f"address add {router6}/{self.subnets.pods6.prefixlen} dev br0 nodad",
            "link set br0 up",
            # No host has a virtual address: fail at once instead of hanging.
            f"route add unreachable {self.subnets.services4}",
            f"route add unreachable {self.subnets.services6}",
            netns=self.netns,
        )

    def router(self) -> tuple[str, str]:
        """The bridge's own addresses, the pods' default routes."""
        return str(self.subnets.pods4[1]), str(self.subnets.pods6[1])

    def pod(self, name: str) -> Pod:
        """Create a pod with its link and addresses. Its name is in every pod's /etc/hosts."""
        if name in self.pods:
            raise LabError(f"cluster {self.name} already has a pod {name}")
        number = _FIRST_POD + len(self.pods)
        if len(self.pods) >= _MAX_PODS:
            raise LabError(f"cluster {self.name} is full ({_MAX_PODS} pods)")
        directory = self.directory / name
        directory.mkdir()
        directory.chmod(0o777)  # the programs of the pod run as other users
        ipv4, ipv6 = str(self.subnets.pods4[number]), str(self.subnets.pods6[number])
        pod = Pod(self, name, self.lab.claim(f"{self.name}-{name}"), ipv4, ipv6, directory)
        self._plug_in(pod)
        self.pods[name] = pod
        self.name_host(name, pod.ipv4, pod.ipv6)
        return pod

    def _plug_in(self, pod: Pod) -> None:
        network.batch(f"netns add {pod.netns}")
        link = (
            f"link add {pod.link} type veth peer name eth0 netns {pod.netns}",
            f"link set {pod.link} master br0 up",
        )
        network.batch(*link, netns=self.netns)
        network.sysctl(pod.netns, POD_SYSCTLS)
        router4, router6 = self.router()
        network.batch(
            "link set lo up",
            f"address add {pod.ipv4}/{self.subnets.pods4.prefixlen} dev eth0",
            f"address add {pod.ipv6}/{self.subnets.pods6.prefixlen} dev eth0 nodad",
            "link set eth0 up",
            f"route add default via {router4}",
            f"route add default via {router6}",
            netns=pod.netns,
        )

    def service_addresses(self, name: str) -> tuple[str, str]:
        """The next virtual addresses (IPv4, IPv6) for a service. Its name is in every pod's
        /etc/hosts.
        """
        self._services += 1
        if self._services > _MAX_PODS:
            raise LabError(f"cluster {self.name} has no virtual address left")
        ipv4, ipv6 = (
            str(self.subnets.services4[self._services]),
            str(self.subnets.services6[self._services]),
        )
        self.name_host(name, ipv4, ipv6)
        return ipv4, ipv6

    def name_host(self, name: str, *addresses: str) -> None:
        """Add a name to the /etc/hosts of the cluster's pods; running programs see it too."""
        self.hosts[name] = list(addresses)
        self._write_hosts()

    def resolve_by(self, *servers: str, search: Sequence[str] = (), ndots: int = 1) -> None:
        """Set the resolvers (addresses) of the pods for names not in /etc/hosts; affects programs
        started from now on.
        """
        lines = [f"nameserver {server}" for server in servers]
        lines += [f"search {' '.join(search)}"] if search else []
        self.resolver_file.write_text(
            "\n".join([*lines, f"options attempts:1 timeout:10 ndots:{ndots}", ""])
        )

    def _write_hosts(self) -> None:
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        lines += [
            f"{address} {name}" for name, addresses in self.hosts.items() for address in addresses
        ]
        # Written in place: the file is bind-mounted, so a replaced file would not be seen.
        self.hosts_file.write_text("\n".join(lines) + "\n")

    async def aclose(self) -> None:
        """Stop all pods and delete the bridge."""
        async with trio.open_nursery() as nursery:
            for pod in self.pods.values():
                nursery.start_soon(pod.aclose)
        network.batch(f"netns delete {self.netns}")


class Lab:
    """All clusters of one experiment, and the nursery that watches their programs."""

    def __init__(self) -> None:
        self.clusters: dict[str, Cluster] = {}
        self._stack = contextlib.AsyncExitStack()
        self._prefix = ""
        self._wide_area: WideArea | None = None
        self.directory = Path()

    async def __aenter__(self) -> Self:
        if not inside():
            raise LabError("the lab runs only in its sandbox: python -m lab.sandbox -- COMMAND")
        self._claim_directory()
        self.nursery = await self._stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 30):
            async with trio.open_nursery() as nursery:
                for cluster in self.clusters.values():
                    nursery.start_soon(cluster.aclose)
            if self._wide_area is not None:
                self._wide_area.close()
        self.nursery.cancel_scope.cancel()
        # Do not pass the error to the nursery: it only holds reader tasks and would wrap the error
        # in a group.
        await self._stack.aclose()

    def cluster(self, name: str, subnets: Subnets | None = None) -> Cluster:
        """A new, empty cluster."""
        if name in self.clusters:
            raise LabError(f"there already is a cluster {name}")
        cluster = Cluster(self, name, subnets or Subnets.numbered(len(self.clusters) + 1))
        self.clusters[name] = cluster
        return cluster

    def wide_area(self) -> WideArea:
        """The network between the clusters, created at the first call."""
        if self._wide_area is None:
            self._wide_area = WideArea(self)
        return self._wide_area

    def claim(self, name: str) -> str:
        """A network namespace name that differs from those of other labs in the same sandbox."""
        return self._prefix + name

    def _claim_directory(self) -> None:
        """A directory of this lab; its number also distinguishes our namespaces from those of other
        labs.

        It is in the sandbox's private /run, which disappears with the sandbox, even after a crash.
        """
        _LABS.mkdir(exist_ok=True)
        for number in range(1000):
            self.directory = _LABS / str(number)
            try:
                self.directory.mkdir()
            except FileExistsError:
                continue
            self.directory.chmod(0o755)
            self._prefix = "" if number == 0 else f"{number}-"
            self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            return
        raise LabError("there are already 1000 labs in this sandbox")
