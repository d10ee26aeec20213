"""Pods with the sidecar and a control plane, without a directory file: see mesh.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lab.kube.cluster import Cluster
from lab.process import LabError
from tests.kube import mesh
from tests.kube.authority import Authority
from tests.kube.installed import Installed, documents, removed
from tests.kube.kit import ask, inside
from tests.kube.mesh import SPACE, Load, apply, deployment, pod, pods_of, rolled_out

HTTP = {"name": "http", "port": 80, "targetPort": "http", "appProtocol": "http"}
REPLICAS = 10


@dataclass
class Mesh:
    """The control plane, and the namespace of the applications."""

    west: Cluster
    control: Installed

    async def ask(self, url: str, frm: str = "deployment/client --container=client") -> str:
        """The name of the pod that answers a GET from a pod with the sidecar."""
        return str((await ask(self.west, SPACE, frm, url))["pod"])

    async def proxies(self, count: int, timeout: float = 120.0) -> None:
        """Wait until so many proxies are connected to the control plane."""
        name, connected = "isthmus_control_proxies", 0.0
        with trio.fail_after(timeout):
            while connected != count:
                await trio.sleep(0.5)
                with suppress(LabError):  # a replica that starts
                    replicas = await self.control.pods()
                    connected = sum([(await self.control.metrics(one))[name] for one in replicas])

    async def run(self, *command: str) -> str:
        """The output of a command in the client."""
        where = "deployment/client --container=client"
        return await inside(self.west, SPACE, where, *command)


@asynccontextmanager
async def installed(west: Cluster, folder: Path) -> AsyncIterator[Mesh]:
    """Install the control plane, and what pods with the sidecar need in the namespace `shop`."""
    authority = Authority(folder)
    shop = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}}
    config = mesh.manifests("config.yaml")
    for document in config:
        if document["kind"] == "ConfigMap":
            settings = document["data"]["isthmus.yaml"]
            assert "default: false" in settings
            document["data"]["isthmus.yaml"] = settings.replace("default: false", "default: true")
    async with removed(west):
        try:
            await apply(west, [*await documents(folder), shop])
            account = {"apiVersion": "v1", "kind": "ServiceAccount"}
            accounts = [
                {**account, "metadata": {"name": name, "namespace": SPACE}}
                for name in ("web", "client")
            ]
            await apply(west, [*accounts, authority.roots(SPACE), *config])
            control = Installed(west)
            await control.available()
            yield Mesh(west, control)
        finally:
            with trio.CancelScope(shield=True):
                await west.kubectl(
                    "delete",
                    "namespace",
                    SPACE,
                    "--ignore-not-found",
                    "--timeout=120s",
                    timeout=130,
                )


async def client(west: Cluster) -> None:
    """A pod from which the test sends requests."""
    container = mesh.apps("client", "sleep", "infinity")
    await apply(west, [deployment("client", pod("client", container, "client"))])


@pytest.mark.own_cluster
async def test_pods_call_each_other_in_every_way(west: Cluster, tmp_path: Path) -> None:
    async with installed(west, tmp_path) as found:
        grpc = mesh.apps(
            "grpc", "python", "-m", "lab.apps.grpc_service", "50051", "grpc", ready="exit 0"
        )
        database = mesh.apps(
            "database",
            "/srv/lab/apps/database",
            "/work/data",
            ready="PGPASSWORD=tangerine psql -h 127.0.0.1 -U tester -c 'select 1' postgres",
        )
        calls = {"name": "grpc", "port": 50051, "appProtocol": "kubernetes.io/h2c"}
        await client(west)
        await apply(
            west,
            [
                deployment("web", pod("web", mesh.web()), replicas=2),
                deployment("grpc", pod("grpc", grpc)),
                deployment("database", pod("database", database)),
                mesh.service("web", "web", HTTP),
                mesh.service("each", "web", {"port": 8080}, headless=True),
                mesh.service("grpc", "grpc", calls),
                mesh.service("database", "database", {"port": 5432}),
            ],
        )
        for name in ("client", "web", "grpc", "database"):
            await rolled_out(west, name)
        pods = await pods_of(west, "web")

        # By the name of the Service: both pods answer.
        with trio.fail_after(60):
            answered: set[str] = set()
            while answered != set(pods):
                answered.add(await found.ask("http://web/"))
        # By the name of a headless Service, and by the addresses of the pods.
        assert await found.ask(f"http://each.{SPACE}.svc.cluster.local:8080/") in pods
        for name, one in pods.items():
            for address in (entry["ip"] for entry in one["status"]["podIPs"]):
                host = f"[{address}]" if ":" in address else address
                assert await found.ask(f"http://{host}:8080/") == name

        code = "import json; from lab.apps.grpc_client import kinds; print(json.dumps(kinds('grpc', 50051, 'secret')))"
        kinds = json.loads(await found.run("python", "-c", code))
        assert kinds == {"unary": True, "server": True, "client": True, "both": True}

        target = "host=database user=tester password=tangerine dbname=postgres sslmode=disable"
        rows = await found.run("psql", target, "-Atc", "select sum(n) from generate_series(1, 9) n")
        assert rows.strip() == "45"

        # A client without the sidecar is refused: identities are required.
        plain = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "plain", "namespace": SPACE},
        }
        container = {**mesh.web("plain"), "lifecycle": {}}
        await apply(west, [{**plain, "spec": {"containers": [container]}}])
        await west.wait("--namespace", SPACE, "pod/plain", "--for=condition=Ready")
        refused = await inside(
            west,
            SPACE,
            "pod/plain",
            *("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://web/"),
        )
        assert refused == "403"


@pytest.mark.own_cluster
async def test_nothing_is_lost_in_a_rolling_update_and_while_the_api_server_or_the_control_plane_is_away(
    west: Cluster, tmp_path: Path
) -> None:
    async with installed(west, tmp_path) as found:
        await apply(
            west,
            [
                deployment("web", pod("web", mesh.web()), REPLICAS),
                mesh.service("web", "web", HTTP),
            ],
        )
        await rolled_out(west, "web")
        load = Load(west)
        await load.start("http://web/")

        before = set(await pods_of(west, "web"))
        await west.kubectl("--namespace", SPACE, "rollout", "restart", "deployment/web")
        await rolled_out(west, "web", timeout=420)
        after = set(await pods_of(west, "web"))
        assert len(after) == REPLICAS
        assert not before & after
        report = await load.more(200)
        assert (report["failed"], report["failures"]) == (0, []), report
        assert set(report["by"]) >= after

        # The API server is away for a minute.
        await west.stop("kube-apiserver")
        try:
            await trio.sleep(60)
        finally:
            with trio.move_on_after(30, shield=True):
                await west.start("kube-apiserver")
        await west.until("the API is ready", "get", "--raw", "/readyz")
        report = await load.more(200)
        assert (report["failed"], report["failures"]) == (0, []), report

        # All replicas of the control plane are killed at the same time.
        for replica in await found.control.pods():
            await found.control.signal(replica, "KILL")
        report = await load.more(200)
        assert (report["failed"], report["failures"]) == (0, []), report
        await found.proxies(REPLICAS + 1)

        # Afterwards, changes arrive again: the load reaches a new pod, and no removed one.
        await west.kubectl("--namespace", SPACE, "scale", "deployment/web", "--replicas=1")
        await west.kubectl("--namespace", SPACE, "rollout", "restart", "deployment/web")
        await rolled_out(west, "web")
        (last,) = await pods_of(west, "web")
        with trio.fail_after(60):
            while True:
                report = await load.more(20)
                if last in report["by"]:
                    break
        assert (report["failed"], report["failures"]) == (0, []), report
        assert report["again"] == 0
