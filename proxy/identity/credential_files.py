"""The parts of an identity's credentials as bytes: reads them together if they are files.
proxy/identity/credentials.py parses and checks them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from proxy.files import FileUnusable, read_bytes
from proxy.files import read_settled as settled

# A bundle of a thousand roots has about 1 MiB.
MAX_FILE_BYTES = 4 * 1024 * 1024


# Where a part of the credentials is, for messages: a file, or words for a part that is in none.
Origin = Path | str


class MaterialError(Exception):
    """A part of the credentials cannot be used. `path` is the file, or words for a part that is not
    in a file; `reason` says what is wrong and how to fix it.
    """

    def __init__(self, path: Origin, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class MaterialFiles:
    """The paths of an identity's files. All are PEM; each root file may hold several
    certificates."""

    certificate: Path
    key: Path
    roots: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.certificate, self.key, *self.roots)


@dataclass(frozen=True, slots=True)
class MaterialNames:
    """The parts of credentials that are not all in files: words or paths for messages."""

    certificate: Origin
    key: Origin
    roots: tuple[Origin, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """The bytes of one set of credentials, in PEM: certificate chain, key, and one part for each of
    `files.roots`. Files are read in one pass. `digest` changes whenever the contents change.
    `key_mode`: the mode of the key's file; 0 if the key is in memory only.
    """

    files: MaterialFiles | MaterialNames
    parts: tuple[bytes, ...]
    key_mode: int = 0

    @property
    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        return digest.digest()


def read_files(files: MaterialFiles) -> Contents:
    """Read all files. Raises MaterialError for the first one that cannot be read."""
    if not files.roots:
        raise MaterialError(
            files.certificate,
            "no trust root file is configured for this certificate: name at least one",
        )
    parts = tuple(read_file(path) for path in files.all)
    try:
        mode = files.key.stat().st_mode
    except OSError as error:
        raise MaterialError(files.key, f"cannot be read: {error.strerror or error}") from None
    return Contents(files, parts, mode)


def read_settled(files: MaterialFiles, settle: float) -> Contents:
    """Read all files once they are not being written; see files.read_settled. Raises
    MaterialError."""

    def read() -> tuple[Contents, bytes]:
        contents = read_files(files)
        return contents, contents.digest

    try:
        return settled(read, files.all, settle)[0]
    except FileUnusable as error:
        raise MaterialError(error.path, error.reason) from None


def read_file(path: Path) -> bytes:
    """The bytes of one file, at most MAX_FILE_BYTES. Raises MaterialError."""
    try:
        return read_bytes(path, MAX_FILE_BYTES)
    except FileUnusable as error:
        raise MaterialError(path, error.reason) from None
