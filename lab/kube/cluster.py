"""Kubernetes clusters for tests: real ones, of one node each, in namespaces of their own.

    clusters = await start_all(("west", "east"))         within a run (guard.py)
    await clusters["west"].kubectl("apply", "-f", "-", stdin=manifest)
    await clusters["west"].aclose()

A `Cluster` holds no open file and no task, so it can be used from any event loop, and from another
process by `attach`. The code that starts a cluster closes it. A cluster that is left open ends with
the run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from lab.kube import cgroups, guard, imagestore, network, node, pki
from lab.kube.components import Settings
from lab.kube.network import NAMES, Addresses
from lab.kube.places import CHECKOUT, HERE
from lab.process import Completed, LabError, Launch
from lab.process import run as run_program

ENV_PROGRAMS = "ISTHMUS_KUBE_PROGRAMS"  # the directory of the programs
ENV_IMAGES = "ISTHMUS_KUBE_IMAGES"  # the images, unpacked for containerd
ENV_LOGS = "ISTHMUS_KUBE_LOGS"  # the directory that has the logs of each cluster; they stay
ENV_RUNNING = "ISTHMUS_KUBE_CLUSTERS"  # the names of clusters that run already, with commas between
# seconds until a cluster is ready, on a slow and busy machine; about 20 s are usual
START_TIMEOUT = 240.0
COMMAND_TIMEOUT = 120.0
_NODE_TIMEOUT = 60.0
_PAUSE = 0.2  # seconds between two looks at something that Kubernetes does in its own time


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Additional flags for two components, and the mode of kube-proxy (nftables or iptables)."""

    apiserver: tuple[str, ...] = ()
    controllers: tuple[str, ...] = ()
    proxy_mode: str = "nftables"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster. Made by `start` or `attach`."""

    name: str
    kubeconfig: Path
    addresses: Addresses
    state: Path = field(repr=False)
    logs: Path = field(repr=False)

    async def kubectl(
        self, *arguments: str, stdin: str = "", timeout: float = COMMAND_TIMEOUT, check: bool = True
    ) -> Completed:
        """Run kubectl. Raises LabError when it fails and `check` is set, or takes more than
        `timeout` seconds."""
        launch = Launch(env=self.environment())
        done = await run_program(
            ["kubectl", *arguments], launch, stdin=stdin.encode(), timeout=timeout
        )
        if check and not done.ok:
            raise LabError(
                f"{self.name}: kubectl {' '.join(arguments)}:"
                f" {done.stderr.decode(errors='replace').strip()}"
            )
        return done

    def environment(self) -> dict[str, str]:
        """What kubectl and helm find the cluster by. Their caches are in the cluster's directory,
        not in that of the user."""
        caches = (
            {
                "KUBECACHEDIR": str(self.state / "kubectl"),
                "HELM_CACHE_HOME": str(self.state / "helm"),
            }
            if self.state.exists()
            else {}
        )
        return {"KUBECONFIG": str(self.kubeconfig), **caches}

    async def apply(self, manifest: str, namespace: str | None = None) -> None:
        """Apply a manifest of one or more documents, by server-side apply. With `namespace`, no
        document may name another one."""
        where = () if namespace is None else ("--namespace", namespace)
        await self.kubectl(*where, "apply", "--server-side", "-f", "-", stdin=manifest)

    async def get(self, *arguments: str) -> Any:
        """What `kubectl get ... -o json` prints, or `kubectl get --raw PATH`, decoded."""
        form = () if "--raw" in arguments else ("-o", "json")
        return json.loads((await self.kubectl("get", *arguments, *form)).stdout)

    async def wait(self, *arguments: str, timeout: float = COMMAND_TIMEOUT) -> None:
        """`kubectl wait`: for instance `wait("deployment/web", "--for=condition=Available")`."""
        await self.kubectl("wait", *arguments, f"--timeout={timeout:g}s", timeout=timeout + 10)

    async def enter(
        self, *command: str, timeout: float = COMMAND_TIMEOUT, check: bool = True
    ) -> Completed:
        """Run a command on the node, with crictl and ctr set up. Raises LabError as `kubectl`
        does."""
        done = await run_program(
            command, Launch(prefix=self.prefix(), env=ON_THE_NODE), timeout=timeout
        )
        if check and not done.ok:
            raise LabError(
                f"{self.name}: {' '.join(command)}: {done.stderr.decode(errors='replace').strip()}"
            )
        return done

    def prefix(self) -> tuple[str, ...]:
        """What goes before a command that runs on the node."""
        return ("nsenter", "--target", str(_pid(self.state)), "--mount", "--pid", "--net", "--")

    async def stop(self, component: str) -> None:
        """Kill a component (`kube-apiserver`, `etcd`, ...); it stays away until `start`."""
        await self._ask(f"stop {component}")

    async def start(self, component: str) -> None:
        """Start a component again. Does not wait until it answers."""
        await self._ask(f"start {component}")

    async def pid(self, component: str) -> int:
        """The process id of a component on the node, or 0 while it does not run."""
        return int(await self._ask(f"pid {component}"))

    async def _ask(self, line: str) -> str:
        with trio.fail_after(10):
            async with await trio.open_unix_socket(str(node.control(self.name))) as stream:
                await stream.send_all(f"{line}\n".encode())
                answer = (await stream.receive_some(256)).decode().strip()
        if not answer.startswith("ok "):
            raise LabError(f"{self.name}: {line}: {answer}")
        return answer.removeprefix("ok ")

    async def until(self, what: str, *command: str, timeout: float = COMMAND_TIMEOUT) -> None:
        """Run kubectl with these arguments until it succeeds. Raises LabError with the last answer
        after `timeout` seconds."""
        end = trio.current_time() + timeout
        while True:
            done = await self.kubectl(*command, check=False)
            if done.ok:
                return
            if trio.current_time() > end or (self.state.exists() and not running(self.state)):
                raise LabError(
                    f"{self.name}: {what}: not so after {timeout:g} s:"
                    f" {done.stderr.decode().strip()}; logs: {self.logs}"
                )
            await trio.sleep(_PAUSE)

    async def aclose(self) -> None:
        """End the node and remove its network and its state. The logs stay."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_end, self.name, self.state)


