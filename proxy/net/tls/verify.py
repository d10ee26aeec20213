"""Verifies a peer's certificates during the handshake.

The TLS library verifies the chain, and calls back for each certificate, the authorities first and
the leaf last. When the leaf has passed, the whole chain is checked by the rules that are the same
for both libraries (certificate_rules.py). Then the connection's own `verify` checks names. All of
this happens during the handshake, because only then a refusal reaches the peer as an alert (RFC
8446, section 6.2). After the handshake only a reset is possible.

The reason of a refusal is stored with the connection: as text, or as the exception that `verify`
raised.

A resumed session has no chain, and the library does not call back. The leaf is in the ticket. The
rest of the chain is what was verified with this leaf before, if it is still cached
(`remembered_chain`).
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

from cryptography.x509 import Certificate, load_der_x509_certificate
from OpenSSL import SSL, crypto

from proxy.net.tls.binding import (
    Verification,
    code_in_words,
    set_signature_algorithms,
    set_verification,
    verification_callback,
)
from proxy.net.tls.certificate_rules import UNREADABLE, Alert, Flaw, find_flaw
from proxy.net.tls.openssl_errors import AWS_LC

# Called with the verified chain, the leaf first and the trust root last. Only the leaf: a session
# was resumed whose chain is not cached. Empty: the peer presented no certificate. Raises to refuse
# the peer; the exception may have an attribute `alert` (Alert).
Chain = tuple[Certificate, ...]
Verify = Callable[[Chain], object]

_V = SSL.X509VerificationCodes

_UNTRUSTED = "is not signed by a trust root"
_ISSUER_MISSING = _V.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY
# Errors that the libraries find before our rules are checked: code, message, alert.
_REFUSALS: dict[int, tuple[str, Alert]] = {
    _ISSUER_MISSING: (_UNTRUSTED, "unknown_ca"),
    _V.ERR_UNABLE_TO_GET_ISSUER_CERT: (_UNTRUSTED, "unknown_ca"),
    _V.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: (_UNTRUSTED, "unknown_ca"),
    _V.ERR_SELF_SIGNED_CERT_IN_CHAIN: (
        f"{_UNTRUSTED} (its own root is not trusted here)",
        "unknown_ca",
    ),
    _V.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: (f"{_UNTRUSTED} (it is self-signed)", "unknown_ca"),
    _V.ERR_CERT_CHAIN_TOO_LONG: ("has too long a chain", "unknown_ca"),
    _V.ERR_CERT_SIGNATURE_FAILURE: (
        "carries a signature that is not its issuer's",
        "bad_certificate",
    ),
    _V.ERR_UNABLE_TO_DECRYPT_CERT_SIGNATURE: (
        "carries a signature that is not its issuer's",
        "bad_certificate",
    ),
    _V.ERR_CERT_HAS_EXPIRED: ("has expired (not after {end})", "certificate_expired"),
    _V.ERR_CERT_NOT_YET_VALID: ("is not valid yet (not before {begin})", "certificate_expired"),
}
# Errors that the libraries find in a complete chain. Our rules find most of them too, with a more
# exact message.
_OF_THE_CHAIN: dict[int, tuple[str, Alert]] = {
    _V.ERR_INVALID_CA: ("is signed by a certificate that is not an authority's", "unknown_ca"),
    _V.ERR_INVALID_PURPOSE: ("is not meant for this use", "unsupported_certificate"),
    _V.ERR_PATH_LENGTH_EXCEEDED: ("has a longer chain than its authority allows", "unknown_ca"),
    _V.ERR_PERMITTED_VIOLATION: (
        "names what its authority may not (name constraints)",
        "certificate_unknown",
    ),
    _V.ERR_EXCLUDED_VIOLATION: (
        "names what its authority may not (name constraints)",
        "certificate_unknown",
    ),
    _V.ERR_UNHANDLED_CRITICAL_EXTENSION: (
        "has a critical extension that is not known here",
        "bad_certificate",
    ),
}
_ANY_OTHER: tuple[str, Alert] = ("was refused by the TLS library: {code}", "bad_certificate")

# One code for each alert, from both libraries' tables (ssl_x509err2alert;
# SSL_alert_from_verify_result).
_ALERTS: dict[Alert, int] = {
    "bad_certificate": _V.ERR_CERT_REJECTED,
    "unsupported_certificate": _V.ERR_INVALID_PURPOSE,
    "certificate_expired": _V.ERR_CERT_HAS_EXPIRED,
    "certificate_unknown": _V.ERR_PERMITTED_VIOLATION,
    "unknown_ca": _V.ERR_INVALID_CA,
}

# The signature algorithms of the handshake, which also decide the accepted keys of a leaf. Set here
# because the libraries have different defaults. Those with PKCS #1 are only for signatures in
# certificates (RFC 8446, section 4.2.3).
_SIGNATURES = (
    b"ecdsa_secp256r1_sha256:ecdsa_secp384r1_sha384:ecdsa_secp521r1_sha512:ed25519:rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:"
    b"rsa_pss_rsae_sha512:rsa_pkcs1_sha256:rsa_pkcs1_sha384:rsa_pkcs1_sha512"
)

# The number of chains that are cached for resumed sessions.
_REMEMBERED = 1024
_chains: OrderedDict[bytes, Chain] = OrderedDict()


class VerificationState:
    """The state of a connection's verification: its application data during the handshake."""

    __slots__ = ("chain", "error", "outcome", "refusal", "verify")

    def __init__(self, verify: Verify | None) -> None:
        self.verify = verify
        self.chain: Chain = ()  # verified in this handshake
        self.outcome: object = None  # what `verify` returned
        self.refusal: str | None = None  # why the peer is refused
        self.error: Exception | None = None  # what `verify` raised


