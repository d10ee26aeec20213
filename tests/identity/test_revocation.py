"""Revoked peers: the list is read as a whole or not at all, and refuses by identity and by serial
number."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from proxy.identity.credential_files import MaterialError
from proxy.identity.identity import PeerRefused
from proxy.identity.issue import Issued, issue
from proxy.identity.revocation import MAX_ENTRIES, RevocationList, Revoked, parse
from tests.kit.workloads import Workload, spiffe

LIST = Path("revoked.txt")


def test_a_list_has_identities_and_serial_numbers() -> None:
    text = f"# stolen\n\n{spiffe('web')}\nserial:00FF  # one\r\n  serial:a\n"
    found = parse(LIST, text.encode())
    assert found == Revoked(frozenset({str(spiffe("web"))}), frozenset({255, 10}))
    assert found
    assert found.has(str(spiffe("web")), None)
    assert found.has("", 255)
    assert not found.has(str(spiffe("cart")), 11)
    assert not parse(LIST, b"")
    assert not parse(LIST, b"# nothing\n")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"web\n", "line 1: neither a SPIFFE ID nor serial:<hexadecimal>"),
        (b"\nserial:xyz\n", "line 2: neither"),
        (b"serial:" + b"f" * 41, "line 1: neither"),
        (b"spiffe://cluster.local/ns/shop/*", "line 1: neither"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"".join(b"serial:%x\n" % n for n in range(MAX_ENTRIES + 1)), "has more than 10000"),
    ],
)
def test_a_malformed_list_is_refused_with_its_line(data: bytes, words: str) -> None:
    with pytest.raises(MaterialError, match=words):
        parse(LIST, data)


def test_a_revoked_peer_is_refused(cart: Workload, root: Issued) -> None:
    identity = cart.identity()
    first, second = (issue(root, spiffe("web")).certificate for _ in range(2))
    assert identity.verify_chain([first]) == spiffe("web")
    identity.revoked = Revoked(serials=frozenset({first.serial_number}))
    with pytest.raises(PeerRefused, match="is on the list of revoked ones") as caught:
        identity.verify_chain([first])
    assert (caught.value.reason, caught.value.alert) == ("revoked", "certificate_unknown")
    assert identity.verify_chain([second]) == spiffe("web")
    identity.revoked = Revoked(frozenset({str(spiffe("web"))}))
    for certificate in (first, second):
        with pytest.raises(PeerRefused):
            identity.verify_chain([certificate])
    assert identity.verify_chain([cart.identity().certificate]) == spiffe("cart")


async def test_a_changed_list_is_used_and_a_broken_or_missing_one_is_not(
    tmp_path: Path, autojump_clock: trio.abc.Clock, nursery: trio.Nursery
) -> None:
    path = tmp_path / "revoked.txt"
    with pytest.raises(MaterialError, match="cannot be read"):
        RevocationList(path, 0.5)
    path.write_text("serial:1\n")
    revocations = RevocationList(path, 0.0)
    assert revocations.current.serials == {1}
    revocations._settle = 0.5
    seen: list[object] = []
    nursery.start_soon(revocations.watch, 10.0, seen.append, lambda error: seen.append(str(error)))
    await trio.sleep(25)
    assert seen == []
    path.write_text("serial:1\nserial:2\n")
    await trio.sleep(25)
    assert seen == [Revoked(serials=frozenset({1, 2}))]
    path.write_text("nonsense\n")
    await trio.sleep(25)
    path.unlink()
    await trio.sleep(25)
    assert len(seen) == 3
    assert "line 1: neither" in str(seen[1])
    assert "cannot be read" in str(seen[2])
    assert revocations.current.serials == {1, 2}
    path.write_text("")
    await trio.sleep(25)
    assert seen[3] == Revoked()
    nursery.cancel_scope.cancel()
