"""The administration listener: /live, /ready and /metrics, in a thread with an event loop of its own.

/live says that the process is not beyond help. /ready says whether it should be sent traffic, and if not, why. Neither says anything about
the application, which has probes of its own.

Kubernetes restarts a pod whose /live does not answer, so the answer must not wait for the data path. The thread asks nothing of the main
thread to answer a probe: it reads what the main thread has left in plain attributes. The interpreter's lock passes to it within a
millisecond. What it may not hide is a main thread that is stuck. The main thread counts up twice a second (`Admin.run`), and this thread
watches the count: when it has not changed for `stall_timeout`, both probes fail. The time is measured in passes of this thread, so that a
process that was stopped as a whole, and goes on, is not taken for stuck.

A text of metrics is made at most once in `metrics_max_age`, in a worker thread, and compressed once. Before, the main thread is asked to
bring its gauges up to date; it is not waited for longer than `_REFRESH`.
"""

from __future__ import annotations

import gzip
import logging
import math
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from typing import Final

import trio

from proxy.config.schema import AdminConfig
from proxy.exchange.exchange import Exchange, Facts, Handler, Whole, stack
from proxy.exchange.h1.server import Drain, Http1Server, ServerSettings
from proxy.exchange.layers import deadline, rescue
from proxy.net.accept import Acceptor, Connection
from proxy.net.connection_slots import Bounds
from proxy.net.disconnects import Disconnects
from proxy.process.acceptors import admission, report
from proxy.telemetry.metrics import CONTENT_TYPE, Metrics
from proxy.wire.messages import Headers, ResponseHead

_log = logging.getLogger("isthmus.admin")

_TEXT = b"text/plain; charset=utf-8"
_REASONS: Final = {200: b"OK", 404: b"Not Found", 405: b"Method Not Allowed", 503: b"Service Unavailable"}

# Seconds between two signs of life of the main thread.
_BEAT = 0.5
# How long (seconds) one thread may keep the interpreter from another. A thread has to get it back behind each system call, ten times for a
# probe, so Python's own 5 ms would be too long while the data path is busy.
_SWITCH = 0.001
# How long (seconds) a text of metrics waits for the main thread's gauges; then it has those of the last time.
_REFRESH = 0.25
# How long (seconds) a client may take nothing of what it is sent.
_WRITE_TIMEOUT = 2.0
# Answers with metrics in a second: sixteen scrapers in a loop would otherwise take half of the interpreter's time from the data path.
_SCRAPES = 50
# How long (seconds) the end of the thread may take.
_END = 2.0


@dataclass(frozen=True, slots=True)
class Status:
    """What the thread asks. All but `refresh` are called in threads other than the main one, and must not wait.

    `not_alive`: the reasons why the process is beyond help. `not_ready`: the reasons why traffic should not come. `render`: the metrics.
    `refresh` is called in the main thread: it brings gauges up to date, and calls what it is given when that is done.
    """

    not_alive: Callable[[], list[str]]
    not_ready: Callable[[], list[str]]
    render: Callable[[], bytes]
    refresh: Callable[[Callable[[], None]], None]


class Admin:
    """The thread, seen from the main one. Owns the listeners, and closes them."""

    def __init__(self, config: AdminConfig, listeners: Sequence[socket.socket], status: Status, metrics: Metrics) -> None:
        self._config = config
        self._listeners = listeners
        self._status = status
        self._metrics = metrics
        self._beats = 0  # written by the main thread
        self._still = 0.0  # seconds since this has changed
        self._runs = threading.Event()  # the two below are there
        self._loop: trio.lowlevel.TrioToken
        self._scope: trio.CancelScope

    async def run(self) -> None:
        """Serve until cancelled, and show that the main thread is alive. Without listeners there is nothing to do."""
        if not self._listeners:
            return
        thread = threading.Thread(target=self._in_thread, args=(trio.lowlevel.current_trio_token(),), name="isthmus-admin", daemon=True)
        thread.start()
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH))
        try:
            while True:
                self._beats += 1
                await trio.sleep(_BEAT)
        finally:
            if self._runs.wait(_END):
                with suppress(trio.RunFinishedError):
                    self._loop.run_sync_soon(self._scope.cancel)
            thread.join(_END)

    def _in_thread(self, main: trio.lowlevel.TrioToken) -> None:
        try:
            trio.run(self._serve, main)
        except Exception:  # the thread's boundary: the traffic goes on, and probes that get no answer say that it has ended
            _log.exception("internal error: the administration listener has ended")
        finally:
            for sock in self._listeners:
                sock.close()

    async def _serve(self, main: trio.lowlevel.TrioToken) -> None:
        self._loop, self._scope = trio.lowlevel.current_trio_token(), trio.CancelScope()
        self._runs.set()
        config = self._config
        texts = _Texts(self._status, config.metrics_max_age, main)
        handler = stack(rescue(lambda _: b"isthmus", lambda _: False), deadline, endpoint=self._pages(texts))
        bounds = Bounds(config.max_connections, per_source=min(config.max_per_source, config.max_connections), cut_busy=True)
        settings = ServerSettings(
            idle_timeout=config.idle_timeout,
            first_timeout=config.request_timeout,
            head_timeout=config.request_timeout,
            body_timeout=config.request_timeout,
            write_timeout=_WRITE_TIMEOUT,
        )
        # Who waits for a text, and whose connection ends meanwhile, is told: an evicted one keeps its place until its task has ended.
        drain = Drain(disconnects=Disconnects().open())

        async def accept(connection: Connection) -> None:
            about = Facts("inbound", connection.peer, connection.local)
            server = Http1Server(connection.stream, about, settings, drain)
            connection.slot.activity = server
            await server.run(handler)

        acceptor = Acceptor(accept, limit=bounds, on_error=report)
        admission("admin", acceptor.slots, self._metrics)
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                nursery.start_soon(drain.disconnects.run)
                nursery.start_soon(acceptor.serve, self._listeners)

    async def _watch(self) -> None:
        """See for how long the main thread has not moved."""
        seen = -1
        while True:
            await trio.sleep(_BEAT)
            beats = self._beats
            self._still = 0.0 if beats != seen else self._still + _BEAT
            seen = beats

    def _stalled(self) -> list[str]:
        still = self._still
        return [f"the event loop has not moved for {still:.0f} s"] if still >= self._config.stall_timeout else []

    def _pages(self, texts: _Texts) -> Handler:
        """The endpoint of the stack."""

        async def answer(exchange: Exchange) -> None:
            path = exchange.request.target.partition(b"?")[0]
            headers = Headers([(b"Date", formatdate(usegmt=True).encode("ascii"))])
            status, kind, text = 200, _TEXT, b""
            if path not in (b"/live", b"/ready", b"/metrics"):
                status, text = 404, b"there are /live, /ready and /metrics\n"
            elif exchange.request.method not in (b"GET", b"HEAD"):
                status, text = 405, b"only GET and HEAD\n"
                headers.add(b"Allow", b"GET, HEAD")
            elif path == b"/metrics":
                zipped = takes_gzip(exchange.request.headers)
                kind, text = CONTENT_TYPE.encode("ascii"), await texts.get(zipped=zipped)
                headers.add(b"Vary", b"Accept-Encoding")
                if zipped:
                    headers.add(b"Content-Encoding", b"gzip")
            else:
                word, ask = ("live", self._status.not_alive) if path == b"/live" else ("ready", self._status.not_ready)
                reasons = [*ask(), *self._stalled()]
                status = 503 if reasons else 200
                text = (f"not {word}: {'; '.join(reasons)}\n" if reasons else f"{word}\n").encode()
            headers.add(b"Content-Type", kind)
            headers.add(b"Content-Length", b"%d" % len(text))
            await exchange.respond(ResponseHead(status, headers, _REASONS[status]), Whole(text))

        return answer


class _Texts:
    """The metrics as they were rendered last, for all who ask within `max_age` seconds."""

    def __init__(self, status: Status, max_age: float, main: trio.lowlevel.TrioToken) -> None:
        self._status = status
        self._max_age = max_age
        self._main = main
        self._lock = trio.Lock()
        self._made = -math.inf  # trio's time
        self._plain = self._zipped = b""
        self._turns = trio.Lock()  # who waits for a turn; one that gives up leaves nothing behind
        self._last = -math.inf  # when the last turn was

    async def get(self, *, zipped: bool) -> bytes:
        """The text, compressed or not."""
        async with self._turns:
            # Up to a second's turns that nobody took are left to be taken.
            turn = max(self._last + 1 / _SCRAPES, trio.current_time() - 1)
            await trio.sleep_until(turn)
            self._last = turn
        async with self._lock:
            if trio.current_time() - self._made >= self._max_age:
                await self._refresh()
                self._plain = await trio.to_thread.run_sync(self._status.render, abandon_on_cancel=True)
                self._zipped, self._made = b"", trio.current_time()
            if zipped and not self._zipped:
                self._zipped = await trio.to_thread.run_sync(_compress, self._plain, abandon_on_cancel=True)
            return self._zipped if zipped else self._plain

    async def _refresh(self) -> None:
        """Have the main thread bring its gauges up to date, if it does so in time."""
        done, own = trio.Event(), trio.lowlevel.current_trio_token()

        def finished() -> None:
            with suppress(trio.RunFinishedError):
                own.run_sync_soon(done.set)

        with suppress(trio.RunFinishedError), trio.move_on_after(_REFRESH):
            self._main.run_sync_soon(self._status.refresh, finished)
            await done.wait()


def _compress(text: bytes) -> bytes:
    return gzip.compress(text, compresslevel=3, mtime=0)


def takes_gzip(headers: Headers) -> bool:
    """Whether Accept-Encoding (RFC 9110 §12.5.3) names gzip, with a weight above 0."""
    for token in headers.tokens(b"accept-encoding"):
        name, _, weight = token.partition(b";")
        if name.strip() in (b"gzip", b"x-gzip"):
            return not weight.strip() or weight.partition(b"=")[2].strip().strip(b"0.") != b""
    return False
