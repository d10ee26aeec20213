"""The identity of a running proxy: loading checks everything, a reload changes all or nothing,
peers are verified on every connection.

Invalid files leave what was loaded before, and are reported once for each change."""

import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from trio.testing import MockClock

from proxy import files
from proxy.identity import credential_files as contents
from proxy.identity import issue
from proxy.identity.identity import (
    Identity,
    MaterialError,
    MaterialFiles,
    PeerRefused,
    TLSSettings,
    verify_peer,
)
from proxy.identity.issue import Issued
from proxy.identity.source import FileSource, report_expiry
from proxy.identity.spiffe import SpiffeId
from tests.kit.certs import signed_with_sha1
from tests.kit.workloads import (
    DAY,
    DOMAIN,
    Clock,
    Log,
    Workload,
    authority,
    handshake,
    refusal,
    spiffe,
    workload,
)


def custom(
    root: Issued,
    *,
    uris: Iterable[str] = (),
    key: Any = None,
    usages: Iterable[x509.ObjectIdentifier] | None = None,
    key_usage: x509.KeyUsage | None = None,
    digest: Any = None,
    ca: bool = False,
    dns: Iterable[str] = (),
    subject: str | None = None,
) -> Issued:
    """A certificate signed by the root with a profile that `issue` would not make."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)] if subject else [])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(root.certificate.subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(minutes=1)).not_valid_after(
        now + timedelta(hours=1)
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    names = [x509.UniformResourceIdentifier(uri) for uri in uris] + [
        x509.DNSName(name) for name in dns
    ]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(key_usage or issue._key_usage(authority=ca), critical=True)
    return issue.Issued(builder.sign(root.key, digest or hashes.SHA256()), key)


def test_a_complete_set_loads(cart: Workload, root: Issued) -> None:
    identity = cart.identity()
    assert identity.id == spiffe("cart")
    assert identity.roots == (root.certificate,)
    assert identity.not_after == identity.certificate.not_valid_after_utc
    assert identity.roots_not_after == root.certificate.not_valid_after_utc
    assert (identity.generation, identity.failures, identity.last_error, identity.warnings) == (
        1,
        0,
        None,
        (),
    )
    assert timedelta(hours=23) < identity.time_left < DAY


@pytest.mark.parametrize(
    ("name", "contents", "complaint"),
    [
        ("certificate.pem", None, "No such file"),
        ("key.pem", None, "No such file"),
        ("roots.pem", None, "No such file"),
        ("certificate.pem", b"", "is empty"),
        ("key.pem", b"\n", "is empty"),
        ("roots.pem", b"", "is empty"),
        ("certificate.pem", b"hello", "no PEM certificate"),
        ("key.pem", b"hello", "no PEM private key"),
        (
            "certificate.pem",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "cannot be parsed",
        ),
        ("roots.pem", b"-----BEGIN CERTIFICATE-----\n", "ends inside a PEM block"),
        ("key.pem", b"x" * (contents.MAX_FILE_BYTES + 1), "larger than 4 MiB"),
    ],
)
def test_a_broken_file_is_named(
    cart: Workload, name: str, contents: bytes | None, complaint: str
) -> None:
    path = cart.directory / name
    path.unlink()
    if contents is not None:
        path.write_bytes(contents)
    where, reason = refusal(cart)
    assert where == name
    assert complaint in reason


def test_a_file_that_never_ends_does_not_stop_the_process(cart: Workload) -> None:
    cart.files.key.unlink()
    os.mkfifo(cart.files.key)
    assert refusal(cart) == ("key.pem", "is not a regular file")
    cart.files.key.unlink()
    cart.files.key.mkdir()
    assert refusal(cart) == ("key.pem", "is not a regular file")
    cart.files.key.rmdir()
    cart.files.key.symlink_to("/dev/zero")
    assert refusal(cart) == ("key.pem", "is not a regular file")


def test_repeated_reads_of_what_is_not_a_file_leave_nothing_open(cart: Workload) -> None:
    identity = cart.identity()
    cart.files.key.unlink()
    cart.files.key.mkdir()
    with pytest.raises(MaterialError):
        identity.reload()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _look in range(5):
        assert identity.reload() is False
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_no_root_file_at_all_is_refused(cart: Workload) -> None:
    with pytest.raises(MaterialError, match="no trust root file"):
        Identity(MaterialFiles(cart.files.certificate, cart.files.key, ()))


def test_a_key_of_another_certificate_is_refused(cart: Workload, root: Issued) -> None:
    files.write_private(cart.files.key, issue.issue(root, cart.id).key_pem)
    where, reason = refusal(cart)
    assert where == "key.pem"
    assert "does not belong to the certificate" in reason


def test_an_encrypted_key_is_refused_with_a_message(cart: Workload, root: Issued) -> None:
    issued = cart.renew(root)
    encryption = serialization.BestAvailableEncryption(b"secret")
    data = issued.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    files.write_private(cart.files.key, data)
    assert "encrypted" in refusal(cart)[1]


def test_a_world_readable_key_is_a_warning(cart: Workload) -> None:
    cart.files.key.chmod(0o644)
    (warning,) = cart.identity().warnings
    assert "every user" in warning
    assert "chmod 600" in warning


def test_a_certificate_of_a_strange_root_is_refused(cart: Workload) -> None:
    cart.write_roots(issue.make_root(DOMAIN))
    where, reason = refusal(cart)
    assert where == "certificate.pem"
    assert "not signed by the trust roots" in reason
    assert "unable to get local issuer" in reason


def test_an_expired_and_an_early_certificate_are_refused_with_a_message(cart: Workload) -> None:
    clock = Clock()
    clock.now += 2 * DAY
    assert "expired on" in refusal(cart, clock=clock)[1]
    clock.now -= 4 * DAY
    _where, reason = refusal(cart, clock=clock)
    assert "not yet valid until" in reason
    assert "is the clock right?" in reason


URI = str(spiffe("cart"))
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@pytest.mark.parametrize(
    ("profile", "complaint"),
    [
        ({}, "no subject alternative name"),
        ({"dns": ["cart.test"]}, "it has none"),
        ({"uris": [URI, URI + "2"]}, "it has 2"),
        ({"uris": ["https://mesh.test/"]}, "not a SPIFFE ID"),
        ({"uris": [f"spiffe://{DOMAIN}"]}, "path must be"),
        ({"uris": [URI], "ca": True}, "put the leaf first"),
        ({"uris": [URI], "usages": [CLIENT]}, "not meant for TLS servers"),
        ({"uris": [URI], "usages": [SERVER]}, "not meant for TLS clients"),
        (
            {"uris": [URI], "usages": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]},
            "servers and clients",
        ),
        ({"uris": [URI], "key": rsa.generate_private_key(65537, 1024)}, "RSA with 1024 bits"),  # noqa: S505 -- the weak key is the case
        ({"uris": [URI], "key": ec.generate_private_key(ec.SECP256K1())}, "secp256k1"),
        (
            {"uris": [URI], "key_usage": issue._key_usage(authority=True)},
            "not meant for this use (key usage)",
        ),
    ],
)
def test_a_certificate_that_peers_would_refuse_is_refused_here(
    cart: Workload, root: Issued, profile: dict[str, Any], complaint: str
) -> None:
    cart.write(custom(root, **profile), [root])
    assert complaint in refusal(cart)[1]


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    ],
)
def test_other_keys_of_tls_1_3_are_welcome(
    cart: Workload, checkout: Workload, root: Issued, key: Any
) -> None:
    cart.write(custom(root, uris=[URI], key=key), [root])
    ours, theirs = cart.identity(), checkout.identity()
    with handshake(ours.client_context, theirs.server_context) as (_client, server):
        assert theirs.verify_peer(server.get_peer_certificate(as_cryptography=True)) == spiffe(
            "cart"
        )


@pytest.mark.parametrize("weak", ["key", "signature"])
def test_a_weak_intermediate_is_refused_by_its_owner(
    cart: Workload, root: Issued, weak: str
) -> None:
    key = (
        rsa.generate_private_key(65537, 1024)  # noqa: S505  # the weak key that must be refused
        if weak == "key"
        else ec.generate_private_key(ec.SECP256R1())
    )
    middle = custom(
        root, key=key, ca=True, key_usage=issue._key_usage(authority=True), subject="middle"
    )
    if weak == "signature":
        assert isinstance(root.key, ec.EllipticCurvePrivateKey)
        middle = issue.Issued(signed_with_sha1(middle.certificate, root.key), key)
    leaf = custom(middle, uris=[URI])
    cart.write(leaf, [root])
    with cart.files.certificate.open("ab") as file:
        file.write(middle.certificate_pem)
    where, reason = refusal(cart)
    assert where == "certificate.pem"
    assert "weak intermediate certificate" in reason


def test_a_workloads_certificate_is_not_a_trust_root(cart: Workload, root: Issued) -> None:
    cart.write_roots(issue.issue(root, spiffe("cart")))
    where, reason = refusal(cart)
    assert where == "roots.pem"
    assert "not a CA" in reason


def test_several_roots_in_several_files_are_trusted_each_once(
    cart: Workload, root: Issued, tmp_path: Path
) -> None:
    second = issue.make_root(DOMAIN)
    cart.write_roots(root, second)
    more = tmp_path / "more.pem"
    files.write_public(more, root.certificate_pem)
    identity = Identity(
        MaterialFiles(cart.files.certificate, cart.files.key, (cart.files.roots[0], more))
    )
    assert identity.roots == (root.certificate, second.certificate)


def test_an_expired_root_among_valid_ones_is_left_out_with_a_warning(
    cart: Workload, root: Issued
) -> None:
    old = issue.make_root(DOMAIN, timedelta(days=1), now=datetime.now(UTC) - 3 * DAY)
    cart.write_roots(old, root)
    identity = cart.identity()
    assert identity.roots == (root.certificate,)
    assert "is not used" in identity.warnings[0]
    cart.write_roots(old)
    assert "no trust root that is valid now" in refusal(cart)[1]


def test_a_root_handed_out_ahead_of_its_time_counts_when_it_begins(
    cart: Workload, root: Issued
) -> None:
    """The files do not change on that day, so the root must be loaded from the start. OpenSSL
    checks its dates in each handshake."""
    coming = issue.make_root(DOMAIN, now=datetime.now(UTC) + DAY)
    cart.write_roots(coming, root)
    identity = cart.identity()
    assert identity.roots == (coming.certificate, root.certificate)
    assert "used from then on" in identity.warnings[0]
    cart.write_roots(coming)
    assert "no trust root that is valid now" in refusal(cart)[1]


def test_an_authority_that_is_not_self_signed_may_be_a_trust_root(
    cart: Workload, checkout: Workload, root: Issued
) -> None:
    """SPIFFE bundles contain such ones. Then nothing above it is needed or trusted."""
    middle = authority(root)
    for member in (cart, checkout):
        member.write(issue.issue(middle, member.id), [middle])
    with handshake(cart.identity().client_context, checkout.identity().server_context) as (
        client,
        _server,
    ):
        assert len(client.get_peer_cert_chain() or ()) == 1


def refused(
    identity: Identity, certificate: x509.Certificate | None, expected: SpiffeId | None = None
) -> tuple[str, str]:
    with pytest.raises(PeerRefused) as caught:
        identity.verify_peer(certificate, expected)
    return caught.value.reason, str(caught.value)


def test_a_peer_is_refused_for_its_reason(cart: Workload, root: Issued) -> None:
    clock = Clock()
    identity = cart.identity(clock=clock)
    good = issue.issue(root, spiffe("checkout")).certificate
    assert identity.verify_peer(good, spiffe("checkout")) == spiffe("checkout")
    assert refused(identity, None)[0] == "no_certificate"
    assert refused(identity, custom(root, dns=["x.test"]).certificate)[0] == "no_identity"
    assert refused(identity, custom(root, uris=[URI, URI]).certificate)[0] == "no_identity"
    reason, message = refused(
        identity, custom(root, uris=["spiffe://other.test/ns/a/sa/b"]).certificate
    )
    assert reason == "trust_domain"
    assert "spiffe://other.test/ns/a/sa/b" in message
    assert DOMAIN in message
    reason, message = refused(identity, good, spiffe("cart"))
    assert reason == "wrong_identity"
    assert str(spiffe("checkout")) in message
    assert str(spiffe("cart")) in message
    clock.now += 2 * DAY
    assert refused(identity, good)[0] == "expired"
    clock.now -= 4 * DAY
    assert refused(identity, good)[0] == "not_yet_valid"


def test_another_trust_domain_is_accepted_only_when_configured(cart: Workload) -> None:
    other = issue.issue(issue.make_root("other.test"), spiffe("cart", "other.test")).certificate
    assert refused(cart.identity(), other)[0] == "trust_domain"
    identity = cart.identity(TLSSettings(trust_domains=frozenset({"other.test"})))
    assert identity.verify_peer(other) == spiffe("cart", "other.test")
    assert verify_peer(other, None, {"other.test"}, datetime.now(UTC)) == spiffe(
        "cart", "other.test"
    )


def test_unchanged_files_are_not_taken_anew(cart: Workload) -> None:
    identity = cart.identity()
    context = identity.server_context
    os.utime(cart.files.certificate)
    assert identity.reload() is False
    assert identity.server_context is context
    assert identity.generation == 1


def test_new_material_replaces_everything_at_once(cart: Workload, root: Issued) -> None:
    identity = cart.identity()
    before = (
        identity.server_context,
        identity.client_context,
        identity.sessions,
        identity.certificate,
    )
    cart.renew(root)
    assert identity.reload() is True
    after = (
        identity.server_context,
        identity.client_context,
        identity.sessions,
        identity.certificate,
    )
    assert all(new is not old for new, old in zip(after, before, strict=True))
    assert identity.generation == 2


def test_broken_material_keeps_the_old_and_is_reported_once(cart: Workload, root: Issued) -> None:
    identity = cart.identity()
    context = identity.server_context
    good = cart.files.certificate.read_bytes()
    files.write_public(cart.files.certificate, issue.issue(root, cart.id).certificate_pem)
    with pytest.raises(MaterialError, match="does not belong"):
        identity.reload()
    assert identity.reload() is False
    assert identity.server_context is context
    assert isinstance(identity.last_error, MaterialError)
    assert (identity.generation, identity.failures) == (1, 1)
    files.write_public(cart.files.certificate, b"garbage")
    with pytest.raises(MaterialError, match="no PEM certificate"):
        identity.reload()
    assert identity.failures == 2
    files.write_public(cart.files.certificate, good)
    assert identity.reload() is False
    assert identity.last_error is None
    assert identity.generation == 1


def test_a_missing_file_is_reported_once_and_again_after_it_was_there(cart: Workload) -> None:
    identity = cart.identity()
    data = cart.files.key.read_bytes()
    for _round in range(2):
        cart.files.key.unlink()
        with pytest.raises(MaterialError, match="No such file"):
            identity.reload()
        assert identity.reload() is False
        files.write_private(cart.files.key, data)
        assert identity.reload() is False
        assert identity.last_error is None


def test_expiry_is_said_once_at_each_threshold(cart: Workload, root: Issued) -> None:
    clock = Clock()
    cart.renew(root, timedelta(hours=10), now=clock.now)
    identity = cart.identity(clock=clock)
    start = clock.now
    assert identity.expiry_warnings() == []
    clock.now = start + timedelta(hours=7, minutes=5)
    (sentence,) = identity.expiry_warnings()
    assert sentence.startswith("our certificate ends in 2 hours 5")
    assert identity.expiry_warnings() == []
    clock.now = start + timedelta(hours=9, minutes=30)
    (sentence,) = identity.expiry_warnings()
    assert sentence.startswith("our certificate ends in 29 minutes")
    assert identity.expiry_warnings() == []
    clock.now = start + timedelta(hours=11)
    assert "expired 1 hour" in identity.expiry_warnings()[0]
    assert identity.expiry_warnings() == []


def test_a_late_start_logs_only_the_last_warning_and_a_new_certificate_starts_again(
    cart: Workload, root: Issued
) -> None:
    clock = Clock()
    old_root = issue.make_root(DOMAIN, now=clock.now - DAY)
    cart.renew(old_root, timedelta(hours=10), now=clock.now - timedelta(hours=9, minutes=30))
    identity = cart.identity(clock=clock)
    assert len(identity.expiry_warnings()) == 1
    assert identity.expiry_warnings() == []
    cart.renew(root, timedelta(hours=10), now=clock.now)
    assert identity.reload()
    assert identity.expiry_warnings() == []
    clock.now += timedelta(hours=8)
    assert len(identity.expiry_warnings()) == 1


def test_a_root_that_ends_soon_is_warned_about_too(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    aging = issue.make_root(DOMAIN, timedelta(days=100), now=now - timedelta(days=80))
    identity = workload(tmp_path, "cart", aging).identity()
    (sentence,) = identity.expiry_warnings()
    assert "the trust root" in sentence
    assert "ends in 19 days" in sentence


async def test_the_watcher_follows_a_swapped_symbolic_link(
    tmp_path: Path, root: Issued, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """As Kubernetes does it: the files are links into ..data, which is a link that is replaced in
    one step."""
    versions = [workload(tmp_path / f"..v{number}", "cart", root) for number in (1, 2)]
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to(versions[0].directory)
    for name in ("certificate.pem", "key.pem", "roots.pem"):
        (mount / name).symlink_to(f"..data/{name}")
    identity = Identity(
        MaterialFiles(mount / "certificate.pem", mount / "key.pem", (mount / "roots.pem",))
    )
    log = Log()
    nursery.start_soon(FileSource(10).run, identity, log.changed, log.failed)
    await trio.sleep(35)
    assert log.reports == []
    (mount / "..new").symlink_to(versions[1].directory)
    (mount / "..new").replace(mount / "..data")
    await trio.sleep(10)
    assert log.reports == [("changed", 2)]
    nursery.cancel_scope.cancel()


async def test_the_watcher_reports_broken_files_once_and_loads_repaired_ones(
    cart: Workload, root: Issued, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    identity = cart.identity()
    log = Log()
    nursery.start_soon(FileSource(10).run, identity, log.changed, log.failed)
    await trio.sleep(5)
    cart.files.certificate.unlink()
    await trio.sleep(50)
    cart.renew(root)
    await trio.sleep(50)
    assert log.reports == [("failed", "certificate.pem"), ("changed", 2)]
    nursery.cancel_scope.cancel()


async def test_the_watcher_loads_credentials_when_they_become_valid(
    cart: Workload, root: Issued, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    clock = Clock()
    identity = cart.identity(clock=clock)
    log = Log()
    nursery.start_soon(FileSource(10).run, identity, log.changed, log.failed)
    await trio.sleep(5)
    cart.renew(root, now=clock.now + timedelta(hours=1))
    await trio.sleep(50)
    assert log.reports == [("failed", "certificate.pem")]
    clock.now += timedelta(hours=2)
    await trio.sleep(10)
    assert log.reports[1:] == [("changed", 2)]
    nursery.cancel_scope.cancel()


async def test_the_watcher_warns_before_the_end(
    cart: Workload, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    clock = Clock()
    log = Log()
    nursery.start_soon(report_expiry, cart.identity(clock=clock), 10, log.warned)
    await trio.sleep(15)
    clock.now += timedelta(hours=20)
    await trio.sleep(30)
    ((kind, sentence),) = log.reports
    assert kind == "warned"
    assert "our certificate ends in 3 hours" in str(sentence)
    nursery.cancel_scope.cancel()


def test_an_identity_without_files_waits_for_its_first_credentials(
    cart: Workload, root: Issued
) -> None:
    waiting = Identity(None)
    assert (waiting.known, waiting.generation) == (False, 0)
    assert waiting.validity_problem() == "there is no certificate yet"
    assert waiting.expiry_warnings() == []
    with pytest.raises(AttributeError):
        _ = waiting.client_context
    read = contents.read_files(cart.files)
    names = contents.MaterialNames("the answer", "our key", ("the roots",))
    assert waiting.use(contents.Contents(names, read.parts)) is True
    assert (waiting.known, waiting.generation, waiting.id) == (True, 1, spiffe("cart"))
    assert waiting.use(contents.Contents(names, read.parts)) is False
    assert waiting.reload() is False
    other = (*read.parts[:1], issue.issue(root, spiffe("cart")).key_pem, *read.parts[2:])
    before = waiting.client_context
    with pytest.raises(MaterialError, match=r"^our key: does not belong to the certificate in the"):
        waiting.use(contents.Contents(names, other))
    assert waiting.client_context is before


def test_a_certificate_of_another_trust_domain_is_not_used(cart: Workload, root: Issued) -> None:
    identity = cart.identity()
    assert identity.id.trust_domain == DOMAIN
    with pytest.raises(MaterialError, match=f"is for the trust domain {DOMAIN}, not other"):
        Identity(cart.files, TLSSettings(own_domain="other.example"))
    assert Identity(cart.files, TLSSettings(own_domain=DOMAIN)).id == identity.id
