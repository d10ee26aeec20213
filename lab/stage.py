"""Shared by the parts of the demonstration: its pods and programs, and the description of client
results.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from lab.cluster import Cluster, Lab
from lab.mesh import Mesh
from lab.pod import PACKAGES, Pod
from lab.report import Report
from lab.sidecar import Sidecar
from lab.traces import TraceCollector

SECRET = "the-password-is-tangerine"  # noqa: S105  # must not be visible on the wire
HTTP, PLAIN, SOCKET, MAIL, GRPC = 8080, 8081, 9000, 2525, 50051


@dataclass(slots=True)
class Stage:
    """The pods of the demonstration."""

    lab: Lab
    west: Cluster
    mesh: Mesh
    report: Report
    web: Pod
    shop: Pod
    annex: Pod  # a second pod of the shop, under the same service account
    stranger: Pod
    size: int
    collectors: list[TraceCollector] = field(
        default_factory=list
    )  # one in each cluster: they share nothing
    sidecars: dict[str, Sidecar] = field(default_factory=dict)
    # port -> the SNI values seen on the wire
    server_names: dict[int, set[str]] = field(default_factory=dict)

    async def client(self, pod: Pod, what: str, host: str, port: int, *rest: str) -> dict[str, Any]:
        """Run an ordinary client in a pod; returns its result."""
        command = [sys.executable, "-m", "lab.apps.client", what, host, str(port), *rest]
        done = await pod.run(command, env=PACKAGES, timeout=60)
        try:
            result: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            return {
                "error": (
                    done.stderr.decode(errors="replace").strip()[-300:]
                    or f"exit code {done.returncode}"
                )
            }
        return result

    async def server(self, pod: Pod, name: str, *arguments: str, port: int) -> None:
        """Start an ordinary server in a pod."""
        command = [sys.executable, "-m", f"lab.apps.{name.partition('-')[0]}", *arguments]
        await pod.start(name, command, port=port, env=PACKAGES)


def why(answer: dict[str, Any], held: bool) -> str:
    """What the client saw, if the proof did not hold."""
    if held:
        return ""
    shown = {key: value for key, value in answer.items() if key != "peak_rss"}
    return f"- the client saw {json.dumps(shown)[:200]}"


def error_type(proxy_status: str) -> str:
    """The error type of a Proxy-Status field (RFC 9209)."""
    return next(
        (part[6:] for part in proxy_status.split(";") if part.startswith("error=")), proxy_status
    )
