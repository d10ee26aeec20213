"""Programs in the lab: starting, watching, waiting, stopping.

A process keeps its output in a file and the newest lines in memory, so that an error can show the
end of the output. Each program runs in its own session, so a kill also reaches its children. The
lab's nursery owns the reader tasks. `Process.aclose` stops the program; as a last resort, the
sandbox's process-id namespace does.
"""

import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

TAIL_LINES = 400  # lines of output that stay in memory; the file has the first MAX_LOG_BYTES
MAX_LINE = 16 * 1024  # bytes; a longer line is cut into pieces
MAX_LOG_BYTES = 16 * 1024 * 1024
# seconds; generous, for a slow and busy machine: waits end as soon as the program is ready
READY_TIMEOUT = 40.0
STOP_TIMEOUT = 10.0  # seconds between SIGTERM and SIGKILL


class LabError(Exception):
    """Something in the lab failed; the message gives the reason, and the end of the log if there is
    one.
    """


@dataclass(slots=True)
class Output:
    """The newest lines a program wrote, and a signal when there are more."""

    path: Path
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    total_bytes: int = 0
    count: int = 0  # of all lines, including those dropped from `lines`
    changed: trio.Event = field(default_factory=trio.Event)
    ended: bool = False

    def tail(self, count: int = 20) -> str:
        """The last lines as one text."""
        return "\n".join(list(self.lines)[-count:])

    async def read_from(self, stream: trio.abc.ReceiveStream) -> None:
        """Read until the program closes its output."""
        rest = b""
        with self.path.open("ab") as file:
            async for chunk in stream:
                if self.total_bytes < MAX_LOG_BYTES:
                    file.write(chunk)
                    file.flush()
                self.total_bytes += len(chunk)
                *complete, rest = (rest + chunk).split(b"\n")
                if len(rest) > MAX_LINE:
                    complete, rest = [*complete, rest], b""
                self._add(complete)
        self._add([rest] if rest else [])
        self.ended = True
        self._wake()

    def _add(self, lines: Sequence[bytes]) -> None:
        self.lines.extend(line.decode(errors="replace") for line in lines)
        self.count += len(lines)
        if lines:
            self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ran to its end."""

    command: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output, decoded."""
        return self.stdout.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """Whether the exit code was 0."""
        return self.returncode == 0


class Process:
    """A running program, created by `start`. The caller of `start` must call `aclose`; the lab does
    so at its end.
    """

    def __init__(
        self, name: str, command: Sequence[str], process: trio.Process, output: Output
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.output = output
        self._process = process

    @property
    def pid(self) -> int:
        """The process id inside the sandbox."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while the program runs; -n when signal n ended it."""
        return self._process.poll()

    @property
    def alive(self) -> bool:
        """Whether the program still runs (a paused one does)."""
        return self.returncode is None

    def rss(self) -> int:
        """Resident memory in bytes.  Raises LabError when the program has ended."""
        return self._status("VmRSS")

    def peak_rss(self) -> int:
        """The largest resident memory so far, in bytes.  Raises LabError when the program has
        ended."""
        return self._status("VmHWM")

    def cpu_seconds(self) -> float:
        """User and system time so far, in seconds.  Raises LabError when the program has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError as error:
            raise LabError(f"{self.name} does not run any more") from error
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status(self, key: str) -> int:
        try:
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
        except OSError as error:
            raise LabError(f"{self.name} does not run any more") from error
        raise LabError(f"{self.name} has ended, but was not reaped yet")

    def signal(self, number: int) -> None:
        """Send a signal to the program and its children; no effect if it has ended."""
        if self.alive:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL: looks like a crash from outside."""
        self.signal(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: the kernel still accepts connections for it, but it does not answer."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: ends a `pause`."""
        self.signal(signal.SIGCONT)

    async def wait(self) -> int:
        """Wait for the end of the program; its return code."""
        return await self._process.wait()

    async def aclose(self, grace: float = STOP_TIMEOUT) -> None:
        """SIGTERM, then SIGKILL after `grace` seconds."""
        self.resume()
        self.signal(signal.SIGTERM)
        with trio.move_on_after(grace):
            await self._process.wait()
        self.kill()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + STOP_TIMEOUT):
            await self._process.wait()

    async def wait_line(self, text: str, timeout: float = READY_TIMEOUT) -> str:
        """Wait until the program has written a line that contains `text`; returns it. Raises
        LabError.
        """
        found: list[str] = []

        def seen() -> bool:
            found[:] = [line for line in self.output.lines if text in line]
            return bool(found)

        await self.wait_until(seen, f"write a line with {text!r}", timeout)
        return found[0]

    async def wait_until(
        self, condition: Callable[[], bool], what: str, timeout: float = READY_TIMEOUT
    ) -> None:
        """Wait until `condition` holds; it is checked after each output. Raises LabError if the
        program ends before, or on timeout.
        """
        with trio.move_on_after(timeout):
            while not condition():
                if self.output.ended:
                    raise self.error(
                        f"ended (return code {await self.wait()}) before it could {what}"
                    )
                await self.output.changed.wait()
            return
        raise self.error(f"did not {what} within {timeout:g} s")

    def error(self, what: str) -> LabError:
        """An error about this program, with the end of its output."""
        tail = self.output.tail() or "(no output)"
        return LabError(f"{self.name} {what}; its output ({self.output.path}) ends with:\n{tail}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a program is started: the command prefix and the environment."""

    prefix: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None


async def start(
    nursery: trio.Nursery, name: str, command: Sequence[str], log: Path, launch: Launch
) -> Process:
    """Start a program; a task in `nursery` reads its output. Raises LabError if it cannot be
    started.
    """
    try:
        process = await trio.lowlevel.open_process(
            [*launch.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **launch.env},
            cwd=launch.cwd,
            start_new_session=True,
        )
    except OSError as error:
        raise LabError(f"{name} cannot be started: {error}") from error
    output = Output(log)
    assert process.stdout is not None  # noqa: S101  # for the type checker: it was asked for
    nursery.start_soon(output.read_from, process.stdout)
    return Process(name, command, process, output)


async def run(
    command: Sequence[str], launch: Launch, *, stdin: bytes = b"", timeout: float = 30.0
) -> Completed:
    """Run a program to its end. Raises LabError if it cannot be started or takes more than
    `timeout` seconds.
    """
    done: subprocess.CompletedProcess[bytes] | None = None
    with trio.move_on_after(timeout):
        try:
            done = await trio.run_process(
                [*launch.prefix, *command],
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env={**os.environ, **launch.env},
                cwd=launch.cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise LabError(f"{command[0]} cannot be started: {error}") from error
    if done is None:
        raise LabError(f"{' '.join(command)} did not finish within {timeout:g} s")
    return Completed(tuple(command), done.returncode, done.stdout, done.stderr)
