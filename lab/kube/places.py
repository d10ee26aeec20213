"""Where the test cluster keeps what it builds, and which versions there are."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from lab.process import LabError

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
VERSIONS = ("1.37", "1.34")  # the newest comes first
ENV_VERSION = "KUBERNETES"


def cache() -> Path:
    """The directory of everything that is built once: ${XDG_CACHE_HOME:-~/.cache}/isthmus-kube."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home, "isthmus-kube")


def chosen() -> str:
    """The version of Kubernetes that the environment asks for; the newest by default. Raises
    LabError for one that there is not."""
    version = os.environ.get(ENV_VERSION) or VERSIONS[0]
    if version not in VERSIONS:
        raise LabError(f"{ENV_VERSION}={version}: there are {' and '.join(VERSIONS)}")
    return version


@dataclass(frozen=True, slots=True)
class Modules:
    """The list of Go modules that a version is built from: go.mod for the newest, VERSION.mod for
    others."""

    version: str

    @property
    def file(self) -> Path:
        """The list. Its hashes are in the same directory, as NAME.sum."""
        return HERE / "go" / ("go.mod" if self.version == VERSIONS[0] else f"{self.version}.mod")

    def key(self, flags: str) -> str:
        """A hash of all that a build depends on: the modules with their hashes, our own sources,
        and the flags of the compiler."""
        digest = hashlib.sha256(flags.encode())
        for file in (
            self.file,
            self.file.with_suffix(".sum"),
            *sorted((HERE / "go").rglob("*.go")),
        ):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    def required(self, module: str) -> str:
        """The version of a module in the list. Raises LabError when it is not there."""
        for line in self.file.read_text().splitlines():
            words = line.split()
            if words[:1] == [module] and len(words) >= 2:
                return words[1]
        raise LabError(f"{self.file}: {module} is not listed")
