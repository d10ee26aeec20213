"""A small certificate authority for tests: right certificates, and wrong ones in every relevant
way.

Everything is ECDSA P-256 and made in memory. `Credential.write` writes it to disk for peers that
need files (openssl, ssl)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL, crypto

from proxy.net.tls.handshake import demand_certificate

HOUR = timedelta(hours=1)


def spiffe(
    service_account: str, namespace: str = "default", trust_domain: str = "test.local"
) -> str:
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"


@dataclass(frozen=True)
class Credential:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write NAME.crt and NAME.key; returns their paths."""
        certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
        certificate.write_bytes(self.certificate_pem)
        key.write_bytes(self.key_pem)
        return certificate, key


@dataclass(frozen=True)
class Authority:
    """A trust root. `issue` makes leaves: with a `uri` (None: without any name), and valid from
    `since` to `until` from now."""

    name: str = "test root"
    root: Credential = field(init=False)

    def __post_init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(
            _common_name(self.name), _common_name(self.name), key, (-HOUR, 24 * HOUR)
        )
        builder = builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        builder = builder.add_extension(_usage(sign=True), critical=True)
        object.__setattr__(self, "root", Credential(builder.sign(key, hashes.SHA256()), key))

    def issue(
        self,
        uri: str | None,
        *,
        since: timedelta = -HOUR,
        until: timedelta = HOUR,
        names: tuple[x509.GeneralName, ...] = (),
    ) -> Credential:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(x509.Name([]), self.root.certificate.subject, key, (since, until))
        alternatives = [*([x509.UniformResourceIdentifier(uri)] if uri is not None else []), *names]
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=True
            )
        builder = builder.add_extension(
            x509.BasicConstraints(ca=False, path_length=None), critical=True
        )
        builder = builder.add_extension(_usage(sign=False), critical=True)
        builder = builder.add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        return Credential(builder.sign(self.root.key, hashes.SHA256()), key)


def self_signed(uri: str) -> Credential:
    """A leaf that only itself has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_common_name("nobody"), _common_name("nobody"), key, (-HOUR, HOUR))
    builder = builder.add_extension(
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True
    )
    builder = builder.add_extension(_usage(sign=False), critical=True)
    return Credential(builder.sign(key, hashes.SHA256()), key)


def signed_with_sha1(
    certificate: x509.Certificate, issuer: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """The certificate with a signature that can be forged. cryptography no longer makes such
    signatures."""
    forgeable = crypto.X509.from_cryptography(certificate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        forgeable.sign(crypto.PKey.from_cryptography_key(issuer), "sha1")
    return forgeable.to_cryptography()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    validity: tuple[timedelta, timedelta],
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + validity[0])
        .not_valid_after(now + validity[1])
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign, key_cert_sign=sign, crl_sign=sign, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def context(
    method: int,
    credential: Credential | None,
    roots: tuple[x509.Certificate, ...],
    alpn: tuple[bytes, ...] = (),
) -> SSL.Context:
    """A context such as the mesh uses: TLS 1.3 only, mutual, tickets on. `alpn` is what a server
    accepts, by its own preference."""
    made = SSL.Context(method)
    made.set_min_proto_version(SSL.TLS1_3_VERSION)
    if credential is not None:
        made.use_certificate(credential.certificate)
        made.use_privatekey(credential.key)
    store = made.get_cert_store()
    assert store is not None
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    demand_certificate(made, always=True)
    made.set_session_id(b"test")
    client = method == SSL.TLS_CLIENT_METHOD
    made.set_session_cache_mode(
        SSL.SESS_CACHE_CLIENT | SSL.SESS_CACHE_NO_INTERNAL if client else SSL.SESS_CACHE_OFF
    )
    made.set_mode(SSL.MODE_RELEASE_BUFFERS)
    if method == SSL.TLS_SERVER_METHOD and alpn:
        made.set_alpn_select_callback(
            lambda _, offered: next((p for p in alpn if p in offered), SSL.NO_OVERLAPPING_PROTOCOLS)
        )
    return made
