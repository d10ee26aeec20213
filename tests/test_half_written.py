"""Files that are read while they are being written: an incomplete file is not used, at the start or
later.

Real files, written in place and in pieces, as editors and scripts do; the test moves the clock."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy import files
from proxy.config.load import load
from proxy.directory import DirectoryError, parse
from proxy.directory.watcher import Acceptance, DirectorySource, IdentityLoss
from proxy.files import FileUnusable, Settling, read_settled
from proxy.identity.identity import (
    Identity,
    MaterialError,
    MaterialFiles,
    SpiffeId,
    TLSSettings,
)
from proxy.identity.issue import Issued, issue, make_root
from proxy.identity.source import FileSource
from proxy.net.address import Address
from proxy.settings.sources import ConfigError

A, B = (f"spiffe://cluster.local/ns/default/sa/{name}" for name in "ab")
TWO = f"""services:
- name: a
  addresses: [10.96.0.1]
  ports: [{{port: 80}}]
  endpoints:
  - address: 10.1.0.1
    identity: {A}
- name: b
  addresses: [10.96.0.2]
  ports: [{{port: 80}}]
  endpoints:
  - address: 10.1.0.2
    identity: {B}
"""
FURTHER = {"name: a": "name: c", "name: b": "name: d", "10.96.0.": "10.97.0.", "10.1.": "10.2."}
FOUR = TWO + reduce(lambda text, pair: text.replace(*pair), FURTHER.items(), TWO.partition("\n")[2])
WITHOUT_D = FOUR[: FOUR.index("- name: d")]
WITHOUT_A_POD = WITHOUT_D.replace(
    f"endpoints:\n  - address: 10.1.0.2\n    identity: {B}", "endpoints: []"
)
MESHED = [
    Address.parse(text)
    for text in ("10.96.0.1:80", "10.96.0.2:80", "10.1.0.1:80", "10.1.0.2:80", "10.1.0.1:9000")
]
SETTLE, INTERVAL = 0.5, 1.0


class Reports(list[DirectoryError | None]):
    def __call__(self, error: DirectoryError | None) -> None:
        self.append(error)


def source(path: Path, **rules: float) -> DirectorySource:
    """A source whose file was complete at the start, and not written just before."""
    made = DirectorySource(path, Acceptance(**{"settle": 0, **rules}))  # type: ignore[arg-type]
    made.acceptance = Acceptance(**{"settle": SETTLE, **rules})  # type: ignore[arg-type]
    made._settling = Settling(SETTLE)
    return made


class Watched:
    """A source that is read as `watch` does it, with a clock that stands still during reads."""

    def __init__(self, made: DirectorySource, clock: MockClock) -> None:
        self.made = made
        self.reports = Reports()
        self._clock = clock
        self._next = clock.current_time() + INTERVAL

    async def passes(self, seconds: float) -> None:
        """Move the clock by so much."""
        end = self._clock.current_time() + seconds
        while self._next <= end:
            self._clock.jump(self._next - self._clock.current_time())
            await self.made.check(self.reports)
            self._next += min(INTERVAL, SETTLE) if self.made._settling.waiting else INTERVAL
        self._clock.jump(end - self._clock.current_time())


def clear(made: DirectorySource) -> list[Address]:
    """The addresses of TWO to which a connection would be in clear text now."""
    return [
        address
        for address in MESHED
        for endpoint in made.current.resolve(address).endpoints
        if endpoint.identity is None
        and made.former.find(endpoint.address, trio.current_time()) is None
    ]


def put(path: Path, text: str) -> None:
    """Write in place: the file is truncated first."""
    path.write_text(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "directory.yaml"
    put(path, TWO)
    return path


async def test_every_prefix_seen_while_the_file_is_written_changes_nothing(
    file: Path, mock_clock: MockClock
) -> None:
    made = source(file)
    watched = Watched(made, mock_clock)
    for end in range(0, len(FOUR), 7):
        put(file, FOUR[:end])
        await watched.passes(SETTLE - 0.01)
        assert len(made.current.services) == 2
        assert clear(made) == []
    assert watched.reports == []
    put(file, FOUR)
    await watched.passes(INTERVAL + SETTLE + 0.1)
    assert len(made.current.services) == 4
    assert watched.reports == [None]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 120), st.floats(0.01, 3.0)), min_size=1, max_size=12),
    st.booleans(),
)
def test_a_file_written_in_pieces_with_pauses_lets_nothing_out(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, float]], end: bool
) -> None:
    """Pauses of up to three seconds: long enough for two reads of a part to agree. If files have
    end marks, no part is even accepted."""
    file, marked = tmp_path_factory.mktemp("pieces") / "directory.yaml", FOUR + "...\n"
    put(file, TWO + "...\n")

    clock = MockClock()

    async def main() -> None:
        made = source(file, require_end=end)
        watched = Watched(made, clock)
        written = 0
        for size, pause in pieces:
            written = min(written + size, len(marked) - 4)
            put(file, marked[:written])
            await watched.passes(pause)
            assert clear(made) == []
            assert not end or len(made.current.services) == 2
        put(file, marked)
        await watched.passes(INTERVAL + SETTLE + 0.1)
        assert len(made.current.services) == 4
        assert watched.reports[-1] is None
        assert clear(made) == []

    trio.run(main, clock=clock)


async def test_a_change_takes_two_reads_and_no_longer(file: Path, mock_clock: MockClock) -> None:
    made = source(file)
    watched = Watched(made, mock_clock)
    put(file, FOUR)
    await watched.passes(INTERVAL + SETTLE - 0.01)
    assert watched.reports == []
    await watched.passes(0.1)
    assert watched.reports == [None]


async def test_watching_reads_again_as_soon_as_a_change_may_have_settled(file: Path) -> None:
    made, taken = DirectorySource(file, Acceptance(settle=0.05)), trio.Event()
    put(file, FOUR)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.watch, 0.3, lambda _: taken.set())
        started = trio.current_time()
        with trio.fail_after(20):
            await taken.wait()
        assert trio.current_time() - started >= 0.35
        assert len(made.current.services) == 4
        nursery.cancel_scope.cancel()


REFUSED = {
    "cut in front of an identity": (
        TWO[: TWO.rindex("    identity")],
        f"10.1.0.2 had the identity {B} and has none",
    ),
    "cut between services": (
        TWO[: TWO.index("- name: b")],
        "1 of 2 services with identities are missing (default/b)",
    ),
    "nothing left": (
        "services: []\n",
        "2 of 2 services with identities are missing (default/a, default/b)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_file_that_stays_cut_off_is_refused_and_reported_once(
    file: Path, name: str, mock_clock: MockClock
) -> None:
    made = source(file)
    watched = Watched(made, mock_clock)
    text, reason = REFUSED[name]
    put(file, text)
    await watched.passes(60)
    assert len(made.current.services) == 2
    assert clear(made) == []
    (error,) = watched.reports
    assert isinstance(error, IdentityLoss)
    assert reason in str(error)
    assert "allow_identity_loss" in str(error)
    put(file, TWO)
    await watched.passes(5)
    put(file, text)
    await watched.passes(5)
    assert [type(report) for report in watched.reports] == [IdentityLoss, IdentityLoss], (
        "reported again after it was good"
    )
    put(file, f"allow_identity_loss: true\n{text}")
    await watched.passes(5)
    assert watched.reports[-1] is None


async def test_removed_identities_get_no_clear_text_until_the_time_is_over(
    file: Path, mock_clock: MockClock
) -> None:
    put(file, FOUR)
    made = source(file, remember=300.0)
    watched = Watched(made, mock_clock)
    put(file, WITHOUT_A_POD)
    await watched.passes(5)
    assert watched.reports == [None]
    gone = [Address("10.97.0.2", 80), Address("10.2.0.2", 80), Address("10.1.0.2", 80)]
    for address in gone:
        assert made.current.find_address(address) is None
        assert made.former.find(address, trio.current_time()) is not None
    await watched.passes(300)
    assert [made.former.find(address, trio.current_time()) for address in gone] == [
        None,
        None,
        None,
    ]


async def test_a_file_that_would_exceed_the_memory_is_refused_until_there_is_room(
    file: Path, mock_clock: MockClock
) -> None:
    put(file, FOUR)
    made = source(file, remember=100.0, max_remembered=2)
    watched = Watched(made, mock_clock)
    put(file, WITHOUT_D)  # two addresses
    await watched.passes(5)
    assert watched.reports == [None]
    put(file, WITHOUT_A_POD)
    await watched.passes(5)
    assert "more than 2 addresses would be remembered as former identities" in str(
        watched.reports[-1]
    )
    assert len(watched.reports) == 2
    await watched.passes(100)
    assert watched.reports[-1] is None


# Certificates, keys and roots...


@dataclass
class Held:
    """An identity whose files are written in place, and its reports."""

    identity: Identity
    changes: list[int]
    errors: list[Exception]

    async def watched(self) -> None:
        await FileSource(0.02).run(
            self.identity,
            lambda found: self.changes.append(len(found.roots)),
            self.errors.append,
        )


def held(folder: Path, roots: list[Issued]) -> Held:
    """With a certificate of the first root; both roots are trusted."""
    leaf = issue(roots[0], SpiffeId.parse(A))
    bundle = b"".join(root.certificate_pem for root in roots)
    for name, pem in (
        ("certificate", leaf.certificate_pem),
        ("key", leaf.key_pem),
        ("roots", bundle),
    ):
        (folder / f"{name}.pem").write_bytes(pem)
        (folder / f"{name}.pem").chmod(0o600)
    files_ = MaterialFiles(folder / "certificate.pem", folder / "key.pem", (folder / "roots.pem",))
    found = Held(Identity(files_, TLSSettings()), [], [])
    found.identity.settings = TLSSettings(settle=0.3)
    return found


async def test_an_incomplete_file_of_roots_is_never_used(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Each prefix that ends after a certificate is a valid file of fewer roots, and would refuse
    the peers of the others."""
    roots = [make_root("cluster.local") for _ in range(4)]
    made, path = held(tmp_path, roots[:2]), tmp_path / "roots.pem"
    new = b"".join(root.certificate_pem for root in roots)
    ends = [len(b"".join(root.certificate_pem for root in roots[:count])) for count in range(5)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.watched)
        for end in sorted({*ends, *range(0, len(new), 300)}):
            path.write_bytes(new[:end])
            await trio.sleep(0.06)  # three reads
            assert len(made.identity.roots) in (2, 4)
            if end < len(new):
                assert made.changes == []
        await trio.sleep(0.4)
        assert made.changes == [4]
        assert made.errors == []
        nursery.cancel_scope.cancel()


