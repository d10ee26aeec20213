"""The issuer: it is used only if proxies would accept what it signs. A refused one changes nothing."""

from __future__ import annotations

import logging
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from trio.abc import Clock

from control.identity.issuer import Issuer, NoIssuer
from control.identity.own import OwnCredentials
from proxy.identity import credentials
from proxy.identity.identity import Identity
from proxy.identity.issue import Issued, Validity, issue, make_root
from proxy.identity.signing_request import make_key
from tests.kit.issuing import CONTROL, DOMAIN, WEB, write_issuer
from tests.kit.workloads import authority

DAY = Validity(timedelta(days=1), timedelta(minutes=5))
KEY = make_key().public_key()


class Mount:
    """A mounted Secret with the issuer, and the trust roots."""

    def __init__(self, folder: Path) -> None:
        self.root = make_root(DOMAIN)
        self.directory = folder
        self.roots = folder / "roots.pem"
        self.now = datetime.now(UTC)
        self.trust(self.root)
        write_issuer(folder, self.root)
        self.issuer = Issuer(folder, (self.roots,), CONTROL, lambda: self.now)

    def trust(self, *roots: Issued) -> None:
        self.roots.write_bytes(b"".join(root.certificate_pem for root in roots))


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    return Mount(tmp_path)


def test_it_signs_for_a_day_and_from_five_minutes_before(mount: Mount) -> None:
    assert mount.issuer.read() is True
    signed = mount.issuer.sign(WEB, KEY, DAY)
    leaf = signed.certificate
    assert credentials.spiffe_uri(leaf) == str(WEB)
    assert leaf.public_key() == KEY
    now = mount.now.replace(microsecond=0)
    # The root is valid from 20 s before.
    assert leaf.not_valid_before_utc == mount.root.certificate.not_valid_before_utc
    assert leaf.not_valid_after_utc == now + timedelta(days=1)
    mount.now += timedelta(hours=1)
    later = mount.issuer.sign(WEB, KEY, DAY).certificate
    assert later.not_valid_before_utc == now + timedelta(minutes=55)
    assert mount.issuer.read() is False


def test_a_certificate_never_outlives_the_issuer(mount: Mount) -> None:
    short = make_root(DOMAIN, timedelta(hours=2))
    mount.trust(short)
    write_issuer(mount.directory, short)
    assert mount.issuer.read()
    leaf = mount.issuer.sign(WEB, KEY, DAY).certificate
    assert leaf.not_valid_after_utc == short.certificate.not_valid_after_utc
    mount.now += timedelta(hours=3)
    with pytest.raises(NoIssuer, match="the issuer cannot sign: the root expired on"):
        mount.issuer.sign(WEB, KEY, DAY)


def test_an_intermediate_signs_with_its_chain(mount: Mount) -> None:
    middle = authority(mount.root)
    write_issuer(mount.directory, middle, mount.root)
    assert mount.issuer.read()
    signed = mount.issuer.sign(WEB, KEY, DAY)
    leaf, above = credentials.parse_certificates("chain", signed.chain)
    assert (leaf, above) == (signed.certificate, middle.certificate)
    assert credentials.verify_chain(leaf, [above], [mount.root.certificate], mount.now)


def test_the_names_that_our_command_writes_are_read(mount: Mount) -> None:
    for kind in ("crt", "key"):
        (mount.directory / f"tls.{kind}").unlink()
    (mount.directory / "root.pem").write_bytes(mount.root.certificate_pem)
    (mount.directory / "root.key").write_bytes(mount.root.key_pem)
    assert mount.issuer.read()
    assert mount.issuer.certificate == mount.root.certificate


def expired(mount: Mount) -> None:
    old = make_root(DOMAIN, timedelta(days=1), now=mount.now - timedelta(days=2))
    mount.trust(mount.root, old)
    write_issuer(mount.directory, old)


def of_other_roots(mount: Mount) -> None:
    write_issuer(mount.directory, make_root(DOMAIN))


def of_another_domain(mount: Mount) -> None:
    other = make_root("other.example")
    mount.trust(mount.root, other)
    write_issuer(mount.directory, other)


def with_another_key(mount: Mount) -> None:
    (mount.directory / "tls.key").write_bytes(make_root(DOMAIN).key_pem)


def a_leaf(mount: Mount) -> None:
    write_issuer(mount.directory, issue(mount.root, WEB))


def below_a_path_of_zero(mount: Mount) -> None:
    """An intermediate below one that may have none below it."""
    middle = authority(mount.root)
    write_issuer(mount.directory, authority(middle), middle)


