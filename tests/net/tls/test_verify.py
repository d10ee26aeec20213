"""The verdict alone: keys and signatures as the openssl command makes them, chains that are cached,
and internal errors."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from proxy.net.exceptions import TLSFailed
from proxy.net.tls import verify
from proxy.net.tls.binding import set_signature_algorithms
from proxy.net.tls.certificate_rules import certificate_flaw, find_flaw, strength_flaw
from proxy.net.tls.handshake import Chain, tls_client, tls_server
from tests.net.conftest import OFFER, Mesh, both, pair

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def certificate(folder: Path, kind: list[str], digest: str) -> x509.Certificate:
    """Self-signed, with a key that `openssl genpkey` makes with these arguments."""
    key, made = folder / "key.pem", folder / "made.pem"
    subprocess.run(["openssl", "genpkey", *kind, "-out", key], check=True, capture_output=True)
    hashed = [f"-{digest}"] if digest else []
    words = ["req", "-x509", "-new", "-key", key, "-subj", "/CN=a", *hashed, "-out", made]
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    return x509.load_pem_x509_certificate(made.read_bytes())


def rsa(bits: int, algorithm: str = "RSA") -> list[str]:
    return ["-algorithm", algorithm, "-pkeyopt", f"rsa_keygen_bits:{bits}"]


def ec(curve: str) -> list[str]:
    return ["-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{curve}"]


STRONG = {
    "P-256": ec("P-256"),
    "P-384": ec("P-384"),
    "RSA": rsa(2048),
    "PSS": rsa(2048, "RSA-PSS"),
    "Ed25519": ["-algorithm", "ED25519"],
}


@needs_openssl
@pytest.mark.parametrize("kind", STRONG)
def test_strong_keys_and_signatures_pass(kind: str, tmp_path: Path) -> None:
    assert (
        strength_flaw(certificate(tmp_path, STRONG[kind], "" if kind == "Ed25519" else "sha256"))
        is None
    )


@needs_openssl
@pytest.mark.parametrize("bits", [1024, 2040])
@pytest.mark.parametrize("algorithm", ["RSA", "RSA-PSS"])
def test_a_short_key_is_weak_however_it_is_written(
    algorithm: str, bits: int, tmp_path: Path
) -> None:
    words = f"has a key that is too weak (RSA with {bits} bits, not 2048)"
    assert strength_flaw(certificate(tmp_path, rsa(bits, algorithm), "sha256")) == words


@needs_openssl
@pytest.mark.parametrize(
    "kind", [ec("P-256"), rsa(2048), rsa(2048, "RSA-PSS")], ids=["P-256", "RSA", "RSA-PSS"]
)
def test_a_signature_with_sha_1_is_weak(kind: list[str], tmp_path: Path) -> None:
    made = certificate(tmp_path, kind, "sha1")
    assert "is signed with an algorithm that is too weak" in (strength_flaw(made) or "")
    assert strength_flaw(made, anchor=True) is None, "the signature of a trust root proves nothing"


def test_an_unreadable_key_is_a_flaw_and_not_an_error(mesh: Mesh) -> None:
    der = mesh.server.certificate.public_bytes(Encoding.DER)
    broken = x509.load_der_x509_certificate(
        der.replace(b"\x06\x03\x55\x1d\x0f\x01\x01\xff", b"\x06\x03\x55\x1d\x13\x01\x01\xff")
    )
    for depth in (0, 1):
        flaw = certificate_flaw(broken, depth)
        assert flaw is not None
        assert "cannot be parsed" in flaw.words
    assert find_flaw((broken, mesh.authority.root.certificate)) is not None


async def test_a_fault_of_the_verification_refuses(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Chain) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(verify, "find_flaw", fail)
    verify._read.cache_clear()
    dialled, accepted = pair()
    results = await both(
        partial(tls_client, dialled, mesh.client_context, OFFER, verify=None, timeout=20),
        partial(tls_server, accepted, mesh.server_context, verify=None, timeout=20),
    )
    assert all(isinstance(result, TLSFailed) for result in results)


async def test_chains_for_resumed_sessions_are_remembered_up_to_a_number(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_REMEMBERED", 1)
    verify._chains.clear()
    client, server = await mesh.connect()
    assert len(verify._chains) == 1
    ends = {end.info.peer_not_after for end in (client, server)}
    assert ends == {
        mesh.server.certificate.not_valid_after_utc.timestamp(),
        mesh.client.certificate.not_valid_after_utc.timestamp(),
    }
    leaf = mesh.server.certificate.public_bytes(Encoding.DER)
    verify._chains.clear()
    assert verify.remembered_chain(leaf) == (mesh.server.certificate,), "the leaf alone is left"
    client.close()
    server.close()


def test_both_libraries_offer_the_same_signatures(mesh: Mesh) -> None:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    verify.demand_certificate(context, always=False)  # raises if the library lacks one
    with pytest.raises(ValueError, match="does not know"):
        set_signature_algorithms(context, b"no_such_algorithm")