async def test_a_key_and_its_certificate_that_are_written_in_turn_are_taken_together(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    root = make_root("cluster.local")
    made, leaf = held(tmp_path, [root, make_root("cluster.local")]), issue(root, SpiffeId.parse(A))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.watched)
        for name, pem in (("certificate", leaf.certificate_pem), ("key", leaf.key_pem)):
            for end in (0, len(pem) // 2, len(pem)):
                (tmp_path / f"{name}.pem").write_bytes(pem[:end])
                await trio.sleep(0.04)
        await trio.sleep(0.4)
        assert made.errors == [], "no incomplete file was even read"
        assert made.identity.generation == 2
        nursery.cancel_scope.cancel()


def test_a_file_that_ends_inside_a_certificate_is_refused(tmp_path: Path) -> None:
    roots = [make_root("cluster.local") for _ in range(2)]
    made, path = held(tmp_path, roots), tmp_path / "roots.pem"
    first, second = (root.certificate_pem for root in roots)
    for end in (30, 200, len(second) - 10):
        path.write_bytes(first + second[:end])
        with pytest.raises(MaterialError, match="ends inside a PEM block"):
            made.identity.reload()
    path.write_bytes(b"# the root of last year\n" + first + b"# and nothing behind it\n")
    assert made.identity.reload()


# The start...


def read(path: Path) -> Callable[[], tuple[bytes, bytes]]:
    def once() -> tuple[bytes, bytes]:
        data = path.read_bytes()
        return data, data

    return once


def test_a_file_that_has_been_left_alone_is_used_at_once(file: Path) -> None:
    os.utime(file, (1, 1))
    time.sleep(0.25)  # the inode was touched too
    started = time.monotonic()
    assert read_settled(read(file), [file], 0.2)[0] == TWO.encode()
    assert time.monotonic() - started < 0.15


def test_a_fresh_file_is_read_twice(file: Path) -> None:
    started = time.monotonic()
    assert read_settled(read(file), [file], 0.2)[0] == TWO.encode()
    assert 0.2 <= time.monotonic() - started < 2


def test_a_writer_that_is_faster_than_the_reads_is_waited_for(file: Path) -> None:
    put(file, "")

    def write() -> None:
        for end in range(0, len(TWO), 40):
            put(file, TWO[:end])
            time.sleep(0.02)
        put(file, TWO)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = DirectorySource(file, Acceptance(settle=0.25))
    finally:
        writer.join()
    assert [service.name for service in made.current.services] == ["a", "b"]


def test_a_file_that_keeps_changing_ends_the_wait(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    count = iter(range(1000))
    with pytest.raises(FileUnusable, match="keeps changing"):
        read_settled(lambda: (None, str(next(count)).encode()), [file], 0.02)


def test_a_file_without_its_end_is_refused_where_the_end_is_asked_for(file: Path) -> None:
    for text in (TWO, TWO + "..", TWO + "...", TWO + "# ...\n", TWO + "  ...\n"):
        put(file, text)
        with pytest.raises(DirectoryError, match=r"does not end with a line `\.\.\.`"):
            DirectorySource(file, Acceptance(settle=0, require_end=True))
    for text in (TWO + "...\n", TWO + "...\n\n"):
        put(file, text)
        assert (
            len(DirectorySource(file, Acceptance(settle=0, require_end=True)).current.services) == 2
        )
        assert len(parse(text, "test").services) == 2, "it changes nothing in the document"


def test_an_incomplete_configuration_is_not_used(tmp_path: Path) -> None:
    path, whole = tmp_path / "isthmus.yaml", "log: {level: debug}\ncluster: east\n"
    put(path, "log: {level: debug}\n")
    writer = threading.Timer(0.1, put, (path, whole))
    writer.start()
    try:
        assert load(path, {}, 0.3).cluster == "east"
    finally:
        writer.join()
    put(path, "log: 3\n")
    with pytest.raises(ConfigError):
        load(path, {}, 0.05)


def test_settling_counts_two_reads_with_nothing_between() -> None:
    settling = Settling(1.0)
    assert not settling.agreed(b"a", 0.0)
    assert settling.waiting
    assert not settling.agreed(b"b", 0.6)
    assert not settling.agreed(b"a", 1.2)
    assert not settling.agreed(b"a", 2.1)
    assert settling.agreed(b"a", 2.2)
    assert not settling.waiting
    assert Settling(0).agreed(b"a", 0.0)
