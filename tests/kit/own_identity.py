"""An identity for a proxy of the tests, and the port of its listeners."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from proxy.identity.issue import issue, make_root
from proxy.identity.spiffe import SpiffeId


def identity(tmp_path: Path) -> tuple[dict[str, Any], SpiffeId]:
    """Settings for a proxy with a certificate of its own, and its identity."""
    root, who = make_root("cluster.local"), SpiffeId("cluster.local", "shop", "web")
    leaf = issue(root, who)
    for name, pem in (
        ("certificate", leaf.certificate_pem),
        ("key", leaf.key_pem),
        ("roots", root.certificate_pem),
    ):
        (tmp_path / f"{name}.pem").write_bytes(pem)
        (tmp_path / f"{name}.pem").chmod(0o600)
    paths = {
        "certificate": str(tmp_path / "certificate.pem"),
        "key": str(tmp_path / "key.pem"),
        "roots": [str(tmp_path / "roots.pem")],
    }
    paths["settle"] = "0s"
    return paths, who


def port_of(listeners: list[socket.socket]) -> int:
    port: int = listeners[0].getsockname()[1]
    return port
