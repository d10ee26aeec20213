"""Keeps the directory current: checks its file, and replaces the snapshot when the content has
changed.

It polls the file and does not use inotify. Kubernetes replaces a symbolic link two levels up
(`..data`), which a watch on the file does not see, and network file systems send no events. A check
is one `stat` that follows the links and takes a few microseconds. The file is read only if its
inode, size or time differ, and parsed only if its bytes differ. A thread reads and parses it,
because ten thousand services take more than a second.

A thread does not help against the garbage collector, which stops all threads while it scans all
objects: with ten thousand services, it stops all requests repeatedly for 200 to 300 ms. A parse
creates no cyclic garbage. So the collector is off during the parse, and a large snapshot is frozen
(gc.freeze). Reference counting frees it when the next snapshot replaces it.

A change is not used at once. Two reads `settle` seconds apart must agree (proxy/files.py), so that
a file is not used while it is being written. With `require_end`, the document must end with a line
`...`, as YAML documents may. No part of a document does. A complete document is compared with the
current directory: it must not move endpoints with an identity to clear text (downgrades.py). What
it may remove is remembered for a while (former_identities.py).

If a file is invalid, missing, incomplete or refused, the previous snapshot stays in use. Each such
state is reported once, not at every check."""

from __future__ import annotations

import gc
import hashlib
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import trio

from proxy import files
from proxy.directory import Directory, DirectoryError, Downgrades, compare, parse
from proxy.directory.former_identities import FormerIdentities
from proxy.directory.source import NOTHING_HELD, Report
from proxy.net.address import Address

# A directory of 10,000 services with five endpoints each has 6 MB.
MOST_BYTES = 64 * 1024 * 1024

_Stat = tuple[int, int, int, int]
# A file's time has the resolution of the kernel's tick, so two writes in one tick may look the
# same. A file younger than this (seconds) is read again at the next check.
_YOUNG = 1.0
# Freeze snapshots with more services and endpoints than this. A scan of fewer takes a few
# milliseconds.
_LARGE = 2000


class IdentityLoss(DirectoryError):
    """The text is a valid directory, but would send in clear text what now uses mutual TLS."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """When a changed file is used. `settle`, `remember` and `interval` (between two checks) in
    seconds; `remember` 0: remembers nothing."""

    settle: float = 0.5
    require_end: bool = False
    max_loss: float = 0.5
    remember: float = 600.0
    max_remembered: int = 65536
    interval: float = 1.0


class DirectorySource:
    """The current directory. `watch` replaces `current` as a whole, so read it once per decision.
    `former` has the addresses that recently had an identity. The file has the whole directory, so
    no lookup waits (proxy/directory/source.py)."""

    asks: ClassVar[bool] = False

    def __init__(self, path: Path, acceptance: Acceptance | None = None) -> None:
        """Reads the file. Raises DirectoryError if it is missing or invalid: a proxy does not start
        without its directory. Blocks while the file is being written, for at most about
        `files.PATIENCE` seconds."""
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
        self._refused: bytes | None = None  # digest of a content that cannot be used
        self._reported: str | None = None

    async def run(self, report: Report) -> None:
        """See Source."""
        await self.watch(self.acceptance.interval, report)

    # Both take what Source passes, and need none of it: the file is always read as a whole.
    def holding(self, original: Address) -> AbstractContextManager[None]:  # noqa: ARG002
        """See Source."""
        return NOTHING_HELD

    async def learn(self, original: Address) -> None:
        """See Source."""

    async def learn_name(self, authority: bytes, namespace: str) -> None:
        """See Source."""

    # as above
    def inside(self, host: str) -> bool:  # noqa: ARG002
        """See Source."""
        return False

    def doubt(self) -> None:
        """See Source."""

    def not_ready(self) -> str | None:
        """See Source."""
        return None

    async def watch(self, interval: float, report: Report) -> None:
        """Check the file every `interval` seconds, until cancelled. Calls `report(None)` after a
        replacement, and `report(error)` for a new error."""
        while True:
            await trio.sleep(
                min(interval, self.acceptance.settle) if self._settling.waiting else interval
            )
            await self.check(report)

    async def check(self, report: Report) -> None:
        """Check the file once."""
        try:
            if (seen := _stat(self.path)) == self._seen:
                return
            data, digest = await trio.to_thread.run_sync(_read, self.path)
        except (DirectoryError, files.FileUnusable) as error:
            self._seen = None
            self._settling.forget()
            self._complain(
                (
                    DirectoryError(str(self.path), [error.reason])
                    if isinstance(error, files.FileUnusable)
                    else error
                ),
                report,
            )
            return
        if digest == self._digest:
            self._reported = self._refused = None
        elif digest != self._refused and not self._settling.agreed(digest, trio.current_time()):
            self._seen = None
            return
        self._settling.forget()
        # The stat from before the read: the next check finds a change in between.
        self._seen = _settled(seen)
        if digest not in (self._digest, self._refused):
            await self._take(data, digest, report)

    async def _take(self, data: bytes, digest: bytes, report: Report) -> None:
        """Use the new content if it is acceptable."""
        try:
            found, losses = await trio.to_thread.run_sync(
                _understand, data, self.path, self.current, self.acceptance
            )
        except DirectoryError as error:
            self._refused = digest
            self._complain(error, report)
            return
        now = trio.current_time()
        if not self.former.fits(losses.former, now):
            self._seen = None  # try again: entries may expire
            words = (
                f"more than {self.former.most} addresses would be remembered as former identities"
                " (directory.max_remembered)"
            )
            self._complain(IdentityLoss(str(self.path), [words]), report)
            return
        self.former.take(found, losses.former, now, losses.missing)
        self.current, self._digest = found, digest
        self._reported = self._refused = None
        report(None)

    def _complain(self, error: DirectoryError, report: Report) -> None:
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
    """`seen`, if every later change of the file would change it. Otherwise None."""
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
    """Parse the snapshot without the garbage collector. Raises DirectoryError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DirectoryError(str(path), [f"not UTF-8 at byte {error.start}"]) from error
    if require_end and not ended(text):
        raise DirectoryError(
            str(path),
            ["does not end with a line `...` (directory.require_end): it may be incomplete"],
        )
    collected = gc.isenabled()
    gc.disable()
    try:
        found = parse(text, str(path))
        if found.endpoint_count + len(found.services) > _LARGE:
            # Reference counting still frees everything else that is frozen. Only existing cyclic
            # garbage stays.
            gc.freeze()
        return found
    finally:
        if collected:
            gc.enable()


def ended(text: str) -> bool:
    """Whether the end of a YAML document is marked (YAML 1.2.2 §9.1.2), so that it is complete."""
    lines = text.rstrip().rsplit("\n", 1)
    return lines[-1] == "..." and text.endswith("\n")


def _understand(
    data: bytes, path: Path, current: Directory, rules: Acceptance
) -> tuple[Directory, Downgrades]:
    """Parse the new directory, and compare it with the current one. Runs in a thread. Raises
    DirectoryError, IdentityLoss."""
    found = _parse(data, path, rules.require_end)
    losses = compare(current, found, rules.max_loss)
    if losses.refusals:
        raise IdentityLoss(
            str(path),
            [
                *losses.refusals,
                "if this is intended, list what may lose its identity in allow_identity_loss",
            ],
        )
    return found, losses
