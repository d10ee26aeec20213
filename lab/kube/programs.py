"""Kubernetes and its tools, built from source by the Go module proxy. What is built, in which
versions and with which hashes, is in lab/kube/go.

From Debian come containerd, runc and the CNI plugins.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

from lab.kube.layers import prune
from lab.kube.places import VERSIONS, Modules, cache
from lab.process import LabError

# Of one program; a link for each (go/kube/main.go).
KUBE = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "etcd",
)
_TAGS = "netgo,osusergo,providerless,selinux_off"
_VERSION = "k8s.io/component-base/version"


def programs(version: str) -> Path:
    """The directory of the programs of a version, built when the list of modules has changed.
    Raises LabError."""
    newest = _built(VERSIONS[0], tools=True)
    return newest if version == VERSIONS[0] else _built(version, tools=False, beside=newest)


def _built(version: str, *, tools: bool, beside: Path | None = None) -> Path:
    modules = Modules(version)
    home = cache() / version
    final = home / modules.key(_TAGS)
    if not (final / ".ready").exists():
        final.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        _go(modules, "./kube", final / "kube", _stamp(modules))
        if tools:
            _go(modules, "./pause", final / "pause")
            _go(modules, "./coredns", final / "coredns")
            _go(modules, "sigs.k8s.io/cri-tools/cmd/crictl", final / "crictl")
            helm = (
                f"-X helm.sh/helm/v4/internal/version.version={modules.required('helm.sh/helm/v4')}"
            )
            _go(modules, "helm.sh/helm/v4/cmd/helm", final / "helm", helm)
        for name in KUBE:
            _link(final / name, Path("kube"))
        (final / ".ready").touch()
        print(
            f"Kubernetes {version} is built ({time.monotonic() - began:.0f} s): {final}", flush=True
        )
    if beside is not None:
        for name in ("pause", "coredns", "crictl", "helm"):
            _link(final / name, beside / name)
    os.utime(final)
    prune(home)
    return final


def _stamp(modules: Modules) -> str:
    """What `kubectl version` and the API say."""
    version = modules.required("k8s.io/kubernetes")
    major, minor, _ = version.removeprefix("v").split(".", 2)
    values = {
        "gitVersion": version,
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
    }
    return " ".join(f"-X {_VERSION}.{name}={value}" for name, value in values.items())


def _go(modules: Modules, package: str, target: Path, linker: str = "") -> None:
    if shutil.which("go") is None:
        raise LabError(
            "go is needed, 1.21 or newer (it fetches the version that go.mod asks for by itself)"
        )
    print(f"  go build {package}", flush=True)
    flags = [
        "-trimpath",
        "-buildvcs=false",
        f"-modfile={modules.file}",
        "-tags",
        _TAGS,
        "-ldflags",
        f"-s -w {linker}",
    ]
    command = ["go", "build", *flags, "-o", str(target), package]
    done = subprocess.run(
        command, cwd=modules.file.parent, env={**os.environ, "CGO_ENABLED": "0"}, check=False
    )
    if done.returncode != 0:
        raise LabError(f"go build {package} failed with {done.returncode}")


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)
