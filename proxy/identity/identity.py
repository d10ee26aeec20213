"""The proxy's identity at run time: certificate, key and trust roots, reloaded without a restart.

An Identity owns the credentials of this process (proxy/identity/credentials.py), the TLS contexts
made from them, and the sessions resumed with them (proxy/identity/tls_contexts.py). They change
together: `use` takes a new set and either replaces everything at once or keeps everything. `reload`
does the same with files. A generation counter shows which. proxy/identity/source.py has the sources
of credentials.

A peer is verified in three steps, all within the handshake. The TLS library verifies the chain up
to one of our trust roots. The rules of proxy/net/tls/certificate_rules.py make both TLS libraries
agree on the allowed chains. `verify_chain` checks the name: exactly one SPIFFE ID, of an accepted
trust domain, valid now, and the expected one. A resumed session only has the last step.

Times here are wall-clock times, because certificates use them.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Literal

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL, crypto

from proxy.files import Settling
from proxy.identity import credential_files, credentials, tls_contexts
from proxy.identity.credential_files import Contents, MaterialError, MaterialFiles
from proxy.identity.credentials import Material, utc_now
from proxy.identity.inspect import expiry_in_words, life_left
from proxy.identity.revocation import Revoked
from proxy.identity.spiffe import IdentityPattern, SpiffeId, SpiffeIdError, check_trust_domain
from proxy.identity.tls_contexts import (
    ALPN_HTTP1,
    ALPN_HTTP2,
    ALPN_TCP,
    INNER_PROTOCOLS,
    NoCommonProtocol,
    SessionCache,
)
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
]

# Known issuers renew a workload's certificate at 70 % of its lifetime. If the old one is still in
# use with 30 % left, renewal has failed. At 10 % an operator must act.
WARN_AT = (0.30, 0.10)

RefusalReason = Literal[
    "no_certificate",
    "no_identity",
    "trust_domain",
    "expired",
    "not_yet_valid",
    "revoked",
    "wrong_identity",
]


# The alert for the peer. RFC 8446 has `access_denied` for a valid certificate without access; no
# TLS library sends that from a verification.
_ALERTS: dict[RefusalReason, Alert] = {
    "no_certificate": "certificate_unknown",
    "no_identity": "bad_certificate",
    "trust_domain": "certificate_unknown",
    "expired": "certificate_expired",
    "not_yet_valid": "certificate_expired",
    "revoked": "certificate_unknown",
    "wrong_identity": "certificate_unknown",
}


class PeerRefused(Exception):
    """The peer's certificate chain is valid, but the peer is not accepted. `reason` is a label for
    metrics, `alert` is sent to the peer.
    """

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason: RefusalReason = reason

    @property
    def alert(self) -> Alert:
        return _ALERTS[self.reason]


@dataclass(frozen=True, slots=True)
class TLSSettings:
    """TLS settings. `trust_domains` are accepted in addition to our own. All of them share the
    trust roots, so a root that may only sign for one of them must be restricted by name
    constraints, as `isthmus identity root` does.
    """

    trust_domains: frozenset[str] = frozenset()
    session_lifetime: float = 3600.0  # seconds in which a session can be resumed; 0: never
    session_limit: int = tls_contexts.DEFAULT_SESSIONS
    # the trust domain that our own certificate must have; None: any
    own_domain: str | None = None
    # seconds between two reads of changed files, which must agree; 0: one read is enough
    settle: float = 0.0
    # the ALPN names of which a client must offer one
    protocols: frozenset[bytes] = tls_contexts.INNER_PROTOCOLS
    # the ALPN names for clients without a certificate (`open_server_context`); none: there are none
    open_protocols: frozenset[bytes] = frozenset()


class Identity:
    """Our certificate, key and trust roots, with the TLS contexts made from them.

    Raises MaterialError if the files are not a complete, consistent and valid set. If
    `settings.settle` is not 0 and the files are being written, the constructor blocks for at most
    about `files.PATIENCE` seconds. Nothing needs closing.

    With None instead of files, a source (proxy/identity/source.py) brings the credentials later.
    Until then `known` is False, and only `known`, `use`, `validity_problem`, `expiry_warnings` and
    the attributes for metrics may be used; the others raise AttributeError.

    Attributes for metrics: `generation` (1 at the start, plus one per change), `failures` (how
    often invalid files were found), `last_error` (None if the files on disk are in use).
    """

    def __init__(
        self,
        files: MaterialFiles | None,
        settings: TLSSettings | None = None,
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.files = files
        self.settings = settings or TLSSettings()
        self.generation = 0
        self.failures = 0
        self.last_error: MaterialError | None = None
        self.revoked = Revoked()  # peers that are refused; replaced as a whole
        self._clock = clock
        self._reported: tuple[bytes | None, str] | None = None
        # by fingerprint: the lowest threshold already reported
        self._warned: dict[bytes, float] = {}
        self._digest = b""
        if files is not None:
            self.use(credential_files.read_settled(files, self.settings.settle))

    @property
    def known(self) -> bool:
        """Whether there are credentials."""
        return self.generation > 0

    def use(self, contents: Contents) -> bool:
        """Use this set of credentials. Returns whether it differs from the one in use. Raises
        MaterialError if it is not a complete, consistent and valid set: everything stays as it was.
        """
        digest = contents.digest
        if digest == self._digest:
            self.last_error = None
            return False
        new = credentials.load(contents, self._clock())
        wanted = self.settings.own_domain
        if wanted is not None and new.id.trust_domain != wanted:
            raise MaterialError(
                contents.files.certificate,
                f"is for the trust domain {new.id.trust_domain}, not {wanted}",
            )
        self._adopt(contents, new)
        self._digest = digest
        return True

    def _adopt(self, contents: Contents, new: Material) -> None:
        """Replace everything at once. The contexts come first: if OpenSSL rejects the credentials,
        nothing has changed.
        """
        try:
            server = tls_contexts.server_context(
                new, self.settings.session_lifetime, self.settings.protocols
            )
            client = tls_contexts.client_context(new, self.settings.session_lifetime)
            open_protocols = self.settings.open_protocols
            self._open_server_context = (
                tls_contexts.server_context(new, 0.0, open_protocols, certificates=False)
                if open_protocols
                else None
            )
        except (SSL.Error, crypto.Error) as error:
            raise MaterialError(
                contents.files.certificate,
                f"is rejected by OpenSSL: {credentials.openssl_reason(error)}",
            ) from error
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
        """The context for accepting. It is replaced at each change: get it again for every
        connection.
        """
        return self._server_context

    @property
    def open_server_context(self) -> SSL.Context:
        """The context for accepting clients that have no certificate: they authenticate in another
        way. Raises RuntimeError if `settings.open_protocols` has none.
        """
        if self._open_server_context is None:
            raise RuntimeError("clients without a certificate are not accepted")
        return self._open_server_context

    @property
    def client_context(self) -> SSL.Context:
        """The context for dialling. It is replaced at each change: get it again for every
        connection, together with `sessions`.
        """
        return self._client_context

    @property
    def sessions(self) -> SessionCache:
        """The sessions of `client_context`; replaced together with it."""
        return self._sessions

    @property
    def resumes(self) -> bool:
        """Whether our connections resume sessions and store them."""
        return self.settings.session_lifetime > 0

    @property
    def certificate(self) -> x509.Certificate:
        return self._material.leaf

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """Our own verified chain: the leaf first, its trust root last."""
        return self._material.chain

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """The trust roots in use, without expired ones."""
        return self._material.roots

    @property
    def not_after(self) -> datetime:
        """When our own certificate expires."""
        return self._material.leaf.not_valid_after_utc

    @property
    def not_before(self) -> datetime:
        """When our own whole chain becomes valid: before that, peers reject us."""
        return max(certificate.not_valid_before_utc for certificate in self._material.chain)

    @property
    def chain_end(self) -> float:
        """When the first certificate of our own chain expires, in seconds since the epoch."""
        return min(
            certificate.not_valid_after_utc.timestamp() for certificate in self._material.chain
        )

    def validity_problem(self) -> str | None:
        """Why peers reject our own chain now, by the clock; None if they accept it."""
        if not self.known:
            return "there is no certificate yet"
        now = self._clock()
        for depth, certificate in enumerate(self._material.chain):
            problem = credentials.validity_problem(certificate, now)
            if problem is not None:
                what = (
                    "the certificate"
                    if not depth
                    else f"the certificate of its authority {credentials.name_of(certificate)}"
                )
                return f"{what} {problem}"
        return None

    @property
    def roots_not_after(self) -> datetime:
        """When the first trust root expires."""
        return min(root.not_valid_after_utc for root in self._material.roots)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Problems that do not prevent operation: a key that all users can read, an expired root
        among valid ones.
        """
        return self._material.warnings

    @property
    def time_left(self) -> timedelta:
        """The remaining lifetime of our certificate; negative if it has expired."""
        return self.not_after - self._clock()

    def verify_peer(
        self, certificate: x509.Certificate | None, expected: SpiffeId | None = None
    ) -> SpiffeId:
        """The peer's identity, if the peer is accepted now. Call it after every handshake, also
        resumed ones.

        `expected` is the identity that the peer must have (from the directory, when dialling); None
        accepts every identity of our trust domains. `certificate` is the one verified in the
        handshake. Raises PeerRefused.
        """
        found = verify_peer(certificate, expected, self._accepted_domains, self._clock())
        if self.revoked and certificate is not None and self.revoked.refuses(found, certificate):
            raise PeerRefused("revoked", f"the peer {found} is on the list of revoked ones")
        return found

    def verify_chain(
        self, chain: Sequence[x509.Certificate], expected: SpiffeId | None = None
    ) -> SpiffeId:
        """The peer's identity from its verified chain, the leaf first. Like `verify_peer`; also, no
        certificate of the chain may have expired.

        An empty chain is a peer without a certificate; a chain of one is a resumed session. Raises
        PeerRefused.
        """
        identity = self.verify_peer(chain[0] if chain else None, expected)
        now = self._clock()
        for authority in chain[1:]:
            if now > authority.not_valid_after_utc:
                words = (
                    f"the certificate of an authority of the peer {identity}"
                    f" {credentials.validity_problem(authority, now)}"
                )
                raise PeerRefused("expired", words)
        return identity

    def reload(self, settling: Settling | None = None) -> bool:
        """Read the files again. True: they had changed and are now in use. False while `settling`
        waits for a second read.

        Raises MaterialError if the new contents are invalid: everything stays as it was. The same
        invalid contents raise once; later calls return False until they change (`last_error`
        stays). Synchronous; takes a few milliseconds if something has changed.
        """
        if self.files is None:
            return False
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
            self.use(read)
        except MaterialError as error:
            self.last_error = error
            # Compare file and contents, not the message: its text contains the current time and
            # would always differ.
            seen = (digest, str(error.path) if digest is not None else str(error))
            if seen == self._reported:
                return False
            self._reported = seen
            self.failures += 1
            raise
        return True

    def expiry_warnings(self) -> list[str]:
        """Warnings about certificates that expire soon: at 30 % of the lifetime left, at 10 %, and
        at the end.

        Each is returned once per certificate, regardless of the caller.
        """
        if not self.known:
            return []
        now = self._clock()
        found = []
        warned: dict[bytes, float] = {}
        named = [("our certificate", self._material.leaf)]
        named += [
            (f"the trust root {credentials.name_of(root)}", root) for root in self._material.roots
        ]
        for what, certificate in named:
            key = certificate.fingerprint(hashes.SHA256())
            before = self._warned.get(key, math.inf)
            threshold = _threshold(certificate, now)
            if threshold < before:
                found.append(f"{what} {expiry_in_words(certificate, now)}")
            warned[key] = min(before, threshold)
        self._warned = warned
        return found


