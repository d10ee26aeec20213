"""Real proxies as processes under a flood: a sidecar that is flooded, the sidecar of a member, and
their metrics."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.identity.issue import issue, make_root
from proxy.identity.spiffe import SpiffeId
from proxy.wire.h2.frames import END_HEADERS, PREFACE
from tests.kit.http2 import POST, data, headers, settings
from tests.kit.ports import free_port

HOST, MIB = "127.0.0.1", 2**20
_PATIENCE = 30.0


def eventually(probe: Callable[[], bool], seconds: float = _PATIENCE) -> bool:
    """Poll until it is true, or the time is over."""
    until = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def program(
    *command: str, port: int | None = None, cgroup: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a Python module in `cgroup`. It listens on `port` when the block starts."""

    whole = [sys.executable, "-m", *command]
    if cgroup is not None:
        whole = ["sh", "-c", f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"', "sh", *whole]
    with subprocess.Popen(
        whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            if port is not None and not eventually(
                lambda: _listens(port) or process.poll() is not None
            ):
                raise AssertionError(f"{command}: port {port} was not opened")
            yield process
        finally:
            process.kill()
            process.communicate()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


@dataclass(frozen=True)
class Flooded:
    """The sidecar that is flooded at `port`, and the member's connection to it."""

    process: subprocess.Popen[str]
    port: int
    admin: int
    member: int

    def resident(self) -> int:
        """Bytes."""
        return int(
            Path(f"/proc/{self.process.pid}/statm").read_text("ascii").split()[1]
        ) * os.sysconf("SC_PAGE_SIZE")

    def metric(self, name: str) -> float:
        """The value of one series."""
        with urllib.request.urlopen(
            f"http://{HOST}:{self.admin}/metrics", timeout=_PATIENCE
        ) as response:
            text = response.read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"{name} is not in\n{text}"
        return float(found[1])


@contextmanager
def flooded(
    folder: Path,
    app: str,
    settings: Mapping[str, Any] | None = None,
    cgroup: Path | None = None,
    *,
    require_identity: bool = False,
) -> Iterator[Flooded]:
    """A member's sidecar, before it one that is to be flooded (`settings` are merged over its
    configuration), and before that the application, whose treatment of HTTP/2 is in flood_app."""
    ports = {name: free_port() for name in ("app", "in", "in-admin", "out", "out-admin")}
    _identities(folder)
    directory = folder / "directory.yaml"
    endpoint = {"address": HOST, "identity": "spiffe://flood.test/ns/a/sa/far"}
    directory.write_text(
        json.dumps(
            {
                "services": [
                    {"name": "far", "ports": [{"port": ports["in"]}], "endpoints": [endpoint]}
                ]
            }
        )
    )
    far = _config(
        "far",
        folder,
        ports["in-admin"],
        inbound=f"{HOST}:{ports['in']}",
        destination=f"{HOST}:{ports['app']}",
    )
    near = _config(
        "near",
        folder,
        ports["out-admin"],
        outbound=f"{HOST}:{ports['out']}",
        destination=f"{HOST}:{ports['in']}",
    )
    far["inbound"]["require_identity"] = require_identity
    (folder / "far.yaml").write_text(json.dumps(far | dict(settings or {})))
    (folder / "near.yaml").write_text(json.dumps(near | {"directory": {"file": str(directory)}}))
    with ExitStack() as stack:
        stack.enter_context(
            program("tests.kit.flood_app", str(ports["app"]), app, port=ports["app"])
        )
        run = ("proxy.cli", "run", "--config")
        process = stack.enter_context(
            program(*run, str(folder / "far.yaml"), port=ports["in-admin"], cgroup=cgroup)
        )
        stack.enter_context(program(*run, str(folder / "near.yaml"), port=ports["out-admin"]))
        yield Flooded(process, ports["in"], ports["in-admin"], ports["out"])


def _identities(folder: Path) -> None:
    root = make_root("flood.test")
    for name in ("near", "far"):
        leaf = issue(root, SpiffeId("flood.test", "a", name))
        (folder / name).mkdir()
        for kind, pem in (
            ("certificate", leaf.certificate_pem),
            ("key", leaf.key_pem),
            ("roots", root.certificate_pem),
        ):
            (folder / name / f"{kind}.pem").write_bytes(pem)
            (folder / name / f"{kind}.pem").chmod(0o600)


def _config(
    name: str, folder: Path, admin: int, *, destination: str, inbound: str = "", outbound: str = ""
) -> dict[str, Any]:
    return {
        "trust_domain": "flood.test",
        "inbound": {"listen": [inbound], "fixed_destination": destination}
        if inbound
        else {"listen": []},
        "outbound": {"listen": [outbound], "fixed_destination": destination}
        if outbound
        else {"listen": []},
        "admin": {"listen": [f"{HOST}:{admin}"]},
        "log": {"level": "error"},
        "identity": {
            "certificate": str(folder / name / "certificate.pem"),
            "key": str(folder / name / "key.pem"),
            "roots": [str(folder / name / "roots.pem")],
        },
    }


class Member:
    """The member's results, once it has ended."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, Any]] = {}

    def was_served(self, within: float) -> None:
        """Fails if a request failed, or took longer than so many seconds."""
        assert set(self.kinds) == {"kept", "new", "live"}
        for name, summary in self.kinds.items():
            assert summary["failed"] == [], (name, summary)
            assert summary["count"] > 0
            assert summary["slowest"] < within, (name, summary)


@contextmanager
def member(proxy: Flooded) -> Iterator[Member]:
    """A member that sends requests within the block."""
    seen = Member()
    with program("tests.kit.flood_member", str(proxy.member), str(proxy.admin)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield seen
        process.stdin.write("\n")
        process.stdin.flush()
        seen.kinds = json.loads(process.stdout.readline())


class Uploads:
    """HTTP/2 connections that send as much as the windows allow, on `streams` streams each."""

    def __init__(self, port: int, connections: int, streams: int) -> None:
        payload = bytes(16384)
        begin = (
            PREFACE
            + settings()
            + b"".join(headers(1 + 2 * number, POST, END_HEADERS) for number in range(streams))
        )
        # Less than a stream's window on each, and all that the connection's window allows.
        bodies = b"".join(
            data(1 + 2 * number, payload) for _ in range(6) for number in range(streams)
        )
        self._left = memoryview(begin + bodies)
        self.socks = [socket.create_connection((HOST, port)) for _ in range(connections)]
        self._at = [0] * connections
        for sock in self.socks:
            sock.setblocking(False)

    def send_until(self, probe: Callable[[], bool], watch: Callable[[], object] = int) -> bool:
        """Send until `probe`, which is called twice a second, returns true. Returns False if it
        does not for long. `watch` is called all the time."""
        next_look, until = 0.0, time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            for number, sock in enumerate(self.socks):
                at = self._at[number]
                with suppress(OSError):  # it reads nothing now, or has been closed
                    self._at[number] += sock.send(self._left[at : at + 131072])
            watch()
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + 0.5
                if probe():
                    return True
            time.sleep(0.005)
        return False

    def close(self) -> None:
        for sock in self.socks:
            sock.close()
