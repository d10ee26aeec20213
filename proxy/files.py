"""Reading files that another program writes, and writing keys and certificates.

What is read was named by a person, who may have named anything: a pipe would stop the process for ever, a device never ends, a
log has gigabytes. So only regular files are read, up to a bound, and what is wrong is said in words.

A file may be read while it is being written. What is there then can be well-formed and mean less than the whole: a shorter list of
roots, an endpoint without its identity. So contents are used only when two reads, some time apart, agree (`Settling` for what is
watched, `read_settled` for the start). At the start a file that has not been touched for that time is used at once.

What is written is there whole or not at all, and a key is never readable by others, not even for a moment. A new file is made
beside the old one, with its final mode, under a name that nobody else can have made (O_EXCL), filled, synced, and renamed over
the old one. A reader sees the old contents or the new ones, and a crash leaves the old ones.
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
    """A file cannot be read, or is not of the kind that can be. `reason` says why, in words that follow the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def read_bytes(path: Path, most: int) -> bytes:
    """What is in a regular file of at most `most` bytes; links are followed. Never waits for anybody. Raises FileUnusable."""
    try:
        # O_NONBLOCK: opening a pipe would wait for somebody who writes into it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FileUnusable(path, "is not a regular file")
            # The descriptor stays ours: a file object that cannot be made (of a directory) would not close it.
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
    """The same as text in UTF-8. Raises FileUnusable."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileUnusable(path, f"not UTF-8 at byte {error.start}") from error


def read_settled(read: Callable[[], tuple[T, bytes]], paths: Iterable[Path], settle: float) -> tuple[T, bytes]:
    """What `read` gives, (contents, digest), of files that are not being written now. `settle` is in seconds; 0: the first read counts.

    Returns at once if none of `paths` has been modified in the last `settle` seconds. Otherwise two reads that far apart have to agree.
    Blocks, for `PATIENCE` seconds and one `settle` at most. Raises FileUnusable if the files keep changing, and what `read` raises.
    """
    paths = list(paths)
    contents, digest = read()
    if settle <= 0 or not any(_young(path, settle) for path in paths):
        return contents, digest
    deadline = time.monotonic() + PATIENCE
    while True:
        time.sleep(settle)
        contents, again = read()
        if again == digest:
            return contents, digest
        if time.monotonic() >= deadline:
            raise FileUnusable(paths[0], f"keeps changing: no two reads within {PATIENCE:g} s have found the same")
        digest = again


def _young(path: Path, settle: float) -> bool:
    """Whether the file has been modified in the last `settle` seconds. The time of the inode counts too, which no writer can set."""
    try:
        found = path.stat()
    except OSError:
        return True  # it has just been read
    # A time in the future says that the clocks differ, so it says nothing.
    return time.time() - max(found.st_mtime, found.st_ctime) < settle


class Settling:
    """Whether the contents of a watched file have settled: two reads, at least `settle` seconds apart, and none in between that differs."""

    def __init__(self, settle: float) -> None:
        self.settle = settle
        self._digest: bytes | None = None
        self._since = 0.0

    @property
    def waiting(self) -> bool:
        """Whether a first read waits for a second one."""
        return self._digest is not None

    def agreed(self, digest: bytes, now: float) -> bool:
        """A read at `now` (seconds of any one clock) has found contents with this digest. True: they have settled; nothing waits then."""
        if digest != self._digest:
            self._digest, self._since = digest, now
        if now - self._since < self.settle:
            return False
        self._digest = None
        return True

    def forget(self) -> None:
        """What was read first does not count any more."""
        self._digest = None


def make_private_directory(path: Path) -> None:
    """Make the directory and its missing parents, new ones with mode 0700. Existing ones stay as they are. Raises OSError."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)


def write_private(path: Path, data: bytes) -> None:
    """Write a secret: only the owner can read it. Raises OSError."""
    _replace(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Write what everybody may read. Raises OSError."""
    _replace(path, data, 0o644)


def _replace(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # O_NOFOLLOW | O_EXCL: a link that somebody has put there is refused and not followed.
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            # The umask may only take away; fchmod gives exactly the mode that was meant.
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
