"""A mesh in a cluster: its members, its services, and the directory of its sidecars.

    mesh = Mesh(cluster)
    mesh.join(client, "client")
    mesh.join(server, "server", inbound={"require_identity": True})
    mesh.service("shop", [server], {80: "detect", 25: "opaque"})
    await mesh.start()

Meshes of several clusters share their trust root. They know of each other what a control plane
would copy: the gateways, and names and ports of exported services. A directory contains nothing
else of another cluster, in particular no pod addresses.

    west, east = Mesh(lab.cluster("west")), Mesh(lab.cluster("east"), authority=west.authority)
    east.gateway(east_gateway, area.attach(east_gateway))
    east.service("c", [server], {80: "http1"}, export=True)
    west.link(east)
    west.service("c", [other], {80: "http1"}, failover={"clusters": ["east"]})
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from lab.cluster import Cluster
from lab.pod import Pod
from lab.process import LabError
from lab.sidecar import Authority, Member, Sidecar
from lab.wide_area import Leg

GATEWAY_PORT = 4143
GATEWAY_NAMESPACE = "isthmus"


@dataclass(slots=True)
class Service:
    """A service: virtual addresses and its pods. `traits` are copied into the directory: export,
    split, failover, policy.
    """

    name: str
    ipv4: str
    ipv6: str
    ports: Mapping[int, str]  # port -> protocol hint
    pods: tuple[Pod, ...]
    traits: dict[str, Any]

    def address(self, version: int) -> str:
        """The virtual address of IP version 4 or 6."""
        return {4: self.ipv4, 6: self.ipv6}[version]


@dataclass(slots=True)
class Mesh:
    """The members and services of one cluster."""

    cluster: Cluster
    authority: Authority = field(default_factory=Authority)
    sidecars: dict[str, Sidecar] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)
    # the gateways, as the directories of other clusters describe them
    gateways: list[dict[str, Any]] = field(default_factory=list)
    peers: list["Mesh"] = field(default_factory=list)  # the known other clusters

    def join(
        self,
        pod: Pod,
        service_account: str | None = None,
        *,
        authority: Authority | None = None,
        **settings: Any,
    ) -> Sidecar:
        """Give a pod a sidecar with an identity; `settings` override its configuration. `start`
        starts it.

        With an `authority` other than the mesh's, it is an intruder: it has a certificate that no
        member trusts.
        """
        if pod.name in self.sidecars:
            raise LabError(f"pod {pod.name} is already in the mesh")
        issuer = authority or self.authority
        sidecar = Sidecar(pod, issuer, issuer.identity(service_account or pod.name), settings)
        self.sidecars[pod.name] = sidecar
        return sidecar

    def gateway(self, pod: Pod, leg: Leg, *, port: int = GATEWAY_PORT, **settings: Any) -> Sidecar:
        """Make a pod a gateway of this cluster (`isthmus run --gateway`); others reach it at the
        addresses of `leg`.
        """
        gateway = self.join(pod, **settings)
        gateway.identity = self.authority.identity("gateway", GATEWAY_NAMESPACE)
        gateway.gateway = True
        self.announce(gateway, address=leg.ipv4, port=port)
        return gateway

    def announce(self, member: Member, **way: Any) -> None:
        """Announce a gateway of any kind to other clusters: `address` or `host`, and `port`."""
        self.gateways.append({**way, "identity": str(member.identity)})

    def link(self, *others: "Mesh") -> None:
        """Make other clusters known: their names, gateways and exports."""
        self.peers += others

    def service(
        self, name: str, pods: Iterable[Pod], ports: Mapping[int, str], **traits: Any
    ) -> Service:
        """Add a service on these pods, with the same ports. Its name resolves in every pod of the
        cluster.
        """
        ipv4, ipv6 = self.cluster.service_addresses(name)
        service = Service(name, ipv4, ipv6, dict(ports), tuple(pods), traits)
        self.services[name] = service
        return service

    def document(self) -> dict[str, Any]:
        """The directory as the sidecars read it."""
        services = [self._described(service) for service in self.services.values()]
        if not self.peers:
            return {"services": services}
        return {
            "cluster": self.cluster.name,
            "services": services,
            "clusters": [peer.exports() for peer in self.peers],
        }

    def exports(self) -> dict[str, Any]:
        """This cluster as other clusters' directories describe it."""
        exported = [service for service in self.services.values() if service.traits.get("export")]
        services = [{"name": service.name, "ports": _ports(service)} for service in exported]
        return {"name": self.cluster.name, "gateways": self.gateways, "services": services}

    def _described(self, service: Service) -> dict[str, Any]:
        return {
            "name": service.name,
            "addresses": [service.ipv4, service.ipv6],
            "ports": _ports(service),
            "endpoints": [entry for pod in service.pods for entry in self._endpoints(pod)],
            **service.traits,
        }

    def _endpoints(self, pod: Pod) -> list[dict[str, Any]]:
        sidecar = self.sidecars.get(pod.name)
        identity = (
            {"identity": str(sidecar.identity)}
            if sidecar is not None and sidecar.identity is not None
            else {}
        )
        return [{"address": address, **identity} for address in (pod.ipv4, pod.ipv6)]

    async def start(self) -> None:
        """Write the files of all sidecars that are not running yet, and start them in parallel.
        Raises LabError.
        """
        waiting = [sidecar for sidecar in self.sidecars.values() if sidecar.process is None]
        for sidecar in waiting:
            sidecar.write_files(self.document())
        failures: list[LabError] = []

        async def start_one(sidecar: Sidecar) -> None:
            try:
                await sidecar.start()
            except LabError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for sidecar in waiting:
                nursery.start_soon(start_one, sidecar)
        if failures:
            raise failures[0]

    def publish(self) -> None:
        """Give the current directory to all sidecars."""
        for sidecar in self.sidecars.values():
            sidecar.write_directory(self.document())


def _ports(service: Service) -> list[dict[str, Any]]:
    return [{"port": port, "protocol": hint} for port, hint in service.ports.items()]
