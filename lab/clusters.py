"""Clusters with one gateway each. Only these gateways connect them.

    clusters = Clusters(lab)
    west, east = clusters.add("west"), clusters.add("east", nat=True)
    ...                                   # pods, services, programs
    clusters.link()
    await clusters.start()

A gateway has its own address in the wide area, or is behind NAT: then others use its border's
address and another port.
"""

from dataclasses import dataclass, field
from typing import Any

import trio

from lab.cluster import Lab
from lab.mesh import GATEWAY_PORT, Mesh
from lab.pod import Pod
from lab.process import LabError
from lab.sidecar import Sidecar
from lab.wide_area import Leg

GATEWAY = "gateway"  # the pod
PUBLISHED_PORT = 14143  # of a gateway behind NAT


@dataclass(slots=True)
class Clusters:
    """The meshes of one lab, by cluster name."""

    lab: Lab
    meshes: dict[str, Mesh] = field(default_factory=dict)
    # the wide-area link of each cluster's gateway
    legs: dict[str, Leg] = field(default_factory=dict)

    def add(self, name: str, *, nat: bool = False, **settings: Any) -> Mesh:
        """Add a cluster with the trust root of the others; `settings` are for its gateway."""
        first = next(iter(self.meshes.values()), None)
        cluster = self.lab.cluster(name)
        return self.adopt(
            Mesh(cluster, first.authority) if first else Mesh(cluster), nat=nat, **settings
        )

    def adopt(self, mesh: Mesh, *, nat: bool = False, **settings: Any) -> Mesh:
        """Give an existing mesh a border and a gateway."""
        name, area = mesh.cluster.name, self.lab.wide_area()
        border, pod = area.border(mesh.cluster), mesh.cluster.pod(GATEWAY)
        if nat:
            border.publish(PUBLISHED_PORT, pod, GATEWAY_PORT)
        self.legs[name] = border.leg if nat else area.attach(pod)
        mesh.gateway(pod, self.legs[name], port=PUBLISHED_PORT if nat else GATEWAY_PORT, **settings)
        self.meshes[name] = mesh
        return mesh

    def link(self) -> None:
        """Make all clusters known to each other."""
        for mesh in self.meshes.values():
            mesh.peers = [other for other in self.meshes.values() if other is not mesh]

    def pod(self, cluster: str, name: str) -> Pod:
        """An existing pod. Raises LabError."""
        try:
            return self.meshes[cluster].cluster.pods[name]
        except KeyError as error:
            raise LabError(f"there is no pod {name} in a cluster {cluster}") from error

    def sidecar(self, cluster: str, pod: str) -> Sidecar:
        """The sidecar of a pod, or the gateway.  Raises LabError."""
        try:
            return self.meshes[cluster].sidecars[pod]
        except KeyError as error:
            raise LabError(f"there is no sidecar of a pod {pod} in a cluster {cluster}") from error

    async def start(self) -> None:
        """Start all sidecars and gateways that are not running yet. Raises LabError."""
        failures: list[LabError] = []

        async def start_one(mesh: Mesh) -> None:
            try:
                await mesh.start()
            except LabError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for mesh in self.meshes.values():
                nursery.start_soon(start_one, mesh)
        if failures:
            raise failures[0]

    def publish(self) -> None:
        """Give all proxies their current directory."""
        for mesh in self.meshes.values():
            mesh.publish()
