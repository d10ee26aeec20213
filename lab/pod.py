"""A pod: a network namespace with one link to its cluster's bridge, and the programs in it.

Programs are started through a chain of commands that replace each other, so that the pid is the
program's own: `nsenter` enters the network namespace, `unshare --mount` and a line of shell install
the cluster's /etc/hosts and /etc/resolv.conf, and `setpriv` drops privileges.

Users: as root, an application runs as uid 65534 and a sidecar as uid 2102, and the rules exempt uid
2102. Where only one user id exists (the rootless sandbox), everything runs with it, and the rules
exempt a packet mark instead. Programs keep CAP_DAC_READ_SEARCH, because a checkout or an
interpreter is often in a home directory that others cannot enter.
"""

import ipaddress
import os
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cryptography
import trio

import proxy
from lab import network, process
from lab.process import Completed, LabError, Launch, Process
from lab.sandbox import rootless
from proxy.intercept.nftables import InterceptSettings

APP_UID = 65534
PROXY_UID = 2102
PROXY_MARK = 0x2102
CLI = (sys.executable, "-m", "proxy.cli")
ROOT = Path(__file__).resolve().parent.parent
# For programs in pods: the checkout, and the build of cryptography and of the product that this
# process uses (`make aws-lc compiled`), which may differ from those of the environment and the
# checkout.
_FOUND = (
    Path(cryptography.__file__).resolve().parents[1],
    Path(proxy.__file__).resolve().parents[1],
)
PACKAGES = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(map(str, (*_FOUND, ROOT))))}