ON_THE_NODE = {
    "CONTAINER_RUNTIME_ENDPOINT": "unix:///run/containerd/containerd.sock",
    "CONTAINERD_NAMESPACE": "k8s.io",
}


def attach(name: str) -> Cluster:
    """A cluster that another process of this run has started. Raises LabError when there is
    none."""
    state = guard.directory() / name
    if not running(state):
        raise LabError(f"the cluster {name} does not run")
    return _cluster(name)


def foreign(kubeconfig: Path) -> Cluster:
    """A cluster that was not started here. Only what is done by kubectl works; the methods about
    the node raise LabError."""
    return Cluster("foreign", kubeconfig, Addresses(0), Path("/nonexistent"), Path("/nonexistent"))


def _cluster(name: str) -> Cluster:
    state = guard.directory() / name
    return Cluster(
        name,
        state / "pki" / "admin.conf",
        Addresses.of(name),
        state,
        Path(_required(ENV_LOGS), name),
    )


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise LabError(
            f"{name} is not set: a test cluster is started within a run only"
            " (python -m lab.kube run -- COMMAND)"
        )
    return value


def running(state: Path) -> bool:
    """Whether a node with this state directory runs."""
    try:
        return (
            Path("/proc", str(_pid(state)), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )
    except (OSError, LabError):
        return False


def _pid(state: Path) -> int:
    """The first process of the node, as this process-id namespace counts."""
    try:
        return int((state / "pid").read_text())
    except OSError as error:
        raise LabError(f"{state.name}: no node runs") from error


async def start(name: str, options: Options | None = None) -> Cluster:
    """Start a cluster and wait until it can run pods and answers names. Raises LabError."""
    cluster = _cluster(name)
    if running(cluster.state):
        raise LabError(f"the cluster {name} runs already")
    try:
        with trio.move_on_after(START_TIMEOUT) as patience:
            await trio.to_thread.run_sync(_begin, cluster, options or Options())
            await _become_ready(cluster)
        if patience.cancelled_caught:
            raise LabError(f"{name} was not ready within {START_TIMEOUT:g} s; logs: {cluster.logs}")
    except BaseException:
        await cluster.aclose()
        raise
    return cluster


async def start_all(
    names: Sequence[str] = NAMES, options: Options | None = None
) -> dict[str, Cluster]:
    """Start several clusters side by side, and join west and east when both are there."""
    clusters: dict[str, Cluster] = {}

    async def one(name: str) -> None:
        clusters[name] = await start(name, options)

    began = time.monotonic()
    try:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(one, name)
    except BaseException:
        for cluster in clusters.values():
            await cluster.aclose()
        raise
    if set(NAMES) <= set(names):
        network.join(*NAMES)
    print(
        f"isthmus lab: {' and '.join(names)} started in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return clusters


def _begin(cluster: Cluster, options: Options) -> None:
    """Everything up to the node's first process."""
    for folder in (cluster.state / "pki", cluster.logs, node.SOCKETS):
        folder.mkdir(parents=True, exist_ok=True)
    for log in cluster.logs.glob("*.log"):
        log.unlink()
    pki.write(cluster.state / "pki", cluster.name)
    network.build(cluster.name)
    imagestore.copy(
        Path(_required(ENV_IMAGES)), cluster.state / "root" / "var" / "lib" / "containerd"
    )
    own = Settings(
        name=cluster.name,
        state=cluster.state,
        programs=Path(_required(ENV_PROGRAMS)),
        logs=cluster.logs,
        cgroup=cgroups.make(guard.directory().name, cluster.name),
        apiserver=options.apiserver,
        controllers=options.controllers,
        proxy_mode=options.proxy_mode,
    )
    settings = cluster.state / "settings.json"
    settings.write_bytes(msgspec.json.encode(own, enc_hook=str))
    namespaces = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--propagation",
        "private",
    ]
    command = ["nsenter", f"--net=/run/netns/{network.namespace(cluster.name)}", *namespaces]
    with (cluster.logs / "node.log").open("wb") as output:
        outer = subprocess.Popen(
            [*command, sys.executable, "-m", "lab.kube.node", str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )
    (cluster.state / "outer").write_text(str(outer.pid))
    (cluster.state / "pid").write_text(str(_child(outer, cluster)))


def _child(outer: "subprocess.Popen[bytes]", cluster: Cluster) -> int:
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    end = time.monotonic() + _NODE_TIMEOUT
    while outer.poll() is None and time.monotonic() < end:
        if found := children.read_text().split():
            outer.returncode = 0  # collected by `_end`, or by the sandbox
            return int(found[0])
        time.sleep(0.01)
    raise LabError(f"{cluster.name}: the node did not start; log: {cluster.logs / 'node.log'}")


async def _become_ready(cluster: Cluster) -> None:
    await cluster.until("the API is ready", "get", "--raw", "/readyz")
    await cluster.until(
        "the node is ready", "wait", f"node/{cluster.name}", "--for=condition=Ready", "--timeout=5s"
    )
    await cluster.until("pods can be made", "get", "serviceaccount", "default")
    await cluster.apply((HERE / "manifests" / "coredns.yaml").read_text())
    await cluster.wait("--namespace=kube-system", "deployment/coredns", "--for=condition=Available")


def _end(name: str, state: Path) -> None:
    node.control(name).unlink(missing_ok=True)
    if (state / "outer").exists():
        outer = int((state / "outer").read_text())
        # The first of its namespace, so that the kernel ends all others, pods too. `outer` ends
        # when they have.
        with contextlib.suppress(ProcessLookupError):
            os.kill(_pid(state) if running(state) else outer, signal.SIGKILL)
        _wait(outer)
    network.remove(name)
    subprocess.run(["rm", "-rf", "--one-file-system", str(state)], check=False)


def _wait(pid: int) -> None:
    """Until a process has ended; collects it if it is a child."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        while Path("/proc", str(pid)).exists():
            time.sleep(0.02)
