"""Malformed files: whatever bytes a certificate, key or root file has, they are refused with a
message and nothing stops.

A parser is lazy, two libraries read the same certificate with different strictness, and an
undocumented error of either would end the process that reads the files. So bytes of good files are
changed, singly and at random with a seed. The outcome is a MaterialError or success, and nothing
else. What was in use stays in use."""

import base64
import random
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from trio.testing import MockClock

from proxy import cli, files
from proxy.identity import credentials, issue
from proxy.identity.identity import Identity, MaterialError
from proxy.identity.inspect import describe
from proxy.identity.issue import Issued
from proxy.identity.source import FileSource
from tests.kit.workloads import DOMAIN, Log, Workload, spiffe

CERTIFICATE, KEY = "CERTIFICATE", "PRIVATE KEY"


def armoured(der: bytes, label: str = CERTIFICATE) -> bytes:
    return (
        f"-----BEGIN {label}-----\n".encode()
        + base64.encodebytes(der)
        + f"-----END {label}-----\n".encode()
    )


def edited(issued: Issued, old: bytes, new: bytes) -> bytes:
    """The certificate in PEM with some of its bytes replaced. Then its signature is wrong, which is
    not checked at this point."""
    der = issued.certificate.public_bytes(Encoding.DER)
    assert old in der
    assert len(old) == len(new)
    return armoured(der.replace(old, new))


class Damage(NamedTuple):
    """Bytes of a root to be replaced, and a part of the message."""

    old: bytes
    new: bytes
    words: str

    def done_to(self, root: Issued) -> bytes:
        return edited(root, self.old, self.new)


