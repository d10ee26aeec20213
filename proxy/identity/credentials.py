"""The files of an identity: certificate chain, private key and trust roots, read and checked
together.

The set is accepted or rejected as a whole. A missing key, the key of an older certificate, a
certificate that our own roots do not verify: OpenSSL would load each of them without an error, and
then every handshake would fail for a reason that only the peer sees. So everything that a peer will
check is checked here first, with the same code (the library's chain verification, and
proxy/net/tls/certificate_rules.py). The error names the file and the fix.

Files can change while they are read. In Kubernetes a mounted volume is a directory of symbolic
links into `..data`, which is swapped atomically; elsewhere files are replaced one after the other.
In both cases a reader may see the new certificate and the old key. Such a set is rejected; the next
check finds a consistent one. A file that is being written may also look valid but short: a bundle
without its last roots. So a change is used only when two reads agree, and a file that ends inside a
certificate is rejected.
"""

import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from OpenSSL import SSL, crypto

from proxy.identity.credential_files import (
    Contents,
    MaterialError,
    Origin,
)
from proxy.identity.key_strength import PrivateKey
from proxy.identity.spiffe import SpiffeId, SpiffeIdError
from proxy.net.tls.certificate_rules import (
    UNREADABLE,
    certificate_flaw,
    find_flaw,
    key_flaw,
    strength_flaw,
)
from proxy.net.tls.openssl_errors import reasons

# RFC 7468 §3
_BOUNDARY = re.compile(rb"-----(BEGIN|END) [A-Z0-9 ]+-----")


@dataclass(frozen=True, slots=True)
class Material:
    """A complete, consistent and currently valid set. `warnings`: problems that do not prevent its
    use.
    """

    id: SpiffeId
    leaf: x509.Certificate
    intermediates: tuple[x509.Certificate, ...]
    key: PrivateKey
    roots: tuple[x509.Certificate, ...]
    warnings: tuple[str, ...]
    # in the order of verification: the leaf first, the trust root last
    chain: tuple[x509.Certificate, ...]


def utc_now() -> datetime:
    """The wall clock in UTC. In the proxy, only certificates depend on wall-clock time."""
    return datetime.now(UTC)


def load(contents: Contents, now: datetime) -> Material:
    """Parse the contents and check everything that a peer would check. Raises MaterialError with
    file and reason.
    """
    files = contents.files
    leaf, *others = parse_certificates(files.certificate, contents.parts[0])
    key = parse_key(files.key, contents.parts[1])
    roots = parse_roots(files.roots, contents.parts[2:], now)
    if key.public_key() != public_key(files.certificate, leaf):
        raise MaterialError(
            files.key,
            f"does not belong to the certificate in {files.certificate}: both must be replaced"
            " together",
        )
    identity = _check_leaf(files.certificate, leaf, now)
    intermediates = tuple(certificate for certificate in others if certificate not in roots)
    for certificate in intermediates:
        check_validity(files.certificate, certificate, now, "the intermediate certificate")
        weakness = _weakness(files.certificate, certificate)
        if weakness is not None:
            raise MaterialError(
                files.certificate,
                f"holds a weak intermediate certificate ({name_of(certificate)}): it {weakness}",
            )
    try:
        chain = verify_chain(leaf, intermediates, roots, now)
    except ValueError as error:
        names = ", ".join(str(path) for path in files.roots)
        raise MaterialError(
            files.certificate, f"is not signed by the trust roots in {names}: {error}"
        ) from None
    flaw = find_flaw(chain)
    if flaw is not None:
        what = (
            "the certificate"
            if not flaw.depth
            else f"the certificate of its authority {name_of(chain[flaw.depth])}"
        )
        raise MaterialError(
            files.certificate, f"would be rejected by every peer: {what} {flaw.words}"
        )
    return Material(
        identity, leaf, intermediates, key, roots, _warnings(contents, roots, now), chain
    )


def parse_certificates(path: Origin, data: bytes) -> list[x509.Certificate]:
    """All certificates of a PEM file, at least one, each well-formed. Raises MaterialError."""
    if b"-----BEGIN CERTIFICATE-----" not in data:
        what = (
            "is empty"
            if not data.strip()
            else "holds no PEM certificate (no line '-----BEGIN CERTIFICATE-----')"
        )
        raise MaterialError(path, what)
    *_, last = _BOUNDARY.finditer(data)
    if last[1] != b"END" or b"-----" in data[last.end() :]:
        raise MaterialError(path, "ends inside a PEM block: it is incomplete or truncated")
    # The library warns of flaws that it will reject in the future, such as serial number zero.
    # Ignore these.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = x509.load_pem_x509_certificates(data)
        except UNREADABLE as error:
            raise MaterialError(
                path, f"holds a certificate that cannot be parsed: {visible(str(error))}"
            ) from None
        for number, certificate in enumerate(found, start=1):
            problem = _malformation(certificate)
            if problem is not None:
                which = (
                    "a certificate"
                    if len(found) == 1
                    else f"a certificate (number {number} of {len(found)})"
                )
                raise MaterialError(path, f"holds {which} that cannot be parsed: {problem}")
    return found


