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
# The packages of the programs that every version shares. A program has the last name of its path.
_TOOLS = ("./pause", "./coredns", "sigs.k8s.io/cri-tools/cmd/crictl", "helm.sh/helm/v4/cmd/helm")
# Without debugging information: -w alone only keeps the linker from writing it.
_FLAGS = (
    "-trimpath",
    "-buildvcs=false",
    "-tags=netgo,osusergo,providerless,selinux_off",
    "-gcflags=all=-dwarf=false",
)
_VERSION = "k8s.io/component-base/version"


def programs(version: str) -> Path:
    """The directory of the programs of a version, built when the list of modules has changed.
    Raises LabError."""
    newest = _built(VERSIONS[0], tools=True)
    return newest if version == VERSIONS[0] else _built(version, tools=False, beside=newest)


def _built(version: str, *, tools: bool, beside: Path | None = None) -> Path:
    modules = Modules(version)
    home = cache() / version
    final = home / modules.key(" ".join(_FLAGS))
    if not (final / ".ready").exists():
        final.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        _go(modules, final, tools=tools)
        for name in KUBE:
            _link(final / name, Path("kube"))
        (final / ".ready").touch()
        print(
            f"Kubernetes {version} is built ({time.monotonic() - began:.0f} s): {final}", flush=True
        )
    if beside is not None:
        for tool in map(Path, _TOOLS):
            _link(final / tool.name, beside / tool.name)
    os.utime(final)
    prune(home)
    return final


def _stamp(modules: Modules, *, tools: bool) -> str:
    """What `kubectl version`, the API and `helm version` say, as flags of the linker."""
    version = modules.required("k8s.io/kubernetes")
    major, minor, _ = version.removeprefix("v").split(".", 2)
    values = {
        f"{_VERSION}.gitVersion": version,
        f"{_VERSION}.gitMajor": major,
        f"{_VERSION}.gitMinor": minor,
        f"{_VERSION}.gitTreeState": "clean",
        f"{_VERSION}.buildDate": "1970-01-01T00:00:00Z",
    }
    if tools:
        values["helm.sh/helm/v4/internal/version.version"] = modules.required("helm.sh/helm/v4")
    return " ".join(f"-X {name}={value}" for name, value in values.items())


def _go(modules: Modules, directory: Path, *, tools: bool) -> None:
    """Build the programs into a directory by one command, so that one is compiled while another is
    linked."""
    if shutil.which("go") is None:
        raise LabError(
            "go is needed, 1.21 or newer (it fetches the version that go.mod asks for by itself)"
        )
    packages = ["./kube", *(_TOOLS if tools else ())]
    print(f"  go build {' '.join(packages)}", flush=True)
    stamp = _stamp(modules, tools=tools)
    places = [f"-modfile={modules.file}", "-o", f"{directory}/"]
    command = ["go", "build", *_FLAGS, "-ldflags", f"-s -w {stamp}", *places, *packages]
    done = subprocess.run(
        command, cwd=modules.file.parent, env={**os.environ, "CGO_ENABLED": "0"}, check=False
    )
    if done.returncode != 0:
        raise LabError(f"go build failed with {done.returncode}")


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)