@lru_cache(maxsize=256)
def _named(certificate: x509.Certificate) -> SpiffeId:
    """The workload that a certificate names. Cached: a proxy sees the same few certificates again
    and again, and parsing is a tenth of Python's time in a handshake. Raises SpiffeIdError.
    """
    return SpiffeId.parse(credentials.spiffe_uri(certificate))


def verify_peer(
    certificate: x509.Certificate | None,
    expected: SpiffeId | None,
    trust_domains: Collection[str],
    now: datetime,
) -> SpiffeId:
    """Check the name in a certificate whose chain is verified. Raises PeerRefused; see
    Identity.verify_peer.
    """
    if certificate is None:
        raise PeerRefused("no_certificate", "the peer presented no certificate")
    try:
        identity = _named(certificate)
    except SpiffeIdError as error:
        raise PeerRefused(
            "no_identity", f"the peer's certificate does not name a workload of the mesh: {error}"
        ) from None
    if identity.trust_domain not in trust_domains:
        ours = " or ".join(sorted(trust_domains))
        raise PeerRefused(
            "trust_domain", f"the peer is {identity}, which is not of the trust domain {ours}"
        )
    problem = credentials.validity_problem(certificate, now)
    if problem is not None:
        reason: RefusalReason = (
            "expired" if now > certificate.not_valid_after_utc else "not_yet_valid"
        )
        raise PeerRefused(reason, f"the certificate of the peer {identity} {problem}")
    if expected is not None and identity != expected:
        raise PeerRefused("wrong_identity", f"the peer is {identity}, but {expected} was expected")
    return identity


def _threshold(certificate: x509.Certificate, now: datetime) -> float:
    """The lowest warning threshold that has been reached; 0.0: expired, infinity: none."""
    left = life_left(certificate, now)
    return (
        0.0
        if left <= 0
        else min((threshold for threshold in WARN_AT if left <= threshold), default=math.inf)
    )
