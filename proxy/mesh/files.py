"""Writing keys and certificates: whole or not at all, and a key never readable by others, not even for a moment.

A new file is made beside the old one, with its final mode, under a name that nobody else can have made (O_EXCL), filled,
synced, and renamed over the old one. A reader sees the old contents or the new ones, and a crash leaves the old ones.
"""

import os
import secrets
from pathlib import Path


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
