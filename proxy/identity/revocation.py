"""Revoked identities and certificates: such peers are refused, although their certificates are
valid.

Certificates of the mesh are short-lived, and that is the first defence: a stolen key is useful for
hours. The list is for these hours. It is a text file, usually from a ConfigMap, with one entry in
each line:

    # the service account whose token was stolen
    spiffe://cluster.local/ns/shop/sa/web
    # one certificate; `isthmus identity show` and the log of the control plane have the number
    serial:3f2a...

An identity in the list also refuses all later certificates of this identity. A new list is used as
a whole or not at all: a file that is missing or malformed revokes and permits nothing new.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography import x509

from proxy.files import FileUnusable, Settling, read_bytes, read_settled, signature
from proxy.identity.credential_files import MaterialError
from proxy.identity.spiffe import SpiffeId, SpiffeIdError

MAX_BYTES = 2**20
MAX_ENTRIES = 10_000
# RFC 5280, section 4.1.2.2: at most 20 octets.
_SERIAL = re.compile(r"serial:([0-9a-fA-F]{1,40})")


@dataclass(frozen=True, slots=True)
class Revoked:
    """A list. Falsy if it is empty."""

    identities: frozenset[str] = frozenset()
    serials: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.identities or self.serials)

    def has(self, identity: str, serial: int | None) -> bool:
        """Whether a peer with this identity and serial number is refused."""
        return identity in self.identities or serial in self.serials

    def refuses(self, identity: SpiffeId, certificate: x509.Certificate) -> bool:
        """Whether a peer is refused."""
        return self.has(str(identity), certificate.serial_number)


def parse(path: Path, data: bytes) -> Revoked:
    """The list in a file. Raises MaterialError with the line that is wrong."""
    identities: set[str] = set()
    serials: set[int] = set()
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise MaterialError(path, f"not UTF-8 at byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        if found := _SERIAL.fullmatch(entry):
            serials.add(int(found[1], 16))
        else:
            try:
                identities.add(str(SpiffeId.parse(entry)))
            except SpiffeIdError as error:
                words = f"line {number}: neither a SPIFFE ID nor serial:<hexadecimal>: {error}"
                raise MaterialError(path, words) from None
        if len(identities) + len(serials) > MAX_ENTRIES:
            raise MaterialError(path, f"has more than {MAX_ENTRIES} entries")
    return Revoked(frozenset(identities), frozenset(serials))


class RevocationList:
    """The list in a file. Reads it at once; raises MaterialError. `settle`: seconds between two
    reads of a changed file, which must agree."""

    def __init__(self, path: Path, settle: float) -> None:
        self._path, self._settle = path, settle
        self._data = self._settled()
        self.current = parse(path, self._data)

    def _settled(self) -> bytes:
        def read() -> tuple[bytes, bytes]:
            data = self._read()
            return data, data

        try:
            return read_settled(read, [self._path], self._settle)[0]
        except FileUnusable as error:
            raise MaterialError(error.path, error.reason) from None

    def _read(self) -> bytes:
        try:
            return read_bytes(self._path, MAX_BYTES)
        except FileUnusable as error:
            raise MaterialError(error.path, error.reason) from None

    async def watch(
        self,
        interval: float,
        changed: Callable[[Revoked], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Look for changes every `interval` seconds, until cancelled. `changed` gets each new list,
        `failed` each new error."""
        settling = Settling(self._settle)
        seen: object = None
        while True:
            found = signature(self._path)
            if found != seen or settling.waiting:
                seen = found
                try:
                    data = self._read()
                    if data == self._data:
                        settling.forget()
                    elif settling.agreed(data, trio.current_time()):
                        self.current = parse(self._path, data)
                        self._data = data
                        changed(self.current)
                except MaterialError as error:
                    failed(error)
            await trio.sleep(min(interval, settling.settle) if settling.waiting else interval)
