"""Issuing and describing: the profile of an X.509-SVID, lifetimes that make sense, and keys that
only their owner can read.

What is issued is accepted by the proxy's own loading and by OpenSSL. A root issues for its trust
domain only. Nothing outlives its root."""

import argparse
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from proxy import files
from proxy.commands import identity as command
from proxy.identity import credentials, issue
from proxy.identity.identity import Identity, MaterialFiles, SpiffeId, SpiffeIdError
from proxy.identity.inspect import describe, in_words
from proxy.identity.issue import IssueError
from tests.kit.workloads import DOMAIN, spiffe

NOW = datetime(2030, 5, 1, 12, tzinfo=UTC)


def extension(certificate: x509.Certificate, kind: Any) -> tuple[Any, bool]:
    found = certificate.extensions.get_extension_for_class(kind)
    return found.value, found.critical


def test_a_root_has_the_profile_of_an_authority() -> None:
    root = issue.make_root(DOMAIN, now=NOW).certificate
    constraints, critical = extension(root, x509.BasicConstraints)
    assert critical
    assert constraints.ca
    usage, critical = extension(root, x509.KeyUsage)
    assert critical
    assert usage.key_cert_sign
    assert not usage.digital_signature
    limits, critical = extension(root, x509.NameConstraints)
    assert critical
    assert [name.value for name in limits.permitted_subtrees] == [DOMAIN]
    assert issue.root_trust_domain(root) == DOMAIN
    assert root.not_valid_before_utc == NOW - issue.CLOCK_SKEW
    assert root.not_valid_after_utc == NOW + issue.ROOT_LIFETIME


def test_a_workload_has_the_profile_of_an_x509_svid() -> None:
    root = issue.make_root(DOMAIN, now=NOW)
    leaf = issue.issue(root, spiffe("cart"), now=NOW).certificate
    constraints, critical = extension(leaf, x509.BasicConstraints)
    assert critical
    assert not constraints.ca
    usage, critical = extension(leaf, x509.KeyUsage)
    assert critical
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert set(extension(leaf, x509.ExtendedKeyUsage)[0]) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    names, critical = extension(leaf, x509.SubjectAlternativeName)
    assert critical
    assert [(type(name), name.value) for name in names] == [
        (x509.UniformResourceIdentifier, str(spiffe("cart")))
    ]
    assert not list(leaf.subject)
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)
    subject_key = extension(root.certificate, x509.SubjectKeyIdentifier)[0].digest
    assert extension(leaf, x509.AuthorityKeyIdentifier)[0].key_identifier == subject_key
    assert leaf.not_valid_before_utc == NOW - issue.CLOCK_SKEW
    assert leaf.not_valid_after_utc == NOW + timedelta(hours=24)


def test_serial_numbers_and_root_names_differ() -> None:
    root = issue.make_root(DOMAIN)
    serials = {issue.issue(root, spiffe("cart")).certificate.serial_number for _ in range(20)}
    assert len(serials) == 20
    assert issue.make_root(DOMAIN).certificate.subject != root.certificate.subject


def test_a_certificate_never_outlives_its_root_and_says_so() -> None:
    root = issue.make_root(DOMAIN, timedelta(hours=1), now=NOW)
    issued = issue.issue(root, spiffe("cart"), timedelta(hours=5), now=NOW)
    assert issued.certificate.not_valid_after_utc == root.certificate.not_valid_after_utc
    assert "shortened" in issued.note
    assert issue.issue(root, spiffe("cart"), timedelta(minutes=5), now=NOW).note == ""


def test_a_certificate_never_begins_before_its_root() -> None:
    root = issue.make_root(DOMAIN, now=NOW)
    early = issue.issue(root, spiffe("cart"), now=NOW - timedelta(seconds=10)).certificate
    assert early.not_valid_before_utc == root.certificate.not_valid_before_utc


@pytest.mark.parametrize(
    ("identity", "lifetime", "later", "complaint"),
    [
        (spiffe("cart", "other.test"), timedelta(hours=1), timedelta(), "cannot sign for"),
        (spiffe("cart"), timedelta(), timedelta(), "must be positive"),
        (spiffe("cart"), timedelta(hours=-1), timedelta(), "must be positive"),
        (spiffe("cart"), timedelta(days=40000), timedelta(), "more than 100 years"),
        (spiffe("cart"), timedelta(hours=1), timedelta(days=4000), "expired on"),
        (spiffe("cart"), timedelta(hours=1), timedelta(days=-1), "not yet valid"),
    ],
)
def test_senseless_certificates_are_not_issued(
    identity: SpiffeId, lifetime: timedelta, later: timedelta, complaint: str
) -> None:
    root = issue.make_root(DOMAIN, now=NOW)
    with pytest.raises(IssueError, match=complaint):
        issue.issue(root, identity, lifetime, now=NOW + later)


