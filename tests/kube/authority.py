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
    """A trust root in a directory, by the commands that control.yaml and gateway.yaml name."""

    folder: Path

    def root(self) -> Path:
        """The directory of the root, which is made at the first call."""
        root = self.folder / "root"
        if not root.exists():
            isthmus("identity", "root", "--trust-domain", "cluster.local", "--out", str(root))
        return root

    def issuer(self, namespace: str) -> Json:
        """The Secret of the issuer: the root itself."""
        root = self.root()
        names = {"tls.crt": "root.pem", "tls.key": "root.key"}
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {"name": "isthmus-issuer", "namespace": namespace},
            "data": {
                name: base64.b64encode((root / file).read_bytes()).decode()
                for name, file in names.items()
            },
        }

    def roots(self, namespace: str) -> Json:
        """The ConfigMap with the trust roots."""
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "isthmus-trust-roots", "namespace": namespace},
            "data": {"roots.pem": (self.root() / "root.pem").read_text()},
        }

    def secret(self, namespace: str, account: str) -> Json:
        """The Secret of a service account, with a new certificate."""
        root, out = self.root(), self.folder / f"{namespace}-{account}"
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
