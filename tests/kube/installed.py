"""The control plane on a cluster, by deploy/kubernetes/control.yaml."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from lab.kube.cluster import Cluster
from lab.process import LabError
from tests.kube.authority import Authority

MANIFEST = Path(__file__).parent.parent.parent / "deploy" / "kubernetes" / "control.yaml"
NAMESPACE = "isthmus"
CONTROL = "isthmus-control"


async def documents(folder: Path) -> list[dict[str, Any]]:
    """The objects of the manifest, and the issuer and the trust roots that it needs, by the root in
    `folder`."""
    namespace, *others = (
        msgspec.yaml.decode(text) for text in MANIFEST.read_text().split("\n---\n")
    )
    authority = Authority(folder)
    issuer = await trio.to_thread.run_sync(authority.issuer, NAMESPACE)
    return [namespace, issuer, authority.roots(NAMESPACE), *others]


def joined(found: Sequence[dict[str, Any]]) -> str:
    """Documents as one text."""
    return "\n---\n".join(json.dumps(one) for one in found)


@asynccontextmanager
async def removed(west: Cluster) -> AsyncIterator[None]:
    """The objects of the manifest do not outlive the test."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await west.kubectl(
                "delete", "--ignore-not-found", "-f", "-", stdin=MANIFEST.read_text(), timeout=150
            )


@dataclass
class Installed:
    """The control plane on a cluster."""

    west: Cluster

    async def kubectl(self, *words: str, **more: Any) -> str:
        return (await self.west.kubectl("--namespace", NAMESPACE, *words, **more)).text

    async def pods(self) -> dict[str, dict[str, Any]]:
        """The pods that are not terminating, by name."""
        found = await self.west.get("--namespace", NAMESPACE, "pods")
        return {
            pod["metadata"]["name"]: pod
            for pod in found["items"]
            if "deletionTimestamp" not in pod["metadata"]
        }

    async def available(self) -> None:
        """Wait until all replicas are ready."""
        await self.kubectl(
            "rollout", "status", f"deployment/{CONTROL}", "--timeout=90s", timeout=100
        )

    async def lease(self) -> dict[str, Any]:
        found = await self.west.get("--namespace", NAMESPACE, "lease", CONTROL)
        spec: dict[str, Any] = found["spec"]
        return spec

    async def leader(self, but: str = "", timeout: float = 60.0) -> str:
        """Wait until a pod that is not `but` holds the lease. Returns its name."""
        with trio.fail_after(timeout):
            while True:
                done = await self.west.kubectl(
                    "--namespace", NAMESPACE, "get", "lease", CONTROL, "-o", "json", check=False
                )
                holder = json.loads(done.stdout)["spec"]["holderIdentity"] if done.ok else ""
                if holder not in ("", but):
                    return str(holder)
                await trio.sleep(0.1)

    async def metrics(self, pod: str) -> dict[str, float]:
        """The metrics of a replica, by name with labels."""
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}:4191/proxy/metrics"
        lines = (await self.kubectl("get", "--raw", path)).splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if not line.startswith("#")
        }

    async def leading(self) -> dict[str, float]:
        """The metric isthmus_control_leading of each replica."""
        return {
            pod: (await self.metrics(pod))["isthmus_control_leading"] for pod in await self.pods()
        }

    async def until_one_leads(self, timeout: float = 60.0) -> str:
        """Wait until exactly one replica reports that it leads, and the Lease names it."""
        with trio.fail_after(timeout):
            while True:
                with suppress(LabError):  # a pod that starts or ends
                    leading = [pod for pod, leads in (await self.leading()).items() if leads]
                    if leading == [(await self.lease())["holderIdentity"]]:
                        return leading[0]
                await trio.sleep(0.2)

    async def log(self, pod: str, *words: str) -> str:
        return await self.kubectl("logs", pod, *words)

    async def until_logged(self, pattern: str, timeout: float = 90.0) -> str:
        """Wait until each replica has logged a line that matches. Returns one of them."""
        with trio.fail_after(timeout):
            while True:
                with suppress(LabError):  # a container that has not started yet
                    texts = [await self.log(pod) for pod in await self.pods()]
                    lines = [found.group() for text in texts if (found := re.search(pattern, text))]
                    if lines and len(lines) == len(texts):
                        return lines[0]
                await trio.sleep(0.2)

    async def signal(self, pod: str, name: str) -> None:
        """Send a signal to the process of a replica."""
        label = f"io.kubernetes.pod.name={pod}"
        script = (
            f"kill -{name} $(crictl inspect --output go-template --template '{{{{.info.pid}}}}'"
            f" $(crictl ps --quiet --label {label}))"
        )
        await self.west.enter("sh", "-ec", script)
