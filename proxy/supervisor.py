"""Several workers as one proxy: starts them, starts them again, passes on what it is told, and answers for all of them.

The supervisor carries no traffic. Each worker is a whole proxy in a process of its own, that binds the same ports with SO_REUSEPORT; the
kernel divides new connections among them by a hash of their addresses, and a connection stays with its worker. When one dies, its
connections break and no others, and the kernel gives it no new ones; it is started again, with a pause that doubles while it keeps
dying.

    supervise
    ├── admin                the one view: /live, /ready and /metrics of all workers together
    ├── look                 asks every worker how it is, now and then, so that little of what it has counted is lost with it
    ├── keep(1) ... keep(N)  a worker's process, one life after the other
    └── stop                 SIGTERM and SIGINT, passed on

The administration listener has a thread of its own (admin.py), which answers from what is known of each worker: no answer waits for one. A
worker that has not answered for `admin.stall_timeout` makes /live and /ready fail, as an event loop that stands still does where there are
no workers. A worker is asked every two seconds, and one that does not answer is not asked again until it has.

The first worker is started alone. What is wrong with the configuration, the certificate or the ports is wrong for all, and is said once.

Two proxies on one port. With SO_REUSEPORT the kernel would let a second proxy of the same user take half of the connections, without a
word. So the supervisor holds a name for each port (an abstract Unix socket: like ports they belong to the network namespace, and the
kernel frees them whatever becomes of the process), and when it has the names, it binds each address once without SO_REUSEPORT, which
fails if anybody listens there: workers of a supervisor that was killed, say. (A proxy without workers binds that way for good.) Other
users cannot share the ports at all: the kernel wants the same user id.

Shared by all of them: the configuration, the loop guard's secret, and the table of our own open connections (workers/connection_table.py).
Not shared: pools, health and load of endpoints, TLS sessions, DNS questions under way, queues of logs and spans. Each worker learns by
itself.
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
from proxy.admin import Admin, Status
from proxy.config.load import Config
from proxy.errors import StartError
from proxy.net.accept import BindFailed, bind, bind_datagrams
from proxy.net.liveness import Liveness
from proxy.process.listeners import has_family
from proxy.telemetry.log import configure
from proxy.telemetry.metrics import Metrics
from proxy.workers.connection_table import make, wipe
from proxy.workers.merged_metrics import Totals, reading
from proxy.workers.protocol import QUESTION, ProcessGone, Start, State, receive, send, share, start_message

_log = logging.getLogger("isthmus.supervisor")

# Seconds between two looks at the workers: what one has counted since is lost if it is killed.
_LOOK = 2.0
# How long (seconds) a text of metrics waits for workers to say how they are.
_PATIENCE = 0.25
# Pauses before a worker that has died is started again: the first, and the longest. One that has lived for `_WELL` begins anew.
_PAUSE, _LONGEST_PAUSE, _WELL = 0.1, 30.0, 60.0
# Beyond the grace: what spans, logs and the interpreter may take at the end of a worker.
_MARGIN = 10.0
# What a process says by its exit code that will be no better the next time (sysexits.h).
_HOPELESS = frozenset({64, 69})


def supervise(config: Config) -> int:
    """Run the workers until told to stop; returns the exit code. Raises StartError."""
    metrics = Metrics()
    close_logs = configure(config.log, on_drop=metrics.logs_dropped, worker=0)
    try:
        with claimed(config):
            return trio.run(Supervisor(config, metrics).run)
    finally:
        close_logs()


def claimed(config: Config) -> ExitStack:
    """Make sure that the ports of the traffic are nobody else's, until the result is closed. Raises StartError."""
    names, addresses = ExitStack(), [(path, address) for path, address in config.listeners() if has_family(address)]
    try:
        for port in sorted({address.port for path, address in addresses if not path.startswith("admin.")}):
            name = names.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                name.bind(f"\0isthmus/port/{port}")
            except OSError as error:
                raise StartError(f"port {port} is in use by another proxy with workers", 69) from error
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
    """One process of a worker. It has at most one question before it; whoever asks meanwhile waits for the same answer."""

    process: trio.Process
    pipe: trio.SocketStream
    state: State | None = None  # the newest that it has said; None: it is still starting
    asked: bool = False
    missed: int = 0  # looks at it since it was asked and has not answered
    heard: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    @property
    def silent_for(self) -> float:
        """Seconds for which it has not answered. One that is still starting is not expected to."""
        return self.missed * _LOOK if self.state is not None else 0.0

    async def look(self) -> None:
        """Ask it how it is, unless it has not answered the last time."""
        self.missed += self.asked
        await self.ask()

    async def ask(self) -> None:
        """Have a question before it. Does not wait for the answer: the socket's buffer holds more than one."""
        try:
            if not self.asked:
                self.asked = True
                await self.pipe.send_all(QUESTION)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it has ended, and that is noticed elsewhere

    async def listen(self, start: Start, hear: Callable[[State], None]) -> None:
        """Tell a new process what it is, and take in what it says, until it is gone."""
        try:
            await send(self.pipe, start_message(start))
            self.asked = True
            await self.pipe.send_all(QUESTION)
            while True:
                self.state = msgspec.msgpack.decode(await receive(self.pipe), type=State)
                self.asked, self.missed = False, 0
                hear(self.state)
                self.heard.unpark_all()
        except (ProcessGone, trio.BrokenResourceError):
            self.heard.unpark_all()
        except msgspec.MsgspecError:
            _log.exception("a worker says what nobody understands")
            self.process.kill()


