"""The rules for certificate chains, independent of the TLS library that has verified the chain.

OpenSSL and AWS-LC both verify signatures, build the path to a trust root, and check the time. They
differ in other checks: key usage of a server's certificate, path length of the root, accepted keys,
signatures and curves, policies. This module checks all of these again, so that both libraries give
the same verdict. The stricter side wins: a refusal of the library stands, and `find_flaw` refuses
more.

The rules are those of X.509-SVID (SPIFFE) sections 4 and 5.2 for the leaf, and of RFC 5280 section
6.1 for its authorities:

- A leaf is not an authority: no CA flag, neither keyCertSign nor cRLSign. It has a critical key
  usage with digitalSignature. Extended key usage, if present, has both serverAuth and clientAuth,
  because a sidecar is both.
- An authority has the CA flag, and keyCertSign if it has a key usage. Path lengths are enforced,
  including the root's. Its name constraints apply to the URIs and DNS names of the leaf. A
  constraint on another kind of name refuses names of this kind.
- A critical extension must be one of those that are checked here. Extensions that only one of the
  libraries enforces (policies, proxy certificates) are refused.
- Keys and signatures have at least 112 bits of security, and both libraries support them.

The caller checks the identity of the peer and the validity period.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import (
    ExtendedKeyUsageOID,
    ExtensionOID,
    ObjectIdentifier,
    SignatureAlgorithmOID,
)

# The alert for the refused side (RFC 8446, section 6.2).
Alert = Literal[
    "bad_certificate",
    "unsupported_certificate",
    "certificate_expired",
    "certificate_unknown",
    "unknown_ca",
]

# The exceptions that parsing a malformed certificate raises. Most parts are parsed on access and
# converted to objects whose constructors may raise anything; the library documents only a few.
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

MIN_RSA_BITS = 2048
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_HASHES = (hashes.SHA224, hashes.SHA256, hashes.SHA384, hashes.SHA512)
# Authorities between the leaf and its trust root. A mesh has none or one. A longer chain is a
# mistake, or an attempt to cause work.
MAX_INTERMEDIATES = 3

# Extensions that are checked here, so they may be critical.
_READ = frozenset({
    ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME, ExtensionOID.NAME_CONSTRAINTS,
})  # fmt: skip
# Extensions that only one library enforces, whether they are critical or not.
_DIVISIVE = {
    ExtensionOID.POLICY_CONSTRAINTS: "policy constraints",
    ExtensionOID.POLICY_MAPPINGS: "policy mappings",
    ExtensionOID.INHIBIT_ANY_POLICY: "inhibit anyPolicy",
    ObjectIdentifier("1.3.6.1.5.5.7.1.14"): "proxy certificate",
    ObjectIdentifier("2.16.840.1.113730.1.1"): "Netscape certificate type",
}
_BOTH_ROLES = (
    (ExtendedKeyUsageOID.SERVER_AUTH, "servers"),
    (ExtendedKeyUsageOID.CLIENT_AUTH, "clients"),
)

_UNSIGNED = "is not signed by a trust root"  # about the certificate below the checked one

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Flaw:
    """Why a chain is refused. `depth`: of the certificate; 0 is the leaf.

    `words` continue a sentence "the certificate ...".
    """

    depth: int
    words: str
    alert: Alert = "bad_certificate"


def find_flaw(chain: Sequence[x509.Certificate]) -> Flaw | None:
    """Return the first violation in a verified chain, or None. Never raises.

    `chain`: the leaf first, the trust root last. It may be the leaf only. A certificate that cannot
    be parsed is a violation.
    """
    if len(chain) - 2 > MAX_INTERMEDIATES:
        return Flaw(0, "has too long a chain", "unknown_ca")
    for depth, certificate in enumerate(chain):
        anchor = depth > 0 and depth == len(chain) - 1
        flaw = certificate_flaw(certificate, depth, anchor=anchor)
        if flaw is None and depth:
            flaw = _path_flaw(chain, depth)
        if flaw is not None:
            return flaw
    return None


def certificate_flaw(
    certificate: x509.Certificate, depth: int, *, anchor: bool = False
) -> Flaw | None:
    """Return the violation of one certificate by itself: a leaf at depth 0, an authority above.

    The signature of an `anchor` proves nothing, so its algorithm is not checked.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deviations that the parser will reject in the future
        try:
            words = strength_flaw(certificate, anchor=anchor)
            if words is None:
                words = _extensions_flaw(certificate) or (
                    _authority_flaw(certificate) if depth else _leaf_flaw(certificate)
                )
        except UNREADABLE as error:
            return Flaw(depth, f"cannot be parsed: {_visible(str(error))[:200]}")
    if words is None:
        return None
    return Flaw(
        depth - 1 if words.startswith(_UNSIGNED) else depth,
        words,
        "unknown_ca" if depth else "bad_certificate",
    )