# OpenSSL refuses the first; the library that shows certificates refuses the second, with an error
# of its own type. Then subjects whose text is of another type, or of a type that only one attribute
# may have; a date; and extensions, which are parsed on access.
DAMAGES = [
    Damage(b"mesh.test root", b"\xff\xfesh.test root", "invalid utf8string"),
    Damage(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x2b", "43 is not a valid X509 version"),
    Damage(b"\x06\x03\x55\x04\x03\x0c", b"\x06\x03\x55\x04\x03\x1e", ""),
    Damage(b"\x06\x03\x55\x04\x03\x0c\x17m", b"\x06\x03\x55\x04\x03\x03\x17\x00", "BitString"),
    Damage(b"\x17\x0d", b"\x17\x0c", ""),
    Damage(b"\x06\x03\x55\x1d\x13\x01\x01\xff", b"\x06\x03\x55\x1d\x0f\x01\x01\xff", ""),
    Damage(b"\x06\x03\x55\x1d\x1e\x01\x01\xff", b"\x06\x03\x55\x1d\x11\x01\x01\xff", ""),
]


@pytest.fixture(params=DAMAGES)
def damage(request: pytest.FixtureRequest) -> Damage:
    found: Damage = request.param
    return found


def test_a_malformed_root_beside_good_ones_is_refused_with_a_message(
    cart: Workload, damage: Damage
) -> None:
    identity = cart.identity()
    context = identity.server_context
    with cart.files.roots[0].open("ab") as file:
        file.write(damage.done_to(issue.make_root(DOMAIN)))
    with pytest.raises(MaterialError) as caught:
        identity.reload()
    assert caught.value.path == cart.files.roots[0]
    assert "cannot be parsed" in caught.value.reason
    assert damage.words in caught.value.reason
    assert "\n" not in str(caught.value)
    assert identity.reload() is False
    assert (identity.failures, identity.generation) == (1, 1)
    assert identity.server_context is context
    with pytest.raises(MaterialError, match=r"roots.pem: .* cannot be parsed"):
        cart.identity()


def test_the_malformed_one_of_several_is_counted_out(cart: Workload, root: Issued) -> None:
    good = root.certificate_pem
    files.write_public(
        cart.files.roots[0], good + edited(root, b"mesh.test root", b"\xff\xfesh.test root") + good
    )
    with pytest.raises(MaterialError, match=r"number 2 of 3.*invalid utf8string"):
        cart.identity()


def test_an_unusual_root_that_is_well_formed_is_accepted_silently(
    cart: Workload, root: Issued
) -> None:
    """The library warns that it will refuse a negative serial number in the future. A warning would
    be lines on standard error."""
    number = root.certificate.serial_number
    written = number.to_bytes(number.bit_length() // 8 + 1, "big")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = credentials.parse_certificates(
            cart.files.roots[0], edited(root, written, b"\x80" + written[1:])
        )
        assert dict(describe(found, credentials.utc_now()))["serial"].startswith("-")


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Most changes are to one byte, some to two or three; some remove or insert bytes."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place, kind = rng.randrange(len(found)), rng.random()
        if kind < 0.8:
            found[place] = rng.randrange(256)
        elif kind < 0.9:
            del found[place : place + rng.randrange(1, 4)]
        else:
            found[place:place] = rng.randbytes(rng.randrange(1, 4))
    return bytes(found)


def attempt(identity: Identity) -> MaterialError | None:
    """Loads the files, or returns the error with the reason. Then reads what the process reads of
    the loaded identity."""
    refusal = None
    try:
        identity.reload()
    except MaterialError as error:
        refusal = error
    for certificate in (identity.certificate, *identity.roots):
        describe(certificate, credentials.utc_now())
    assert identity.roots_not_after
    assert identity.not_after
    identity.expiry_warnings()
    return refusal


@pytest.mark.parametrize("which", ["certificate", "key", "roots", "further root"])
@pytest.mark.parametrize(("form", "rounds"), [("DER", 650), ("PEM", 250)])
def test_any_bytes_are_material_or_a_material_error(
    cart: Workload, root: Issued, which: str, form: str, rounds: int
) -> None:
    """Seeded. The keys are new in each run, so a failure shows its bytes."""
    issued = cart.renew(root)
    path = {"certificate": cart.files.certificate, "key": cart.files.key}.get(
        which, cart.files.roots[0]
    )
    good = path.read_bytes()
    kept = good if which == "further root" else b""
    label = KEY if which == "key" else CERTIFICATE
    if which == "key":
        der = issued.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    else:
        der = (issued if which == "certificate" else root).certificate.public_bytes(Encoding.DER)
    rng = random.Random(f"{which} {form}")
    identity = cart.identity()
    refused = 0
    for _ in range(rounds):
        damaged = kept + (
            armoured(mutated(rng, der), label) if form == "DER" else mutated(rng, good)
        )
        path.write_bytes(damaged)
        before = identity.server_context
        try:
            refusal = attempt(identity)
        except BaseException as error:
            error.add_note(damaged.decode("ascii", "backslashreplace"))
            raise
        if refusal is not None:
            refused += 1
            assert identity.server_context is before
            assert len(str(refusal).splitlines()) == 1
    assert refused > rounds / 4
    path.write_bytes(good)
    identity.reload()
    assert identity.last_error is None


async def test_a_running_watch_survives_a_malformed_root(
    cart: Workload, root: Issued, damage: Damage, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    identity, log = cart.identity(), Log()
    nursery.start_soon(FileSource(10).run, identity, log.changed, log.failed)
    await trio.sleep(15)
    with cart.files.roots[0].open("ab") as file:
        file.write(damage.done_to(issue.make_root(DOMAIN)))
    await trio.sleep(50)
    assert log.reports == [("failed", "roots.pem")]
    assert identity.generation == 1
    assert identity.failures == 1
    cart.write_roots(root, issue.make_root(DOMAIN))
    await trio.sleep(10)
    assert log.reports == [("failed", "roots.pem"), ("changed", 2)]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["certificate.pem", "roots.pem"])
def test_a_proxy_does_not_start_with_a_malformed_file_and_says_so_in_one_line(
    cart: Workload,
    root: Issued,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = edited(root, b"mesh.test root", b"\xff\xfesh.test root")
    (cart.directory / name).write_bytes(broken)
    names = cart.files
    monkeypatch.setenv("ISTHMUS_IDENTITY__CERTIFICATE", str(names.certificate))
    monkeypatch.setenv("ISTHMUS_IDENTITY__KEY", str(names.key))
    monkeypatch.setenv("ISTHMUS_IDENTITY__ROOTS", f"[{names.roots[0]}]")
    monkeypatch.setenv("ISTHMUS_TRUST_DOMAIN", DOMAIN)
    assert cli.main(["run"]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{cart.directory / name}: holds a certificate that cannot be parsed: " in line


def test_show_reports_what_is_malformed_and_continues_with_the_next_file(
    tmp_path: Path, root: Issued, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, good = tmp_path / "broken.pem", tmp_path / "good.pem"
    files.write_public(broken, damage.done_to(root))
    files.write_public(good, issue.issue(root, spiffe("cart")).certificate_pem)
    assert cli.main(["identity", "show", str(broken), str(good)]) == 1
    shown = capsys.readouterr().out
    assert "FAILED       holds a certificate that cannot be parsed: " in shown
    assert damage.words in shown
    assert str(spiffe("cart")) in shown
    assert cli.main(["identity", "show", str(good), "--roots", str(broken)]) == 64
    assert "broken.pem: holds a certificate that cannot be parsed" in capsys.readouterr().err


def test_a_name_cannot_give_orders_to_a_terminal_or_begin_a_line(
    tmp_path: Path, root: Issued, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "root.pem"
    files.write_public(path, edited(root, b"mesh.test root", b"m\x1b[2J\nt\r root "))
    assert cli.main(["identity", "show", str(path)]) == 0
    assert r"CN=m\x1b[2J\nt\r root" in capsys.readouterr().out


def test_a_root_whose_parts_are_malformed_issues_nothing(
    tmp_path: Path, root: Issued, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write_private(tmp_path / "root.key", root.key_pem)
    (tmp_path / "root.pem").write_bytes(
        edited(root, b"\x06\x03\x55\x1d\x1e\x01\x01\xff", b"\x06\x03\x55\x1d\x11\x01\x01\xff")
    )
    assert (
        cli.main(
            [
                "identity",
                "issue",
                "--root",
                str(tmp_path),
                "--id",
                str(spiffe("a")),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 64
    )
    assert "root.pem: holds a certificate that cannot be parsed" in capsys.readouterr().err


def test_lifetimes_far_beyond_a_hundred_years_are_described(cart: Workload, root: Issued) -> None:
    """GeneralizedTime ends with the year 9999; the text about the remaining time must not
    overflow."""
    der = root.certificate.public_bytes(Encoding.DER)
    start = der.index(b"\x17\x0d", der.index(b"\x17\x0d") + 1)
    longer = b"\x18\x0f99991231235959Z"
    grown = bytearray(der[:start] + longer + der[start + 15 :])
    for place in (
        2,
        6,
        start - 16,
    ):  # the lengths around it: certificate, its signed part, validity
        if place == start - 16:
            grown[place] += 2
        else:
            grown[place : place + 2] = (
                int.from_bytes(grown[place : place + 2], "big") + 2
            ).to_bytes(2, "big")
    (certificate,) = credentials.parse_certificates(cart.files.roots[0], armoured(bytes(grown)))
    words = dict(describe(certificate, credentials.utc_now() + timedelta(days=1)))
    assert "9999-12-31" in words["valid until"]