@dataclass(slots=True, eq=False)
class Worker:
    """One place, and the process that has it now. `served`: one of them has come so far as to say how it is, or nobody will."""

    number: int
    life: Life | None = None
    pausing: trio.CancelScope = field(default_factory=trio.CancelScope)  # between two lives
    served: trio.Event = field(default_factory=trio.Event)

    def stalled(self, timeout: float) -> list[str]:
        """Why it is beyond help, if it has not answered for `timeout` seconds."""
        life = self.life
        return [f"has not answered for {life.silent_for:.0f} s"] if life is not None and life.silent_for >= timeout else []

    def reasons(self, timeout: float) -> list[str]:
        """Why no traffic should come to it."""
        life = self.life
        if life is None:
            return ["is not running"]
        return self.stalled(timeout) or (["is starting"] if life.state is None else life.state.reasons)


class Supervisor:
    """The workers, and the one view of them. The constructor binds the administration listener, and raises StartError."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config = config
        self.workers = [Worker(number) for number in range(1, config.workers + 1)]
        self._metrics = metrics
        self._totals = Totals()
        self._share = share(config)
        self._secret = token_bytes(32)
        self._memory = make(config.workers)  # open as long as this process lives
        self._stopping = trio.Event()
        self._lives = trio.CancelScope()  # of all workers
        self._code = 0
        self._nursery: trio.Nursery  # while it runs
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
        """Until all workers have ended, since they were told to, or the first could not start. Returns the exit code."""
        status = Status(self.not_alive, self.not_ready, self.render, self._refresh)
        admin = Admin(self.config.admin, self._admin, status, self._metrics)
        _log.info("%d workers", len(self.workers))
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(admin.run)
                nursery.start_soon(self._look)
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

    # A worker's lives...

    async def _keep(self, worker: Worker) -> None:
        """A worker's process, one after the other, until it is told to stop."""
        pause = _PAUSE
        while not self._stopping.is_set():
            began = trio.current_time()
            code = await self._life(worker)
            if self._stopping.is_set():
                break
            if code in _HOPELESS and worker is self.workers[0] and not worker.served.is_set():
                self._code = code  # it has said itself what is wrong
                self._stopping.set()
                break
            self._metrics.worker_exits.at("signal" if code < 0 else "exit").inc()
            pause = _PAUSE if trio.current_time() - began > _WELL else pause
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
            _log.error("worker %d %s, and is started again in %g s: its connections are lost", worker.number, how, pause)
            with worker.pausing:
                await trio.sleep(pause)
            worker.pausing = trio.CancelScope()
            pause = min(2 * pause, _LONGEST_PAUSE)
        worker.served.set()

    async def _life(self, worker: Worker) -> int:
        """One process, from its start to its end; the return code, negative for a signal. Cancelled, it is killed."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as pipe:
            with theirs:
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-P", "-m", "proxy.worker", str(theirs.fileno()), str(self._memory)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), self._memory],
                    env={**os.environ, "PYTHONPATH": _path()},
                    process_group=0,  # an interrupt from the keyboard is passed on by us, once
                )
            worker.life = life = Life(process, pipe)
            if self._stopping.is_set():  # the signal came before there was somebody to pass it on to
                process.terminate()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(life.listen, Start(worker.number, self._share, self._secret), partial(self._hear, worker))
                    await process.wait()
                    nursery.cancel_scope.cancel()
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.CancelScope(shield=True):  # nothing outlives SIGKILL for long
                        await process.wait()
                worker.life = None
                self._totals.gone(worker.number)
                wipe(self._memory, worker.number)
                life.heard.unpark_all()
        return process.returncode or 0

    def _hear(self, worker: Worker, state: State) -> None:
        self._totals.take(worker.number, state.reading)
        if not worker.served.is_set():
            _log.info("worker %d serves", worker.number)
        worker.served.set()

    async def _stop(self, signals: AsyncIterator[int]) -> None:
        """Pass on each signal. The first is the beginning of the end, for which the workers have their grace."""
        async for number in signals:
            if not self._stopping.is_set():
                self._stopping.set()
                _log.info("stopping: the workers have %g s", self.config.shutdown.grace)
                self._lives.deadline = trio.current_time() + self.config.shutdown.grace + _MARGIN
            for worker in self.workers:
                if worker.life is not None:
                    worker.life.process.send_signal(number)
                worker.pausing.cancel()

    # How they are...

    async def _look(self) -> None:
        while True:
            await trio.sleep(_LOOK)
            for worker in self.workers:
                if worker.life is not None:
                    await worker.life.look()

    def _refresh(self, done: Callable[[], None]) -> None:
        self._nursery.start_soon(self._hear_all, done)

    async def _hear_all(self, done: Callable[[], None]) -> None:
        """Have the newest from all workers that answer within `_PATIENCE`."""
        with trio.move_on_after(_PATIENCE):
            async with trio.open_nursery() as nursery:
                for worker in self.workers:
                    if worker.life is not None and worker.life.state is not None:
                        await worker.life.ask()
                        nursery.start_soon(worker.life.heard.park)
        done()

    # The rest is called by the thread of the administration listener, too.

    def not_alive(self) -> list[str]:
        """A worker that has ended is started again. One that is there and does not answer never will be."""
        timeout = self.config.admin.stall_timeout
        return [f"worker {worker.number} {reason}" for worker in self.workers for reason in worker.stalled(timeout)]

    def not_ready(self) -> list[str]:
        if self._stopping.is_set():
            return ["shutting down"]
        timeout = self.config.admin.stall_timeout
        return [f"worker {worker.number}: {reason}" for worker in self.workers for reason in worker.reasons(timeout)]

    def render(self) -> bytes:
        timeout = self.config.admin.stall_timeout
        alive = [worker for worker in self.workers if worker.life is not None]
        self._metrics.workers.at("alive").set(len(alive))
        self._metrics.workers.at("ready").set(sum(not worker.reasons(timeout) for worker in alive))
        return self._totals.render(reading(self._metrics.registry))


def _path() -> str:
    """Where a worker finds this program, whatever directory it is started in."""
    ours = str(Path(proxy.__file__).parent.parent)
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])
