"""A mesh in a cluster: who is in it, which services there are, and the directory that its sidecars read.

mesh = Mesh(cluster)
mesh.join(client, "client")
mesh.join(server, "server", inbound={"require_identity": True})
mesh.service("shop", [server], {80: "detect", 25: "opaque"})
await mesh.start()
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from lab.cluster import Cluster
from lab.pod import Pod
from lab.process import LabError
from lab.sidecar import Authority, Sidecar


@dataclass(frozen=True, slots=True)
class Service:
    """A service: virtual addresses, and pods behind them."""

    name: str
    ipv4: str
    ipv6: str
    ports: Mapping[int, str]  # port -> protocol hint
    pods: tuple[Pod, ...]

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

    def join(self, pod: Pod, service_account: str | None = None, *, authority: Authority | None = None, **settings: Any) -> Sidecar:
        """Give a pod a sidecar with an identity; `settings` are laid over its configuration.  Started by `start`.

        Another `authority` than the mesh's makes an intruder: with a certificate, but one that nobody here trusts.
        """
        if pod.name in self.sidecars:
            raise LabError(f"pod {pod.name} is already in the mesh")
        issuer = authority or self.authority
        sidecar = Sidecar(pod, issuer, issuer.identity(service_account or pod.name), settings)
        self.sidecars[pod.name] = sidecar
        return sidecar

    def service(self, name: str, pods: Iterable[Pod], ports: Mapping[int, str]) -> Service:
        """A service on these pods; ports are the same on both sides.  Its name resolves in every pod of the cluster."""
        ipv4, ipv6 = self.cluster.service_addresses(name)
        service = Service(name, ipv4, ipv6, dict(ports), tuple(pods))
        self.services[name] = service
        return service

    def document(self) -> dict[str, Any]:
        """The directory as the sidecars read it."""
        return {"services": [self._described(service) for service in self.services.values()]}

    def _described(self, service: Service) -> dict[str, Any]:
        return {
            "name": service.name,
            "addresses": [service.ipv4, service.ipv6],
            "ports": [{"port": port, "protocol": hint} for port, hint in service.ports.items()],
            "endpoints": [entry for pod in service.pods for entry in self._endpoints(pod)],
        }

    def _endpoints(self, pod: Pod) -> list[dict[str, Any]]:
        sidecar = self.sidecars.get(pod.name)
        identity = {"identity": str(sidecar.identity)} if sidecar is not None and sidecar.identity is not None else {}
        return [{"address": address, **identity} for address in (pod.ipv4, pod.ipv6)]

    async def start(self) -> None:
        """Write the files of all sidecars that do not run yet, and start them, all at once.  Raises LabError."""
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
        """Give the present directory to all sidecars."""
        for sidecar in self.sidecars.values():
            sidecar.write_directory(self.document())
