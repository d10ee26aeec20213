"""Layers of images: directories, made by running something on top of others, kept by a key, and
written as archives.

A layer is the upper directory of an overlay mount. What runs does so in mount and process-id
namespaces of its own, so a build that is killed leaves no mount behind. Needs root, and a file
system that an overlay can have its upper directory on (ext4, xfs, tmpfs; not another overlay).
"""

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.process import LabError

UNUSED = 14 * 86400.0  # seconds after which `prune` removes a layer that no build has used
_OVERLAY = "redirect_dir=off,metacopy=off,index=off"
_OPAQUE = "trusted.overlay.opaque"
_TAIL = 30  # lines of a failed step's output that the error shows


@dataclass(frozen=True, slots=True)
class Layer:
    """A finished layer. `path` is its directory, `tree` what is in it."""

    path: Path

    @property
    def key(self) -> str:
        """What it was made from, as a hash."""
        return self.path.name

    @property
    def tree(self) -> Path:
        """The files of the layer, with the kernel's marks for deleted ones."""
        return self.path / "tree"

    def archive(self) -> Path:
        """The layer as a tar archive (OCI image specification, layer.md). Written at the first
        call."""
        file = self.path / "layer.tar"
        if not file.exists():
            part = file.with_suffix(".part")
            _write_archive(self.tree, part)
            part.rename(file)
        return file

    def digest(self) -> str:
        """The SHA-256 of the archive, in hexadecimal."""
        file = self.path / "digest"
        if not file.exists():
            with self.archive().open("rb") as archive:
                digest = hashlib.file_digest(archive, "sha256").hexdigest()
            part = file.with_suffix(".part")
            part.write_text(digest)
            part.rename(file)
        return file.read_text()


class Store:
    """The layers under a directory. One process at a time builds (`locked`)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process builds here, and keep others out."""
        with (self._root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def layer(self, key: str, make: Callable[[Path], None]) -> Layer:
        """The layer with this key. `make` fills an empty directory with its files if the layer is
        not there yet."""
        final = self._root / key
        if not final.exists():
            work = self._root / f".{key}.new"
            _remove(work)
            (work / "tree").mkdir(parents=True)
            make(work / "tree")
            work.rename(final)
        os.utime(final)
        return Layer(final)

    def run(self, under: Sequence[Layer], upper: Path, script: str, log: Path) -> None:
        """Run a shell script with the merged tree of `under` and `upper` at $ROOT. Raises LabError
        with the end of its output."""
        work, root = upper.with_name("work"), upper.with_name("root")
        for directory in (work, root):
            directory.mkdir(exist_ok=True)
        # Names relative to the store: the options of a mount have to fit in one page.
        lower = ":".join(f"{layer.key}/tree" for layer in reversed(under))
        places = f"lowerdir={lower},upperdir={upper.relative_to(self._root)},workdir={work.relative_to(self._root)}"
        mount = f"mount -t overlay overlay -o {_OVERLAY},{places} {shlex.quote(str(root))}"
        whole = f"set -e\ncd {shlex.quote(str(self._root))}\n{mount}\nROOT={shlex.quote(str(root))}\n{script}"
        namespaces = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
        ]
        with log.open("ab") as file:
            done = subprocess.run(
                [*namespaces, "sh", "-c", whole],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
            raise LabError(
                f"a step of the image failed with {done.returncode}; its output ({log}) ends with:\n{tail}"
            )
        _remove(work)
        _remove(root)

    def prune(self) -> None:
        """Remove layers that were not used for UNUSED seconds, and unfinished ones of builds that
        were killed."""
        for unfinished in self._root.glob(".*.new"):
            _remove(unfinished)
        prune(self._root)


def prune(directory: Path) -> None:
    """Remove what is in a directory and was not used for UNUSED seconds, by its time of
    modification."""
    for entry in directory.iterdir():
        if not entry.name.startswith(".") and time.time() - entry.stat().st_mtime > UNUSED:
            if entry.is_dir():
                _remove(entry)
            else:
                entry.unlink()


def merged(layers: Sequence[Layer], root: str) -> str:
    """The commands that show the merged tree of `layers`, read-only, at `root`, which is quoted for
    the shell already."""
    lower = ":".join(f"{layer.key}/tree" for layer in reversed(layers))
    if len(layers) == 1:
        return f"mount --bind {lower} {root}\nmount -o remount,ro,bind {root}"
    return f"mount -t overlay overlay -o {_OVERLAY},lowerdir={lower} {root}"


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise LabError(f"{directory} cannot be removed")


def _write_archive(tree: Path, target: Path) -> None:
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for folder, directories, files in os.walk(tree):
            directories.sort()
            here = Path(folder)
            if _OPAQUE in os.listxattr(folder, follow_symlinks=False):
                archive.addfile(tarfile.TarInfo(str((here / ".wh..wh..opq").relative_to(tree))))
            for name in sorted([*directories, *files]):
                _add(archive, tree, here / name)


def _add(archive: tarfile.TarFile, tree: Path, path: Path) -> None:
    status = path.lstat()
    name = str(path.relative_to(tree))
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:  # an overlay's mark for a deleted file
        archive.addfile(tarfile.TarInfo(str(Path(name).with_name(f".wh.{path.name}"))))
        return
    if "security.capability" in os.listxattr(path, follow_symlinks=False):
        raise LabError(f"/{name} has file capabilities, which are not kept here")
    if stat.S_ISSOCK(status.st_mode):
        return
    # Times are kept: Python compares them with those in its compiled files.
    info = archive.gettarinfo(str(path), name)
    info.uname = info.gname = ""
    if info.isreg():
        with path.open("rb") as file:
            archive.addfile(info, file)
    else:
        archive.addfile(info)
