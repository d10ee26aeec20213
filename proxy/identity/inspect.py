"""Describes a certificate for people: its identity, issuer, validity and permitted use."""

import io
import sys
import warnings
from collections.abc import Iterable
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from proxy.identity.credentials import name_of, spiffe_uri, validity_problem, visible, when
from proxy.identity.spiffe import SpiffeId, SpiffeIdError, split_uri
from proxy.net.tls.certificate_rules import UNREADABLE

_USAGES = {
    ExtendedKeyUsageOID.SERVER_AUTH: "TLS server",
    ExtendedKeyUsageOID.CLIENT_AUTH: "TLS client",
}


def describe(certificate: x509.Certificate, now: datetime) -> list[tuple[str, str]]:
    """The facts of a certificate from credentials.parse_certificates, as (label, text), in display
    order.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(label, visible(words)) for label, words in _facts(certificate, now)]


def _facts(certificate: x509.Certificate, now: datetime) -> list[tuple[str, str]]:
    return [
        ("identity", _identity(certificate)),
        ("subject", name_of(certificate)),
        (
            "issuer",
            (
                "itself"
                if certificate.issuer == certificate.subject
                else certificate.issuer.rfc4514_string()
            ),
        ),
        ("valid from", when(certificate.not_valid_before_utc)),
        ("valid until", f"{when(certificate.not_valid_after_utc)} ({_left(certificate, now)})"),
        ("key", _key(certificate)),
        ("signature", _signature(certificate)),
        ("names", _san(certificate)),
        ("used for", _usage(certificate)),
        ("authority", _authority(certificate)),
        ("serial", f"{certificate.serial_number:x}"),
        ("SHA-256", certificate.fingerprint(hashes.SHA256()).hex(":")),
    ]


def write_everything() -> None:
    """Make standard output escape characters that its encoding lacks, instead of raising: names
    come from files and peers.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def expiry_in_words(certificate: x509.Certificate, now: datetime) -> str:
    """The expiry of a certificate, as a phrase after its name."""
    end = certificate.not_valid_after_utc
    if now > end:
        return f"expired {in_words(now - end)} ago, on {when(end)}"
    return f"ends in {in_words(end - now)}, on {when(end)}"


def in_words(span: timedelta) -> str:
    """A duration in its two largest units: "3 days 4 hours", "12 minutes 5 seconds"."""
    seconds = max(0, int(span.total_seconds()))
    parts: list[str] = []
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, seconds = divmod(seconds, size)
        if count or (name == "second" and not parts):
            parts.append(f"{count} {name}{'' if count == 1 else 's'}")
    return " ".join(parts[:2])


def life_left(certificate: x509.Certificate, now: datetime) -> float:
    """The fraction of the lifetime that is left: 1.0 at the start, 0.0 or less after the end."""
    lifetime = (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()
    return (certificate.not_valid_after_utc - now).total_seconds() / max(lifetime, 1.0)


def _left(certificate: x509.Certificate, now: datetime) -> str:
    problem = validity_problem(certificate, now)
    if problem is None:
        return (
            f"{in_words(certificate.not_valid_after_utc - now)} left,"
            f" {max(0.0, life_left(certificate, now)):.0%} of its life"
        )
    if now > certificate.not_valid_after_utc:
        return f"EXPIRED {in_words(now - certificate.not_valid_after_utc)} ago"
    return f"NOT YET VALID for {in_words(certificate.not_valid_before_utc - now)}"


def _identity(certificate: x509.Certificate) -> str:
    try:
        uri = spiffe_uri(certificate)
        trust_domain, path = split_uri(uri)
        return str(SpiffeId.parse(uri)) if path else f"the trust domain {trust_domain} itself"
    except SpiffeIdError as error:
        return f"none: {error}"


def _key(certificate: x509.Certificate) -> str:
    try:
        key = certificate.public_key()
    except UNREADABLE as error:
        return f"cannot be read: {error}"
    match key:
        case ec.EllipticCurvePublicKey():
            return f"ECDSA {'P-256' if isinstance(key.curve, ec.SECP256R1) else key.curve.name}"
        case rsa.RSAPublicKey():
            return f"RSA {key.key_size} bits"
        case ed25519.Ed25519PublicKey():
            return "Ed25519"
        case ed448.Ed448PublicKey():
            return "Ed448"
        case _:
            return type(key).__name__


def _signature(certificate: x509.Certificate) -> str:
    try:
        algorithm = certificate.signature_hash_algorithm
    except UNREADABLE:
        return f"unknown ({certificate.signature_algorithm_oid.dotted_string})"
    return algorithm.name if algorithm is not None else "without a separate hash (Ed25519 or Ed448)"


def _san(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "none"
    return _listed(f"{_KINDS.get(type(name), type(name).__name__)} {name.value}" for name in names)


_KINDS: dict[type, str] = {
    x509.UniformResourceIdentifier: "URI",
    x509.DNSName: "DNS",
    x509.IPAddress: "IP",
    x509.RFC822Name: "e-mail",
}


def _usage(certificate: x509.Certificate) -> str:
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return "not restricted"
    return _listed(_USAGES.get(usage, usage.dotted_string) for usage in usages)


def _authority(certificate: x509.Certificate) -> str:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return "no (no basic constraints)"
    if not constraints.ca:
        return "no"
    try:
        limits = certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return "yes, for any name"
    permitted = _listed(str(name.value) for name in limits.permitted_subtrees or ())
    return (
        f"yes, for names in {permitted}"
        if limits.permitted_subtrees
        else "yes, with names that are excluded"
    )


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"
