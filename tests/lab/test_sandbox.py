"""The sandbox: it changes nothing outside, and leaves nothing behind.

Rules: the sandbox is run as a command, as a user runs it. After its end or its death the tests
check from outside what is left. These tests make their own sandboxes, so they run outside of one as
well as inside (namespaces nest)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import sandbox

REASON = sandbox.available()
needs_sandbox = pytest.mark.skipif(REASON is not None, reason=str(REASON))
COMMAND = [sys.executable, "-m", "lab.sandbox", "--"]


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def processes_with(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@needs_sandbox
@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 128 + 9), ("kill -TERM $$", 128 + 15)],
)
def test_the_exit_code_is_that_of_the_command(script: str, code: int) -> None:
    assert run(script).returncode == code


@needs_sandbox
def test_a_command_that_does_not_exist_is_named() -> None:
    done = subprocess.run(
        [*COMMAND, "no-such-program"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 64
    assert "no-such-program" in done.stderr
    assert "Traceback" not in done.stderr


@needs_sandbox
def test_inside_is_known_inside_only() -> None:
    code = "from lab.sandbox import inside; import sys; sys.exit(0 if inside() else 1)"
    assert (
        subprocess.run([*COMMAND, sys.executable, "-c", code], timeout=60, check=False).returncode
        == 0
    )
    environment = {**os.environ, sandbox.ENV_INSIDE: "pid:[1]"}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], timeout=60, check=False, env=environment
        ).returncode
        == 1
    )


@needs_sandbox
def test_namespaces_links_and_rules_work_inside_and_cannot_be_seen_outside() -> None:
    before = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    make = (
        "ip netns add sandboxed && ip link add sandboxed0 type veth peer name sandboxed1 && nft add"
        " table inet sandboxed"
    )
    done = run(f"{make} && ip netns && ip link && nft list tables")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sandboxed") >= 3
    assert not Path("/run/netns/sandboxed").exists()
    after = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "sandboxed0" not in after
    assert after == before


@needs_sandbox
def test_a_child_that_outlives_the_command_is_killed_with_the_sandbox() -> None:
    marker = f"97{os.getpid()}1"
    done = run(f"setsid sleep {marker} & echo started")
    assert done.stdout == "started\n"
    assert eventually(lambda: not processes_with(f"sleep\0{marker}"))


@needs_sandbox
def test_kill_9_of_the_outer_process_ends_everything_inside() -> None:
    marker = f"97{os.getpid()}2"
    script = f"ip netns add doomed; ip netns exec doomed setsid sleep {marker} & wait"
    outer = subprocess.Popen([*COMMAND, "sh", "-c", script], start_new_session=True)
    assert eventually(lambda: bool(processes_with(f"sleep\0{marker}")))
    outer.kill()
    outer.wait()
    assert eventually(lambda: not processes_with(f"sleep\0{marker}"))
    assert not Path("/run/netns/doomed").exists()


@needs_sandbox
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_command_exactly_once(number: signal.Signals) -> None:
    # Blocked and waited for: a handler could run within the very `print` before it, or before the
    # `pause` that is to wait for it.
    code = (
        "import signal, sys\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{number:d}])\n"
        "print('ready', flush=True)\n"
        f"print('got', signal.sigwait([{number:d}]), flush=True)\n"
        f"sys.exit(5 if signal.sigtimedwait([{number:d}], 0.2) is None else 6)"
    )
    # A shell starts background jobs with SIGINT ignored, and that is inherited.
    command = ["env", "--default-signal=INT", *COMMAND, sys.executable, "-c", code]
    outer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert outer.stdout is not None
    assert outer.stdout.readline() == "ready\n"
    outer.send_signal(number)
    assert outer.stdout.read() == f"got {number:d}\n"
    assert outer.wait(timeout=60) == 5
    outer.stdout.close()


@needs_sandbox
def test_orphans_are_collected() -> None:
    # Running or not: one that has ended, and was not waited for, is shown as `sleep <defunct>`.
    wait = "for i in $(seq 400); do ps -eo comm | grep -q sleep || { echo none left; break; }; done"
    done = run(f"for i in 1 2 3; do (sleep 0.05 &) ; done; sleep 0.3; {wait}")
    assert done.stdout.strip() == "none left"


def test_missing_programs_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sandbox, "SYSTEM_PATH", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = sandbox.available()
    assert reason is not None
    assert "ip and nft" in reason
    assert "apt install iproute2 nftables" in reason


def test_the_reason_without_user_namespaces_is_one_line_that_says_what_to_do() -> None:
    reason = sandbox.why_no_user_namespace(1)
    assert "\n" not in reason
    assert "user namespaces" in reason
    assert "run this" in reason