def test_a_root_of_a_bad_trust_domain_is_not_made() -> None:
    with pytest.raises(SpiffeIdError, match="trust domain"):
        issue.make_root("Mesh.Test")


def test_openssl_holds_a_root_to_its_trust_domain() -> None:
    root = issue.make_root(DOMAIN)
    lying = issue.Issued(issue.make_root("other.test").certificate, root.key)
    forged = issue.issue(lying, spiffe("cart", "other.test")).certificate
    # Signed with the key of mesh.test's root, and made to look as if that root had issued it.
    builder = (
        x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(root.certificate.subject)
    )
    builder = builder.public_key(forged.public_key()).serial_number(1)
    builder = builder.not_valid_before(forged.not_valid_before_utc).not_valid_after(
        forged.not_valid_after_utc
    )
    builder = builder.add_extension(
        extension(forged, x509.SubjectAlternativeName)[0], critical=True
    )
    stranger = builder.sign(root.key, hashes.SHA256())
    now = credentials.utc_now()
    with pytest.raises(ValueError, match="permitted subtree violation"):
        credentials.verify_chain(stranger, [], [root.certificate], now)
    credentials.verify_chain(
        issue.issue(root, spiffe("cart")).certificate, [], [root.certificate], now
    )


@pytest.mark.parametrize("umask", [0, 0o077])
def test_a_secret_is_written_for_its_owner_only_whatever_the_umask(
    tmp_path: Path, umask: int
) -> None:
    path = tmp_path / "key.pem"
    before = os.umask(umask)
    try:
        files.write_private(path, b"old")
        files.write_private(path, b"new")
        files.write_public(tmp_path / "certificate.pem", b"all")
        files.make_private_directory(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "certificate.pem").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "certificate.pem", "key.pem"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write_private(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["key.pem"]


def test_a_description_is_plain_text() -> None:
    root = issue.make_root(DOMAIN, now=NOW)
    leaf = issue.issue(root, spiffe("cart"), now=NOW).certificate
    words = dict(describe(leaf, NOW + timedelta(hours=12)))
    assert words["identity"] == str(spiffe("cart"))
    assert "12 hours left, 50% of its life" in words["valid until"]
    assert words["key"] == "ECDSA P-256"
    assert words["signature"] == "sha256"
    assert words["used for"] == "TLS server, TLS client"
    assert words["authority"] == "no"
    assert "EXPIRED 1 day ago" in dict(describe(leaf, NOW + timedelta(days=2)))["valid until"]
    assert "NOT YET VALID" in dict(describe(leaf, NOW - timedelta(days=2)))["valid until"]
    words = dict(describe(root.certificate, NOW))
    assert words["identity"] == f"the trust domain {DOMAIN} itself"
    assert words["issuer"] == "itself"
    assert words["authority"] == f"yes, for names in {DOMAIN}"


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (timedelta(days=3, hours=4, minutes=5), "3 days 4 hours"),
        (timedelta(days=1), "1 day"),
        (timedelta(minutes=12, seconds=1), "12 minutes 1 second"),
        (timedelta(), "0 seconds"),
        (timedelta(seconds=-5), "0 seconds"),
    ],
)
def test_a_span_of_time_is_said_in_its_two_largest_units(span: timedelta, words: str) -> None:
    assert in_words(span) == words


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="isthmus")
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["identity", *map(str, arguments)])
    status: int = args.run(args)
    return status


def test_the_commands_make_an_identity_that_a_proxy_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust, out = tmp_path / "trust", tmp_path / "cart"
    assert run("root", "--trust-domain", DOMAIN, "--out", trust) == 0
    assert (
        run(
            "issue",
            "--root",
            trust,
            "--namespace",
            "shop",
            "--service-account",
            "cart",
            "--out",
            out,
        )
        == 0
    )
    assert "ends in 23 hours 59 minutes" in capsys.readouterr().out
    identity = Identity(
        MaterialFiles(out / command.CERTIFICATE, out / command.KEY, (out / command.ROOTS,))
    )
    assert identity.id == spiffe("cart")
    assert identity.warnings == ()
    assert stat.S_IMODE((trust / command.ROOT_KEY).stat().st_mode) == 0o600
    assert run("show", out / command.CERTIFICATE, "--roots", out / command.ROOTS) == 0
    shown = capsys.readouterr().out
    assert str(spiffe("cart")) in shown
    assert "verified" in shown
    assert "PRIVATE" not in shown


