"""Layers contain what a step has changed, in the format of image archives. A step whose input is
the same is not run again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from lab.kube.archive import archive
from lab.kube.images import Builder
from lab.kube.layers import UNUSED, Layer, Store
from lab.process import LabError

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="layers are made by root"),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "layers")


def step(store: Store, key: str, under: list[Layer], script: str, log: Path) -> Layer:
    return store.layer(key, lambda upper: store.run(under, upper, script, log))


def names(layer: Layer) -> set[str]:
    with tarfile.open(layer.archive()) as file:
        return set(file.getnames())


def test_a_layer_has_added_replaced_and_deleted_files(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = store.layer("1", _first)
    second = step(
        store, "2", [first], 'cd "$ROOT"; test -e a; rm a; rm -r d; mkdir d; echo c >d/c', log
    )
    third = step(
        store,
        "3",
        [first, second],
        'cd "$ROOT"; test ! -e a; test ! -e d/b; test -e hard; echo more >>d/c',
        log,
    )
    assert names(first) == {"a", "hard", "link", "d", "d/b"}
    assert names(second) == {".wh.a", "d", "d/.wh..wh..opq", "d/c"}
    assert names(third) == {"d", "d/c"}


def _first(tree: Path) -> None:
    (tree / "d").mkdir()
    (tree / "a").write_text("a")
    (tree / "d" / "b").write_text("b")
    (tree / "link").symlink_to("a")
    (tree / "hard").hardlink_to(tree / "a")
    os.chown(tree / "a", 2102, 2102)
    os.utime(tree / "a", (1_600_000_000, 1_600_000_000))


def test_owners_times_and_links_are_kept(store: Store) -> None:
    with tarfile.open(store.layer("1", _first).archive()) as file:
        found = file.getmember("a")
        assert (found.uid, found.gid, found.mtime, found.uname) == (2102, 2102, 1_600_000_000, "")
        assert file.getmember("link").issym()
        assert file.getmember("hard").linkname == "a"


def test_a_step_that_fails_shows_its_output_and_leaves_no_layer(
    store: Store, tmp_path: Path
) -> None:
    under = store.layer("1", _first)
    with pytest.raises(LabError, match=r"(?s)failed with 3.*why not"):
        step(store, "2", [under], "echo why not >&2; exit 3", tmp_path / "log")
    made = step(store, "2", [under], 'echo x >"$ROOT/x"', tmp_path / "log")
    assert names(made) == {"x"}
    assert step(store, "2", [under], "exit 1", tmp_path / "log") == made  # not run again


def test_layers_that_are_not_used_and_unfinished_ones_are_removed(store: Store) -> None:
    used, unused = store.layer("1", _first), store.layer("2", _first)
    half = used.path.with_name(".3.new")
    half.mkdir()
    past = time.time() - UNUSED - 60
    os.utime(unused.path, (past, past))
    store.prune()
    assert (used.path.exists(), unused.path.exists(), half.exists()) == (True, False, False)


def test_a_file_with_capabilities_is_refused(store: Store) -> None:
    def make(tree: Path) -> None:
        (tree / "ping").touch()
        os.setxattr(
            tree / "ping",
            "security.capability",
            bytes.fromhex("0100000200200000000000000000000000000000"),
        )

    layer = store.layer("1", make)
    with pytest.raises(LabError, match="/ping has file capabilities"):
        layer.archive()


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "data" / "inner").mkdir(parents=True)
    (folder / "program").write_text("one")
    (folder / "program").chmod(0o755)
    (folder / "data" / "inner" / "file").write_text("two")
    (folder / "data" / "left.pyc").write_text("out")
    (folder / ".dockerignore").write_text("**/*.pyc\n")
    text = 'FROM scratch\nCOPY program /bin/\nUSER 5:6\nENV A=b\nEXPOSE 80 53/udp\nENTRYPOINT ["/bin/program"]\nCMD ["x"]\n'
    (folder / "Dockerfile").write_text(text)
    return folder


def test_an_image_is_the_result_of_its_steps(tmp_path: Path, context: Path) -> None:
    built = Builder(tmp_path / "cache").build(context / "Dockerfile", context)
    assert built.settings() == {
        "Entrypoint": ["/bin/program"],
        "Cmd": ["x"],
        "User": "5:6",
        "Env": ["A=b"],
        "WorkingDir": "/",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
    }
    (layer,) = built.layers
    assert (layer.tree / "bin" / "program").read_text() == "one"
    assert (layer.tree / "bin" / "program").stat().st_mode & 0o777 == 0o755


def test_a_changed_file_makes_another_image_and_an_ignored_one_does_not(
    tmp_path: Path, context: Path
) -> None:
    (context / "Dockerfile").write_text("FROM scratch\nCOPY data /data\n")
    builder = Builder(tmp_path / "cache")
    first = builder.build(context / "Dockerfile", context)
    assert {path.name for path in first.layers[0].tree.rglob("*")} == {"data", "inner", "file"}
    (context / "data" / "left.pyc").write_text("changed")
    assert builder.build(context / "Dockerfile", context) == first
    (context / "data" / "inner" / "file").write_text("changed")
    second = builder.build(context / "Dockerfile", context)
    assert second.key != first.key
    assert (second.layers[0].tree / "data" / "inner" / "file").read_text() == "changed"


def test_a_source_that_is_not_there_is_named(tmp_path: Path, context: Path) -> None:
    (context / "Dockerfile").write_text("FROM scratch\nCOPY nothing /\n")
    with pytest.raises(LabError, match=r"context/nothing: nothing to copy"):
        Builder(tmp_path / "cache").build(context / "Dockerfile", context)


def test_a_base_that_cannot_be_put_together_is_named(tmp_path: Path, context: Path) -> None:
    (context / "Dockerfile").write_text("FROM alpine:3\n")
    with pytest.raises(LabError, match=r"alpine:3: only python:X\.Y-slim-SUITE"):
        Builder(tmp_path / "cache").build(context / "Dockerfile", context)


def test_an_archive_has_each_layer_once_and_names_its_contents_by_hash(
    tmp_path: Path, context: Path
) -> None:
    builder = Builder(tmp_path / "cache")
    one = builder.build(context / "Dockerfile", context)
    (context / "Dockerfile").write_text('FROM scratch\nCOPY program /bin/\nCMD ["y"]\n')
    two = builder.build(context / "Dockerfile", context)
    file = archive({"one:1": one, "two:1": two}, tmp_path / "archives")
    with tarfile.open(file) as tar:
        members = tar.getnames()
        read = {name: tar.extractfile(name).read() for name in members}  # type: ignore[union-attr]
    index = json.loads(read["manifest.json"])
    assert [entry["RepoTags"] for entry in index] == [["one:1"], ["two:1"]]
    assert len(members) == len(set(members)) == 4  # both configurations, the index, and one layer
    for entry in index:
        (layer,) = entry["Layers"]
        digest = hashlib.sha256(read[layer]).hexdigest()
        assert json.loads(read[entry["Config"]])["rootfs"]["diff_ids"] == [f"sha256:{digest}"]
        with tarfile.open(fileobj=io.BytesIO(read[layer])) as tar:
            assert "bin/program" in tar.getnames()
    assert archive({"one:1": one, "two:1": two}, tmp_path / "archives") == file