def strength_flaw(certificate: x509.Certificate, *, anchor: bool = False) -> str | None:
    """Describe a weak key, or a weak algorithm of the issuer's signature. None: no violation.

    Raises the exceptions in UNREADABLE.
    """
    words = key_flaw(certificate.public_key())
    if words is not None:
        return f"has {words}"
    return None if anchor else signature_flaw(certificate)


def key_flaw(key: CertificatePublicKeyTypes) -> str | None:
    """Describe an unaccepted kind or strength of a public key as "a key ...". None: accepted."""
    match key:
        case ec.EllipticCurvePublicKey():
            if not isinstance(key.curve, CURVES):
                return (
                    f"a key on the curve {key.curve.name}, which is not one of P-256, P-384 and"
                    " P-521"
                )
            return None
        case rsa.RSAPublicKey():
            return (
                None
                if key.key_size >= MIN_RSA_BITS
                else f"a key that is too weak (RSA with {key.key_size} bits, not {MIN_RSA_BITS})"
            )
        case ed25519.Ed25519PublicKey():
            return None
        case _:
            return f"a key of a kind that is not accepted here ({type(key).__name__})"


def signature_flaw(certificate: x509.Certificate) -> str | None:
    """Describe an unaccepted algorithm of the issuer's signature. None: accepted."""
    if certificate.signature_algorithm_oid == SignatureAlgorithmOID.ED25519:
        return None
    try:
        algorithm = certificate.signature_hash_algorithm
    except UNREADABLE:
        return (
            "is signed with an algorithm that is not known here"
            f" ({certificate.signature_algorithm_oid.dotted_string})"
        )
    if isinstance(algorithm, _HASHES):
        return None
    name = (
        algorithm.name
        if algorithm is not None
        else certificate.signature_algorithm_oid.dotted_string
    )
    return f"is signed with an algorithm that is too weak, or not known here ({name})"


def _extensions_flaw(certificate: x509.Certificate) -> str | None:
    for extension in certificate.extensions:
        if extension.oid in _DIVISIVE:
            return f"has an extension that is not accepted here ({_DIVISIVE[extension.oid]})"
        if extension.critical and extension.oid not in _READ:
            return (
                f"has a critical extension that is not known here ({extension.oid.dotted_string})"
            )
    return None


def _leaf_flaw(leaf: x509.Certificate) -> str | None:
    usage, critical = _extension(leaf, x509.KeyUsage)
    if usage is not None and not usage.digital_signature:
        # AWS-LC checks this before it calls back: openssl_errors.py has the same message.
        return "is not meant for this use (key usage)"
    constraints, _ = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        return "is an authority's (CA), not a workload's"
    if usage is None:
        return "does not say what its key is for (key usage)"
    if usage.key_cert_sign or usage.crl_sign:
        return "may sign certificates or revocation lists (key usage), which a workload's may not"
    if not critical:
        return "has a key usage that is not critical"
    return _roles_flaw(leaf)


