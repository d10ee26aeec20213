"""The verdict on a peer's certificates, while the handshake runs.

The library below verifies the chain, and calls back for each certificate of it, the authorities first. Here its reason for a refusal is
put into words, and kept with the connection; and what it would let pass is refused too: keys and signatures that can be forged. OpenSSL has
a security level for those. AWS-LC has none, and takes RSA keys of 1024 bits, and SHA-1, from anybody whom an authority has given them. (The
peer then hears of an `internal error`: what a callback refuses by itself has no alert of its own.)

Nobody is asked when a session is resumed: what it began with has been verified then.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519
from cryptography.x509 import InvalidVersion
from OpenSSL import SSL, crypto

from proxy.net.tls_errors import AWS_LC

_V = SSL.X509VerificationCodes
_REFUSALS = {
    _V.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: "is not signed by a trust root",
    _V.ERR_UNABLE_TO_GET_ISSUER_CERT: "is not signed by a trust root",
    _V.ERR_SELF_SIGNED_CERT_IN_CHAIN: "is not signed by a trust root (its own root is not trusted here)",
    _V.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: "is not signed by a trust root (it is self-signed)",
    _V.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: "is not signed by a trust root",
    _V.ERR_CERT_SIGNATURE_FAILURE: "carries a signature that is not its issuer's",
    _V.ERR_CERT_CHAIN_TOO_LONG: "has too long a chain",
    _V.ERR_INVALID_CA: "is signed by a certificate that is not an authority's",
    _V.ERR_INVALID_PURPOSE: "is not meant for this use (extended key usage)",
    _V.ERR_PATH_LENGTH_EXCEEDED: "has a longer chain than its authority allows",
    _V.ERR_PERMITTED_VIOLATION: "names what its authority may not (name constraints)",
    _V.ERR_EXCLUDED_VIOLATION: "names what its authority may not (name constraints)",
    _V.ERR_UNHANDLED_CRITICAL_EXTENSION: "has a critical extension that is not known here",
}
_KEY, _SIGNATURE = "has a key that is too weak", "is signed with an algorithm that is too weak"
if not AWS_LC:  # X509_V_ERR_EE_KEY_TOO_SMALL, CA_KEY_TOO_SMALL, CA_MD_TOO_WEAK: pyOpenSSL has no names for them
    _REFUSALS |= {66: _KEY, 67: _KEY, 68: _SIGNATURE}

# What OpenSSL demands at its security level 2, 112 bits: of elliptic curves these many, of RSA, however it is written, those.
_CURVE, _FACTORS = 224, 2048
_EC = 408  # NID_X9_62_id_ecPublicKey: pyOpenSSL has no name for it
_PSS = b"rsassaPss"  # the hash is among its parameters
_STRONG = frozenset({
    b"ecdsa-with-SHA224", b"ecdsa-with-SHA256", b"ecdsa-with-SHA384", b"ecdsa-with-SHA512", b"ED25519",
    b"sha224WithRSAEncryption", b"sha256WithRSAEncryption", b"sha384WithRSAEncryption", b"sha512WithRSAEncryption",
    b"MLDSA44", b"MLDSA65", b"MLDSA87",
})  # fmt: skip
_BROKEN = (hashes.MD5, hashes.SHA1)

# Kinds of keys that come in good sizes only.
_OTHERS = (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)

_UNREADABLE = (crypto.Error, ValueError, InvalidVersion, UnsupportedAlgorithm)


def note_verdict(connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, accepted: int) -> bool:
    """The verification callback: agrees with a refusal, adds its own (see above), and keeps the first reason with the connection, as
    text; otherwise the peer's own certificate."""
    words = None if accepted else _refusal(connection, certificate, code, depth)
    if AWS_LC and words is None:
        words = weakness(certificate)
    if words is not None:
        if not isinstance(connection.get_app_data(), str):
            owner = "the peer's certificate" if depth == 0 else "an authority's certificate in the peer's chain"
            connection.set_app_data(f"{owner} {words}")
        return False
    if depth == 0:
        connection.set_app_data(certificate)
    return True


def take_verified(connection: SSL.Connection) -> crypto.X509 | None:
    """The certificate that the peer has shown in this very handshake, and that was found good; once. None: it has shown none, or a session
    was resumed, which has its own."""
    certificate: crypto.X509 | None = connection.get_app_data()
    connection.set_app_data(None)
    return certificate


def weakness(certificate: crypto.X509) -> str | None:
    """What can be forged of a certificate, in words that follow "the certificate ...": its key, or its issuer's signature."""
    try:
        key = certificate.get_pubkey()
        if key.bits() < (_CURVE if key.type() == _EC else _FACTORS) and not isinstance(certificate.to_cryptography().public_key(), _OTHERS):
            return f"{_KEY} ({key.bits()} bits)"
        algorithm = certificate.get_signature_algorithm()
        if algorithm in _STRONG or (algorithm == _PSS and not isinstance(certificate.to_cryptography().signature_hash_algorithm, _BROKEN)):
            return None
    except _UNREADABLE:
        return "has a key, or a signature, of a kind that is not known here"
    return f"{_SIGNATURE} ({algorithm.decode('ascii', 'replace')})"


def _refusal(connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int) -> str:
    if code == _V.ERR_CERT_HAS_EXPIRED:
        return f"has expired (not after {_day(certificate.get_notAfter)})"
    if code == _V.ERR_CERT_NOT_YET_VALID:
        return f"is not valid yet (not before {_day(certificate.get_notBefore)})"
    if AWS_LC and code == _V.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:  # its one reason for all that ends a chain too early
        if 0 <= connection.get_context().get_verify_depth() <= depth:
            code = _V.ERR_CERT_CHAIN_TOO_LONG
        elif depth == 0 and _names_itself(certificate):
            code = _V.ERR_DEPTH_ZERO_SELF_SIGNED_CERT
    return _REFUSALS.get(code) or f"was refused (X.509 verification error {code})"


def _names_itself(certificate: crypto.X509) -> bool:
    try:
        parsed = certificate.to_cryptography()
        return parsed.issuer == parsed.subject
    except _UNREADABLE:
        return False


def _day(when: Callable[[], bytes | None]) -> str:
    """ASN.1 GeneralizedTime `20260131120000Z` as `2026-01-31 12:00:00 UTC`."""
    t = (when() or b"").decode("ascii", "replace")
    return f"{t[:4]}-{t[4:6]}-{t[6:8]} {t[8:10]}:{t[10:12]}:{t[12:14]} UTC"
