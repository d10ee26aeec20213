"""Reading files that somebody else writes, and writing keys and certificates.

What is read was named by a person, who may have named anything: a pipe would stop the process for ever, a device never ends, a
log has gigabytes. So only regular files are read, up to a bound, and what is wrong is said in words.

What is written is there whole or not at all, and a key is never readable by others, not even for a moment. A new file is made
beside the old one, with its final mode, under a name that nobody else can have made (O_EXCL), filled, synced, and renamed over
the old one. A reader sees the old contents or the new ones, and a crash leaves the old ones.
"""

import os
import secrets
import stat
from pathlib import Path


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