def _malformation(certificate: x509.Certificate) -> str | None:
    """What is malformed in a certificate, or None. If None, reading its parts does not raise,
    except for the public key and the signature algorithm, which may be of an unknown kind.

    Both libraries check it, because the TLS library parses some parts more strictly than the one
    that displays them.
    """
    try:
        crypto.X509.from_cryptography(certificate)
        name_of(certificate)
        certificate.issuer.rfc4514_string()
        when(certificate.not_valid_before_utc)
        when(certificate.not_valid_after_utc)
        list(certificate.extensions)
    except crypto.Error as error:
        return openssl_reason(error)
    except UNREADABLE as error:
        return visible(str(error))
    return None


def openssl_reason(error: crypto.Error | SSL.Error) -> str:
    """OpenSSL's reason for an error. pyOpenSSL raises a list of (library, function, reason), most
    general last.
    """
    return ", in ".join(dict.fromkeys(reasons(error))) or visible(str(error)) or "no reason given"


def parse_key(path: Origin, data: bytes) -> PrivateKey:
    """The one private key of a PEM file, checked for type and strength. Raises MaterialError, never
    with key data.
    """
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise MaterialError(
            path, "holds an encrypted private key, but the proxy has no passphrase for it"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        # The library's message may quote its input, and key material must never reach a log.
        what = (
            "is empty"
            if not data.strip()
            else "holds no PEM private key that can be read (PKCS #8, SEC 1 or PKCS #1)"
        )
        raise MaterialError(path, what) from None
    if isinstance(key, PrivateKey):
        weakness = key_flaw(key.public_key())
        if weakness is not None:
            raise MaterialError(path, f"holds a private key that no peer accepts: {weakness}")
        return key
    raise MaterialError(path, f"holds a private key of an unsupported kind ({type(key).__name__})")


def spiffe_uri(certificate: x509.Certificate) -> str:
    """The one URI SAN of a certificate (X.509-SVID, section 2). Raises SpiffeIdError if there is
    none or several.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise SpiffeIdError(
            "the certificate has no subject alternative name, so it has no identity"
        ) from None
    except UNREADABLE as error:
        raise SpiffeIdError(f"the certificate's extensions cannot be parsed: {error}") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        found = (
            "none"
            if not uris
            else f"{len(uris)}: " + ", ".join(repr(uri[:100]) for uri in uris[:4])
        )
        raise SpiffeIdError(
            "the certificate must have exactly one URI among its subject alternative names, it has"
            f" {found}"
        )
    return uris[0]


def verify_chain(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    now: datetime,
) -> tuple[x509.Certificate, ...]:
    """Verify the chain as the TLS library does in the handshake. Returns it, the leaf first and the
    root last. Raises ValueError with the reason.
    """
    store = crypto.X509Store()
    # Every certificate in the root files is a trust anchor, even if not self-signed (SPIFFE bundles
    # may be so).
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    store.set_time(now)
    try:
        for root in roots:
            store.add_cert(crypto.X509.from_cryptography(root))
        chain = [crypto.X509.from_cryptography(certificate) for certificate in intermediates]
        found = crypto.X509StoreContext(
            store, crypto.X509.from_cryptography(leaf), chain
        ).get_verified_chain()
        return tuple(certificate.to_cryptography() for certificate in found)
    except crypto.X509StoreContextError as error:
        raise ValueError(str(error)) from None
    except crypto.Error as error:
        raise ValueError(openssl_reason(error)) from None


def check_validity(path: Origin, certificate: x509.Certificate, now: datetime, what: str) -> None:
    """Raise MaterialError if the certificate is not valid at `now`."""
    reason = validity_problem(certificate, now)
    if reason is not None:
        raise MaterialError(path, f"{what} {reason}")


def validity_problem(certificate: x509.Certificate, now: datetime) -> str | None:
    """Why the certificate is not valid at `now`, as a phrase after "the certificate ..."; None if
    it is valid.
    """
    if now > certificate.not_valid_after_utc:
        return f"expired on {when(certificate.not_valid_after_utc)} (it is {when(now)} here)"
    if now < certificate.not_valid_before_utc:
        return (
            f"is not yet valid until {when(certificate.not_valid_before_utc)} (it is {when(now)}"
            " here: is the clock right?)"
        )
    return None


def when(moment: datetime) -> str:
    """A time for messages: UTC, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def parse_roots(
    origins: Sequence[Origin], parts: Sequence[bytes], now: datetime
) -> tuple[x509.Certificate, ...]:
    """All roots of all parts, without duplicates and without expired ones, which cannot verify
    anything.

    A root that is not yet valid stays: it may have been distributed in advance, and no file changes
    when it starts.
    """
    found: dict[x509.Certificate, str | None] = {}
    for path, data in zip(origins, parts, strict=True):
        for certificate in parse_certificates(path, data):
            check_authority(path, certificate)
            found.setdefault(certificate, validity_problem(certificate, now))
    if all(found.values()):
        raise MaterialError(
            origins[0],
            f"holds no trust root that is valid now: the first one {next(iter(found.values()))}",
        )
    return tuple(certificate for certificate in found if now <= certificate.not_valid_after_utc)


def check_authority(path: Origin, certificate: x509.Certificate) -> None:
    """Raise MaterialError if a certificate is not that of an authority, or is weak."""
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise MaterialError(
            path,
            f"holds a certificate that is not a CA (no basic constraints): {name_of(certificate)}",
        ) from None
    except UNREADABLE as error:
        raise MaterialError(
            path, f"holds a certificate whose extensions cannot be parsed: {error}"
        ) from None
    if not constraints.ca:
        raise MaterialError(
            path,
            "holds a certificate that is not a CA (a workload's certificate?):"
            f" {name_of(certificate)}",
        )
    weakness = _weakness(path, certificate)
    if weakness is not None:
        raise MaterialError(
            path, f"holds a weak trust root ({name_of(certificate)}): it {weakness}"
        )


def _check_leaf(path: Origin, leaf: x509.Certificate, now: datetime) -> SpiffeId:
    check_validity(path, leaf, now, "the certificate")
    try:
        identity = SpiffeId.parse(spiffe_uri(leaf))
    except SpiffeIdError as error:
        raise MaterialError(path, str(error)) from None
    if _is_authority(leaf):
        raise MaterialError(
            path, "the first certificate is a CA, not a workload's certificate: put the leaf first"
        )
    flaw = certificate_flaw(leaf, 0)
    if flaw is not None:
        raise MaterialError(path, f"would be rejected by every peer: the certificate {flaw.words}")
    return identity


def public_key(path: Origin, certificate: x509.Certificate) -> CertificatePublicKeyTypes:
    """The certificate's public key. Raises MaterialError if it is malformed, or of an unknown
    kind."""
    try:
        return certificate.public_key()
    except UNREADABLE as error:
        raise MaterialError(
            path, f"holds a certificate whose public key cannot be read: {error}"
        ) from None


def _weakness(path: Origin, certificate: x509.Certificate) -> str | None:
    """What makes a certificate forgeable, as a phrase after "it ...". Raises MaterialError if its
    key is unreadable.
    """
    public_key(path, certificate)
    return strength_flaw(certificate)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _warnings(
    contents: Contents, roots: Sequence[x509.Certificate], now: datetime
) -> tuple[str, ...]:
    files = contents.files
    found = []
    if contents.key_mode & stat.S_IROTH:
        found.append(
            f"{files.key}: the private key can be read by every user of this machine: chmod 600"
            f" {files.key}"
        )
    for path, data in zip(files.roots, contents.parts[2:], strict=True):
        for certificate in parse_certificates(path, data):
            flaw = certificate_flaw(certificate, 1, anchor=True)
            if flaw is not None:
                found.append(
                    f"{path}: the trust root {name_of(certificate)} {flaw.words}: certificates that"
                    " it signed are rejected"
                )
            problem = validity_problem(certificate, now)
            if problem is not None:
                use = "it is used from then on" if certificate in roots else "it is not used"
                found.append(f"{path}: the trust root {name_of(certificate)} {problem}: {use}")
    return tuple(found)


def name_of(certificate: x509.Certificate) -> str:
    """A certificate's subject for a message; its serial number if the subject is empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overlong parts; harmless
        return (
            visible(certificate.subject.rfc4514_string())
            or f"serial number {certificate.serial_number:x}"
        )


def visible(text: str) -> str:
    """Foreign text for a message: on one line, without terminal control characters."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )
