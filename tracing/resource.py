"""The resource of all spans of a proxy: pod, workload, cluster, node, process and service.

Labels and annotations can change while a pod runs. Then Kubernetes rewrites the files of the
downward-API volume. The resource always has the current values; without a change this costs two
stat calls.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tracing.pod import FILES, pod_attributes
from tracing.workload import ANNOTATION, owner, service

Value = str | int

_LABEL = "k8s.pod.label."


@dataclass(frozen=True, slots=True)
class About:
    """What is known about the proxy before any file is read.

    `environ`: the environment, with variables of the downward API (pod.VARIABLES). `given`:
    configured attributes, which override all others.
    """

    environ: Mapping[str, str]
    cluster: str = ""
    directory: Path | None = None
    service_name: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    labels: bool = False  # use the app.kubernetes.io labels instance, name and version
    version: str = ""


class Resource:
    """The current attributes.

    `warn` is called once for each problem; then attributes are missing.
    """

    def __init__(self, about: About, warn: Callable[[str], None]) -> None:
        self._about = about
        self._warn = warn
        self._stamp: object = None
        self._warned: str | None = None
        self._attributes: dict[str, Value] = {}

    def attributes(self) -> Mapping[str, Value]:
        """The attributes; the same object until something changes. For use by one thread."""
        stamp = self._stamps()
        if not self._attributes or stamp != self._stamp:
            self._stamp = stamp
            self._attributes = self._read()
        return self._attributes

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Values that change with the files.

        Kubernetes replaces their directory by renaming a link, so the inode changes.
        """
        if self._about.directory is None:
            return ()
        found: list[tuple[int, int, int] | None] = []
        for name in FILES:
            try:
                stat = Path(self._about.directory, name).stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return tuple(found)

    def _read(self) -> dict[str, Value]:
        about = self._about
        pod, warning = pod_attributes(about.environ, about.directory)
        if warning is not None and warning != self._warned:
            self._warn(warning)
        self._warned = warning
        labels = {
            key.removeprefix(_LABEL): value for key, value in pod.items() if key.startswith(_LABEL)
        }
        pod |= owner(pod.get("k8s.pod.name", ""), labels)
        if about.cluster:
            pod["k8s.cluster.name"] = about.cluster
        pod |= service(pod, labels=about.labels)
        pod = {
            key: value
            for key, value in pod.items()
            if not key.startswith(f"k8s.pod.annotation.{ANNOTATION}")
        }
        pod.setdefault("host.name", platform.node())
        found: dict[str, Value] = {**pod, **_process(about.version), **about.given}
        if about.service_name:
            found["service.name"] = about.service_name
        return found


def _process(version: str) -> dict[str, Value]:
    found: dict[str, Value] = {
        "host.arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(
            platform.machine(), platform.machine()
        ),
        "process.pid": os.getpid(),
        "process.executable.name": Path(sys.executable).name,
        "process.runtime.name": sys.implementation.name,
        "process.runtime.version": platform.python_version(),
        "telemetry.distro.name": "isthmus",
    }
    return found | ({"telemetry.distro.version": version} if version else {})
