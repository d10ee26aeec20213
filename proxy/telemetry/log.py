"""Structured log lines on standard error. The data path never waits for them.

A line is put into a bounded queue as values; a separate thread formats and writes it. If the reader
of standard error stops reading, only that thread blocks. Lines that find the queue full are dropped
and counted; when there is space again, a line reports how many were lost. Lines that cannot be
written are reported in the same way, with the reason (log_output.py).

A request's target is logged without its query, which may contain secrets, and without user
information. `log.query` adds the query.

Log lines contain data from peers, so no value may start a line of its own. JSON escapes control
characters. In the text format, a value with unusual characters is written as a JSON string, control
characters in messages are escaped, and the lines of a traceback are indented.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Final, TextIO

from proxy.config.schema_process import LogConfig
from proxy.net.tls.handshake import TLSInfo
from proxy.telemetry.log_output import Drop, LostLines, Output, Why, describe_losses
from tracing.spans import redacted

ROOT: Final = "isthmus"
_CONNECTION = logging.getLogger(f"{ROOT}.connection")
_ACCESS = logging.getLogger(f"{ROOT}.access")
# Seconds to write the last lines when the process ends.
CLOSING = 2.0
_PLAIN = re.compile(r"[!#-<>-~]+\Z")
# Characters of a value that are written: a target may have 8 KiB, and a line should stay readable.
_LONGEST = 1024
# Characters that one system call writes, if that many are queued.
_TOGETHER = 65536

Field = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class ConnectionLine:
    """The log line of a connection that has ended. `reason` is a fixed label, `words` describes it
    for people.
    """

    direction: str
    peer: str
    destination: str
    upstream: str = ""
    upstream_identity: str = ""
    protocol: str = ""
    identity: str = ""
    tls: TLSInfo | None = None
    upstream_tls: TLSInfo | None = None
    read: int = 0
    written: int = 0
    seconds: float = 0.0
    reason: str = ""
    words: str = ""
    trace_id: bytes = b""
    span_id: bytes = b""


@dataclass(frozen=True, slots=True)
class RequestLine:
    """The log line of a finished request. `status` 0: there was no response. `caller`: the sender
    of the request, as reported by a peer that is a trusted gateway.
    """

    direction: str
    peer: str
    identity: str = ""
    caller: str = ""
    method: bytes = b""
    target: bytes = b""
    authority: bytes = b""
    status: int = 0
    upstream: str = ""
    upstream_identity: str = ""
    request_bytes: int = 0
    response_bytes: int = 0
    seconds: float = 0.0
    reason: str = ""
    words: str = ""
    trace_id: bytes = b""
    span_id: bytes = b""


def connections_logged() -> bool:
    """Whether connections are logged; if not, callers need not build the line."""
    return _CONNECTION.isEnabledFor(logging.INFO)


def log_connection(line: ConnectionLine) -> None:
    """Log a connection, at level info."""
    _CONNECTION.info("connection", extra={"line": line})


def log_request(line: RequestLine) -> None:
    """Log a request, at level info."""
    if _ACCESS.isEnabledFor(logging.INFO):
        _ACCESS.info("request", extra={"line": line})


def configure(
    config: LogConfig,
    stream: TextIO | None = None,
    on_drop: Drop | None = None,
    worker: int | None = None,
) -> Callable[[], None]:
    """Start logging to `stream` (None: standard error). `on_drop(count, why)` is called for dropped
    lines, from any thread. `worker`: the worker's number, added to every line.

    Call the result to stop: it writes queued lines, waits at most `CLOSING` seconds, and restores
    the previous logging.
    """
    formatter = (JsonFormatter if config.format == "json" else TextFormatter)(
        worker, query=config.query
    )
    handler = QueueHandler(
        stream or sys.stderr, formatter, config.queue, on_drop or (lambda *_: None)
    )
    root, own = logging.getLogger(), logging.getLogger(ROOT)
    before = own.level
    root.addHandler(handler)
    own.setLevel(config.level.upper())

    def close() -> None:
        root.removeHandler(handler)
        own.setLevel(before)
        handler.close()

    return close


class _NoLock:
    """The lock interface that logging uses around `emit`: acquire and release until Python 3.12,
    `with` from 3.13.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass


