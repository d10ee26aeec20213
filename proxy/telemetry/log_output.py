"""Where log lines are written, and what has become of those that could not be.

Lines are written to the descriptor itself, several at a time. A text stream would keep what it could not write, and write it later, or
half of it; how many lines are lost would not be known. Here it is: those that are not wholly written. A line that was written in part (a
disk that became full within it) is ended before the next one begins.

Why lines are lost is one of a few words. `slow_reader`: the reader of standard error does not keep up, the queue is full. `disk_full`: a
file system without room, or a quota. `closed`: the reader of a pipe has gone, or the descriptor is closed. `write_error`: anything else,
an I/O error of the disk for instance.
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
    "slow_reader": "their reader is too slow",
    "disk_full": "there was no room on the disk",
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
    """Writes to `stream`, which is a file, a pipe, or something in memory. None: there is no standard error."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._descriptor = _descriptor(stream)
        self._torn = False  # the last line that was begun was not ended
        self.error: int | None = None  # errno of the last write that failed

    def write(self, lines: Sequence[str]) -> int:
        """Write lines, each without its end; how many are wholly written. Waits for a reader that is slow. After fewer than all,
        `error` says why, and the rest is lost."""
        if self._descriptor is None:
            return self._write_text(lines)
        data = b"".join(line.encode(self._encoding, "backslashreplace") + _NEWLINE for line in lines)
        begun = self._torn
        if begun:
            data = _NEWLINE + data
        sent = self._send(self._descriptor, data)
        done = data.count(_NEWLINE, 0, sent) - (begun and sent > 0)
        if sent:
            self._torn = data[sent - 1 : sent] != _NEWLINE
        return done

    def _send(self, descriptor: int, data: bytes) -> int:
        """How many bytes were written."""
        sent = 0
        while sent < len(data):
            try:
                sent += os.write(descriptor, memoryview(data)[sent:])
            except BlockingIOError:  # somebody who has the descriptor too has made it non-blocking
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
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = error.errno if isinstance(error, OSError) else errno.EBADF
            return 0
        return len(lines)

    def why(self) -> Why:
        """The reason of the last write that failed."""
        return _REASONS.get(self.error, "write_error")


class Losses:
    """Lines that were lost and not told of yet, by their reasons. Not for several threads at once."""

    def __init__(self) -> None:
        self._lost: dict[Why, int] = {}

    def add(self, why: Why, count: int) -> None:
        self._lost[why] = self._lost.get(why, 0) + count

    def __bool__(self) -> bool:
        return bool(self._lost)

    def take(self) -> dict[Why, int]:
        lost, self._lost = self._lost, {}
        return lost


def told(lost: dict[Why, int]) -> str:
    """What was lost, as a message."""
    count = sum(lost.values())
    if len(lost) == 1:
        return f"{count} log lines were dropped: {WORDS[next(iter(lost))]}"
    parts = ", ".join(f"{WORDS[why]} ({number})" for why, number in sorted(lost.items()))
    return f"{count} log lines were dropped: {parts}"


Drop = Callable[[int, Why], None]


def _descriptor(stream: TextIO | None) -> int | None:
    """The stream's descriptor, if it has one; what was written to it before is out by then."""
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
