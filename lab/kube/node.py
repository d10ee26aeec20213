"""The first process of a node: gives the node its own places, starts the components, starts again
what ends, and collects orphans.

`python -m lab.kube.node SETTINGS` (a JSON file), in new mount and process-id namespaces and in the
node's network namespace. When it ends the kernel ends everything else on the node, pods too. It is
plain synchronous code: the first process of a namespace has to collect every child there is.

Tests stop and start components by a socket (`ask`): one line, `stop NAME`, `start NAME` or `pid
NAME`, and one line in answer.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from lab.kube import cgroups
from lab.kube.components import Settings, commands, write

SOCKETS = Path("/run/isthmus-kube")  # in the sandbox's own /run
RESTART_AFTER = 1.0  # seconds between the end of a component and its next start
# Directories that the node has for itself: they are in its state directory.
_OWN = (
    "/var/lib/kubelet",
    "/var/lib/containerd",
    "/var/log/pods",
    "/var/log/containers",
    "/var/lib/cni",
    "/etc/cni",
    "/run/containerd",
    "/run/netns",
)
# What a kubelet sets for the whole machine. It reads first, and leaves alone what is as it wants
# it: so it finds files with these values.
WANTED = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def control(cluster: str) -> Path:
    """The socket of a node."""
    return SOCKETS / f"{cluster}.sock"


class Node:
    """The components, as processes."""

    def __init__(self, own: Settings) -> None:
        self._logs = own.logs
        self._commands = commands(own)
        self._running: dict[int, str] = {}
        self._due: dict[str, float] = {}  # when a component is started next, on the monotonic clock
        self._stopped: set[str] = set()
        self._environment = {**os.environ, "PATH": f"{own.programs}:{os.environ['PATH']}"}

    def start_all(self) -> None:
        """Start every component. Each of them retries until those that it needs answer."""
        for name in self._commands:
            self._start(name)

    def _start(self, name: str) -> None:
        self._due.pop(name, None)
        with (self._logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self._commands[name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        process.returncode = 0  # it is collected here, not by the module
        self._running[process.pid] = name

    def collect(self) -> None:
        """Take the status of every process that has ended; a component is due again, unless it was
        stopped."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            name = self._running.pop(pid, None)
            if name is None:
                continue
            with (self._logs / f"{name}.log").open("a") as log:
                log.write(f"--- ended with {os.waitstatus_to_exitcode(status)}\n")
            if name not in self._stopped:
                self._due[name] = time.monotonic() + RESTART_AFTER

    def wait_time(self) -> float | None:
        """Seconds until a component is due, or None."""
        return max(0.0, min(self._due.values()) - time.monotonic()) if self._due else None

    def start_due(self) -> None:
        """Start what is due."""
        for name, when in list(self._due.items()):
            if when <= time.monotonic():
                self._start(name)

    def answer(self, line: str) -> str:
        """Do what a line of the control socket asks for."""
        verb, _, name = line.strip().partition(" ")
        if name not in self._commands:
            return f"error: there is no component {name!r}"
        pid = next((pid for pid, running in self._running.items() if running == name), None)
        if verb == "stop":
            self._stopped.add(name)
            self._due.pop(name, None)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        elif verb == "start":
            self._stopped.discard(name)
            if pid is None:
                self._start(name)
        elif verb != "pid":
            return f"error: {verb!r} is not known"
        return f"ok {pid or 0}"


def prepare(own: Settings) -> None:
    """The mounts of the node."""
    _mount("--make-rshared", "/")  # as kubelets want it
    _mount("-t", "proc", "proc", "/proc")
    for place in _OWN:
        directory = own.state / "root" / place.lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        Path(place).mkdir(parents=True, exist_ok=True)
        _mount("--bind", str(directory), place)
    _mount("--make-rshared", "/")
    for name, wanted in WANTED.items():
        setting = Path("/proc/sys", name)
        if setting.exists() and setting.read_text().strip() != wanted:
            cover = own.state / "sysctl" / name
            cover.parent.mkdir(parents=True, exist_ok=True)
            cover.write_text(f"{wanted}\n")
            _mount("--bind", str(cover), str(setting))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def run(own: Settings) -> None:
    """Run the node until SIGTERM."""
    wake_writer, wake_reader = socket.socketpair()
    wake_writer.setblocking(False)
    wake_reader.setblocking(False)
    signal.set_wakeup_fd(wake_writer.fileno())
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, end)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(control(own.name)))
    listener.listen()
    node = Node(own)
    node.start_all()
    with selectors.DefaultSelector() as selector:
        selector.register(wake_reader, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while not ended:
            for key, _ in selector.select(node.wait_time()):
                if key.fileobj is listener:
                    _serve(node, listener)
                else:
                    wake_reader.recv(4096)
            node.collect()
            node.start_due()


def _serve(node: Node, listener: socket.socket) -> None:
    with contextlib.suppress(OSError), listener.accept()[0] as connection:
        connection.settimeout(1.0)
        node.collect()
        connection.sendall(node.answer(connection.recv(256).decode()).encode() + b"\n")


def main() -> None:
    """The command."""
    own = msgspec.json.decode(
        Path(sys.argv[1]).read_bytes(), type=Settings, dec_hook=lambda kind, value: kind(value)
    )
    cgroups.join(own.cgroup, os.getpid())
    prepare(own)
    write(own)
    run(own)


if __name__ == "__main__":
    main()
