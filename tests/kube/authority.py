"""A trust root of the test, and the Secrets with certificates from it."""

from __future__ import annotations

import base64
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def isthmus(*arguments: str) -> None:
    """Run the command line."""
    command = [sys.executable, "-m", "proxy.cli", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@dataclass
class Authority:
    """A trust root in a directory, which issues certificates by the commands that config.yaml
    names."""

    folder: Path

    def secret(self, namespace: str, account: str) -> Json:
        """The Secret of a service account, with a new certificate."""
        root, out = self.folder / "root", self.folder / f"{namespace}-{account}"
        if not root.exists():
            isthmus("identity", "root", "--trust-domain", "cluster.local", "--out", str(root))
        names = ["--namespace", namespace, "--service-account", account]
        isthmus("identity", "issue", "--root", str(root), *names, "--out", str(out))
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": f"isthmus-identity-{account}", "namespace": namespace},
            "data": {
                file.name: base64.b64encode(file.read_bytes()).decode() for file in out.iterdir()
            },
        }
