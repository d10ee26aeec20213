"""What the tests on Kubernetes share: manifests as texts, and requests from within pods."""

from __future__ import annotations

import json
from typing import Any

import trio

from lab.kube.cluster import Cluster
from lab.process import LabError


def web(name: str = "web", replicas: int = 1) -> str:
    """A Deployment of the image `web`, and its Service at port 80."""
    return f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
        - name: web
          image: web:1.0
          ports: [{{name: http, containerPort: 8080}}]
          readinessProbe: {{httpGet: {{path: /, port: http}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  selector: {{app: {name}}}
  ports: [{{name: http, port: 80, targetPort: http}}]
"""


async def deploy(cluster: Cluster, namespace: str, name: str = "web", replicas: int = 1) -> None:
    """Deploy `web` and wait until every replica is ready, and the Service has them as endpoints."""
    await cluster.apply(web(name, replicas), namespace)
    await cluster.wait("--namespace", namespace, f"deployment/{name}", "--for=condition=Available")
    await cluster.wait(
        "--namespace", namespace, "pod", "--selector", f"app={name}", "--for=condition=Ready"
    )


async def inside(
    cluster: Cluster, namespace: str, pod: str, *command: str, check: bool = True
) -> str:
    """The output of a command in a pod (`pod/NAME`, `deployment/NAME`, or with a container:
    `pod/NAME --container=NAME` as two words)."""
    done = await cluster.kubectl(
        "--namespace", namespace, "exec", *pod.split(), "--", *command, check=check
    )
    return done.text if done.ok else done.text + done.stderr.decode(errors="replace")


async def ask(cluster: Cluster, namespace: str, pod: str, url: str) -> dict[str, Any]:
    """What the image `web` answers to a GET by curl in a pod. Raises LabError for anything but a
    200."""
    text = await inside(
        cluster,
        namespace,
        pod,
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--max-time",
        "10",
        url,
    )
    answer = json.loads(text)
    assert isinstance(answer, dict)
    return answer


async def eventually(
    cluster: Cluster, namespace: str, pod: str, url: str, timeout: float = 30.0
) -> dict[str, Any]:
    """`ask` until it succeeds: the rules of kube-proxy follow the endpoints a moment later. Raises
    LabError after `timeout` seconds."""
    end = trio.current_time() + timeout
    while True:
        try:
            return await ask(cluster, namespace, pod, url)
        except LabError:
            if trio.current_time() > end:
                raise
        await trio.sleep(0.2)
