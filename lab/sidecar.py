"""A sidecar in a pod: its certificate, files, rules and process.

Everything uses the product itself: certificates from proxy.identity.issue, the configuration as
YAML, the rules from `isthmus intercept`, the process from `isthmus run`. The files are in the pod's
directory and can be replaced while the sidecar runs; so tests rotate certificates and change the
directory.
"""

import contextlib
import copy
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import trio
import yaml

from lab.pod import PACKAGES, PROXY_MARK, SIDECAR, Pod
from lab.process import READY_TIMEOUT, LabError, Process
from lab.sandbox import rootless
from proxy.identity.issue import Issued, issue, make_root
from proxy.identity.spiffe import SpiffeId

TRUST_DOMAIN: Final = "cluster.local"
ADMIN_PORT: Final = 4191

READY_POLL: Final = 0.03  # seconds
ANSWER_TIMEOUT: Final = 20.0  # seconds: the maximum for a live proxy on a busy machine


class _Plain(yaml.SafeDumper):
    """Writes repeated values out: the proxies accept no anchors and aliases."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002  # the base class's signature
        return True


class Authority:
    """A trust root of the lab; valid since yesterday, so that it can issue expired certificates."""

    def __init__(self, trust_domain: str = TRUST_DOMAIN) -> None:
        self.trust_domain = trust_domain
        self.root = make_root(trust_domain, now=_ago(days=1))

    def identity(self, service_account: str, namespace: str = "default") -> SpiffeId:
        """The SPIFFE identity of a service account."""
        return SpiffeId.parse(f"spiffe://{self.trust_domain}/ns/{namespace}/sa/{service_account}")

    def issue(self, identity: SpiffeId, lifetime: timedelta = timedelta(hours=1)) -> Issued:
        """A certificate and its key."""
        return issue(self.root, identity, lifetime)

    def issue_expired(self, identity: SpiffeId) -> Issued:
        """A certificate that expired an hour ago."""
        return issue(self.root, identity, timedelta(hours=1), now=_ago(hours=2))


def _ago(**amount: float) -> datetime:
    return datetime.now(UTC) - timedelta(**amount)


@dataclass(slots=True)
class Member:
    """A proxy in a pod, with an identity and files: common to this project's proxies and others.
    Stopped with the pod.
    """

    pod: Pod
    authority: Authority | None
    identity: SpiffeId | None

    @property
    def directory(self) -> Path:
        """Where the proxy's files lie."""
        return self.pod.directory / "sidecar"

    def write_certificate(self, issued: Issued) -> None:
        """Replace the certificate and its key; a running proxy loads them at its next check."""
        self.write(self.directory / "key.pem", issued.key_pem, mode=0o600)
        self.write(self.directory / "certificate.pem", issued.certificate_pem)

    def write_roots(self, *authorities: Authority) -> None:
        """Replace the trust roots."""
        self.write(
            self.directory / "roots.pem",
            b"".join(authority.root.certificate_pem for authority in authorities),
        )

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Write a file atomically: a reader sees the old or the new one."""
        temporary = path.with_suffix(".new")
        temporary.write_bytes(data)
        temporary.chmod(mode)
        if not rootless():
            os.chown(temporary, SIDECAR.uid, SIDECAR.uid)
        temporary.replace(path)


@dataclass(slots=True)
class Sidecar(Member):
    """The proxy of a pod. Created by `Mesh.join`."""

    settings: dict[str, Any]
    process: Process | None = None
    gateway: bool = False  # a gateway of its cluster has no application, so nothing is redirected

    @property
    def config_file(self) -> Path:
        return self.directory / "config.yaml"

    @property
    def directory_file(self) -> Path:
        return self.directory / "directory.yaml"

    def running(self) -> Process:
        """The proxy's process.  Raises LabError when it was not started."""
        if self.process is None:
            raise LabError(f"the sidecar of pod {self.pod.name} was not started")
        return self.process

    def write_files(self, directory: Mapping[str, Any]) -> None:
        """Write certificate, key, roots, directory and configuration."""
        self.directory.mkdir(exist_ok=True)
        self.write_directory(directory)
        settings: dict[str, Any] = {
            "cluster": self.pod.cluster.name,
            "pod": {
                "name": self.pod.name,
                "ip": self.pod.ipv4,
                "addresses": [self.pod.ipv4, self.pod.ipv6],
            },
            "directory": {
                "file": str(self.directory_file),
                "poll_interval": "200ms",
                "settle": "100ms",
            },
            "log": {"format": "json", "access": True},
            # Most programs of the lab are not stopped together with their sidecar.
            "shutdown": {"grace": "1s", "outbound_minimum": "0s"},
            "admin": {"metrics_max_age": 0},  # tests compare counters before and after
            # After this time, a silent client counts as one without TLS. It must not be a sidecar
            # that waits for the CPU.
            "inbound": {"hello_timeout": "10s"},
        }
        if rootless():
            settings["mark"] = PROXY_MARK
        if self.authority is not None and self.identity is not None:
            settings["trust_domain"] = self.authority.trust_domain
            files = {
                name: str(self.directory / f"{name}.pem")
                for name in ("certificate", "key", "roots")
            }
            settings["identity"] = {
                **files,
                "roots": [files["roots"]],
                "reload_interval": "200ms",
                "settle": "100ms",
            }
            settings["pod"] |= {
                "service_account": self.identity.service_account,
                "namespace": self.identity.namespace,
            }
            self.write_certificate(self.authority.issue(self.identity))
            self.write_roots(self.authority)
        merge(settings, self.settings)
        self.write(self.config_file, yaml.safe_dump(settings, sort_keys=False).encode())

    def write_directory(self, directory: Mapping[str, Any]) -> None:
        """Replace the directory."""
        self.write(
            self.directory_file, yaml.dump(dict(directory), Dumper=_Plain, sort_keys=False).encode()
        )

    async def start(self, *, intercept: bool = True, ready: bool = True) -> None:
        """Install the rules, start the proxy, wait until /ready succeeds. Raises LabError with the
        end of its log.
        """
        if intercept and not self.gateway:
            await self.pod.intercept("--config", str(self.config_file))
        command = [
            sys.executable,
            "-m",
            "proxy.cli",
            "run",
            "--config",
            str(self.config_file),
            *(["--gateway"] if self.gateway else []),
        ]
        self.process = await self.pod.start("sidecar", command, user=SIDECAR, env=PACKAGES)
        if ready:
            await self.wait_ready()

    async def restart(self) -> None:
        """Stop the proxy and start it again; the rules stay."""
        await self.running().aclose()
        await self.start(intercept=False)

    async def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the proxy is ready. Raises LabError with the last reason."""
        process, reason = self.running(), "no answer"
        with trio.move_on_after(timeout):
            while process.alive:
                status, body = await self.admin("/ready")
                if status == 200:
                    return
                reason = body.strip() or reason
                await trio.sleep(READY_POLL)
            await process.wait_until(lambda: process.output.ended, "end")
            raise process.error(f"ended (return code {process.returncode}) before it was ready")
        raise process.error(f"was not ready within {timeout:g} s: {reason}")

    async def admin(self, path: str) -> tuple[int, str]:
        """Ask the admin port from inside the pod: (status, body), or (0, reason) without an
        answer."""
        return await http_get(self.pod, "127.0.0.1", ADMIN_PORT, path)

    async def metrics(self) -> dict[str, float]:
        """The proxy's metrics: sample name with labels -> value. Raises LabError if they cannot be
        read.
        """
        status, body = await self.admin("/metrics")
        if status != 200:
            raise LabError(f"/metrics of pod {self.pod.name} answered {status}: {body[:200]}")
        samples = (
            line.rpartition(" ") for line in body.splitlines() if line and not line.startswith("#")
        )
        return {name: float(value) for name, _, value in samples}

    def logged(self) -> list[dict[str, Any]]:
        """The proxy's log lines so far as mappings, without lines that are not JSON."""
        found: list[dict[str, Any]] = []
        for line in self.running().output.path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
        return found


def merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge settings into others, section by section; copies, so `changes` stay unchanged."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


async def http_get(pod: Pod, host: str, port: int, path: str) -> tuple[int, str]:
    """A minimal HTTP request from inside a pod: (status, body), or (0, reason)."""
    try:
        with trio.fail_after(ANSWER_TIMEOUT):
            stream = await pod.connect(host, port)
            async with stream:
                await stream.send_all(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                answer = b"".join([chunk async for chunk in stream])
    except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
        return 0, str(error) or type(error).__name__
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return status, body.decode(errors="replace")
