"""Which certificates can be forged: the judgement that a library without a security level leaves to us."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from OpenSSL import crypto

from proxy.net.tls_verdict import weakness

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def certificate(folder: Path, kind: list[str], digest: str) -> crypto.X509:
    """Self-signed, with a key that `openssl genpkey` makes of these words."""
    key, made = folder / "key.pem", folder / "made.pem"
    subprocess.run(["openssl", "genpkey", *kind, "-out", key], check=True, capture_output=True)
    hashed = [f"-{digest}"] if digest else []
    words = ["req", "-x509", "-new", "-key", key, "-subj", "/CN=a", *hashed, "-out", made]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    return crypto.X509.from_cryptography(x509.load_pem_x509_certificate(made.read_bytes()))


def rsa(bits: int, algorithm: str = "RSA") -> list[str]:
    return ["-algorithm", algorithm, "-pkeyopt", f"rsa_keygen_bits:{bits}"]


def ec(curve: str) -> list[str]:
    return ["-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{curve}"]


STRONG = {"P-256": ec("P-256"), "P-384": ec("P-384"), "RSA": rsa(2048), "PSS": rsa(2048, "RSA-PSS"), "Ed25519": ["-algorithm", "ED25519"]}


@pytest.mark.parametrize("kind", STRONG)
def test_what_is_strong_enough_passes(kind: str, tmp_path: Path) -> None:
    assert weakness(certificate(tmp_path, STRONG[kind], "" if kind == "Ed25519" else "sha256")) is None


@pytest.mark.parametrize("bits", [1024, 2040])
@pytest.mark.parametrize("algorithm", ["RSA", "RSA-PSS"])
def test_a_short_key_is_weak_however_it_is_written(algorithm: str, bits: int, tmp_path: Path) -> None:
    assert weakness(certificate(tmp_path, rsa(bits, algorithm), "sha256")) == f"has a key that is too weak ({bits} bits)"


@pytest.mark.parametrize("kind", [ec("P-256"), rsa(2048), rsa(2048, "RSA-PSS")], ids=["P-256", "RSA", "RSA-PSS"])
def test_a_signature_with_sha_1_is_weak(kind: list[str], tmp_path: Path) -> None:
    assert "is signed with an algorithm that is too weak" in (weakness(certificate(tmp_path, kind, "sha1")) or "")
