"""Creates certificates: a trust root, and workload certificates signed by it or by an intermediate.

The control plane certifies the keys of proxies with it (`certify`). `isthmus identity` makes roots,
and certificates with keys for clusters where nothing else issues them; so do the lab and the tests.
The profile is an X.509-SVID (SPIFFE). Our own keys are ECDSA P-256 with SHA-256. The only name is
one URI SAN. The subject is empty, so the SAN is critical (RFC 5280, section 4.1.2.6).

Lifetimes. A workload's certificate lasts hours: its key is stored beside an application and is
never revoked, so it must expire soon. A root lasts ten years: its expiry stops the whole mesh at
once, and replacing it changes every workload. So an operator should plan the replacement (several
roots can be trusted at once) and not be surprised by an expiry. The root's key must be stored away
from the machines that run workloads; that protects it, a shorter lifetime would not.

Clock skew. A certificate's validity starts CLOCK_SKEW before its creation. Otherwise a machine
whose clock is slightly behind would reject it.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy.identity.credentials import spiffe_uri, utc_now, validity_problem, when
from proxy.identity.key_strength import PrivateKey, PublicKey
from proxy.identity.spiffe import SCHEME, SpiffeId, SpiffeIdError, check_trust_domain, split_uri

WORKLOAD_LIFETIME = timedelta(hours=24)
ROOT_LIFETIME = timedelta(days=3650)
# Clocks kept by NTP differ by milliseconds, those of virtual machines after a suspend by seconds.
CLOCK_SKEW = timedelta(seconds=20)
# X.509 ends with the year 9999 (RFC 5280, section 4.1.2.5). A lifetime above a hundred years is
# surely a mistake.
MAX_LIFETIME = timedelta(days=36500)
# A common name has at most 64 characters (RFC 5280, appendix A.1).
_MAX_COMMON_NAME = 64


class IssueError(Exception):
    """A certificate cannot be created as requested; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its private key. `note`: how it differs from the request (a shortened
    lifetime), or "".
    """

    certificate: x509.Certificate
    key: PrivateKey
    note: str = ""

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """Unencrypted PKCS #8. Write it with files.write_private only."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def make_root(
    trust_domain: str,
    lifetime: timedelta = ROOT_LIFETIME,
    *,
    name_constraints: bool = True,
    now: datetime | None = None,
) -> Issued:
    """Create a trust root for a trust domain. Raises SpiffeIdError (trust domain) or IssueError
    (lifetime).

    With `name_constraints` the root is limited to names of this trust domain, and OpenSSL enforces
    that. So the root of one domain can never sign for another domain whose root is also trusted.
    Leave it out only for verifiers that do not support name constraints for URIs.
    """
    check_trust_domain(trust_domain)
    now = now or utc_now()
    _check_lifetime(lifetime)
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # The start of the key identifier distinguishes two roots of one domain where only the name is
    # shown.
    tag = f" root {identifier.digest.hex()[:8]}"
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, trust_domain[: _MAX_COMMON_NAME - len(tag)] + tag)]
    )
    builder = (
        _builder(subject, subject, key.public_key())
        .not_valid_before(_seconds(now - CLOCK_SKEW))
        .not_valid_after(_seconds(now + lifetime))
        # One intermediate CA is allowed between root and workload, so that the root's key can stay
        # offline.
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(f"{SCHEME}{trust_domain}")]
            ),
            critical=False,
        )
    )
    if name_constraints:
        permitted = [x509.UniformResourceIdentifier(trust_domain)]
        builder = builder.add_extension(
            x509.NameConstraints(permitted_subtrees=permitted, excluded_subtrees=None),
            critical=True,
        )
    return Issued(builder.sign(key, hashes.SHA256()), key)


def issue(
    root: Issued,
    identity: SpiffeId,
    lifetime: timedelta = WORKLOAD_LIFETIME,
    *,
    now: datetime | None = None,
) -> Issued:
    """Create a key and a certificate for a workload, signed by the root. The certificate never
    outlives the root; `note` says if it was shortened.

    Raises IssueError if the root is not valid now, belongs to another trust domain, or the lifetime
    is invalid.
    """
    now = now or utc_now()
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(
        root, Subject(identity, key.public_key()), Validity(lifetime, CLOCK_SKEW), now
    )
    end = root.certificate.not_valid_after_utc
    note = f"the lifetime was shortened: the root expires on {when(end)}"
    return Issued(certificate, key, note if now + lifetime > end else "")


@dataclass(frozen=True, slots=True)
class Subject:
    """What a certificate is about: a workload and its public key."""

    identity: SpiffeId
    key: PublicKey


@dataclass(frozen=True, slots=True)
class Validity:
    """When a new certificate is valid: from `skew` before now until `lifetime` after now."""

    lifetime: timedelta
    skew: timedelta


def certify(
    issuer: Issued, subject: Subject, validity: Validity, now: datetime
) -> x509.Certificate:
    """Create a certificate for a workload's key, signed by the issuer: a root or an intermediate.
    It is never valid when the issuer is not.

    Raises IssueError if the issuer is not valid now, belongs to another trust domain, or the
    lifetime is invalid.
    """
    _check_lifetime(validity.lifetime)
    authority, identity = issuer.certificate, subject.identity
    problem = validity_problem(authority, now)
    if problem is not None:
        raise IssueError(f"the root {problem}")
    domain = root_trust_domain(authority)
    if domain is not None and domain != identity.trust_domain:
        raise IssueError(
            f"the root is for the trust domain {domain}, it cannot sign for {identity}"
        )
    begin = max(_seconds(now - validity.skew), authority.not_valid_before_utc)
    end = min(_seconds(now + validity.lifetime), authority.not_valid_after_utc)
    return (
        _builder(x509.Name([]), authority.subject, subject.key)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(subject.key), critical=False)
        .add_extension(_authority_identifier(authority), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]),
            critical=True,
        )
        .sign(
            issuer.key,
            None if isinstance(issuer.key, ed25519.Ed25519PrivateKey) else hashes.SHA256(),
        )
    )


def root_trust_domain(root: x509.Certificate) -> str | None:
    """The trust domain that a root names (a SPIFFE URI without a path in its SAN), or None."""
    try:
        trust_domain, path = split_uri(spiffe_uri(root))
    except SpiffeIdError:
        return None
    return trust_domain if not path else None


def _builder(subject: x509.Name, issuer: x509.Name, key: PublicKey) -> x509.CertificateBuilder:
    # 159 random bits, positive, at most 20 octets (RFC 5280, section 4.1.2.2): serial numbers do
    # not repeat.
    serial = x509.random_serial_number()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
    )


def _check_lifetime(lifetime: timedelta) -> None:
    if lifetime < timedelta(seconds=1):
        raise IssueError(
            f"a lifetime of {lifetime.total_seconds():g} seconds is invalid: it must be positive"
        )
    if lifetime > MAX_LIFETIME:
        raise IssueError(
            f"a lifetime of {lifetime.days} days is more than {MAX_LIFETIME.days // 365} years"
        )


def _seconds(moment: datetime) -> datetime:
    """Truncate to whole seconds, the resolution of certificates (RFC 5280, section 4.1.2.5.1)."""
    return moment.replace(microsecond=0)


def _authority_identifier(root: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        own = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier(
            x509.SubjectKeyIdentifier.from_public_key(root.public_key()).digest, None, None
        )
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    """A CA signs certificates, a workload signs handshakes. No other use of the key is allowed."""
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
