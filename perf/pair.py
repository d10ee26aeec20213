"""Two proxies on loopback with mutual TLS between them: client -> outbound -> inbound -> server.

Nothing is redirected: the listeners have fixed destinations, so the proxies are measured and not
the packet filter.
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
from typing import Any, cast

HOST = "127.0.0.1"
BODY = b"x" * 1024
# What the image adds to a checkout: its TLS library and compiled modules. Created by `make aws-lc
# compiled`, in the folder `build`.
PACKAGES = (Path("aws-lc", "site"), Path("compiled"))
IMAGE = tuple(Path(__file__).parents[1] / "build" / package for package in PACKAGES)
# And the environment of the programs in it (Dockerfile), but for its path.
IMAGE_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "PYTHONMALLOC": "malloc"}
_START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy, and its listener."""

    name: str
    pid: int
    port: int

    def cpu(self) -> float:
        """CPU seconds so far, of all its threads. Uses the process's CPU clock, so without the 10
        ms steps of /proc/PID/stat.
        """
        # The kernel's number for the CPU clock of another process (clock_getcpuclockid(3) computes
        # the same).
        return time.clock_gettime((~self.pid << 3) | 2)

    def resident(self) -> int:
        """Resident memory in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )


@dataclass(frozen=True, slots=True)
class Pair:
    outbound: Proxy
    inbound: Proxy

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
    with (
        log.open("wb") as sink,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink) as process,
    ):
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


def nginx_paths(folder: Path) -> str:
    """Paths for an nginx that may not write to /var."""
    return "".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """nginx with one worker. It answers / with 1 KiB, and /N with the file N of the folder www, if
    there is one; /chunked/N answers the same in chunks.
    """
    if shutil.which("nginx") is None or shutil.which("wrk") is None:
        raise SystemExit("perf needs nginx and wrk")
    port = free_port()
    user = "user root; " if os.getuid() == 0 else ""  # other users could not read the folder
    (folder / "nginx.conf").write_text(
        f"{user}daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log"
        f" {folder}/nginx.log;"
        "events { worker_connections 8192; }"
        "http { access_log off; keepalive_requests 100000000; client_max_body_size 0; sendfile"
        f" on; {nginx_paths(folder)}"
        f"server {{ listen {HOST}:{port}; root {folder}/www; location = / {{ return 200"
        f' "{BODY.decode()}"; }}'
        # A filtered response has no known length, so it is sent in chunks.
        f" location /chunked/ {{ alias {folder}/www/; sub_filter_types *; sub_filter never-there x;"
        " } } }",
        "ascii",
    )
    log = folder / "nginx.out"
    with running(["nginx", "-c", str(folder / "nginx.conf")], log) as process:
        await_port(port, process, log)
        yield port


@contextmanager
def pair_of(
    name: str, commands: dict[str, list[str]], ports: dict[str, int], folder: Path
) -> Iterator[Pair]:
    """The two processes of a pair, the inbound one first; `commands` and `ports` have an entry for
    each.
    """
    proxies = {}
    with ExitStack() as stack:
        for side in ("inbound", "outbound"):
            log = folder / f"{name}-{side}.log"
            process = stack.enter_context(running(commands[side], log))
            await_port(ports[side], process, log)
            proxies[side] = Proxy(side, process.pid, ports[side])
        yield Pair(proxies["outbound"], proxies["inbound"])


@contextmanager
def pair() -> Iterator[Pair]:
    """Two proxies of this project in front of nginx; the end of the block stops and removes
    everything.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-perf-")))
        make_identities(folder)
        found = stack.enter_context(isthmus_pair(folder, stack.enter_context(server(folder))))
        with urllib.request.urlopen(
            f"http://{HOST}:{found.outbound.port}/", timeout=10
        ) as response:
            assert response.read() == BODY
        yield found


@contextmanager
def isthmus_pair(
    folder: Path, back: int, options: dict[str, object] | None = None
) -> Iterator[Pair]:
    """Two proxies of this project in front of the server at port `back`. `folder` holds the
    identities from make_identities. `options`: the directory's `protocol`, whether sessions may
    `resume`, `settings` that override both configurations, and `environment`: that of the proxies,
    over this process's own.
    """
    options = {"protocol": "detect", "resume": True, "settings": {}, "environment": {}} | (
        options or {}
    )
    ports = {
        name: free_port() for name in ("inbound", "outbound", "inbound-admin", "outbound-admin")
    }
    services = [
        {
            "name": "server",
            "ports": [{"port": ports["inbound"], "protocol": options["protocol"]}],
            "endpoints": [{"address": HOST, "identity": "spiffe://perf.test/ns/perf/sa/server"}],
        }
    ]
    (folder / "directory.yaml").write_text(json.dumps({"services": services}))
    configs = {
        "inbound": _configured("inbound", f"{HOST}:{back}", ports, folder / "server"),
        "outbound": {
            **_configured("outbound", f"{HOST}:{ports['inbound']}", ports, folder / "client"),
            "directory": {"file": str(folder / "directory.yaml")},
        },
    }
    commands = {}
    environment = cast("dict[str, str]", options["environment"])
    for name, config in configs.items():
        if not options["resume"]:
            config["identity"]["session_lifetime"] = 0
        config.update(cast("dict[str, Any]", options["settings"]))
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(config))
        commands[name] = [
            *("env", *(f"{name}={value}" for name, value in environment.items())),
            *(sys.executable, "-m", "proxy.cli", "run", "--config", str(path)),
        ]
    with pair_of("isthmus", commands, ports, folder) as found:
        yield found


def make_identities(folder: Path, *names: str) -> None:
    """Create a trust root and the certificates of these workloads; default: a client and a
    server."""
    command, root = [sys.executable, "-m", "proxy.cli", "identity"], folder / "root"
    subprocess.run(
        [*command, "root", "--trust-domain", "perf.test", "--out", root],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for name in names or ("client", "server"):
        who = ["--namespace", "perf", "--service-account", name]
        subprocess.run(
            [*command, "issue", "--root", root, *who, "--out", folder / name],
            check=True,
            stdout=subprocess.DEVNULL,
        )


def _configured(
    name: str, destination: str, ports: dict[str, int], material: Path
) -> dict[str, Any]:
    other = "inbound" if name == "outbound" else "outbound"
    return {
        "trust_domain": "perf.test",
        "pod": {"name": name, "namespace": "perf"},
        name: {
            "listen": [f"{HOST}:{ports[name]}"],
            "fixed_destination": destination,
            "opaque_ports": [],
            "max_connections": 100_000,
        },
        other: {"listen": []},
        "admin": {"listen": [f"{HOST}:{ports[f'{name}-admin']}"]},
        "log": {"level": "warning"},
        # on, but nothing is sampled, so nothing is sent
        "tracing": {"endpoint": f"http://{HOST}:9"},
        "identity": {
            "certificate": str(material / "certificate.pem"),
            "key": str(material / "key.pem"),
            "roots": [str(material / "roots.pem")],
        },
    }


def wrk(port: int, connections: int, seconds: int) -> int:
    """Load for `seconds`; returns the number of requests answered. Ends the run if any failed."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", f"http://{HOST}:{port}/"]
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=seconds + 30
    ).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(text)
    return int(next(line.split()[0] for line in text.splitlines() if "requests in" in line))