class QueueHandler(logging.Handler):
    """Passes records to the writing thread, or drops them. `emit` never blocks and never raises."""

    def __init__(
        self, stream: TextIO | None, formatter: logging.Formatter, size: int, on_drop: Drop
    ) -> None:
        super().__init__()
        self._output = Output(stream)
        self._form = formatter
        self._queue: queue.Queue[logging.LogRecord | None] = queue.Queue(size)
        self._on_drop = on_drop
        self._lost = LostLines()
        self._lost_lock = threading.Lock()
        self._ending = threading.Event()
        # A daemon thread: one that is blocked in a write would otherwise keep the process from
        # ending.
        self._writer = threading.Thread(target=self._write, name="isthmus-logs", daemon=True)
        self._writer.start()

    def createLock(self) -> None:  # noqa: N802  (logging's name)
        """No lock: the queue has its own, and the data path must never wait for a thread that holds
        one.
        """
        self.lock = _NoLock()  # type: ignore[assignment]  # the part of RLock's interface that logging uses

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped(1, "slow_reader")

    def close(self) -> None:
        """Stop the writing thread. Lines that are not written by then are lost."""
        self._ending.set()
        # then the thread sees the event when the queue is empty
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._writer.join(CLOSING)
        super().close()

    def _dropped(self, count: int, why: Why) -> None:
        with self._lost_lock:
            self._lost.add(why, count)
        self._on_drop(count, why)

    def _write(self) -> None:
        while not (self._ending.is_set() and self._queue.empty()):
            lines = self._take()
            written = self._output.write(lines)
            if written < len(lines):
                self._dropped(len(lines) - written, self._output.why())
            elif self._lost:
                self._report_losses()

    def _take(self) -> list[str]:
        """The queued lines, up to `_TOGETHER` characters, to be written together. Waits for the
        first one.
        """
        lines: list[str] = []
        size = 0
        record = self._queue.get()
        while True:
            if record is not None:
                lines.append(self._text(record))
                size += len(lines[-1])
            if size >= _TOGETHER:
                return lines
            try:
                record = self._queue.get_nowait()
            except queue.Empty:
                return lines

    def _report_losses(self) -> None:
        with self._lost_lock:
            lost = self._lost.take()
        record = logging.LogRecord(
            ROOT, logging.WARNING, __file__, 0, "%s", (describe_losses(lost),), None
        )
        if not self._output.write([self._text(record)]):
            with self._lost_lock:
                for why, count in lost.items():
                    self._lost.add(why, count)

    def _text(self, record: logging.LogRecord) -> str:
        try:
            return self._form.format(record)
        except Exception as error:  # noqa: BLE001, RUF100  (wrong arguments of a message must not end the thread)
            return (
                f"a log line could not be formatted: {type(error).__name__}"
                f" ({record.pathname}:{record.lineno})"
            )


class _Formatter(logging.Formatter):
    def __init__(self, worker: int | None = None, *, query: bool = False) -> None:
        """`query`: write targets with their query strings."""
        super().__init__()
        self._query = query
        self._who: dict[str, Field] = {} if worker is None else {"worker": worker}


class JsonFormatter(_Formatter):
    """One JSON object in ASCII per line."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Field] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._who,
            **facts(record, query=self._query),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found)


class TextFormatter(_Formatter):
    """`time level logger: message name=value ...`, for people."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [
            (
                f"{_time(record)} {record.levelname.lower():7} {record.name}:"
                f" {printable(record.getMessage())}"
            )
        ]
        parts += [
            f"{name}={_quoted(value)}"
            for name, value in {**self._who, **facts(record, query=self._query)}.items()
        ]
        line = " ".join(parts)
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join(f"\n    | {printable(part)}" for part in trace.splitlines())
        return line


def facts(record: logging.LogRecord, *, query: bool = False) -> Mapping[str, Field]:
    """The fields of a connection or request line, in output order, without empty ones. `query`: see
    shown_target.
    """
    line: object = getattr(record, "line", None)
    if not isinstance(line, ConnectionLine | RequestLine):
        return {}
    found: dict[str, Field] = {}
    for info in fields(line):
        value: object = getattr(line, info.name)
        if isinstance(value, TLSInfo):
            side = info.name.removesuffix("tls")
            found |= {
                f"{side}tls": value.version,
                f"{side}cipher": value.cipher,
                f"{side}group": value.group,
                f"{side}resumed": value.resumed,
            }
        elif isinstance(value, bytes):
            found[info.name] = _shown(
                info.name, value.decode("utf-8", "backslashreplace"), query=query
            )[:_LONGEST]
        elif isinstance(value, str):
            found[info.name] = value[:_LONGEST]
        elif isinstance(value, float):
            found[info.name] = round(value, 6)
        elif isinstance(value, int):
            found[info.name] = value
    return {name: value for name, value in found.items() if value != ""}


def _shown(name: str, text: str, *, query: bool) -> str:
    """The text to log for a value that a client has chosen."""
    if name == "target":
        return shown_target(text, query=query)
    return text.rpartition("@")[2] if name == "authority" else text


def shown_target(target: str, *, query: bool) -> str:
    """A request target without user information and query. `query`: keep the query, but mask the
    values of parameters that are known to hold signatures or keys.
    """
    path, mark, parameters = target.partition("?")
    if not path.startswith("/") and "://" in path:
        scheme, _, rest = path.partition("://")
        authority, slash, path = rest.partition("/")
        path = f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    return f"{path}?{redacted(parameters)}" if mark and query else path


def printable(text: str) -> str:
    """The text on one line, with unprintable characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def _quoted(value: Field) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if _PLAIN.match(text) else json.dumps(text)


def _time(record: logging.LogRecord) -> str:
    return (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        + f".{int(record.msecs):03}Z"
    )


@dataclass(slots=True)
class RateLimit:
    """Lets `per_second` warnings of one kind through each second, and counts the others."""

    per_second: int
    clock: Callable[[], float] = time.monotonic
    _second: float = field(default=float("-inf"), init=False)
    _admitted: int = field(default=0, init=False)
    _suppressed: int = field(default=0, init=False)

    def admit(self) -> int | None:
        """None: do not log the warning. Otherwise, how many were suppressed since the last logged
        one.
        """
        now = self.clock()
        if now - self._second >= 1:
            self._second, self._admitted = now, 0
        if self._admitted >= self.per_second:
            self._suppressed += 1
            return None
        self._admitted += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


def warn(logger: logging.Logger, limit: RateLimit, message: str, *args: object) -> None:
    """Log a warning under a rate limit, with the number of similar ones suppressed before."""
    if (suppressed := limit.admit()) is not None:
        more = f" ({suppressed} similar suppressed)" if suppressed else ""
        logger.warning(message + more, *args)
