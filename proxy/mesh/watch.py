"""Keeps the directory fresh: looks at its file, and swaps the snapshot whole when what the file says has changed.

Polling, not inotify: Kubernetes swaps a symbolic link two levels up (`..data`), which a watch on the file does not see, and network
file systems send no events at all. A look is one `stat`, a few microseconds, which follows the links; the file is read only when its
identity, size or time differ, and parsed only when its bytes do. Reading and parsing happen in a thread, since ten thousand services
take more than a second.

A thread does not help against the garbage collector, which stops all of them while it looks at everything that there is: with ten
thousand services again and again for 200 to 300 ms, in which no request moves. Reading a directory makes no garbage that needs it. So it
rests meanwhile, and is told to leave a large snapshot alone, which goes by itself when the next one takes its place.

A file that is broken, missing or half written keeps the snapshot that was there; each such state is reported once, not at every look.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import trio

from proxy.mesh import files
from proxy.mesh.directory import Directory, DirectoryError, parse

# A directory of 10,000 services with five endpoints each has 6 MB.
MOST_BYTES = 64 * 1024 * 1024

Outcome = Callable[[DirectoryError | None], None]
_Stat = tuple[int, int, int, int]
# A file's time has the tick of the kernel's clock, so two writes in one tick can look the same. A file younger than this (seconds) is
# read again at the next look.
_YOUNG = 1.0
# Services and endpoints that are not worth to be looked at by the garbage collector; fewer cost it a few milliseconds.
_LARGE = 2000


class DirectorySource:
    """The directory as it is now. `current` is replaced whole, by `watch`; take it once for one decision."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises DirectoryError if it is missing or broken: a proxy does not start without its directory."""
        self.path = path
        self._seen: _Stat | None = _settled(_stat(path))
        text = read(path)
        self.current, self._digest = parse(text, str(path)), _digest(text)
        self._reported: str | None = None

    async def watch(self, interval: float, report: Outcome) -> None:
        """Looks at the file every `interval` seconds, for ever. `report(None)` after a swap, `report(error)` for a new mistake."""
        while True:
            await trio.sleep(interval)
            await self.look(report)

    async def look(self, report: Outcome) -> None:
        """Looks once."""
        try:
            if (seen := _stat(self.path)) == self._seen:
                return
            found = await trio.to_thread.run_sync(_load, self.path, self._digest)
        except DirectoryError as error:
            self._seen = None
            self._complain(error, report)
            return
        # What was seen before the file was read: a change in between is found at the next look.
        self._seen = _settled(seen)
        digest, outcome = found
        if isinstance(outcome, DirectoryError):
            self._complain(outcome, report)
            return
        self._reported = None
        if outcome is not None:
            self.current, self._digest = outcome, digest
            report(None)

    def _complain(self, error: DirectoryError, report: Outcome) -> None:
        if str(error) != self._reported:
            self._reported = str(error)
            report(error)


def _stat(path: Path) -> _Stat:
    try:
        found = path.stat()
    except OSError as error:
        raise DirectoryError(str(path), [f"cannot be read: {error.strerror}"]) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _settled(seen: _Stat) -> _Stat | None:
    """`seen` if nothing can have happened to the file that it would not show, else None."""
    return seen if time.time() - seen[3] / 1e9 > _YOUNG else None


def read(path: Path) -> str:
    """The text of a directory file. Raises DirectoryError."""
    try:
        return files.read_text(path, MOST_BYTES)
    except files.FileUnusable as error:
        raise DirectoryError(str(path), [error.reason]) from error


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _parse(text: str, path: Path) -> Directory:
    """The snapshot, read without the garbage collector. Raises DirectoryError."""
    collected = gc.isenabled()
    gc.disable()
    try:
        found = parse(text, str(path))
        if found.endpoint_count + len(found.services) > _LARGE:
            # What else is frozen with it is collected by its references as before; only what is garbage in a circle now stays.
            gc.freeze()
        return found
    finally:
        if collected:
            gc.enable()


def _load(path: Path, known: bytes) -> tuple[bytes, Directory | DirectoryError | None]:
    """Runs in a thread: the digest, and the new directory, None when the bytes are those that are `known`, or what is wrong."""
    try:
        text = read(path)
        digest = _digest(text)
        return digest, None if digest == known else _parse(text, path)
    except DirectoryError as error:
        return b"", error
