"""Who we are, and who the others are: certificate, key and trust roots, alive.

An Identity owns the material of this process (proxy/identity/credentials.py: what was read and checked), the TLS contexts made from it
and the sessions resumed with it (proxy/identity/tls_contexts.py). It changes as a whole: `reload` reads the files again and either
replaces everything, synchronously, or keeps everything. A generation counter says which it was.

Three steps judge a peer, all of them within the handshake. The TLS library verifies the chain up to one of our trust roots. The rules
of proxy/net/tls/certificate_rules.py make both libraries agree on what a chain may be. `verify_chain` reads the name: exactly one SPIFFE
ID, of a trust domain we accept, valid at this moment, and the one that was expected. A resumed session has the last step only.

Time here is wall-clock time, since that is what certificates speak about.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL, crypto

from proxy.files import Settling
from proxy.identity import credential_files, credentials, tls_contexts
from proxy.identity.credential_files import MaterialError, MaterialFiles
from proxy.identity.credentials import Material, utc_now
from proxy.identity.inspect import expiry_in_words, life_left
from proxy.identity.spiffe import IdentityPattern, SpiffeId, SpiffeIdError, check_trust_domain
from proxy.identity.tls_contexts import ALPN_HTTP1, ALPN_HTTP2, ALPN_TCP, INNER_PROTOCOLS, NoCommonProtocol, SessionCache
from proxy.net.tls.certificate_rules import Alert

__all__ = [
    "ALPN_HTTP1",
    "ALPN_HTTP2",
    "ALPN_TCP",
    "INNER_PROTOCOLS",
    "Identity",
    "IdentityPattern",
    "MaterialError",
    "MaterialFiles",
    "NoCommonProtocol",
    "PeerRefused",
    "SessionCache",
    "SpiffeId",
    "SpiffeIdError",
    "TLSSettings",
    "check_trust_domain",
    "verify_peer",
    "watch",
]

# A workload's certificate is renewed at 70 % of its lifetime by every issuer we know of; when 30 % are left and it is still the
# old one, renewal has failed. At 10 % somebody must act.
WARN_AT = (0.30, 0.10)

RefusalReason = Literal["no_certificate", "no_identity", "trust_domain", "expired", "not_yet_valid", "wrong_identity"]


# What the peer is told. RFC 8446 has `access_denied` for a good certificate that is not let in; no library sends that from a verification.
_ALERTS: dict[RefusalReason, Alert] = {
    "no_certificate": "certificate_unknown",
    "no_identity": "bad_certificate",
    "trust_domain": "certificate_unknown",
    "expired": "certificate_expired",
    "not_yet_valid": "certificate_expired",
    "wrong_identity": "certificate_unknown",
}


class PeerRefused(Exception):
    """The peer's certificate chain is good, but we may not talk to the peer. `reason` is a label for metrics, `alert` what the peer is
    told."""

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason: RefusalReason = reason

    @property
    def alert(self) -> Alert:
        return _ALERTS[self.reason]


@dataclass(frozen=True, slots=True)
class TLSSettings:
    """What can be set about TLS. `trust_domains` are accepted beside our own; all of them share the trust roots, so a root that
    may only speak for one of them must say so itself (name constraints, which `isthmus identity root` sets)."""

    trust_domains: frozenset[str] = frozenset()
    session_lifetime: float = 3600.0  # seconds a session can be resumed; 0: never
    session_limit: int = tls_contexts.DEFAULT_SESSIONS
    settle: float = 0.0  # seconds between two reads of changed files that have to agree; 0: one is enough


class Identity:
    """Our certificate, key and trust roots, with the TLS contexts made from them.

    Raises MaterialError when the files are not a complete, consistent and valid set. Blocks while they are being written, for about
    `files.PATIENCE` seconds at most, if `settings.settle` is not 0. Nothing is to be closed.

    Attributes for metrics: `generation` (1 at the start, one more with each change), `failures` (how many times broken
    material was found), `last_error` (None when the files on disk are the ones in use).
    """

    def __init__(self, files: MaterialFiles, settings: TLSSettings | None = None, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.files = files
        self.settings = settings or TLSSettings()
        self.generation = 0
        self.failures = 0
        self.last_error: MaterialError | None = None
        self._clock = clock
        self._reported: tuple[bytes | None, str] | None = None
        self._warned: dict[bytes, float] = {}  # by fingerprint, the lowest threshold that has been said
        read = credential_files.read_settled(files, self.settings.settle)
        self._adopt(read.digest, credentials.load(read, clock()))

    def _adopt(self, digest: bytes, new: Material) -> None:
        """Replace everything at once. The contexts come first: if OpenSSL refuses the material nothing has changed."""
        try:
            server = tls_contexts.server_context(new, self.settings.session_lifetime)
            client = tls_contexts.client_context(new, self.settings.session_lifetime)
        except (SSL.Error, crypto.Error) as error:
            raise MaterialError(self.files.certificate, f"is refused by OpenSSL: {credentials.openssl_reason(error)}") from error
        self._digest = digest
        self._material = new
        self._server_context = server
        self._client_context = client
        self._sessions = SessionCache(self.settings.session_limit)
        self._accepted_domains = self.settings.trust_domains | {new.id.trust_domain}
        self.generation += 1
        self.last_error = None
        self._reported = None

    @property
    def id(self) -> SpiffeId:
        return self._material.id

    @property
    def server_context(self) -> SSL.Context:
        """For accepting. Another object after each change: take it anew for every connection."""
        return self._server_context

    @property
    def client_context(self) -> SSL.Context:
        """For dialling. Another object after each change: take it anew for every connection, together with `sessions`."""
        return self._client_context

    @property
    def sessions(self) -> SessionCache:
        """The sessions of `client_context`; replaced with it."""
        return self._sessions

    @property
    def resumes(self) -> bool:
        """Whether our connections take up sessions, and keep them."""
        return self.settings.session_lifetime > 0

    @property
    def certificate(self) -> x509.Certificate:
        return self._material.leaf

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """The trust roots in use; expired ones are left out."""
        return self._material.roots

    @property
    def not_after(self) -> datetime:
        """When our own certificate ends."""
        return self._material.leaf.not_valid_after_utc

    @property
    def not_before(self) -> datetime:
        """When the last certificate of our own chain begins: before that, no peer accepts us."""
        return max(certificate.not_valid_before_utc for certificate in self._material.chain)

    @property
    def chain_end(self) -> float:
        """When the first certificate of our own chain ends, in seconds since the epoch."""
        return min(certificate.not_valid_after_utc.timestamp() for certificate in self._material.chain)

    def validity_problem(self) -> str | None:
        """Why peers refuse our own chain at this moment, by the clock; None: they do not."""
        now = self._clock()
        for depth, certificate in enumerate(self._material.chain):
            problem = credentials.validity_problem(certificate, now)
            if problem is not None:
                what = "the certificate" if not depth else f"the certificate of its authority {credentials.name_of(certificate)}"
                return f"{what} {problem}"
        return None

    @property
    def roots_not_after(self) -> datetime:
        """When the first of the trust roots ends."""
        return min(root.not_valid_after_utc for root in self._material.roots)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What works but should be mended: a key that everybody can read, an expired root among valid ones."""
        return self._material.warnings

    @property
    def time_left(self) -> timedelta:
        """How long our certificate is still valid; negative when it has expired."""
        return self.not_after - self._clock()

    def verify_peer(self, certificate: x509.Certificate | None, expected: SpiffeId | None = None) -> SpiffeId:
        """The peer's identity, if it is one we may talk to now. Call it after every handshake, resumed ones too.

        `expected` is who must be there (the directory's word, when we dial); None accepts every identity of our trust
        domains. The certificate is the one the handshake has verified. Raises PeerRefused.
        """
        return verify_peer(certificate, expected, self._accepted_domains, self._clock())

    def verify_chain(self, chain: Sequence[x509.Certificate], expected: SpiffeId | None = None) -> SpiffeId:
        """The peer's identity by its verified chain, the leaf first: as `verify_peer`, and no certificate of the chain may have expired.

        An empty chain is a peer without a certificate; a leaf alone is one whose session was resumed. Raises PeerRefused.
        """
        identity = self.verify_peer(chain[0] if chain else None, expected)
        now = self._clock()
        for authority in chain[1:]:
            if now > authority.not_valid_after_utc:
                words = f"the certificate of an authority of the peer {identity} {credentials.validity_problem(authority, now)}"
                raise PeerRefused("expired", words)
        return identity

    def reload(self, settling: Settling | None = None) -> bool:
        """Read the files again; True when they had changed and are in use now. False while `settling` waits for a second read.

        Raises MaterialError when they have changed to something broken: everything stays as it was. The same broken contents
        are raised once, and after that answered with False until they change (`last_error` stays). Synchronous; a few
        milliseconds when something has changed.
        """
        digest = None
        try:
            read = credential_files.read_files(self.files)
            digest = read.digest
            if digest == self._digest:
                if settling is not None:
                    settling.forget()
                self.last_error = None
                self._reported = None
                return False
            if settling is not None and not settling.agreed(digest, trio.current_time()):
                return False
            self._adopt(digest, credentials.load(read, self._clock()))
        except MaterialError as error:
            self.last_error = error
            # A text with the present time in it would be new at every look, so what is compared is the file and the contents.
            seen = (digest, str(error.path) if digest is not None else str(error))
            if seen == self._reported:
                return False
            self._reported = seen
            self.failures += 1
            raise
        return True

    def expiry_warnings(self) -> list[str]:
        """Sentences about certificates that end soon: one when 30 % of the lifetime are left, one at 10 %, one at the end.

        Each is said once for each certificate, whoever asks.
        """
        now = self._clock()
        found = []
        said: dict[bytes, float] = {}
        named = [("our certificate", self._material.leaf)]
        named += [(f"the trust root {credentials.name_of(root)}", root) for root in self._material.roots]
        for what, certificate in named:
            key = certificate.fingerprint(hashes.SHA256())
            before = self._warned.get(key, math.inf)
            threshold = _threshold(certificate, now)
            if threshold < before:
                found.append(f"{what} {expiry_in_words(certificate, now)}")
            said[key] = min(before, threshold)
        self._warned = said
        return found