def missing(mount: Mount) -> None:
    (mount.directory / "tls.crt").unlink()


def without_roots(mount: Mount) -> None:
    mount.roots.write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (expired, "the issuer expired on"),
        (of_other_roots, "does not chain to the trust roots"),
        (of_another_domain, "the root is for the trust domain other.example"),
        (with_another_key, "does not belong to the certificate"),
        (a_leaf, "not a CA"),
        (below_a_path_of_zero, ""),
        (missing, "cannot be read"),
        (without_roots, "is empty"),
    ],
)
def test_an_unusable_issuer_is_refused_and_the_old_one_stays(
    mount: Mount, caplog: pytest.LogCaptureFixture, change: object, words: str
) -> None:
    assert mount.issuer.read()
    before = mount.issuer.certificate
    assert callable(change)
    change(mount)
    assert mount.issuer.read() is False
    assert mount.issuer.read() is False
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "cannot use the issuer, keeping the old one: " in record.message
    assert words in record.message
    assert (mount.issuer.failures, mount.issuer.generation) == (1, 1)
    assert mount.issuer.certificate is before
    assert mount.issuer.sign(WEB, KEY, DAY).certificate.issuer == mount.root.certificate.subject
    write_issuer(mount.directory, mount.root)
    mount.trust(mount.root)
    mount.issuer.read()
    assert mount.issuer.problem == ""


def test_without_any_usable_issuer_nothing_is_signed(mount: Mount) -> None:
    missing(mount)
    assert mount.issuer.read() is False
    with pytest.raises(NoIssuer, match=r"there is no usable issuer: .*cannot be read"):
        mount.issuer.sign(WEB, KEY, DAY)


async def test_a_changed_issuer_is_used_without_a_restart(
    mount: Mount, clock: Clock, nursery: trio.Nursery
) -> None:
    """As the kubelet does it: the files are links into a directory that is replaced."""
    new = make_root(DOMAIN)
    mount.issuer.read()
    nursery.start_soon(mount.issuer.watch, 10.0)
    await trio.sleep(25)
    assert mount.issuer.generation == 1
    # Both roots first, then the new issuer.
    mount.trust(mount.root, new)
    await trio.sleep(25)
    write_issuer(mount.directory, new)
    await trio.sleep(25)
    assert mount.issuer.generation == 3
    assert mount.issuer.certificate == new.certificate
    nursery.cancel_scope.cancel()


async def test_an_issuer_that_is_not_valid_yet_is_used_in_time(
    mount: Mount, clock: Clock, nursery: trio.Nursery
) -> None:
    mount.issuer.read()
    early = make_root(DOMAIN, now=mount.now + timedelta(hours=1))
    mount.trust(mount.root, early)
    write_issuer(mount.directory, early)
    nursery.start_soon(mount.issuer.watch, 10.0)
    await trio.sleep(25)
    assert mount.issuer.certificate == mount.root.certificate
    mount.now += timedelta(hours=2)
    await trio.sleep(25)
    assert mount.issuer.certificate == early.certificate
    nursery.cancel_scope.cancel()


async def test_the_control_plane_renews_its_own_certificate(
    mount: Mount, clock: Clock, nursery: trio.Nursery
) -> None:
    start = mount.now
    seen: list[str] = []
    identity = Identity(None, clock=lambda: mount.now)
    own = OwnCredentials(mount.issuer, CONTROL, DAY)
    nursery.start_soon(
        own.run, identity, lambda _: seen.append("ok"), lambda error: seen.append(str(error))
    )
    await trio.sleep(1)
    assert not identity.known
    assert seen == ["there is no usable issuer: the files have not been read yet"]
    mount.issuer.read()
    await trio.sleep(1)
    assert identity.id == CONTROL
    assert identity.not_after == start.replace(microsecond=0) + timedelta(days=1)
    mount.now = start + timedelta(hours=12)
    await trio.sleep(12 * 3600)
    assert identity.generation == 2
    assert identity.not_after == start.replace(microsecond=0) + timedelta(hours=36)
    # A new issuer: at once.
    new = make_root(DOMAIN)
    mount.trust(mount.root, new)
    write_issuer(mount.directory, new)
    mount.issuer.read()
    await trio.sleep(1)
    assert identity.certificate.issuer == new.certificate.subject
    assert len(identity.roots) == 2
    nursery.cancel_scope.cancel()


def test_the_folder_may_disappear(mount: Mount) -> None:
    mount.issuer.read()
    shutil.rmtree(mount.directory)
    assert mount.issuer.read() is False
    assert mount.issuer.certificate == mount.root.certificate
