"""Discovery of a real cluster's objects. Slices are written by its controllers; pods are not
started, and their status is written by the test."""

from __future__ import annotations

import trio

from control.contract import SpiffeId
from control.discovery.catalog import Catalog, Changes
from control.discovery.discovery import Discovery
from control.discovery.entries import ServiceEntry
from control.kube.objects import Pod
from control.kube.resources import PODS, SERVICES
from tests.kube.stage import REAL_NODES, RealStage


class Reports:
    """What discovery reports about one service."""

    def __init__(self, stage: RealStage) -> None:
        self.discovery = Discovery(stage.client, Catalog("test.local"), self._tell)
        self._key = stage.namespace, "web"
        self._more = trio.Event()

    def _tell(self, _: Changes) -> None:
        self._more.set()
        self._more = trio.Event()

    async def until(self, endpoints: dict[str, tuple[SpiffeId | None, str]]) -> ServiceEntry:
        """`endpoints`: identity and state for each address."""
        with trio.fail_after(60):
            while True:
                entry = self.discovery.catalog.services.get(self._key)
                if (
                    entry is not None
                    and {found.address: (found.identity, found.state) for found in entry.endpoints}
                    == endpoints
                ):
                    return entry
                await self._more.wait()


async def run_pod(stage: RealStage, name: str, ip: str, **labels: str) -> Pod:
    """A pod that is ready by its status."""
    container = {
        "name": "c",
        "image": "web:1.0",
        "ports": [{"name": "http", "containerPort": 8080}],
    }
    spec = {"nodeName": stage.namespace, "containers": [container]}
    meta = {"name": name, "namespace": stage.namespace, "labels": {"app": "web", **labels}}
    made = await stage.client.apply(
        PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}, "tests"
    )
    conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]
    status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}
    return await stage.client.patch(PODS, made, {"status": status}, "status")


async def test_a_service_follows_its_pods(stage: RealStage, nursery: trio.Nursery) -> None:
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": stage.namespace, "labels": {"topology.kubernetes.io/zone": "west-1"}},
    }
    made = await stage.client.apply(
        REAL_NODES, node, "tests"
    )  # a slice has pods of nodes that exist only
    reports = Reports(stage)
    nursery.start_soon(reports.discovery.run)
    spec = {
        "selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": "http", "appProtocol": "http"}],
    }
    meta = {"name": "web", "namespace": stage.namespace}
    await stage.client.apply(
        SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}, "tests"
    )
    await reports.until({})
    ours = SpiffeId("test.local", stage.namespace, "default")
    meshed = await run_pod(stage, "a", "10.244.77.1", **{"isthmus.dev/meshed": "true"})
    await reports.until({"10.244.77.1": (ours, "ready")})
    await run_pod(stage, "b", "10.244.77.2")
    entry = await reports.until({"10.244.77.1": (ours, "ready"), "10.244.77.2": (None, "ready")})
    assert len(entry.addresses) == 1
    assert [found.zone for found in entry.endpoints] == ["west-1"] * 2
    assert [(port.port, port.protocol) for port in entry.ports] == [(80, "http1")]
    assert [found.ports for found in entry.endpoints] == [((80, 8080),)] * 2
    assert reports.discovery.catalog.pods["10.244.77.1"].identity == ours
    await stage.client.delete(PODS, meshed)
    # Without a kubelet the pod never disappears; it is terminating, and may still serve.
    await reports.until({"10.244.77.1": (ours, "draining"), "10.244.77.2": (None, "ready")})
    await stage.client.delete(REAL_NODES, made)
    nursery.cancel_scope.cancel()