def _authority_flaw(authority: x509.Certificate) -> str | None:
    usage, _ = _extension(authority, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        # For AWS-LC such a certificate is not an issuer, so the chain ends below it, and it can
        # only report "not signed by a trust root".
        return f"{_UNSIGNED}, but by one that may not sign certificates (key usage)"
    constraints, _ = _extension(authority, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        return "is not an authority's, and has signed one"
    return _roles_flaw(authority)


def _roles_flaw(certificate: x509.Certificate) -> str | None:
    extended, _ = _extension(certificate, x509.ExtendedKeyUsage)
    if extended is None:
        return None
    missing = [who for oid, who in _BOTH_ROLES if oid not in extended]
    return f"is not meant for TLS {' and '.join(missing)} (extended key usage)" if missing else None


def _path_flaw(chain: Sequence[x509.Certificate], depth: int) -> Flaw | None:
    """Check the path length and the name constraints of the authority at `depth`."""
    authority = chain[depth]
    constraints, _ = _extension(authority, x509.BasicConstraints)
    if constraints is not None and constraints.path_length is not None:
        # RFC 5280, section 4.2.1.9: certificates that are not self-issued, without the leaf.
        below = sum(
            1 for certificate in chain[1:depth] if certificate.subject != certificate.issuer
        )
        if below > constraints.path_length:
            return Flaw(0, "has a longer chain than its authority allows", "unknown_ca")
    limits, _ = _extension(authority, x509.NameConstraints)
    if limits is not None and (words := _names_flaw(chain[0], limits)) is not None:
        return Flaw(0, words, "certificate_unknown")
    return None


_OUTSIDE = "names what its authority may not (name constraints)"


def _names_flaw(leaf: x509.Certificate, limits: x509.NameConstraints) -> str | None:
    """Check the names of a leaf by RFC 5280, section 4.2.1.10."""
    names, _ = _extension(leaf, x509.SubjectAlternativeName)
    permitted, excluded = (
        list(limits.permitted_subtrees or ()),
        list(limits.excluded_subtrees or ()),
    )
    found: list[x509.GeneralName] = list(names or ())
    if list(leaf.subject):
        found.append(x509.DirectoryName(leaf.subject))
    for name in found:
        kind = type(name)
        allowing = [limit for limit in permitted if isinstance(limit, kind)]
        forbidding = [limit for limit in excluded if isinstance(limit, kind)]
        if not allowing and not forbidding:
            continue
        if not isinstance(name, x509.UniformResourceIdentifier | x509.DNSName):
            return (
                f"has a name of a kind ({kind.__name__}) for which name constraints are not"
                " supported"
            )
        if allowing and not _within(name, allowing):
            return _OUTSIDE
        if _within(name, forbidding):
            return _OUTSIDE
    return None


def _within(
    name: x509.UniformResourceIdentifier | x509.DNSName, limits: Iterable[x509.GeneralName]
) -> bool:
    if isinstance(name, x509.UniformResourceIdentifier):
        host = _host(name.value)
        return any(
            _uri_host_within(host, limit.value)
            for limit in limits
            if isinstance(limit, x509.UniformResourceIdentifier)
        )
    text = name.value.lower()
    return any(
        _domain_within(text, limit.value.lower())
        for limit in limits
        if isinstance(limit, x509.DNSName)
    )


def _host(uri: str) -> str:
    authority = uri.partition("://")[2].partition("/")[0].partition("?")[0].partition("#")[0]
    return authority.rpartition("@")[2].partition(":")[0].lower()


def _uri_host_within(host: str, limit: str) -> bool:
    """Whether a host is within a limit. A limit with a leading dot covers the names below it."""
    limit = limit.lower()
    return bool(host) and (
        host.endswith(limit) and len(host) > len(limit) if limit.startswith(".") else host == limit
    )


def _domain_within(name: str, limit: str) -> bool:
    return not limit or name == limit or name.endswith("." + limit.removeprefix("."))


def _extension(
    certificate: x509.Certificate, kind: type[_Extension]
) -> tuple[_Extension | None, bool]:
    """Return an extension, and whether it is critical."""
    try:
        found = certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None, False
    return found.value, found.critical


def _visible(text: str) -> str:
    """Escape line breaks and control characters for terminals."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )
