"""Two proxies on loopback with mutual TLS between them: client -> outbound -> inbound -> server.

Nothing is redirected here: the listeners have fixed destinations, so what is measured is the proxies, and not the packet filter.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
BODY = b"x" * 1024
_START_SECONDS = 20.0
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy, and where it listens."""

    name: str
    pid: int
    port: int

    def cpu(self) -> float:
        """Seconds of processor time so far, of all its threads (resolution: a clock tick, usually 10 ms)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def resident(self) -> int:
        """Resident memory in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Pair:
    outbound: Proxy
    inbound: Proxy
    server: int  # the port of the server behind both

    @property
    def proxies(self) -> tuple[Proxy, Proxy]:
        return self.outbound, self.inbound


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def await_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit(f"port {port} was not opened:\n{log.read_text('utf-8', 'replace')[-2000:]}")


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """nginx with one worker, which answers every request with 1 KiB."""
    if shutil.which("nginx") is None or shutil.which("wrk") is None:
        raise SystemExit("perf needs nginx and wrk")
    port = free_port()
    paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;"
        "events { worker_connections 8192; }"
        f"http {{ access_log off; keepalive_requests 100000000; client_max_body_size 0; {paths}"
        f'server {{ listen {HOST}:{port}; location / {{ return 200 "{BODY.decode()}"; }} }} }}',
        "ascii",
    )
    log = folder / "nginx.out"
    with running(["nginx", "-c", str(folder / "nginx.conf")], log) as process:
        await_port(port, process, log)
        yield port


@contextmanager
def pair() -> Iterator[Pair]:
    """Two of ours in front of nginx; everything is stopped and removed behind the block."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-perf-")))
        make_identities(folder)
        found = stack.enter_context(isthmus_pair(folder, stack.enter_context(server(folder))))
        with urllib.request.urlopen(f"http://{HOST}:{found.outbound.port}/", timeout=10) as response:
            assert response.read() == BODY
        yield found


@contextmanager
def isthmus_pair(folder: Path, back: int) -> Iterator[Pair]:
    """Two of ours in front of the server at port `back`; `folder` holds the identities that make_identities has made."""
    with ExitStack() as stack:
        ports = {name: free_port() for name in ("inbound", "outbound", "inbound-admin", "outbound-admin")}
        services = [
            {
                "name": "server",
                "ports": [{"port": ports["inbound"]}],
                "endpoints": [{"address": HOST, "identity": "spiffe://perf.test/ns/perf/sa/server"}],
            }
        ]
        (folder / "directory.yaml").write_text(json.dumps({"services": services}))
        started = {
            "inbound": _configured("inbound", f"{HOST}:{back}", ports, folder / "server"),
            "outbound": {
                **_configured("outbound", f"{HOST}:{ports['inbound']}", ports, folder / "client"),
                "directory": {"file": str(folder / "directory.yaml")},
            },
        }
        proxies = {}
        for name, config in started.items():
            path, log = folder / f"{name}.yaml", folder / f"{name}.log"
            path.write_text(json.dumps(config))
            process = stack.enter_context(running([sys.executable, "-m", "proxy.cli", "run", "--config", str(path)], log))
            await_port(ports[name], process, log)
            proxies[name] = Proxy(name, process.pid, ports[name])
        yield Pair(proxies["outbound"], proxies["inbound"], back)


def make_identities(folder: Path) -> None:
    """A trust root, and the certificates of a client and a server."""
    command, root = [sys.executable, "-m", "proxy.cli", "identity"], folder / "root"
    subprocess.run([*command, "root", "--trust-domain", "perf.test", "--out", root], check=True, stdout=subprocess.DEVNULL)
    for name in ("client", "server"):
        who = ["--namespace", "perf", "--service-account", name]
        subprocess.run([*command, "issue", "--root", root, *who, "--out", folder / name], check=True, stdout=subprocess.DEVNULL)


def _configured(name: str, destination: str, ports: dict[str, int], material: Path) -> dict[str, Any]:
    other = "inbound" if name == "outbound" else "outbound"
    return {
        "trust_domain": "perf.test",
        "pod": {"name": name, "namespace": "perf"},
        name: {"listen": [f"{HOST}:{ports[name]}"], "fixed_destination": destination, "opaque_ports": [], "max_connections": 100_000},
        other: {"listen": []},
        "admin": {"listen": [f"{HOST}:{ports[f'{name}-admin']}"]},
        "log": {"level": "warning"},
        "identity": {
            "certificate": str(material / "certificate.pem"),
            "key": str(material / "key.pem"),
            "roots": [str(material / "roots.pem")],
        },
    }


def wrk(port: int, connections: int, seconds: int) -> int:
    """Load for `seconds`; returns the number of requests answered. Ends the run if any failed."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", f"http://{HOST}:{port}/"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds + 30).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(text)
    return int(next(line.split()[0] for line in text.splitlines() if "requests in" in line))
