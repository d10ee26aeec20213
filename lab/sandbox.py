"""The sandbox: the lab runs in separate namespaces, so that the kernel removes everything at the
end.

`python -m lab.sandbox -- COMMAND ...` runs COMMAND in new network, mount and process-id namespaces;
for an ordinary user also in a new user namespace, where that user is root. Inside, `ip netns`, veth
pairs and nftables work, and nothing is visible outside: interfaces and rules belong to the network
namespaces, names in /run/netns to the mount namespace, and processes to the process-id namespace.
When its first process ends for any reason, the kernel kills the others and frees everything.

There are three processes:

    outer   stays in the old process-id namespace; passes signals on; exits with the exit code of
            COMMAND
    init    the first process of the new namespace; dies with `outer` (PR_SET_PDEATHSIG, also after
            kill -9); reaps orphans
    COMMAND keeps the terminal

Signals from the terminal (Ctrl-C) reach all three, since they share a process group. Only other
signals are passed on, otherwise COMMAND would get each Ctrl-C three times.

The code uses system calls and not the program unshare, because that ignores SIGTERM while it waits,
and hides the exit code.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# the id of the process-id namespace: an inherited value is recognised as foreign
ENV_INSIDE = "ISTHMUS_SANDBOX"
ENV_PID = "ISTHMUS_SANDBOX_PID"  # the pid of `init` outside, for nsenter
SYSTEM_PATH = ("/usr/sbin", "/sbin")  # where ip and nft live
PROBE_TIMEOUT = 20.0  # seconds

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x00020000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x8, 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80  # si_code of a signal that the terminal generated (asm-generic/siginfo.h)

_FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)

# Settings that the lab needs and containers often lack. The net.* values belong to the network
# namespace.
SYSCTLS = {
    # an application without privileges may listen on port 25
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv4/ping_group_range": "0 0",
    # addresses are usable at once; no other host is on the link
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
}


class SandboxError(Exception):
    """The sandbox cannot be created; the message is one line with the reason and the remedy."""


def inside() -> bool:
    """Whether this process is in a sandbox."""
    return os.environ.get(ENV_INSIDE) == _pid_namespace()


def outside_pid() -> int | None:
    """The pid for processes outside to enter this sandbox (nsenter --target)."""
    return int(os.environ[ENV_PID]) if inside() and ENV_PID in os.environ else None


def rootless() -> bool:
    """Whether only one user id exists here. Then uid 2102 cannot be used, and the packet mark
    replaces it.
    """
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return not any(int(first) <= 65534 < int(first) + int(count) for first, _, count in ranges)


def available() -> str | None:
    """None if a sandbox can be created here; otherwise one line with the reason and the remedy.
    Creates one to check.
    """
    if (missing := _missing_programs()) is not None:
        return missing
    return _probe()


@functools.cache
def _probe() -> str | None:
    script = "ip netns add probe && ip netns exec probe nft list tables && ip netns delete probe"
    command = [sys.executable, "-m", "lab.sandbox", "--", "sh", "-c", script]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
            check=False,
            env=_environment(),
            cwd=_root(),
        )
    except subprocess.TimeoutExpired:
        return f"a sandbox could not be made within {PROBE_TIMEOUT:g} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return (
        lines[0]
        if done.returncode == 64
        else f"network namespaces or nftables do not work here: {lines[0]}"
    )


def command_line(command: Sequence[str]) -> list[str]:
    """The command that runs `command` in a sandbox."""
    return [sys.executable, "-m", "lab.sandbox", "--", *command]


def reexecute(command: Sequence[str]) -> None:
    """Replace this process by `command` in a sandbox. Returns only by raising SandboxError."""
    if (missing := _missing_programs()) is not None:
        raise SandboxError(missing)
    arguments = command_line(command)
    environment = _environment()
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(_root()), environment.get("PYTHONPATH")])
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(arguments[0], arguments, environment)  # noqa: S606  # no shell needed


def run(command: Sequence[str]) -> int:
    """Run `command` in a new sandbox and wait; its exit code (128 + n when signal n ended it).
    Raises SandboxError."""
    if (missing := _missing_programs()) is not None:
        raise SandboxError(missing)
    os.environ.update(_environment())
    _unshare()
    watched = {*_FORWARDED, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    alive_reader, alive_writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(alive_writer)
        os._exit(_init(command, alive_reader))
    os.close(alive_reader)
    os.write(alive_writer, f"{child}\n".encode())
    return _wait(child)


def _init(command: Sequence[str], alive: int) -> int:
    """The first process of the namespace: prepares it for `ip netns`, starts the command, reaps
    orphans.
    """
    try:
        _libc_call(
            "prctl", "die with the outer process", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0
        )
        outside = os.read(alive, 32)
        if not outside:  # the outer process died before the line above
            return 1
        os.set_inheritable(alive, False)
        _prepare_mounts()
        _prepare_network()
        os.environ[ENV_INSIDE] = _pid_namespace()
        os.environ[ENV_PID] = outside.decode().strip()
        try:
            child = os.posix_spawnp(
                command[0],
                list(command),
                os.environ,
                setsigmask=[],
                setsigdef=[*_FORWARDED, signal.SIGPIPE],
            )
        except OSError as error:
            raise SandboxError(f"{command[0]} cannot be started: {error.strerror}") from error
        return _wait(child)
    except SandboxError as error:
        print(f"isthmus lab: {error}", file=sys.stderr, flush=True)
        return 64


def _wait(child: int) -> int:
    """Wait for `child`, pass signals on, and reap every other process that ends."""
    watched = {*_FORWARDED, signal.SIGCHLD}
    while True:
        info = signal.sigwaitinfo(watched)
        if info.si_signo != signal.SIGCHLD:
            if info.si_code != _SI_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, info.si_signo)
            continue
        # Pending signals of one number are merged: one SIGCHLD can stand for many children.
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return 1
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code


def _unshare() -> None:
    """Enter the new namespaces: as root directly, otherwise (also as root without the capability)
    with a user namespace.
    """
    flags = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET
    uid, gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if uid == 0 and libc.unshare(flags) == 0:
        return
    if libc.unshare(flags | _CLONE_NEWUSER) != 0:
        raise SandboxError(why_no_user_namespace(ctypes.get_errno()))
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as error:
        raise SandboxError(
            f"{why_no_user_namespace(error.errno or 0)} (it was made, but its user ids cannot be"
            " mapped)"
        ) from error


def why_no_user_namespace(code: int) -> str:
    """The reason: several systems restrict user namespaces in their own ways."""

    def setting(path: str) -> str | None:
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
        return None

    start = "the lab needs user namespaces, and they are not allowed here: "
    if setting("/proc/sys/user/max_user_namespaces") == "0":
        return start + "run `sysctl user.max_user_namespaces=10000` as root, or run this as root"
    if setting("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return (
            start + "run `sysctl kernel.unprivileged_userns_clone=1` as root, or run this as root"
        )
    if setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            start
            + "run `sysctl kernel.apparmor_restrict_unprivileged_userns=0` as root, or run this as"
            " root"
        )
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return start + "start the container with --privileged, or run this outside of a container"
    return f"{start}{os.strerror(code)}; run this as root"


def _prepare_mounts() -> None:
    """Private mounts: a /proc of the new process-id namespace, a /sys of the new network namespace,
    an empty /run."""
    resolver = Path("/etc/resolv.conf").resolve()
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    # All of /run is hidden: an ordinary user cannot create /run/netns in it, and as root it would
    # stay behind.
    _mount("tmpfs", "/run", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=512m")
    if resolver.is_relative_to("/run"):  # the file of systemd-resolved has just been hidden
        resolver.parent.mkdir(parents=True, exist_ok=True)
        resolver.write_text("")
    for directory in ("netns", "lock", "postgresql"):
        Path("/run", directory).mkdir()
    Path("/run/postgresql").chmod(0o1777)
    Path("/run/lock").chmod(0o1777)


def _prepare_network() -> None:
    for arguments in (["link", "set", "lo", "up"],):
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SandboxError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    for name, value in SYSCTLS.items():
        with contextlib.suppress(OSError):  # a kernel without IPv6 has no such setting
            Path("/proc/sys", name).write_text(value)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2).  Raises SandboxError."""
    arguments = (
        source.encode(),
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _libc_call("mount", f"mount {kind or 'private'} on {target}", *arguments)


def _libc_call(name: str, what: str, *arguments: object) -> None:
    """Call a C library function that returns 0 on success. Raises SandboxError that names the
    attempt.
    """
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        hint = (
            "; this container hides parts of /proc: start it with --privileged"
            if code == errno.EPERM and "/proc" in what
            else ""
        )
        raise SandboxError(f"cannot {what}: {os.strerror(code)}{hint}")


def _missing_programs() -> str | None:
    path = _environment()["PATH"]
    needed = (("ip", "iproute2"), ("nft", "nftables"))
    missing = [
        (program, package) for program, package in needed if not shutil.which(program, path=path)
    ]
    if not missing:
        return None
    programs, packages = zip(*missing, strict=True)
    names = " ".join(packages)
    return (
        f"the lab needs the programs {' and '.join(programs)}: install {names} (Debian: apt install"
        f" {names})"
    )


def _environment() -> dict[str, str]:
    """The environment with the system's program directories on PATH, which an ordinary user often
    lacks.
    """
    environment = dict(os.environ)
    path = environment.get("PATH", os.defpath).split(os.pathsep)
    environment["PATH"] = os.pathsep.join(
        [*path, *(extra for extra in SYSTEM_PATH if extra not in path)]
    )
    return environment


def _pid_namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink())


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m lab.sandbox [--check] [-- COMMAND ...]`."""
    about = "Run a command in separate namespaces; leaves nothing behind."
    parser = argparse.ArgumentParser(prog="python -m lab.sandbox", description=about)
    parser.add_argument(
        "--check", action="store_true", help="only report whether a sandbox can be created here"
    )
    parser.add_argument(
        "command",
        nargs="*",
        metavar="COMMAND",
        help="what to run, after -- (a shell if nothing is given)",
    )
    args = parser.parse_args(argv)
    if args.check:
        reason = available()
        print(reason or "a sandbox can be created here")
        return 1 if reason else 0
    try:
        return run(args.command or [os.environ.get("SHELL", "/bin/sh")])
    except SandboxError as error:
        print(f"isthmus lab: {error}", file=sys.stderr)
        return 64


if __name__ == "__main__":
    sys.exit(main())
