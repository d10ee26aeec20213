"""Several workers as one proxy: starts and restarts them, passes signals on, and serves their admin
listener.

The supervisor carries no traffic. Each worker is a complete proxy in its own process. All bind the
same ports with SO_REUSEPORT; the kernel distributes new connections by a hash of their addresses,
and a connection stays with its worker. When a worker dies, only its own connections break, and the
kernel gives it no new ones. It is restarted after a pause, which doubles while it keeps dying.

    supervise
    ├── admin                /live, /ready and /metrics of all workers together
    ├── poll                 asks every worker for its state, so that a crash loses few counts
    ├── keep(1) ... keep(N)  runs one worker's process and restarts it
    └── stop                 passes SIGTERM and SIGINT on

The administration listener has its own thread (admin.py). It answers from the last known state of
each worker and waits for none. If a worker has not answered for `admin.stall_timeout`, /live and
/ready fail, like those of a single process whose event loop is stuck. A worker is asked every two
seconds; no new question is sent while one is open.

The first worker is started alone. An error in the configuration, the certificate or the ports
affects all workers, and is reported once.

Two proxies on one port: with SO_REUSEPORT the kernel would silently give half of the connections to
a second proxy of the same user. So the supervisor claims a name for each port, an abstract Unix
socket. Like ports, these names belong to the network namespace, and the kernel frees them when the
process ends for any reason. With the names claimed, the supervisor binds each address once without
SO_REUSEPORT. That fails if another process listens there, for example workers of a supervisor that
was killed. (A proxy without workers keeps this bind.) Processes of other users cannot share the
ports: the kernel requires the same user id.

Shared by all workers: the configuration, the loop guard's secret, and the table of the proxy's own
open connections (workers/connection_table.py). Not shared: pools, health and load of endpoints, TLS
sessions, DNS queries in flight, queues of logs and spans. Each worker learns these for itself.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from secrets import token_bytes

import msgspec
import trio

import proxy
from proxy.admin import Admin, AdminCallbacks
from proxy.config.schema import Config
from proxy.errors import StartError
from proxy.net.accept import BindFailed, bind, bind_datagrams
from proxy.net.liveness import Liveness
from proxy.process.listeners import has_family
from proxy.telemetry.log import configure
from proxy.telemetry.metrics import Metrics
from proxy.workers.connection_table import make, wipe
from proxy.workers.merged_metrics import MergedMetrics, reading
from proxy.workers.protocol import (
    QUESTION,
    ProcessGone,
    Start,
    WorkerState,
    receive,
    send,
    share,
    start_message,
)

_log = logging.getLogger("isthmus.supervisor")

# Seconds between two questions to the workers. A worker that is killed loses what it counted since
# the last.
_POLL_INTERVAL = 2.0
# How long (seconds) rendering the metrics waits for the workers' states.
_PATIENCE = 0.25
# Pauses before a dead worker is restarted: the first, and the longest. After a life of `_WELL`, the
# pause starts again at the first.
_PAUSE, _LONGEST_PAUSE, _WELL = 0.1, 30.0, 60.0
# Time after the grace period in which spans, logs and the interpreter of a worker may finish.
_MARGIN = 10.0
# Exit codes of errors that a restart does not fix (sysexits.h).
_HOPELESS = frozenset({64, 69})


def supervise(config: Config) -> int:
    """Run the workers until a signal stops them; returns the exit code. Raises StartError."""
    metrics = Metrics()
    close_logs = configure(config.log, on_drop=metrics.count_dropped_logs, worker=0)
    try:
        with claimed(config):
            return trio.run(Supervisor(config, metrics).run)
    finally:
        close_logs()


def claimed(config: Config) -> ExitStack:
    """Claim the traffic ports for this proxy until the result is closed. Raises StartError."""
    names, addresses = (
        ExitStack(),
        [(path, address) for path, address in config.listeners() if has_family(address)],
    )
    try:
        for port in sorted(
            {address.port for path, address in addresses if not path.startswith("admin.")}
        ):
            name = names.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                name.bind(f"\0isthmus/port/{port}")
            except OSError as error:
                raise StartError(
                    f"port {port} is in use by another proxy with workers", 69
                ) from error
        for path, address in addresses:
            if not path.startswith("admin."):
                bind(address).close()
                if path.startswith("dns."):
                    bind_datagrams(address).close()
    except (StartError, BindFailed) as error:
        names.close()
        raise StartError(str(error), 69) from error
    return names


@dataclass(slots=True, eq=False)
class Life:
    """One process of a worker. At most one question is open; all callers wait for the same
    answer."""

    process: trio.Process
    pipe: trio.SocketStream
    state: WorkerState | None = None  # the last state received; None while it is starting
    question_open: bool = False
    missed: int = 0  # `poll` calls since the unanswered question
    answered: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    @property
    def silent_for(self) -> float:
        """Seconds without an answer; 0 while it is starting."""
        return self.missed * _POLL_INTERVAL if self.state is not None else 0.0

    async def poll(self) -> None:
        """Ask it for its state, unless a question is still open; then count the miss."""
        self.missed += self.question_open
        await self.ask()

    async def ask(self) -> None:
        """Make sure that a question is open. Does not wait for the answer, and does not block: the
        socket's buffer holds more than one question.
        """
        try:
            if not self.question_open:
                self.question_open = True
                await self.pipe.send_all(QUESTION)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the process has ended; `_life` handles that

    async def listen(self, start: Start, on_state: Callable[[WorkerState], None]) -> None:
        """Send a new process its `Start`, then receive its states until it ends."""
        try:
            await send(self.pipe, start_message(start))
            self.question_open = True
            await self.pipe.send_all(QUESTION)
            while True:
                self.state = msgspec.msgpack.decode(await receive(self.pipe), type=WorkerState)
                self.question_open, self.missed = False, 0
                on_state(self.state)
                self.answered.unpark_all()
        except (ProcessGone, trio.BrokenResourceError):
            self.answered.unpark_all()
        except msgspec.MsgspecError:
            _log.exception("a worker sent an invalid message")
            self.process.kill()


@dataclass(slots=True, eq=False)
class Worker:
    """One worker number and its current process. `served`: a process has reported its state, or
    none will.
    """

    number: int
    life: Life | None = None
    # the pause before a restart
    pausing: trio.CancelScope = field(default_factory=trio.CancelScope)
    served: trio.Event = field(default_factory=trio.Event)

    def stalled(self, timeout: float) -> list[str]:
        """Why it counts as stuck: it has not answered for `timeout` seconds. Empty if it is not
        stuck.
        """
        life = self.life
        return (
            [f"has not answered for {life.silent_for:.0f} s"]
            if life is not None and life.silent_for >= timeout
            else []
        )

    def reasons(self, timeout: float) -> list[str]:
        """Why it should get no traffic. Empty if it is ready."""
        life = self.life
        if life is None:
            return ["is not running"]
        return self.stalled(timeout) or (
            ["is starting"] if life.state is None else life.state.reasons
        )


class Supervisor:
    """The workers and their common view. The constructor binds the administration listener; it
    raises StartError.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config = config
        self.workers = [Worker(number) for number in range(1, config.workers + 1)]
        self._metrics = metrics
        self._totals = MergedMetrics(metrics.families.rules)
        self._share = share(config)
        self._secret = token_bytes(32)
        self._memory = make(config.workers)  # open as long as this process
        self._stopping = trio.Event()
        self._lives = trio.CancelScope()  # of all workers
        self._code = 0
        self._nursery: trio.Nursery  # set while `run` runs
        self._admin: list[socket.socket] = []
        try:
            for address in config.admin.listen:
                if has_family(address):
                    self._admin.append(bind(address))
                    Liveness(config.tcp.user_timeout, config.tcp.keepalive).prepare(self._admin[-1])
        except BindFailed as error:
            for sock in self._admin:
                sock.close()
            raise StartError(str(error), 69) from error

    async def run(self) -> int:
        """Run until all workers have ended after a signal, or the first one cannot start. Returns
        the exit code.
        """
        status = AdminCallbacks(self.not_alive, self.not_ready, self.render, self._refresh)
        admin = Admin(self.config.admin, self._admin, status, self._metrics)
        _log.info("%d workers", len(self.workers))
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(admin.run)
                nursery.start_soon(self._poll)
                nursery.start_soon(self._stop, signals)
                with self._lives:
                    await self._keep_all()
                nursery.cancel_scope.cancel()
        return self._code

    async def _keep_all(self) -> None:
        async with trio.open_nursery() as workers:
            first, *others = self.workers
            workers.start_soon(self._keep, first)
            await first.served.wait()
            for worker in others:
                workers.start_soon(self._keep, worker)

    # Processes of the workers

    async def _keep(self, worker: Worker) -> None:
        """Run a worker's process and restart it until the supervisor stops."""
        pause = _PAUSE
        while not self._stopping.is_set():
            began = trio.current_time()
            code = await self._life(worker)
            if self._stopping.is_set():
                break
            if code in _HOPELESS and worker is self.workers[0] and not worker.served.is_set():
                self._code = code  # the worker has logged the error itself
                self._stopping.set()
                break
            self._metrics.worker_exits.at("signal" if code < 0 else "exit").inc()
            pause = _PAUSE if trio.current_time() - began > _WELL else pause
            how = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"exited with code {code}"
            )
            _log.error(
                "worker %d %s; its connections are lost; restarting it in %g s",
                worker.number,
                how,
                pause,
            )
            with worker.pausing:
                await trio.sleep(pause)
            worker.pausing = trio.CancelScope()
            pause = min(2 * pause, _LONGEST_PAUSE)
        worker.served.set()

    async def _life(self, worker: Worker) -> int:
        """Run one process to its end; returns its return code, negative for a signal. If cancelled,
        kills it.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as pipe:
            with theirs:
                process = await trio.lowlevel.open_process(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "proxy.worker",
                        str(theirs.fileno()),
                        str(self._memory),
                    ],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), self._memory],
                    env={**os.environ, "PYTHONPATH": _path()},
                    process_group=0,  # the supervisor itself passes Ctrl-C on, once
                )
            worker.life = life = Life(process, pipe)
            # the signal came before the process was there to receive it
            if self._stopping.is_set():
                process.terminate()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        life.listen,
                        Start(worker.number, self._share, self._secret),
                        partial(self._on_state, worker),
                    )
                    await process.wait()
                    nursery.cancel_scope.cancel()
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.CancelScope(shield=True):  # SIGKILL ends it soon
                        await process.wait()
                worker.life = None
                self._totals.gone(worker.number)
                wipe(self._memory, worker.number)
                life.answered.unpark_all()
        return process.returncode or 0

    def _on_state(self, worker: Worker, state: WorkerState) -> None:
        self._totals.take(worker.number, state.reading)
        if not worker.served.is_set():
            _log.info("worker %d is serving", worker.number)
        worker.served.set()

    async def _stop(self, signals: AsyncIterator[int]) -> None:
        """Pass each signal on to the workers. The first one starts the shutdown, within their grace
        period.
        """
        async for number in signals:
            if not self._stopping.is_set():
                self._stopping.set()
                _log.info("stopping: the workers have %g s to finish", self.config.shutdown.grace)
                self._lives.deadline = trio.current_time() + self.config.shutdown.grace + _MARGIN
            for worker in self.workers:
                if worker.life is not None:
                    worker.life.process.send_signal(number)
                worker.pausing.cancel()

    # States of the workers

    async def _poll(self) -> None:
        while True:
            await trio.sleep(_POLL_INTERVAL)
            for worker in self.workers:
                if worker.life is not None:
                    await worker.life.poll()

    def _refresh(self, done: Callable[[], None]) -> None:
        self._nursery.start_soon(self._hear_all, done)

    async def _hear_all(self, done: Callable[[], None]) -> None:
        """Get fresh states from all workers that answer within `_PATIENCE`."""
        with trio.move_on_after(_PATIENCE):
            async with trio.open_nursery() as nursery:
                for worker in self.workers:
                    if worker.life is not None and worker.life.state is not None:
                        await worker.life.ask()
                        nursery.start_soon(worker.life.answered.park)
        done()

    # The methods below are also called by the thread of the administration listener.

    def not_alive(self) -> list[str]:
        """A worker that has ended is restarted and does not count. One that runs but does not
        answer stays stuck.
        """
        timeout = self.config.admin.stall_timeout
        return [
            f"worker {worker.number} {reason}"
            for worker in self.workers
            for reason in worker.stalled(timeout)
        ]

    def not_ready(self) -> list[str]:
        if self._stopping.is_set():
            return ["shutting down"]
        timeout = self.config.admin.stall_timeout
        return [
            f"worker {worker.number}: {reason}"
            for worker in self.workers
            for reason in worker.reasons(timeout)
        ]

    def render(self) -> bytes:
        timeout = self.config.admin.stall_timeout
        alive = [worker for worker in self.workers if worker.life is not None]
        self._metrics.workers.at("alive").set(len(alive))
        self._metrics.workers.at("ready").set(sum(not worker.reasons(timeout) for worker in alive))
        return self._totals.render(reading(self._metrics.registry))


def _path() -> str:
    """The directory of this program, so that a worker finds it in any working directory."""
    ours = str(Path(proxy.__file__).parent.parent)
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])
