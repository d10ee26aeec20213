"""The control plane in a cluster of the lab: an in-memory API server, and `isthmus control`.

The API server runs in this process and listens on loopback in the pod of the control plane. It has
the objects that Kubernetes would have for the mesh's pods and services.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import trio
import yaml

from lab.kube_api.server import ApiServer
from lab.kube_api.store import KINDS, Json, Kind, Problem
from lab.mesh import Mesh, Service
from lab.network import open_socket
from lab.pod import PACKAGES, Pod
from lab.process import Process
from lab.sidecar import Member, Sidecar

PORT: Final = 4190
ADMIN: Final = 4191
API: Final = 6443
NODE: Final = "node-1"
_POD, _SERVICE, _SLICE, _NODE = (
    KINDS["v1", "pods"],
    KINDS["v1", "services"],
    KINDS["discovery.k8s.io/v1", "endpointslices"],
    KINDS["v1", "nodes"],
)


@dataclass(slots=True)
class ControlPlane:
    """One replica in `pod`, which must have no sidecar. `start` before the mesh's sidecars."""

    mesh: Mesh
    pod: Pod
    api: ApiServer = field(init=False)
    member: Member = field(init=False)
    process: Process | None = None
    _listener: socket.socket | None = None

    def __post_init__(self) -> None:
        self.api = ApiServer(self.pod.cluster.lab.nursery)
        identity = self.mesh.authority.identity("isthmus-control", "isthmus")
        self.member = Member(self.pod, self.mesh.authority, identity)

    def settings(self, **more: Any) -> dict[str, Any]:
        """Settings of a sidecar that has its directory from here."""
        control = {
            "address": f"{self.pod.ipv4}:{PORT}",
            "identity": str(self.member.identity),
            "min_pause": "100ms",
            "max_pause": "1s",
            **more,
        }
        return {"directory": {"file": None, "control": control}, "pod": {"node": NODE}}

    async def start(self) -> None:
        """Start the API server and a replica; wait until it serves proxies."""
        if self._listener is None:
            self._listener = open_socket(self.pod.netns, socket.AF_INET, socket.SOCK_STREAM)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(("127.0.0.1", API))
            self._listener.listen(64)
            serving = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
            self.pod.cluster.lab.nursery.start_soon(trio.serve_listeners, self.api.serve, [serving])
            self.publish()
        folder = self.member.directory
        folder.mkdir(exist_ok=True)
        if self.member.identity is not None:
            self.member.write_certificate(self.mesh.authority.issue(self.member.identity))
        self.member.write_roots(self.mesh.authority)
        self.member.write(folder / "kubeconfig", yaml.safe_dump(_kubeconfig()).encode())
        command = [sys.executable, "-m", "proxy.cli", "control"]
        command += ["--kubeconfig", str(folder / "kubeconfig"), "--name", "control-0"]
        command += ["--admin", f"127.0.0.1:{ADMIN}", "--log-level", "debug"]
        command += ["--certificate", str(folder / "certificate.pem")]
        command += ["--key", str(folder / "key.pem"), "--roots", str(folder / "roots.pem")]
        self.process = await self.pod.start("control", command, port=PORT, env=PACKAGES)

    async def stop(self) -> None:
        """Kill the replica."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()

    # Objects

    def publish(self) -> None:
        """Write the objects of all pods and services of the mesh."""
        self.put(_NODE, {"metadata": {"name": NODE}})
        for sidecar in self.mesh.sidecars.values():
            self.put(_POD, pod_object(sidecar))
        for service in self.mesh.services.values():
            self.put(_SERVICE, service_object(service))
            self.put_slices(service)

    def put_slices(self, service: Service) -> None:
        """Write the slices of a service, with the endpoints that it has now."""
        for family in ("IPv4", "IPv6"):
            self.put(_SLICE, slice_object(service, family))

    def put(self, kind: Kind, item: Json) -> None:
        """Create or replace an object."""
        meta = item["metadata"]
        namespace = "default" if kind.namespaced else ""
        try:
            self.api.store.update(
                kind,
                (namespace, meta["name"]),
                lambda old: {**item, "metadata": {**old["metadata"], **meta}},
            )
        except Problem:
            self.api.store.create(kind, namespace, item)

    def remove(self, kind: Kind, name: str) -> None:
        """Delete an object, if there is one."""
        with contextlib.suppress(Problem):
            self.api.store.delete(kind, ("default" if kind.namespaced else "", name))


def pod_object(sidecar: Sidecar) -> Json:
    """The pod of a sidecar."""
    pod, identity = sidecar.pod, sidecar.identity
    labels = {"isthmus.dev/meshed": "true"} if identity is not None else {}
    account = identity.service_account if identity is not None else pod.name
    return {
        "metadata": {"name": pod.name, "labels": labels},
        "spec": {"serviceAccountName": account, "nodeName": NODE},
        "status": {"phase": "Running", "podIPs": [{"ip": pod.ipv4}, {"ip": pod.ipv6}]},
    }


def service_object(service: Service) -> Json:
    """A service with cluster addresses; without them if its trait `headless` is set."""
    addresses = ["None"] if service.traits.get("headless") else [service.ipv4, service.ipv6]
    ports = [
        {
            "name": f"p{port}",
            "port": port,
            "protocol": "TCP",
            "targetPort": port,
            **({"appProtocol": "kubernetes.io/h2c"} if hint == "http2" else {}),
        }
        for port, hint in service.ports.items()
    ]
    opaque = ",".join(str(port) for port, hint in service.ports.items() if hint == "opaque")
    return {
        "metadata": {
            "name": service.name,
            "annotations": {"isthmus.dev/opaque-ports": opaque} if opaque else {},
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ports": ports,
            "selector": {"app": service.name},
        },
    }


def slice_object(service: Service, family: str) -> Json:
    """The endpoints of one address family."""
    return {
        "metadata": {
            "name": f"{service.name}-{family.lower()}",
            "labels": {"kubernetes.io/service-name": service.name},
        },
        "addressType": family,
        "endpoints": [
            {
                "addresses": [pod.ipv6 if family == "IPv6" else pod.ipv4],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": NODE,
                "targetRef": {"kind": "Pod", "name": pod.name, "namespace": "default"},
            }
            for pod in service.pods
        ],
        "ports": [{"name": f"p{port}", "port": port, "protocol": "TCP"} for port in service.ports],
    }


def _kubeconfig() -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {"server": f"http://127.0.0.1:{API}"}}],
        "users": [{"name": "lab", "user": {}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
    }
