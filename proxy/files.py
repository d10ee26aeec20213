"""Reading files that another program writes, and writing keys and certificates.

A path comes from a user and may point to anything. A pipe would block the process forever, a device
never ends, a log file may have gigabytes. So only regular files up to a size limit are read, and
errors say what is wrong.

A file may be read while it is being written. The partial contents can be well-formed and yet wrong:
a shorter list of trust roots, an endpoint without its identity. So contents are used only when two
reads, some time apart, agree (`Settling` for watched files, `read_settled` at the start). At the
start, a file that has not been modified for that time is used at once.

Writes are atomic, and a key is never readable by other users. A new file is created beside the old
one with its final mode, under an unused name (O_EXCL), then filled, synced, and renamed over the
old one. A reader sees the old or the new contents; after a crash the old contents remain.
"""

import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Seconds that the start waits for a file that keeps changing.
PATIENCE = 10.0


class FileUnusable(Exception):
    """A file cannot be read, or is not a regular file. `reason` is a phrase that follows the
    path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def read_bytes(path: Path, most: int) -> bytes:
    """The contents of a regular file of at most `most` bytes; follows links. Never blocks. Raises
    FileUnusable.
    """
    try:
        # O_NONBLOCK: opening a pipe would otherwise wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FileUnusable(path, "is not a regular file")
            # We keep the descriptor: if the file object cannot be created (a directory), it would
            # not be closed.
            with open(fd, "rb", closefd=False) as file:
                data = file.read(most + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise FileUnusable(path, f"cannot be read: {error.strerror or error}") from error
    if len(data) > most:
        raise FileUnusable(path, f"is larger than {most >> 20} MiB: is it the right file?")
    return data


def read_text(path: Path, most: int) -> str:
    """The contents of a regular file, decoded as UTF-8, at most `most` bytes. Raises
    FileUnusable."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileUnusable(path, f"not UTF-8 at byte {error.start}") from error


def read_settled(
    read: Callable[[], tuple[T, bytes]], paths: Iterable[Path], settle: float
) -> tuple[T, bytes]:
    """The result of `read`, (contents, digest), once the files have settled. `settle` in seconds;
    0: one read is enough.

    Returns at once if none of `paths` was modified in the last `settle` seconds. Otherwise two
    reads, `settle` seconds apart, must agree. Blocks for at most `PATIENCE` plus one `settle`.
    Raises FileUnusable if the files keep changing, and whatever `read` raises.
    """
    paths = list(paths)
    contents, digest = read()
    if settle <= 0 or not any(_recently_modified(path, settle) for path in paths):
        return contents, digest
    deadline = time.monotonic() + PATIENCE
    while True:
        time.sleep(settle)
        contents, again = read()
        if again == digest:
            return contents, digest
        if time.monotonic() >= deadline:
            raise FileUnusable(
                paths[0], f"keeps changing: no two reads within {PATIENCE:g} s agreed"
            )
        digest = again


def _recently_modified(path: Path, settle: float) -> bool:
    """Whether the file was modified in the last `settle` seconds. The inode's change time also
    counts, because a writer cannot set it.
    """
    try:
        found = path.stat()
    except OSError:
        return True  # the file was just read, so it changed since
    # A time in the future means that the clocks differ; then it tells nothing.
    return time.time() - max(found.st_mtime, found.st_ctime) < settle


def signature(path: Path) -> object:
    """A value that changes when the file at `path` is replaced or written."""
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Settling:
    """Whether the contents of a watched file have settled: two reads with the same digest, at least
    `settle` seconds apart, and no different read in between.
    """

    def __init__(self, settle: float) -> None:
        self.settle = settle
        self._digest: bytes | None = None
        self._since = 0.0

    @property
    def waiting(self) -> bool:
        """Whether a first read still waits for its confirmation."""
        return self._digest is not None

    def agreed(self, digest: bytes, now: float) -> bool:
        """Record a read at `now` (seconds of any monotonic clock). True: the contents have settled,
        and nothing waits.
        """
        if digest != self._digest:
            self._digest, self._since = digest, now
        if now - self._since < self.settle:
            return False
        self._digest = None
        return True

    def forget(self) -> None:
        """Discard the first read."""
        self._digest = None


def make_private_directory(path: Path) -> None:
    """Create the directory and its missing parents with mode 0700. Existing ones do not change.
    Raises OSError.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)


def write_private(path: Path, data: bytes) -> None:
    """Write a secret atomically; only the owner can read it. Raises OSError."""
    _replace(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Write a public file atomically; all users can read it. Raises OSError."""
    _replace(path, data, 0o644)


def _replace(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # O_NOFOLLOW | O_EXCL: a link placed at this name is refused, not followed.
    fd = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode
    )
    try:
        with os.fdopen(fd, "wb") as file:
            # The umask could remove permissions; fchmod sets exactly the intended mode.
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
