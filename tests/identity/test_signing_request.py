"""Certificate signing requests: only a request for exactly the permitted name, with nothing else,
is accepted. All others are refused with the reason."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as some

from proxy.identity.signing_request import (
    MAX_BYTES,
    RequestRefused,
    check_request,
    make_key,
    make_request,
)
from proxy.identity.spiffe import SpiffeId
from tests.kit.chains import key_of

WEB = SpiffeId("cluster.local", "shop", "web")
KEY = make_key()
Builder = x509.CertificateSigningRequestBuilder


def san(*names: x509.GeneralName) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(names)


def uri(name: object) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(str(name))


def request(
    change: Callable[[Builder], Builder] = lambda builder: builder,
    *,
    names: tuple[x509.GeneralName, ...] = (uri(WEB),),
    subject: tuple[x509.NameAttribute[str], ...] = (),
    key: Any = KEY,
    algorithm: Any = hashes.SHA256(),  # noqa: B008  # immutable
) -> bytes:
    builder = Builder().subject_name(x509.Name(subject))
    if names:
        builder = builder.add_extension(san(*names), critical=True)
    signed = change(builder).sign(key, algorithm)
    return signed.public_bytes(serialization.Encoding.PEM)


def flaw(data: bytes) -> tuple[str, str]:
    with pytest.raises(RequestRefused) as caught:
        check_request(data, WEB)
    return caught.value.flaw, str(caught.value)


def test_the_request_of_a_proxy_is_accepted() -> None:
    assert check_request(make_request(KEY, WEB), WEB) == KEY.public_key()


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["P-384", "RSA", "Ed25519"],
)
def test_other_strong_keys_are_accepted(key: Any) -> None:
    assert check_request(make_request(key, WEB), WEB) == key.public_key()


OTHER = "spiffe://cluster.local/ns/shop/sa/admin"


@pytest.mark.parametrize(
    ("data", "expected", "words"),
    [
        (request(names=(uri(WEB), uri(OTHER))), "names", "it has 2"),
        (request(names=(uri(WEB), uri(WEB))), "names", "it has 2"),
        (request(names=()), "names", "it has 0"),
        (request(names=(uri(WEB), x509.DNSName("web"))), "names", "DNSName"),
        (request(names=(uri("https://web"),)), "names", "is not a SPIFFE ID"),
        (request(names=(uri(f"{WEB}/x"),)), "names", "is not a SPIFFE ID"),
        (request(names=(uri(OTHER),)), "identity", "is for spiffe://cluster.local/ns/shop/sa/adm"),
        (request(names=(uri("spiffe://x/ns/shop/sa/web"),)), "identity", "its sender is"),
        (
            request(names=(), subject=(x509.NameAttribute(NameOID.COMMON_NAME, str(WEB)),)),
            "names",
            "a common name",
        ),
        (
            request(subject=(x509.NameAttribute(NameOID.ORGANIZATION_NAME, "x"),)),
            "names",
            "a subject",
        ),
        (
            request(lambda b: b.add_extension(x509.BasicConstraints(True, None), critical=True)),
            "extensions",
            "a CA certificate",
        ),
        (
            request(lambda b: b.add_extension(x509.BasicConstraints(False, None), critical=True)),
            "extensions",
            "2.5.29.19",
        ),
        (
            request(
                lambda b: b.add_extension(
                    x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
                )
            ),
            "extensions",
            "2.5.29.37",
        ),
        (
            request(lambda b: b.add_attribute(AttributeOID.CHALLENGE_PASSWORD, b"secret")),
            "extensions",
            "unknown attributes",
        ),
        (request(key=key_of("RSA1024")), "key", "too weak"),
        (request(key=ec.generate_private_key(ec.SECP256K1())), "key", "secp256k1"),
        (request(algorithm=hashes.SHA224()), "signature", "sha224"),
        (b"", "malformed", "cannot be parsed"),
        (b"garbage", "malformed", "cannot be parsed"),
        (b"x" * (MAX_BYTES + 1), "malformed", "larger than"),
    ],
)
def test_anything_else_is_refused_with_the_reason(data: bytes, expected: str, words: str) -> None:
    found, message = flaw(data)
    assert found == expected
    assert words in message


def der(data: bytes) -> bytes:
    return base64.b64decode(b"".join(data.splitlines()[1:-1]))


def pem(data: bytes) -> bytes:
    body = base64.encodebytes(data)
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"


def test_a_signature_of_another_key_is_refused() -> None:
    """The request of one key, with the signature that another key made."""
    ours, other = der(make_request(KEY, WEB)), der(make_request(make_key(), WEB))
    mixed = x509.load_der_x509_csr(ours)
    foreign = x509.load_der_x509_csr(other)
    swapped = ours.replace(mixed.signature, foreign.signature[: len(mixed.signature)])
    if len(mixed.signature) == len(foreign.signature):
        assert flaw(pem(swapped))[0] == "signature"
    changed = bytearray(ours)
    changed[-1] ^= 1
    assert flaw(pem(bytes(changed)))[0] in ("signature", "malformed")


GOOD = der(make_request(KEY, WEB))


@pytest.mark.no_cover
@given(some.integers(0, len(GOOD) - 1), some.integers(1, 255))
def test_a_damaged_request_is_refused_and_nothing_else_happens(at: int, by: int) -> None:
    """Each byte is covered by the signature, or is a part of it."""
    damaged = bytearray(GOOD)
    damaged[at] ^= by
    try:
        key = check_request(pem(bytes(damaged)), WEB)
    except RequestRefused:
        return
    # An encoding that differs only where the parser is tolerant. It is for the same key.
    assert key == KEY.public_key()


@pytest.mark.no_cover
@given(some.binary(max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    assert flaw(data)[0] == "malformed"
    assert flaw(pem(data))[0] == "malformed"
