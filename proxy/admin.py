"""The administration listener: /live, /ready and /metrics. It runs in its own thread and event
loop.

/live tells whether the process still works. /ready tells whether it should receive traffic, and if
not, why. Neither reports on the application, which has its own probes.

Kubernetes restarts a pod whose /live does not answer, so an answer must not wait for the data path.
To answer a probe, the thread only reads plain attributes that the main thread has set. The
interpreter lock reaches this thread within half a millisecond. Still, a stuck main thread must be
detected. The main thread increments a counter twice a second (`Admin.run`), and this thread watches
it: if it has not changed for `stall_timeout`, both probes fail. The time is counted in passes of
this thread. So a process that was stopped (SIGSTOP) and continued is not reported as stuck.

The metrics are rendered at most once per `metrics_max_age`, in a worker thread, and compressed
once. Before that, the main thread is asked to update its gauges; the wait for it is at most
`_REFRESH`.
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

from proxy.config.schema_process import AdminConfig
from proxy.exchange.exchange import ConnectionInfo, Exchange, Handler, Whole, stack
from proxy.exchange.h1.server import Http1Server
from proxy.exchange.layers import deadline, rescue
from proxy.exchange.server_settings import Drain, ServerSettings
from proxy.metric_families import CONTENT_TYPE
from proxy.net.accept import Acceptor, Connection
from proxy.net.connection_slots import Bounds
from proxy.net.disconnects import Disconnects
from proxy.process.acceptors import admission, report
from proxy.telemetry.metrics import Metrics
from proxy.wire.messages import Headers, ResponseHead

_log = logging.getLogger("isthmus.admin")

_TEXT = b"text/plain; charset=utf-8"
_REASONS: Final = {
    200: b"OK",
    404: b"Not Found",
    405: b"Method Not Allowed",
    503: b"Service Unavailable",
}

# Seconds between two increments of the main thread's counter.
_BEAT = 0.5
# How long (seconds) one thread may keep the interpreter lock while another waits. This thread takes
# the lock again after each system call, about ten times per probe. Python's default of 5 ms is too
# slow for that while the data path is busy. With 1 ms, a probe took up to 124 ms in a flood.
_SWITCH = 0.0005
# How long (seconds) rendering waits for the main thread's gauges; after that it uses their previous
# values.
_REFRESH = 0.25
# How long (seconds) a client may read nothing of its response.
_WRITE_TIMEOUT = 2.0
# Metrics responses per second. Without this limit, sixteen scrapers in a loop take half of the
# interpreter's time from the data path.
_SCRAPES = 50
# How long (seconds) stopping the thread may take.
_END = 2.0


@dataclass(frozen=True, slots=True)
class AdminCallbacks:
    """Callbacks of the admin thread. All but `refresh` are called outside the main thread and must
    not block.

    `not_alive`: reasons why the process no longer works. `not_ready`: reasons why it should get no
    traffic. `render`: the metrics. `refresh` is called in the main thread: it updates the gauges,
    then calls its argument.
    """

    not_alive: Callable[[], list[str]]
    not_ready: Callable[[], list[str]]
    render: Callable[[], bytes]
    refresh: Callable[[Callable[[], None]], None]


class Admin:
    """The admin thread, controlled from the main thread. Owns the listeners and closes them."""

    def __init__(
        self,
        config: AdminConfig,
        listeners: Sequence[socket.socket],
        status: AdminCallbacks,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._listeners = listeners
        self._status = status
        self._metrics = metrics
        self._beats = 0  # incremented by the main thread
        self._still = 0.0  # seconds since `_beats` last changed
        self._runs = threading.Event()  # set once the two attributes below exist
        self._loop: trio.lowlevel.TrioToken
        self._scope: trio.CancelScope

    async def run(self) -> None:
        """Serve until cancelled, and increment the counter. Without listeners it returns at
        once."""
        if not self._listeners:
            return
        thread = threading.Thread(
            target=self._in_thread,
            args=(trio.lowlevel.current_trio_token(),),
            name="isthmus-admin",
            daemon=True,
        )
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
        # the thread's boundary: traffic continues, and unanswered probes show that the thread ended
        except Exception:
            _log.exception("internal error: the administration listener has stopped")
        finally:
            for sock in self._listeners:
                sock.close()

    async def _serve(self, main: trio.lowlevel.TrioToken) -> None:
        self._loop, self._scope = trio.lowlevel.current_trio_token(), trio.CancelScope()
        self._runs.set()
        config = self._config
        texts = _Texts(self._status, config.metrics_max_age, main)
        handler = stack(
            rescue(lambda _: b"isthmus", lambda _: False), deadline, endpoint=self._pages(texts)
        )
        bounds = Bounds(
            config.max_connections,
            per_source=min(config.max_per_source, config.max_connections),
            cut_busy=True,
        )
        settings = ServerSettings(
            idle_timeout=config.idle_timeout,
            first_timeout=config.request_timeout,
            head_timeout=config.request_timeout,
            body_timeout=config.request_timeout,
            write_timeout=_WRITE_TIMEOUT,
        )
        # An evicted connection keeps its slot until its task has ended. A task that waits for the
        # metrics is cancelled when its connection ends, so that the slot is free again.
        drain = Drain(disconnects=Disconnects().open())

        async def accept(connection: Connection) -> None:
            about = ConnectionInfo("inbound", connection.peer, connection.local)
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
        """Measure for how long the main thread has not incremented its counter."""
        seen = -1
        while True:
            await trio.sleep(_BEAT)
            beats = self._beats
            self._still = 0.0 if beats != seen else self._still + _BEAT
            seen = beats

    def _stalled(self) -> list[str]:
        still = self._still
        return (
            [f"the event loop has been stuck for {still:.0f} s"]
            if still >= self._config.stall_timeout
            else []
        )

    def _pages(self, texts: _Texts) -> Handler:
        """The innermost handler of the layer stack."""

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
                word, ask = (
                    ("live", self._status.not_alive)
                    if path == b"/live"
                    else ("ready", self._status.not_ready)
                )
                reasons = [*ask(), *self._stalled()]
                status = 503 if reasons else 200
                text = (f"not {word}: {'; '.join(reasons)}\n" if reasons else f"{word}\n").encode()
            headers.add(b"Content-Type", kind)
            headers.add(b"Content-Length", b"%d" % len(text))
            await exchange.respond(ResponseHead(status, headers, _REASONS[status]), Whole(text))

        return answer


class _Texts:
    """The rendered metrics, shared by all requests within `max_age` seconds."""

    def __init__(
        self, status: AdminCallbacks, max_age: float, main: trio.lowlevel.TrioToken
    ) -> None:
        self._status = status
        self._max_age = max_age
        self._main = main
        self._lock = trio.Lock()
        self._rendered_at = -math.inf  # trio's clock
        self._plain = self._zipped = b""
        self._turns = trio.Lock()  # limits the rate; a waiter that is cancelled leaves no trace
        self._last = -math.inf  # when the lock was last granted

    async def get(self, *, zipped: bool) -> bytes:
        """The text, gzip-compressed if `zipped`."""
        async with self._turns:
            # Unused grants of the last second may be used now (a burst).
            turn = max(self._last + 1 / _SCRAPES, trio.current_time() - 1)
            await trio.sleep_until(turn)
            self._last = turn
        async with self._lock:
            if trio.current_time() - self._rendered_at >= self._max_age:
                await self._refresh()
                self._plain = await trio.to_thread.run_sync(
                    self._status.render, abandon_on_cancel=True
                )
                self._zipped, self._rendered_at = b"", trio.current_time()
            if zipped and not self._zipped:
                self._zipped = await trio.to_thread.run_sync(
                    _compress, self._plain, abandon_on_cancel=True
                )
            return self._zipped if zipped else self._plain

    async def _refresh(self) -> None:
        """Let the main thread update its gauges; gives up after `_REFRESH`."""
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
    """Whether Accept-Encoding (RFC 9110 §12.5.3) names gzip with a weight above 0."""
    for token in headers.tokens(b"accept-encoding"):
        name, _, weight = token.partition(b";")
        if name.strip() in (b"gzip", b"x-gzip"):
            return not weight.strip() or weight.partition(b"=")[2].strip().strip(b"0.") != b""
    return False
