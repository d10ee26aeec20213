"""The manifests of deploy/kubernetes on a real cluster: a pod with the sidecar starts in their
order, is ready, and uses mutual TLS.

There is no control plane here. The directory is a file in a ConfigMap, written by the test, in
place of `directory.control`, and the identity is a Secret, in place of `identity.control`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from lab.kube.cluster import Cluster
from tests.kube.authority import Authority
from tests.kube.kit import eventually, inside

MANIFESTS = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
SECRET = "/var/run/isthmus/roots"
IDENTITY = "spiffe://cluster.local/ns/shop/sa/web"
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
"""


def manifests(file: str) -> list[dict[str, Any]]:
    documents = (MANIFESTS / file).read_text().split("\n---\n")
    return [msgspec.yaml.decode(document) for document in documents]


@pytest.fixture
async def shop(west: Cluster, tmp_path: Path) -> AsyncIterator[str]:
    """The namespace that the manifests name, with the service account and the Secret."""
    await west.kubectl("create", "namespace", "shop")
    try:
        await west.until(
            "service accounts are there", "--namespace", "shop", "get", "serviceaccount", "default"
        )
        secret = await trio.to_thread.run_sync(Authority(tmp_path).secret, "shop", "web")
        await west.apply(json.dumps(secret))
        yield "shop"
    finally:
        with trio.CancelScope(shield=True):
            await west.kubectl("delete", "namespace", "shop", "--timeout=90s")


async def configure(west: Cluster, services: list[dict[str, Any]]) -> None:
    """Apply config.yaml with a directory file of our own, and with the identity in files."""
    for document in manifests("config.yaml"):
        if document["kind"] == "ConfigMap":
            settings = msgspec.yaml.decode(document["data"]["isthmus.yaml"])
            settings["identity"] = {
                "certificate": f"{SECRET}/certificate.pem",
                "key": f"{SECRET}/key.pem",
                "roots": [f"{SECRET}/roots.pem"],
            }
            settings["directory"] = {"file": "/etc/isthmus/directory.yaml"}
            document["data"]["isthmus.yaml"] = json.dumps(settings)
            document["data"]["directory.yaml"] = json.dumps({"services": services})
        await west.apply(json.dumps(document))


async def start(west: Cluster, name: str) -> dict[str, Any]:
    """The pod of pod.yaml under a name, ready."""
    (pod,) = manifests("pod.yaml")
    pod["metadata"] |= {"name": name, "labels": {"app": name}}
    for volume in pod["spec"]["volumes"]:
        if volume["name"] == "roots":  # mounted at SECRET
            del volume["configMap"]
            volume["secret"] = {"secretName": "isthmus-identity-web", "defaultMode": 0o440}
    await west.apply(json.dumps(pod))
    await west.wait("--namespace", "shop", f"pod/{name}", "--for=condition=Ready")
    found: dict[str, Any] = await west.get("--namespace", "shop", "pod", name)
    return found


async def admin(west: Cluster, pod: str, path: str) -> str:
    """The response of the sidecar's admin port, requested from within the pod."""
    return await inside(
        west,
        "shop",
        f"pod/{pod} --container=web",
        "curl",
        "--silent",
        "--show-error",
        f"http://127.0.0.1:4191{path}",
    )


async def test_a_pod_with_the_sidecar_is_ready_and_calls_another_by_mutual_tls(
    west: Cluster, shop: str
) -> None:
    await west.apply(SERVICE, shop)
    address = (await west.get("--namespace", shop, "service", "web"))["spec"]["clusterIP"]
    await configure(west, [])
    server = await start(west, "web")
    status = {one["name"]: one for one in server["status"]["initContainerStatuses"]}
    assert status["isthmus-intercept"]["state"]["terminated"]["exitCode"] == 0
    assert status["isthmus"]["ready"]
    assert [one["restartCount"] for one in server["status"]["containerStatuses"]] == [0]
    assert "ready" in (await admin(west, "web", "/ready")).lower()
    # A directory in a ConfigMap reaches running pods after a minute or so: the client starts with
    # it.
    ports = [{"port": 80, "target_port": 8080, "protocol": "http1"}]
    endpoints = [{"address": one["ip"], "identity": IDENTITY} for one in server["status"]["podIPs"]]
    service = {
        "name": "web",
        "namespace": "shop",
        "addresses": [address],
        "ports": ports,
        "endpoints": endpoints,
    }
    await configure(west, [service])
    await start(west, "client")

    answer = await eventually(west, shop, "pod/client --container=web", "http://web/hello")
    assert (answer["pod"], answer["path"]) == ("web", "/hello")
    lines = (await admin(west, "web", "/metrics")).splitlines()
    secured = [
        line
        for line in lines
        if line.startswith("isthmus_tls_handshakes_total")
        and 'direction="inbound"' in line
        and 'result="ok"' in line
    ]
    assert len(secured) == 1
    assert 'version="TLSv1.3"' in secured[0]
    assert float(secured[0].split()[-1]) >= 1
    (built,) = [line for line in lines if line.startswith("isthmus_build_info")]
    assert "AWS-LC" in built
    assert IDENTITY in await west_log(west, "web")


async def west_log(west: Cluster, pod: str) -> str:
    """The sidecar's log."""
    return (await west.kubectl("--namespace", "shop", "logs", pod, "--container=isthmus")).text
