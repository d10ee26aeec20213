"""Certificate signing requests (PKCS #10, RFC 2986): how a proxy makes one, and what is accepted.

A request proves that its sender has the private key, and nothing else. Who the sender is comes from
elsewhere (a service account token). So the request may only repeat that identity: exactly one name,
a URI, and nothing else that could end up in a certificate. The profile of the certificate is the
issuer's own (issue.py); a request that asks for more is refused, so that a sender learns that it
does not get it.
"""

from __future__ import annotations

import warnings
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

from proxy.identity.credentials import visible
from proxy.identity.key_strength import PrivateKey, PublicKey
from proxy.identity.spiffe import SpiffeId, SpiffeIdError
from proxy.net.tls.certificate_rules import UNREADABLE, key_flaw

__all__ = ["Flaw", "RequestRefused", "check_request", "make_key", "make_request"]

# A request with the longest name and an RSA key of 8192 bits has about 4 KiB.
MAX_BYTES = 16 * 1024
# Larger keys are slow to verify, for each peer in each handshake.
MAX_RSA_BITS = 8192
# RFC 2985, section 5.4.2: the attribute that has the extensions.
_EXTENSIONS = ObjectIdentifier("1.2.840.113549.1.9.14")
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)

Flaw = Literal["malformed", "signature", "key", "names", "extensions", "identity"]


class RequestRefused(Exception):
    """A request is not accepted. `flaw` is a label for metrics."""

    def __init__(self, flaw: Flaw, words: str) -> None:
        super().__init__(words)
        self.flaw: Flaw = flaw


def make_key() -> ec.EllipticCurvePrivateKey:
    """Create a private key of the recommended kind: ECDSA P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def make_request(key: PrivateKey, identity: SpiffeId) -> bytes:
    """A request for a certificate of `identity`, in PEM."""
    name = x509.UniformResourceIdentifier(str(identity))
    algorithm = (
        hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) else None
    )
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([name]), critical=True)
        .sign(key, algorithm)
        .public_bytes(serialization.Encoding.PEM)
    )


def check_request(data: bytes, permitted: SpiffeId) -> PublicKey:
    """The public key of a request in PEM, if the request is for `permitted` and for nothing else.
    Raises RequestRefused.
    """
    if len(data) > MAX_BYTES:
        raise RequestRefused("malformed", f"the request is larger than {MAX_BYTES} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deviations that the parser will reject in the future
        try:
            request = x509.load_pem_x509_csr(data)
            key = _check_key(request)
            _check_signature(request)
            _check_attributes(request)
            names = _names(request)
        except UNREADABLE as error:
            words = f"the request cannot be parsed: {visible(str(error))[:200]}"
            raise RequestRefused("malformed", words) from None
    if len(names) != 1:
        words = f"the request must have exactly one name, a URI; it has {len(names)}"
        raise RequestRefused("names", words)
    try:
        asked = SpiffeId.parse(names[0])
    except SpiffeIdError as error:
        raise RequestRefused("names", str(error)) from None
    if asked != permitted:
        raise RequestRefused(
            "identity", f"the request is for {asked}, but its sender is {permitted}"
        )
    return key


def _check_key(request: x509.CertificateSigningRequest) -> PublicKey:
    key = request.public_key()
    words = key_flaw(key)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size > MAX_RSA_BITS:
        words = f"a key that is too large (RSA with {key.key_size} bits, more than {MAX_RSA_BITS})"
    if words is not None or not isinstance(key, PublicKey):
        raise RequestRefused("key", f"the request has {words}")
    return key


def _check_signature(request: x509.CertificateSigningRequest) -> None:
    """Check that the sender has the private key."""
    algorithm = request.signature_hash_algorithm
    if algorithm is not None and not isinstance(algorithm, _HASHES):
        words = f"the request is signed with {algorithm.name}, which is not accepted"
        raise RequestRefused("signature", words)
    if not request.is_signature_valid:
        raise RequestRefused("signature", "the signature of the request is not that of its key")


def _check_attributes(request: x509.CertificateSigningRequest) -> None:
    """Check that the request has nothing besides one list of extensions."""
    kinds = [attribute.oid for attribute in request.attributes]
    if any(kind != _EXTENSIONS for kind in kinds) or len(kinds) > 1:
        found = ", ".join(kind.dotted_string for kind in kinds)
        raise RequestRefused("extensions", f"the request has unknown attributes: {found}")


def _names(request: x509.CertificateSigningRequest) -> list[str]:
    """All URIs among the names. Raises RequestRefused for another kind of name, and for extensions
    that are not names.
    """
    if subject := list(request.subject):
        kind = "a common name" if subject[0].oid == NameOID.COMMON_NAME else "a subject"
        raise RequestRefused("names", f"the request has {kind}; only one URI is accepted")
    found: list[str] = []
    for extension in request.extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            raise RequestRefused("extensions", "the request asks for a CA certificate")
        if not isinstance(value, x509.SubjectAlternativeName):
            words = f"the request asks for the extension {extension.oid.dotted_string}"
            raise RequestRefused("extensions", words)
        for name in value:
            if not isinstance(name, x509.UniformResourceIdentifier):
                kind = type(name).__name__
                raise RequestRefused("names", f"the request has a name of the kind {kind}")
            found.append(name.value)
    return found
