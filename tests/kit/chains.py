"""Chains of certificates with one thing wrong: a profile for each certificate, and the certificates
built from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import crypto

from tests.kit.certs import signed_with_sha1

HOUR = timedelta(hours=1)
URI = "spiffe://mesh.test/ns/shop/sa/peer"
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
    "encipher_only", "decipher_only",
)  # fmt: skip


@lru_cache
def key_of(kind: str) -> Any:
    """A key by its name. One for each name, because RSA keys take long."""
    kind = kind.partition(" ")[0]
    if kind.startswith("RSA"):
        return rsa.generate_private_key(65537, int(kind[3:]))
    if kind in ("Ed25519", "Ed448"):
        return (
            ed25519.Ed25519PrivateKey if kind == "Ed25519" else ed448.Ed448PrivateKey
        ).generate()
    return ec.generate_private_key(getattr(ec, kind)())


@dataclass(frozen=True)
class Profile:
    """The contents of a certificate. An authority has `ca`; None: no basic constraints."""

    name: str = ""  # the common name
    key: str = "SECP256R1"
    ca: bool | None = False
    path_length: int | None = None
    constraints_critical: bool = True
    usage: frozenset[str] | None = frozenset({"digital_signature"})
    usage_critical: bool = True
    extended: tuple[x509.ObjectIdentifier, ...] | None = BOTH
    names: tuple[x509.GeneralName, ...] = (x509.UniformResourceIdentifier(URI),)
    since: timedelta = -HOUR
    until: timedelta = HOUR
    digest: str = "SHA256"
    permitted: tuple[x509.GeneralName, ...] = ()
    excluded: tuple[x509.GeneralName, ...] = ()
    extra: tuple[tuple[str, bool, bytes], ...] = ()  # extensions: number, critical, value
    forged: bool = False  # signed by a key that is not the issuer's
    bad: bytes = field(default=b"")  # bytes of the certificate that are replaced
    by: bytes = field(default=b"")


def authority(name: str, **changes: Any) -> Profile:
    """A profile of a certificate authority."""
    usual = Profile(
        name=name,
        key=f"SECP256R1 {name}",
        ca=True,
        usage=frozenset({"key_cert_sign", "crl_sign"}),
        extended=None,
        names=(),
    )
    return replace(usual, **changes)


@dataclass(frozen=True)
class Made:
    certificate: x509.Certificate
    key: Any

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        coding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return bytes(self.key.private_bytes(coding, form, serialization.NoEncryption()))


def make(profiles: Sequence[Profile]) -> list[Made]:
    """The chain of these profiles, the root first, each signed by the one before it."""
    made: list[Made] = []
    for profile in profiles:
        made.append(_make(profile, made[-1] if made else None))
    return made


def _make(profile: Profile, issuer: Made | None) -> Made:
    key = key_of(profile.key)
    now = datetime.now(UTC)
    subject = x509.Name(
        [x509.NameAttribute(x509.NameOID.COMMON_NAME, profile.name)] if profile.name else []
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
    )
    builder = builder.issuer_name(issuer.certificate.subject if issuer is not None else subject)
    builder = builder.not_valid_before(now + profile.since).not_valid_after(now + profile.until)
    for extension, critical in _extensions(profile):
        builder = builder.add_extension(extension, critical=critical)
    signing = (
        key_of("SECP256R1 forger") if profile.forged else issuer.key if issuer is not None else key
    )
    pure = isinstance(signing, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    certificate = builder.sign(
        signing,
        (
            None
            if pure
            else hashes.SHA256()
            if profile.digest == "SHA1"
            else getattr(hashes, profile.digest)()
        ),
    )
    if profile.digest == "SHA1":
        certificate = signed_with_sha1(certificate, signing)
    if profile.bad:
        certificate = _altered(certificate, signing, profile)
    return Made(certificate, key)


def _altered(
    certificate: x509.Certificate, signing: ec.EllipticCurvePrivateKey, profile: Profile
) -> x509.Certificate:
    """The same with other bytes in it, and a valid signature of them."""
    body = certificate.tbs_certificate_bytes
    assert profile.bad in body
    assert len(profile.bad) == len(profile.by)
    body = body.replace(profile.bad, profile.by, 1)
    signature = signing.sign(body, ec.ECDSA(hashes.SHA256()))
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")
    return x509.load_der_x509_certificate(
        _tlv(0x30, body + algorithm + _tlv(0x03, b"\0" + signature))
    )


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    length = bytes([size]) if size < 128 else bytes([0x82, size >> 8, size & 255])
    return bytes([tag]) + length + value


def _extensions(profile: Profile) -> list[tuple[x509.ExtensionType, bool]]:
    found: list[tuple[x509.ExtensionType, bool]] = []
    if profile.ca is not None:
        found.append(
            (x509.BasicConstraints(profile.ca, profile.path_length), profile.constraints_critical)
        )
    if profile.usage is not None:
        found.append(
            (
                x509.KeyUsage(**{name: name in profile.usage for name in _USAGES}),
                profile.usage_critical,
            )
        )
    if profile.extended is not None:
        found.append((x509.ExtendedKeyUsage(profile.extended), False))
    if profile.names:
        found.append((x509.SubjectAlternativeName(profile.names), not profile.name))
    if profile.permitted or profile.excluded:
        found.append(
            (x509.NameConstraints(profile.permitted or None, profile.excluded or None), True)
        )
    found += [
        (x509.UnrecognizedExtension(x509.ObjectIdentifier(number), value), critical)
        for number, critical, value in profile.extra
    ]
    return found


def as_openssl(certificate: x509.Certificate) -> crypto.X509:
    return crypto.X509.from_cryptography(certificate)