def verdict_of(connection: SSL.Connection) -> VerificationState:
    """Return the verdict on the peer of `connection`. Create it if there is none."""
    found = connection.get_app_data()
    if not isinstance(found, VerificationState):
        found = VerificationState(None)
        connection.set_app_data(found)
    return found


def demand_certificate(context: SSL.Context, *, always: bool) -> None:
    """Make a new context verify the peer's certificate by the rules of this module.

    `always`: a server also refuses a peer without a certificate.
    """
    mode = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT if always else SSL.VERIFY_PEER
    set_verification(context, mode, _CALLBACK)
    set_signature_algorithms(context, _SIGNATURES)


def remembered_chain(leaf: bytes) -> Chain:
    """The chain that was last verified with this leaf (DER). Only the leaf if it is not cached."""
    return _chains.get(leaf) or _read(leaf)[1]


def _on_certificate(verification: Verification, accepted: bool) -> int | None:
    verdict = verdict_of(verification.connection)
    refused = _judge(verdict, verification.chain()) if accepted else _explain(verification)
    if refused is None:
        return None
    words, alert = refused
    verdict.refusal = verdict.refusal or words
    return _ALERTS[alert]


_CALLBACK = verification_callback(_on_certificate)


def _judge(verdict: VerificationState, shown: bytes) -> tuple[str, Alert] | None:
    """Check a chain that the library accepts. Return the reason and alert of a refusal, or None."""
    try:
        leaf, chain, flaw = _read(shown)
    except UNREADABLE as error:
        return f"the peer's certificate cannot be parsed: {str(error)[:200]!r}", "bad_certificate"
    if flaw is not None:
        return f"{_owner(flaw.depth)} {flaw.words}", flaw.alert
    if verdict.verify is not None:
        try:
            verdict.outcome = verdict.verify(chain)
        except Exception as error:
            verdict.error = error
            return str(error), getattr(error, "alert", "certificate_unknown")
    verdict.chain = chain
    _chains[leaf] = chain
    _chains.move_to_end(leaf)
    if len(_chains) > _REMEMBERED:
        _chains.popitem(last=False)
    return None


def _explain(verification: Verification) -> tuple[str, Alert]:
    """Describe a refusal of the library: the reason, and the alert for it."""
    code, depth, certificate = verification.code, verification.depth, verification.certificate()
    if AWS_LC and code == _ISSUER_MISSING:  # its only code for a chain that ends too early
        code = _why_too_early(verification.connection, depth, certificate)
    if code not in _REFUSALS:
        try:
            flaw = _read.__wrapped__(verification.chain())[2]  # unverified: not cached
        except UNREADABLE:
            flaw = None
        if flaw is not None:
            return f"{_owner(flaw.depth)} {flaw.words}", flaw.alert
    words, alert = _REFUSALS.get(code) or _OF_THE_CHAIN.get(code) or _ANY_OTHER
    begin = end = ""
    if certificate is not None:
        begin, end = _day(certificate.get_notBefore), _day(certificate.get_notAfter)
    return f"{_owner(depth)} {words.format(begin=begin, end=end, code=code_in_words(code))}", alert


def _why_too_early(connection: SSL.Connection, depth: int, certificate: crypto.X509 | None) -> int:
    if 0 <= connection.get_context().get_verify_depth() <= depth:
        return int(_V.ERR_CERT_CHAIN_TOO_LONG)
    if depth == 0 and certificate is not None and _names_itself(certificate):
        return int(_V.ERR_DEPTH_ZERO_SELF_SIGNED_CERT)
    return int(_ISSUER_MISSING)


def _owner(depth: int) -> str:
    return (
        "the peer's certificate" if depth == 0 else "an authority's certificate in the peer's chain"
    )


@lru_cache(maxsize=256)
def _read(shown: bytes) -> tuple[bytes, Chain, Flaw | None]:
    """Parse concatenated DER certificates into (leaf in DER, chain, violation).

    Cached, because peers are few and connect repeatedly.
    """
    found = []
    while shown:
        size = _size(shown)
        found.append(shown[:size])
        shown = shown[size:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = tuple(load_der_x509_certificate(der) for der in found)
    return found[0], chain, find_flaw(chain)


def _size(der: bytes) -> int:
    """The size of the DER element at the start (X.690, section 8.1.3)."""
    if der[1] < 0x80:
        return 2 + der[1]
    octets = der[1] & 0x7F
    return 2 + octets + int.from_bytes(der[2 : 2 + octets], "big")


def _names_itself(certificate: crypto.X509) -> bool:
    try:
        parsed = certificate.to_cryptography()
        return parsed.issuer == parsed.subject
    except UNREADABLE:
        return False


def _day(when: Callable[[], bytes | None]) -> str:
    """ASN.1 GeneralizedTime `20260131120000Z` as `2026-01-31 12:00:00 UTC`."""
    t = (when() or b"").decode("ascii", "replace")
    return f"{t[:4]}-{t[4:6]}-{t[6:8]} {t[8:10]}:{t[10:12]}:{t[12:14]} UTC"


def chain_end(chain: Chain) -> float:
    """When the first certificate of the chain expires, in seconds since the epoch.

    Infinity for an empty chain.
    """
    return min(
        (certificate.not_valid_after_utc.timestamp() for certificate in chain), default=math.inf
    )