_OVERLAY = 'mount --bind "$1" /etc/hosts; mount --bind "$2" /etc/resolv.conf; shift 2; exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """The user of a program in a pod. `privileged` keeps root (for the interception); `never_root`
    is for programs that refuse to run as root.
    """

    uid: int = APP_UID
    privileged: bool = False
    never_root: bool = False

    def prefix(self) -> list[str]:
        """The command prefix that switches to this user."""
        if self.privileged:
            return []
        if rootless():
            return (
                ["unshare", "--user", f"--map-user={self.uid}", f"--map-group={self.uid}"]
                if self.never_root
                else []
            )
        kept = "-all,+dac_read_search"
        ids = [f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
        return [
            "setpriv",
            *ids,
            f"--inh-caps={kept}",
            f"--ambient-caps={kept}",
            f"--bounding-set={kept}",
            "--no-new-privs",
            "--",
        ]


APP = User()
SIDECAR = User(uid=PROXY_UID)
OPERATOR = User(privileged=True)


class Laboratory(Protocol):
    """The part of the laboratory (`Lab`) that a pod uses."""

    @property
    def nursery(self) -> trio.Nursery: ...


class Home(Protocol):
    """The part of a cluster (`Cluster`) that a pod uses."""

    name: str
    netns: str
    hosts_file: Path
    resolver_file: Path

    @property
    def lab(self) -> Laboratory: ...


@dataclass(slots=True)
class Pod:
    """A pod of a cluster; created by `Cluster.pod`, deleted with the lab."""

    cluster: Home
    name: str
    netns: str
    ipv4: str
    ipv6: str
    directory: Path  # this pod's files: logs, and the sidecar's files
    processes: dict[str, Process] = field(default_factory=dict)
    # this process's sockets in the pod's namespace
    sockets: list[trio.socket.SocketType] = field(default_factory=list)

    @property
    def link(self) -> str:
        """The name of the pod's end at the bridge, in the cluster's namespace."""
        return f"p-{self.ipv4.rpartition('.')[2]}"

    def launch(
        self, user: User = APP, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Launch:
        """How to start a program in this pod."""
        hosts, resolver = self.cluster.hosts_file, self.cluster.resolver_file
        prefix = ["nsenter", f"--net=/run/netns/{self.netns}", "--", "unshare", "--mount", "--"]
        prefix += ["sh", "-c", _OVERLAY, "sh", str(hosts), str(resolver), *user.prefix()]
        return Launch(
            prefix=tuple(prefix),
            env={"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
            cwd=cwd,
        )

    async def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        user: User = APP,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a program. With `port`, wait until it listens there. Raises LabError with the end
        of its output.
        """
        if (old := self.processes.get(name)) is not None and old.alive:
            raise LabError(f"pod {self.name} already runs {name}")
        log = self.directory / f"{name}.log"
        running = await process.start(
            self.cluster.lab.nursery,
            f"{self.name}/{name}",
            command,
            log,
            self.launch(user, env, self.directory),
        )
        self.processes[name] = running
        if port is not None:
            await self.wait_port(running, port)
        return running

    async def python(
        self, name: str, code: str, *arguments: str, port: int | None = None, user: User = APP
    ) -> Process:
        """Start a Python program given as text."""
        return await self.start(
            name, [sys.executable, "-c", code, *arguments], port=port, user=user
        )

    async def restart(
        self, running: Process, *, user: User = APP, port: int | None = None
    ) -> Process:
        """Stop a program and start the same command again."""
        await running.aclose()
        return await self.start(
            running.name.rpartition("/")[2], running.command, user=user, port=port
        )

    async def run(
        self,
        command: Sequence[str],
        *,
        user: User = APP,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        timeout: float = 30.0,
    ) -> Completed:
        """Run a program in the pod to its end. Raises LabError if it cannot start or on timeout,
        not for its exit code.
        """
        return await process.run(
            command, self.launch(user, env, self.directory), stdin=stdin, timeout=timeout
        )

    async def run_python(
        self, code: str, *arguments: str, user: User = APP, timeout: float = 30.0
    ) -> Completed:
        """Run a Python program given as text to its end."""
        return await self.run([sys.executable, "-c", code, *arguments], user=user, timeout=timeout)

    async def wait_port(
        self, running: Process, port: int, timeout: float = process.READY_TIMEOUT
    ) -> None:
        """Wait until something in the pod listens on `port`.  Raises LabError."""
        with trio.move_on_after(timeout):
            while not self.listens(port):
                if not running.alive:
                    with trio.move_on_after(1):
                        await running.wait_until(lambda: running.output.ended, "end")
                    raise running.error(
                        f"ended (return code {running.returncode}) before it listened on port"
                        f" {port}"
                    )
                await trio.sleep(0.02)
            return
        raise running.error(f"did not listen on port {port} within {timeout:g} s")

    def listens(self, port: int) -> bool:
        """Whether a TCP listener is on `port`, in any family and on any address; opens no
        connection.
        """
        return self._sockets(port, "0A") > 0

    def connected(self, port: int) -> int:
        """The number of established TCP connections with local port `port` in this pod."""
        return self._sockets(port, "01")

    def _sockets(self, port: int, state: str) -> int:
        """The number of TCP sockets with this local port and this state (linux/tcp_states.h,
        hexadecimal).
        """

        def tables() -> str:
            # The thread's own /proc/.../net shows the namespace that it has entered.
            return "".join(
                Path("/proc/thread-self/net", name).read_text()
                for name in ("tcp", "tcp6")
                if Path("/proc/thread-self/net", name).exists()
            )

        wanted = f":{port:04X}"
        rows = (line.split() for line in network.in_namespace(self.netns, tables).splitlines())
        return sum(
            1 for row in rows if len(row) > 3 and row[1].endswith(wanted) and row[3] == state
        )

    def socket(self, version: int = 4, kind: int = socket.SOCK_STREAM) -> trio.socket.SocketType:
        """A socket inside the pod for this process (as root); closed with the pod at the latest."""
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        plain = network.open_socket(self.netns, family, kind)
        if version == 6:
            plain.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made = trio.socket.from_stdlib_socket(plain)
        self.sockets.append(made)
        return made

    async def listen(self, port: int, version: int = 4) -> trio.SocketListener:
        """A listener inside the pod on all addresses of IP version 4 or 6; closed with the pod at
        the latest."""
        sock = self.socket(version)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind(("::" if version == 6 else "0.0.0.0", port))
        sock.listen()
        return trio.SocketListener(sock)

    async def connect(self, host: str, port: int, *, mark: int | None = None) -> trio.SocketStream:
        """A TCP connection from inside the pod to an IP literal; closed with the pod at the latest.
        Raises OSError."""
        sock = self.socket(ipaddress.ip_address(host).version)
        if mark is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        try:
            await sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        finally:
            self.sockets = [open_ for open_ in self.sockets if open_.fileno() != -1]
        return trio.SocketStream(sock)

    async def intercept(self, *flags: str, check: bool = True) -> Completed:
        """Run the command `isthmus intercept` in the pod. Raises LabError if it fails and `check`
        is true.
        """
        done = await self.run([*CLI, "intercept", *flags], user=OPERATOR, env=PACKAGES)
        if check and not done.ok:
            raise LabError(
                f"isthmus intercept in pod {self.name}:"
                f" {done.stderr.decode(errors='replace').strip()}"
            )
        return done

    def inside(self, function: Callable[[], network.T]) -> network.T:
        """Call a short function in the pod's network namespace, in a separate thread."""
        return network.in_namespace(self.netns, function)

    def address(self, version: int) -> str:
        """The pod's address of IP version 4 or 6."""
        return {4: self.ipv4, 6: self.ipv6}[version]

    def cut_link(self) -> None:
        """Unplug the pod: packets vanish in both directions, as when its node dies."""
        network.batch(f"link set {self.link} down", netns=self.cluster.netns)

    def restore_link(self) -> None:
        """Plug the pod in again."""
        network.batch(f"link set {self.link} up", netns=self.cluster.netns)

    async def aclose(self) -> None:
        """Stop the pod's programs and delete its namespace."""
        for sock in self.sockets:
            sock.close()
        async with trio.open_nursery() as nursery:
            for running in self.processes.values():
                nursery.start_soon(running.aclose)
        network.batch(f"netns delete {self.netns}")

    def enter_command(self, outside_pid: int) -> str:
        """The command that opens a root shell in this pod, from outside the sandbox."""
        script = self.directory / "enter"
        shell = os.environ.get("SHELL", "/bin/sh")
        script.write_text(f"exec {shlex.join([*self.launch(OPERATOR).prefix, shell])}\n")
        user = "-U --preserve-credentials " if rootless() else ""
        return f"nsenter -t {outside_pid} {user}-m -p -n sh {script}"


def exemption() -> InterceptSettings:
    """The interception settings of this sandbox: exemption by user id if there are several,
    otherwise by packet mark.
    """
    return (
        InterceptSettings(uid=None, mark=PROXY_MARK)
        if rootless()
        else InterceptSettings(uid=PROXY_UID)
    )


def exemption_flags() -> tuple[str, ...]:
    """The settings of `exemption` as flags of `isthmus intercept`."""
    return ("--no-uid", "--mark", hex(PROXY_MARK)) if rootless() else ("--uid", str(PROXY_UID))


def bracketed(address: str, port: int) -> str:
    """host:port in the form used in URLs."""
    return (
        f"[{address}]:{port}" if ipaddress.ip_address(address).version == 6 else f"{address}:{port}"
    )