@lru_cache(maxsize=256)
def _named(certificate: x509.Certificate) -> SpiffeId:
    """The workload that a certificate names. A proxy has few peers, and meets the same certificates again and again: this is a tenth of
    what Python does for a handshake. Raises SpiffeIdError."""
    return SpiffeId.parse(credentials.spiffe_uri(certificate))


def verify_peer(certificate: x509.Certificate | None, expected: SpiffeId | None, trust_domains: Collection[str], now: datetime) -> SpiffeId:
    """Read and judge the name in a certificate whose chain has been verified. Raises PeerRefused; see Identity.verify_peer."""
    if certificate is None:
        raise PeerRefused("no_certificate", "the peer has shown no certificate")
    try:
        identity = _named(certificate)
    except SpiffeIdError as error:
        raise PeerRefused("no_identity", f"the peer's certificate does not name a workload of the mesh: {error}") from None
    if identity.trust_domain not in trust_domains:
        ours = " or ".join(sorted(trust_domains))
        raise PeerRefused("trust_domain", f"the peer is {identity}, which is not of the trust domain {ours}")
    problem = credentials.validity_problem(certificate, now)
    if problem is not None:
        reason: RefusalReason = "expired" if now > certificate.not_valid_after_utc else "not_yet_valid"
        raise PeerRefused(reason, f"the certificate of the peer {identity} {problem}")
    if expected is not None and identity != expected:
        raise PeerRefused("wrong_identity", f"the peer is {identity}, but {expected} was expected")
    return identity


def _threshold(certificate: x509.Certificate, now: datetime) -> float:
    """The lowest of the warning thresholds that has been reached; 0.0 is the end itself, infinity is none of them."""
    left = life_left(certificate, now)
    return 0.0 if left <= 0 else min((threshold for threshold in WARN_AT if left <= threshold), default=math.inf)


async def watch(
    identity: Identity,
    interval_seconds: float,
    on_change: Callable[[Identity], None],
    on_error: Callable[[MaterialError], None],
    on_warning: Callable[[str], None],
) -> None:
    """Look for changed files every `interval_seconds`, for ever; end it by cancelling.

    A look is one stat() a file (which follows the symbolic links that Kubernetes swaps); only when something moved are the
    contents read. They are used when two reads have found the same, `TLSSettings.settle` seconds apart. The callbacks are
    synchronous: `on_change` after new material is in use, `on_error` once for each broken change, `on_warning` with each sentence
    of Identity.expiry_warnings.
    """
    seen: tuple[object, ...] | None = None
    settling = Settling(identity.settings.settle)
    while True:
        # Taken before reading: what changes while we read is noticed at the next look.
        signature = tuple(_signature(path) for path in identity.files.all)
        # Broken material may mend itself without a change of the files: a certificate that is not valid yet.
        if signature != seen or identity.last_error is not None or settling.waiting:
            seen = signature
            try:
                if identity.reload(settling):
                    on_change(identity)
            except MaterialError as error:
                on_error(error)
        for sentence in identity.expiry_warnings():
            on_warning(sentence)
        await trio.sleep(min(interval_seconds, settling.settle) if settling.waiting else interval_seconds)


def _signature(path: Path) -> object:
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
