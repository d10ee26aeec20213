"""Keeps the directory fresh: looks at its file, and swaps the snapshot whole when what the file says has changed.

Polling, not inotify: Kubernetes swaps a symbolic link two levels up (`..data`), which a watch on the file does not see, and network
file systems send no events at all. A look is one `stat`, a few microseconds, which follows the links; the file is read only when its
identity, size or time differ, and parsed only when its bytes do. Reading and parsing happen in a thread, since ten thousand services
take more than a second.

A thread does not help against the garbage collector, which stops all of them while it looks at everything that there is: with ten
thousand services again and again for 200 to 300 ms, in which no request moves. Reading a directory makes no garbage that needs it. So it
rests meanwhile, and is told to leave a large snapshot alone, which goes by itself when the next one takes its place.

What has changed is not used at once. Two reads have to agree, `settle` seconds apart (proxy/files.py), so a file that is being
written is left alone. With `require_end` the document has to end as YAML documents may, by a line `...`, which no part of it does. What is
complete is held against the directory in use: it may not let what had an identity go over to clear text (downgrades.py). What it
may drop is remembered for a while (former_identities.py).

A file that is broken, missing, half written or refused keeps the snapshot that was there; each such state is reported once, not at every
look.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from proxy import files
from proxy.directory import Directory, DirectoryError, Losses, compare, parse
from proxy.directory.former_identities import FormerIdentities

# A directory of 10,000 services with five endpoints each has 6 MB.
MOST_BYTES = 64 * 1024 * 1024

Outcome = Callable[[DirectoryError | None], None]
_Stat = tuple[int, int, int, int]
# A file's time has the tick of the kernel's clock, so two writes in one tick can look the same. A file younger than this (seconds) is
# read again at the next look.
_YOUNG = 1.0
# Services and endpoints that are not worth to be looked at by the garbage collector; fewer cost it a few milliseconds.
_LARGE = 2000


class IdentityLoss(DirectoryError):
    """The text is a directory, but would send in clear text what is sent by mutual TLS now."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """When a changed file is used. `settle`, `remember` in seconds; `remember` 0: nothing is remembered."""

    settle: float = 0.5
    require_end: bool = False
    max_loss: float = 0.5
    remember: float = 600.0
    max_remembered: int = 65536


class DirectorySource:
    """The directory as it is now. `current` is replaced whole, by `watch`; take it once for one decision. `former` has the addresses that
    had an identity lately."""

    def __init__(self, path: Path, acceptance: Acceptance | None = None) -> None:
        """Reads the file. Raises DirectoryError if it is missing or broken: a proxy does not start without its directory. Blocks while the
        file is being written, for about `files.PATIENCE` seconds at most."""
        self.path = path
        self.acceptance = rules = acceptance or Acceptance()
        self.former = FormerIdentities(rules.remember, rules.max_remembered)
        self._seen: _Stat | None = _settled(_stat(path))
        try:
            data, self._digest = files.read_settled(lambda: _read(path), [path], rules.settle)
        except files.FileUnusable as error:
            raise DirectoryError(str(path), [error.reason]) from error
        self.current = _parse(data, path, rules.require_end)
        self._settling = files.Settling(rules.settle)
        self._refused: bytes | None = None  # the digest of contents that cannot be used
        self._reported: str | None = None

    async def watch(self, interval: float, report: Outcome) -> None:
        """Looks at the file every `interval` seconds, for ever. `report(None)` after a swap, `report(error)` for a new mistake."""
        while True:
            await trio.sleep(min(interval, self.acceptance.settle) if self._settling.waiting else interval)
            await self.look(report)

    async def look(self, report: Outcome) -> None:
        """Looks once."""
        try:
            if (seen := _stat(self.path)) == self._seen:
                return
            data, digest = await trio.to_thread.run_sync(_read, self.path)
        except (DirectoryError, files.FileUnusable) as error:
            self._seen = None
            self._settling.forget()
            self._complain(DirectoryError(str(self.path), [error.reason]) if isinstance(error, files.FileUnusable) else error, report)
            return
        if digest == self._digest:
            self._reported = self._refused = None
        elif digest != self._refused and not self._settling.agreed(digest, trio.current_time()):
            self._seen = None
            return
        self._settling.forget()
        # What was seen before the file was read: a change in between is found at the next look.
        self._seen = _settled(seen)
        if digest not in (self._digest, self._refused):
            await self._take(data, digest, report)

    async def _take(self, data: bytes, digest: bytes, report: Outcome) -> None:
        """Use what the file says now, if that can be used."""
        try:
            found, losses = await trio.to_thread.run_sync(_understand, data, self.path, self.current, self.acceptance)
        except DirectoryError as error:
            self._refused = digest
            self._complain(error, report)
            return
        now = trio.current_time()
        if not self.former.fits(losses.former, now):
            self._seen = None  # there may be room later
            words = f"more than {self.former.most} addresses would have lost their identity lately (directory.max_remembered)"
            self._complain(IdentityLoss(str(self.path), [words]), report)
            return
        self.former.take(found, losses.former, now)
        self.current, self._digest = found, digest
        self._reported = self._refused = None
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


def _read(path: Path) -> tuple[bytes, bytes]:
    """The bytes of a file, and their digest. Raises FileUnusable."""
    data = files.read_bytes(path, MOST_BYTES)
    return data, hashlib.sha256(data).digest()


def _parse(data: bytes, path: Path, require_end: bool) -> Directory:
    """The snapshot, read without the garbage collector. Raises DirectoryError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DirectoryError(str(path), [f"not UTF-8 at byte {error.start}"]) from error
    if require_end and not ended(text):
        raise DirectoryError(str(path), ["does not end with a line `...`, which directory.require_end asks for: it may be half written"])
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


def ended(text: str) -> bool:
    """Whether the end of a YAML document is marked (YAML 1.2.2 §9.1.2), so that nothing of it is missing."""
    lines = text.rstrip().rsplit("\n", 1)
    return lines[-1] == "..." and text.endswith("\n")


def _understand(data: bytes, path: Path, current: Directory, rules: Acceptance) -> tuple[Directory, Losses]:
    """Runs in a thread: the new directory, and what it has lost of the one in use. Raises DirectoryError, IdentityLoss."""
    found = _parse(data, path, rules.require_end)
    losses = compare(current, found, rules.max_loss)
    if losses.refusals:
        raise IdentityLoss(str(path), [*losses.refusals, "name what may lose its identity in allow_identity_loss, if that is meant"])
    return found, losses