def test_issuing_again_renews_and_an_id_may_be_given_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust, out = tmp_path / "trust", tmp_path / "cart"
    run("root", "--trust-domain", DOMAIN, "--out", trust, "--lifetime", "2h")
    assert (
        run("issue", "--root", trust, "--id", spiffe("cart"), "--out", out, "--lifetime", "1h") == 0
    )
    first = (out / command.CERTIFICATE).read_bytes()
    assert run("issue", "--root", trust, "--id", spiffe("cart"), "--out", out) == 0
    assert "shortened" in capsys.readouterr().out
    assert (out / command.CERTIFICATE).read_bytes() != first


def test_a_root_is_not_overwritten_by_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("root", "--trust-domain", DOMAIN, "--out", tmp_path)
    before = (tmp_path / command.ROOT_CERTIFICATE).read_bytes()
    assert run("root", "--trust-domain", DOMAIN, "--out", tmp_path) == 64
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / command.ROOT_CERTIFICATE).read_bytes() == before
    assert run("root", "--trust-domain", DOMAIN, "--out", tmp_path, "--force") == 0
    assert (tmp_path / command.ROOT_CERTIFICATE).read_bytes() != before


def test_show_fails_for_an_expired_certificate_and_for_a_stranger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, other = issue.make_root(DOMAIN), issue.make_root(DOMAIN)
    past = credentials.utc_now() - timedelta(days=30)
    old_root = issue.make_root(DOMAIN, now=past)
    expired = issue.issue(old_root, spiffe("cart"), now=past)
    files.write_public(tmp_path / "expired.pem", expired.certificate_pem)
    files.write_public(tmp_path / "good.pem", issue.issue(root, spiffe("cart")).certificate_pem)
    files.write_public(tmp_path / "other.pem", other.certificate_pem)
    assert run("show", tmp_path / "expired.pem") == 1
    assert "EXPIRED" in capsys.readouterr().out
    assert run("show", tmp_path / "good.pem") == 0
    assert run("show", tmp_path / "good.pem", "--roots", tmp_path / "other.pem") == 1
    assert "not signed by" in capsys.readouterr().out


def test_show_warns_before_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = issue.make_root(DOMAIN, now=credentials.utc_now() - timedelta(hours=20))
    aging = issue.issue(root, spiffe("cart"), now=credentials.utc_now() - timedelta(hours=18))
    files.write_public(tmp_path / "aging.pem", aging.certificate_pem)
    assert run("show", tmp_path / "aging.pem") == 0
    assert "WARNING" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["show", "missing.pem"], "missing.pem: cannot be read: No such file"),
        (["root", "--trust-domain", "Bad", "--out", "x"], "trust domain 'Bad'"),
        (
            ["issue", "--root", "nowhere", "--id", "spiffe://mesh.test/ns/a/sa/b", "--out", "x"],
            "nowhere/root.pem: cannot be read",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 64
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_who_the_certificate_is_for_must_be_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("root", "--trust-domain", DOMAIN, "--out", tmp_path)
    assert run("issue", "--root", tmp_path, "--namespace", "shop", "--out", tmp_path) == 64
    assert "--service-account" in capsys.readouterr().err
    assert (
        run(
            "issue",
            "--root",
            tmp_path,
            "--id",
            spiffe("a"),
            "--namespace",
            "shop",
            "--out",
            tmp_path,
        )
        == 64
    )
    assert (
        run(
            "issue", "--root", tmp_path, "--id", SpiffeId("other.test", "a", "b"), "--out", tmp_path
        )
        == 64
    )


@pytest.mark.parametrize("text", ["", "24", "h", "1y", "-1h", "1.5h", "24 h"])
def test_a_lifetime_needs_a_number_and_a_unit(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("root", "--trust-domain", DOMAIN, "--out", "x", f"--lifetime={text}")
    assert "is not a duration" in capsys.readouterr().err
