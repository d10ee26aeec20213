"""The watcher of the directory: a good change replaces the snapshot as a whole. A bad one keeps the
old snapshot and is reported once. The files are real; only the clock is simulated."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from proxy.directory import DirectoryError
from proxy.directory.watcher import MOST_BYTES, Acceptance, DirectorySource
from proxy.net.address import Address
from tests.directory.documents import large

A = "services: [{name: a, addresses: [10.0.0.1], ports: [{port: 80}]}]\n"
B = A.replace("name: a", "name: b")
ONE_READ = Acceptance(settle=0)


def rewrite_in_the_same_tick(path: Path, text: str) -> None:
    """Replace the text of a file. Its size, inode and time stay as they were."""
    first = path.stat()
    path.write_text(text)
    os.utime(path, ns=(first.st_atime_ns, first.st_mtime_ns))


def make(directory: Path, text: str) -> None:
    directory.mkdir()
    write(directory / "directory.yaml", text)


def move(path: Path, target: Path) -> None:
    path.rename(target)


def swap(link: Path, target: str) -> None:
    """Point a symbolic link elsewhere in one step, as Kubernetes does."""
    new = link.with_name("..new")
    new.symlink_to(target)
    new.rename(link)


class Reports(list[DirectoryError | None]):
    def __call__(self, error: DirectoryError | None) -> None:
        self.append(error)


def name(source: DirectorySource) -> str | None:
    return source.current.resolve(Address("10.0.0.1", 80)).service


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "directory.yaml"
    write(path, A)
    return path


def test_a_missing_file_at_the_start_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DirectoryError, match=r"nowhere.yaml: cannot be read: No such file"):
        DirectorySource(tmp_path / "nowhere.yaml", ONE_READ)


def test_a_broken_file_at_the_start_is_an_error(file: Path) -> None:
    write(file, "services: 3")
    with pytest.raises(DirectoryError, match="services: expected a list"):
        DirectorySource(file, ONE_READ)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"services: [\xe9]"])
def test_a_file_that_is_not_utf8_is_an_error(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(DirectoryError, match="not UTF-8 at byte"):
        DirectorySource(file, ONE_READ)


def replace(path: Path, put: Callable[[Path], None]) -> None:
    path.unlink()
    put(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [pipe, device, Path.mkdir])
async def test_a_file_that_is_not_regular_is_an_error_and_stops_nothing(
    file: Path, put: Callable[[Path], None]
) -> None:
    source, reports = DirectorySource(file, ONE_READ), Reports()
    replace(file, put)
    with trio.fail_after(30):
        await source.check(reports)
        await source.check(reports)
    assert [str(error) for error in reports] == [f"{file}: is not a regular file"]
    assert name(source) == "default/a"
    with pytest.raises(DirectoryError, match="is not a regular file"):
        DirectorySource(file, ONE_READ)


def test_a_file_without_end_is_not_read_to_its_end(file: Path) -> None:
    os.truncate(file, MOST_BYTES + 1)
    with pytest.raises(DirectoryError, match="is larger than 64 MiB"):
        DirectorySource(file, ONE_READ)


async def test_a_change_swaps_the_snapshot_and_leaves_the_old_one_as_it_was(file: Path) -> None:
    source, reports = DirectorySource(file, ONE_READ), Reports()
    before = source.current
    write(file, B)
    await source.check(reports)
    assert (name(source), reports) == ("default/b", [None])
    assert before.resolve(Address("10.0.0.1", 80)).service == "default/a"


async def test_two_writes_in_one_tick_of_the_clock_are_both_seen(file: Path) -> None:
    source, reports = DirectorySource(file, ONE_READ), Reports()
    rewrite_in_the_same_tick(file, B)
    await source.check(reports)
    assert name(source) == "default/b"


async def test_a_file_that_was_touched_and_not_changed_is_not_a_change(file: Path) -> None:
    source, reports = DirectorySource(file, ONE_READ), Reports()
    before = source.current
    os.utime(file, (1, 1))
    await source.check(reports)
    assert source.current is before
    assert reports == []


async def test_a_broken_file_keeps_the_old_snapshot_and_is_reported_once_for_each_state(
    file: Path,
) -> None:
    source, reports = DirectorySource(file, ONE_READ), Reports()
    write(file, "services: [{name: a}]")
    for _ in range(3):
        await source.check(reports)
    assert name(source) == "default/a"
    assert [str(error).split(": ", 1)[1] for error in reports] == [
        "services[0].ports: at least one port must be given"
    ]
    write(file, "services: 3")
    await source.check(reports)
    write(file, B)
    await source.check(reports)
    assert len(reports) == 3
    assert reports[-1] is None
    assert name(source) == "default/b"


async def test_a_file_that_goes_and_comes_back_is_reported_each_time(file: Path) -> None:
    source, reports = DirectorySource(file, ONE_READ), Reports()
    away = file.with_name("away")
    for _ in range(2):
        move(file, away)
        await source.check(reports)
        await source.check(reports)
        move(away, file)
        await source.check(reports)
    assert len(reports) == 2
    assert all("cannot be read" in str(error) for error in reports)
    assert name(source) == "default/a"


async def test_the_symbolic_links_that_kubernetes_swaps_are_followed(tmp_path: Path) -> None:
    for version, text in (("1", A), ("2", B)):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "directory.yaml", text)
    swap(tmp_path / "..data", "1")
    swap(tmp_path / "directory.yaml", "..data/directory.yaml")
    source, reports = DirectorySource(tmp_path / "directory.yaml", ONE_READ), Reports()
    assert name(source) == "default/a"
    swap(tmp_path / "..data", "2")
    await source.check(reports)
    assert name(source) == "default/b"


async def test_watching_looks_once_in_every_interval(file: Path, mock_clock: MockClock) -> None:
    source, reports = DirectorySource(file, ONE_READ), Reports()
    swapped = trio.Event()

    def report(error: DirectoryError | None) -> None:
        reports(error)
        swapped.set()

    write(file, B)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.watch, 10, report)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(9)
        await trio.testing.wait_all_tasks_blocked()
        assert name(source) == "default/a"
        mock_clock.jump(1)
        await swapped.wait()
        assert name(source) == "default/b"
        nursery.cancel_scope.cancel()


async def test_reading_a_large_directory_causes_no_garbage_collection(file: Path) -> None:
    """A full collection during the read would stop all requests for as long as it takes to visit
    all objects."""
    source, reports = DirectorySource(file, ONE_READ), Reports()
    full = gc.get_stats()[2]["collections"]
    write(file, large(1000))
    try:
        await source.check(reports)
        assert len(source.current.services) == 1000
        assert gc.get_stats()[2]["collections"] == full
        assert gc.get_freeze_count() > 5000, "the snapshot is not visited"
        assert gc.isenabled()
        write(file, "services: 3")
        await source.check(reports)
        assert reports[-1] is not None
        assert gc.isenabled()
    finally:
        gc.unfreeze()
