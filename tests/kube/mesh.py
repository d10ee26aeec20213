"""Pods with the sidecar on a cluster with the control plane, by the manifests of deploy/kubernetes.

No directory file exists: the sidecars use the control plane. Certificates come from a root that the
test makes, by the control plane. Every sidecar requires identities (`require_identity`), so each response of a pod proves
that the request came with mutual TLS. Therefore readiness probes run inside of the pods."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from lab.kube.catalogue import APPS, WEB
from lab.kube.cluster import Cluster
from tests.kube.kit import inside

MANIFESTS = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
SPACE = "shop"
Json = dict[str, Any]


def manifests(file: str) -> list[Json]:
    """The documents of a file of deploy/kubernetes."""
    text = (MANIFESTS / file).read_text()
    return [msgspec.yaml.decode(document) for document in text.split("\n---\n")]


def web(name: str = "web") -> Json:
    """The container of the image `web`. It serves for some seconds after its SIGTERM, because
    requests still arrive in this time."""
    return {
        "name": name,
        "image": WEB,
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {
            "exec": {"command": ["curl", "-fs", "-o", "/dev/null", "http://127.0.0.1:8080/"]},
            "periodSeconds": 2,
        },
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "5"]}}},
        "securityContext": _RESTRICTED,
    }


def apps(name: str, *command: str, ready: str = "true") -> Json:
    """A container of the image `apps`, with a directory /work. `ready`: a shell command."""
    return {
        "name": name,
        "image": APPS,
        "command": list(command),
        "readinessProbe": {
            "exec": {"command": ["sh", "-c", ready]},
            "periodSeconds": 2,
            "timeoutSeconds": 5,
        },
        "volumeMounts": [{"name": "work", "mountPath": "/work"}],
        "securityContext": _RESTRICTED,
    }


_RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod(name: str, container: Json, account: str = "web") -> Json:
    """The pod of pod.yaml with another application, as the template of a Deployment."""
    (found,) = manifests("pod.yaml")
    spec = found["spec"]
    spec["serviceAccountName"] = account
    spec["containers"] = [container]
    spec["volumes"].append({"name": "work", "emptyDir": {}})
    labels = {**found["metadata"]["labels"], "app": name}
    return {"metadata": {"labels": labels}, "spec": spec}


def deployment(name: str, template: Json, replicas: int = 1) -> Json:
    """A Deployment of a pod, which never has fewer ready pods than `replicas`."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": SPACE},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "strategy": {"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 0}},
            "template": template,
        },
    }


def service(name: str, app: str, *ports: Json, headless: bool = False) -> Json:
    """A Service of a Deployment."""
    spec: Json = {"selector": {"app": app}, "ports": list(ports)}
    if headless:
        spec["clusterIP"] = "None"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": SPACE},
        "spec": spec,
    }


async def apply(west: Cluster, documents: Iterable[Json]) -> None:
    """Apply objects."""
    await west.apply("\n---\n".join(json.dumps(document) for document in documents))


async def rolled_out(west: Cluster, name: str, timeout: float = 240.0) -> None:
    """Wait until a Deployment has all its pods of its newest template, and no others."""
    words = ("rollout", "status", f"deployment/{name}", f"--timeout={timeout:g}s")
    await west.kubectl("--namespace", SPACE, *words, timeout=timeout + 10)


async def pods_of(west: Cluster, app: str) -> dict[str, Json]:
    """The pods of a Deployment that are not terminating, by name."""
    found = await west.get("--namespace", SPACE, "pods", "--selector", f"app={app}")
    return {
        one["metadata"]["name"]: one
        for one in found["items"]
        if "deletionTimestamp" not in one["metadata"]
    }


@dataclass
class Load:
    """A steady load of HTTP requests from a pod with the sidecar: see lab/apps/load.py."""

    west: Cluster
    name: str = "load"

    async def start(self, *urls: str, clients: int = 4, pause: float = 0.05) -> None:
        """Start the pod, and wait for its first responses."""
        command = ("python", "-m", "lab.apps.load", "/work", str(clients), str(pause), *urls)
        template = pod(self.name, apps("load", *command), "client")
        template["metadata"] |= {"name": self.name, "namespace": SPACE}
        await apply(self.west, [{"apiVersion": "v1", "kind": "Pod", **template}])
        await self.west.wait("--namespace", SPACE, f"pod/{self.name}", "--for=condition=Ready")
        await self.more(10)

    async def report(self) -> Json:
        """The results so far."""
        text = await inside(
            self.west, SPACE, f"pod/{self.name} --container=load", "cat", "/work/report.json"
        )
        found: Json = json.loads(text)
        return found

    async def more(self, requests: int, timeout: float = 60.0) -> Json:
        """Wait for so many more requests. Returns the report."""
        wanted = 0
        with trio.fail_after(timeout):
            while True:
                done = await self.west.kubectl(
                    "--namespace",
                    SPACE,
                    "exec",
                    self.name,
                    "--container=load",
                    "--",
                    "cat",
                    "/work/report.json",
                    check=False,
                )
                if done.ok:
                    found: Json = json.loads(done.stdout)
                    wanted = wanted or found["requests"] + requests
                    if found["requests"] >= wanted:
                        return found
                await trio.sleep(0.5)
