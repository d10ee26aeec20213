"""Writing log lines, and counting those that could not be written.

Lines are written directly to the file descriptor, several at a time. A text stream would keep what
it could not write and retry it later, perhaps in part, so the number of lost lines would be
unknown. Here a line counts as lost if it was not written completely. A partly written line (the
disk became full) is terminated before the next line.

The reason for a loss is one of: `slow_reader`, the reader of standard error does not keep up and
the queue is full; `disk_full`, no space on the file system, or a quota; `closed`, the reader of the
pipe is gone, or the descriptor is closed; `write_error`, anything else, such as an I/O error of the
disk.
"""

from __future__ import annotations

import errno
import io
import os
import select
from collections.abc import Callable, Sequence
from typing import Literal, TextIO

Why = Literal["slow_reader", "disk_full", "closed", "write_error"]
WORDS: dict[Why, str] = {
    "slow_reader": "the reader is too slow",
    "disk_full": "the disk was full",
    "closed": "standard error was closed",
    "write_error": "they could not be written",
}
_REASONS: dict[int | None, Why] = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EFBIG: "disk_full",
    errno.EPIPE: "closed",
    errno.EBADF: "closed",
}

_NEWLINE = b"\n"


class Output:
    """Writes to `stream`: a file, a pipe, or a stream in memory. None: there is no standard
    error."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._descriptor = _descriptor(stream)
        self._torn = False  # the last line was written in part
        self.error: int | None = None  # errno of the last failed write

    def write(self, lines: Sequence[str]) -> int:
        """Write lines, given without line ends; returns how many were written completely. Blocks
        while the reader is slow. If not all were written, `error` holds the reason and the rest is
        lost.
        """
        if self._descriptor is None:
            return self._write_text(lines)
        data = b"".join(
            line.encode(self._encoding, "backslashreplace") + _NEWLINE for line in lines
        )
        torn = self._torn
        if torn:
            data = _NEWLINE + data
        sent = self._send(self._descriptor, data)
        done = data.count(_NEWLINE, 0, sent) - (torn and sent > 0)
        if sent:
            self._torn = data[sent - 1 : sent] != _NEWLINE
        return done

    def _send(self, descriptor: int, data: bytes) -> int:
        """The number of bytes written."""
        sent = 0
        while sent < len(data):
            try:
                sent += os.write(descriptor, memoryview(data)[sent:])
            except (
                BlockingIOError
            ):  # another process that shares the descriptor made it non-blocking
                _wait(descriptor)
            except OSError as error:
                self.error = error.errno
                break
        return sent

    def _write_text(self, lines: Sequence[str]) -> int:
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, "there is no standard error")
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.error = error.errno if isinstance(error, OSError) else errno.EBADF
            return 0
        return len(lines)

    def why(self) -> Why:
        """The reason of the last failed write."""
        return _REASONS.get(self.error, "write_error")


class LostLines:
    """Lost lines that were not reported yet, by reason. Not thread-safe."""

    def __init__(self) -> None:
        self._lost: dict[Why, int] = {}

    def add(self, why: Why, count: int) -> None:
        self._lost[why] = self._lost.get(why, 0) + count

    def __bool__(self) -> bool:
        return bool(self._lost)

    def take(self) -> dict[Why, int]:
        lost, self._lost = self._lost, {}
        return lost


def describe_losses(lost: dict[Why, int]) -> str:
    """The log message that reports lost lines."""
    count = sum(lost.values())
    if len(lost) == 1:
        return f"{count} log lines were dropped: {WORDS[next(iter(lost))]}"
    parts = ", ".join(f"{WORDS[why]} ({number})" for why, number in sorted(lost.items()))
    return f"{count} log lines were dropped: {parts}"


Drop = Callable[[int, Why], None]


def _descriptor(stream: TextIO | None) -> int | None:
    """The stream's file descriptor, if it has one. Flushes the stream first."""
    if stream is None:
        return None
    try:
        descriptor = stream.fileno()
        stream.flush()
    except (OSError, ValueError, io.UnsupportedOperation):
        return None
    return descriptor


def _wait(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()
