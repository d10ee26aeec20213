"""The issuer: a CA certificate with its key, in mounted files.

The files are those of a Secret: `tls.crt` and `tls.key` (Kubernetes and cert-manager), or the names
that `isthmus identity root` writes. The certificate file may have a chain up to the trust roots.
The trust roots come from files of their own, because proxies must trust them before anything is
issued.

A new issuer is used only if proxies would accept what it signs: before that, a certificate is made
with it and checked as a proxy checks its peers. So an issuer that is expired, that has the key of
another, or that the trust roots do not verify is refused, and the one before stays in use. If there
was none before, nothing is issued.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from control.contract import SpiffeId
from proxy.files import Settling, signature
from proxy.identity import credentials
from proxy.identity.credential_files import Contents, MaterialError, MaterialFiles, read_files
from proxy.identity.issue import Issued, IssueError, Subject, Validity, certify
from proxy.identity.key_strength import PublicKey
from proxy.identity.signing_request import make_key
from proxy.net.tls.certificate_rules import find_flaw

_log = logging.getLogger("isthmus.control")

# The names of certificate and key in the mounted directory.
LAYOUTS = (("tls.crt", "tls.key"), ("root.pem", "root.key"))
SETTLE = 0.5


class NoIssuer(Exception):
    """Nothing can be issued. The message says why."""


@dataclass(frozen=True, slots=True)
class Signed:
    """A new certificate. `chain`: it and the intermediates up to the roots, in PEM."""

    certificate: x509.Certificate
    chain: bytes
    roots: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Authority:
    issued: Issued
    chain: bytes  # the intermediates, in PEM
    roots: tuple[x509.Certificate, ...]
    pem: tuple[bytes, ...]


def issuer_files(directory: Path, roots: tuple[Path, ...]) -> MaterialFiles:
    """The files of the issuer in a directory: those of the first layout that is there."""
    for certificate, key in LAYOUTS:
        if (directory / certificate).exists():
            return MaterialFiles(directory / certificate, directory / key, roots)
    certificate, key = LAYOUTS[0]
    return MaterialFiles(directory / certificate, directory / key, roots)


class Issuer:
    """The current issuer. `sample`: an identity to check new issuers with. `generation` counts the
    issuers and roots that were used, `failures` those that were refused; `problem`: why the files
    are not in use (""; they are).
    """

    def __init__(
        self,
        directory: Path,
        roots: tuple[Path, ...],
        sample: SpiffeId,
        clock: Callable[[], datetime] = credentials.utc_now,
    ) -> None:
        self.generation = self.failures = 0
        self.problem = "the files have not been read yet"
        self.changed = trio.Event()
        self._directory, self._roots = directory, roots
        self._sample = sample
        self._clock = clock
        self._authority: _Authority | None = None
        self._digest = b""

    @property
    def certificate(self) -> x509.Certificate | None:
        """The issuer in use."""
        return self._authority.issued.certificate if self._authority is not None else None

    def sign(self, identity: SpiffeId, key: PublicKey, validity: Validity) -> Signed:
        """Certify a key. Raises NoIssuer."""
        authority = self._authority
        if authority is None:
            raise NoIssuer(f"there is no usable issuer: {self.problem}")
        try:
            made = certify(authority.issued, Subject(identity, key), validity, self._clock())
        except IssueError as error:
            raise NoIssuer(f"the issuer cannot sign: {error}") from None
        return Signed(made, _pem(made) + authority.chain, authority.pem)

    def read(self, settling: Settling | None = None) -> bool:
        """Read the files. True: they have changed and are in use. A refusal is logged once, and
        what was in use stays."""
        try:
            contents = read_files(issuer_files(self._directory, self._roots))
            if contents.digest == self._digest and self._authority is not None:
                if settling is not None:
                    settling.forget()
                self.problem = ""
                return False
            if settling is not None and not settling.agreed(contents.digest, trio.current_time()):
                return False
            self._authority = self._load(contents)
        except MaterialError as error:
            if str(error.path) + error.reason != self.problem:
                self.failures += 1
                self.problem = str(error.path) + error.reason
                kept = ", keeping the old one" if self._authority is not None else ""
                _log.error("cannot use the issuer%s: %s", kept, error)
            return False
        self._digest = contents.digest
        self.generation += 1
        self.problem = ""
        issuer = self._authority.issued.certificate
        _log.info(
            "issuer in use: %s, valid until %s",
            credentials.name_of(issuer),
            credentials.when(issuer.not_valid_after_utc),
        )
        self.changed.set()
        self.changed = trio.Event()
        return True

    async def watch(self, interval: float) -> None:
        """Use changed files, until cancelled. Looks every `interval` seconds."""
        settling = Settling(SETTLE)
        seen: object = None
        while True:
            files = issuer_files(self._directory, self._roots)
            found = tuple(map(signature, files.all))
            # One that is not valid yet becomes valid without a change.
            if found != seen or self.problem or settling.waiting:
                seen = found
                self.read(settling)
            await trio.sleep(min(interval, SETTLE) if settling.waiting else interval)

    def _load(self, contents: Contents) -> _Authority:
        """Check everything that a proxy would check of what this issuer signs. Raises
        MaterialError."""
        files, now = contents.files, self._clock()
        path = files.certificate
        first, *others = credentials.parse_certificates(path, contents.parts[0])
        key = credentials.parse_key(files.key, contents.parts[1])
        roots = credentials.parse_roots(files.roots, contents.parts[2:], now)
        if key.public_key() != credentials.public_key(path, first):
            raise MaterialError(files.key, f"does not belong to the certificate in {path}")
        credentials.check_authority(path, first)
        credentials.check_validity(path, first, now, "the issuer")
        above = tuple(other for other in (first, *others) if other not in roots)
        issued = Issued(first, key)
        try:
            subject = Subject(self._sample, make_key().public_key())
            leaf = certify(issued, subject, Validity(timedelta(hours=1), timedelta()), now)
        except IssueError as error:
            raise MaterialError(path, f"cannot sign: {error}") from None
        try:
            chain = credentials.verify_chain(leaf, above, roots, now)
        except ValueError as error:
            names = ", ".join(map(str, files.roots))
            raise MaterialError(
                path, f"does not chain to the trust roots in {names}: {error}"
            ) from None
        if (flaw := find_flaw(chain)) is not None:
            what = credentials.name_of(chain[flaw.depth]) if flaw.depth else "what it signs"
            raise MaterialError(path, f"would be rejected by every proxy: {what} {flaw.words}")
        return _Authority(issued, b"".join(map(_pem, above)), roots, contents.parts[2:])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
