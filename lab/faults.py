"""Faults of real clusters, reproduced here. Each is a `with` block and is undone at its end.

Crashes and hangs of programs are methods of lab.process.Process: kill, pause, resume.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lab.pod import Pod
from lab.process import LabError, Process
from lab.sidecar import Sidecar


@contextmanager
def paused(process: Process) -> Iterator[None]:
    """A program that hangs: its port still accepts connections, but it does not answer."""
    process.pause()
    try:
        yield
    finally:
        process.resume()


@contextmanager
def link_cut(pod: Pod) -> Iterator[None]:
    """A pod that cannot be reached: packets vanish, as when its node dies."""
    pod.cut_link()
    try:
        yield
    finally:
        pod.restore_link()


@contextmanager
def expired_certificate(sidecar: Sidecar) -> Iterator[None]:
    """A sidecar whose certificate file expired an hour ago. A running proxy rejects the file and
    keeps the old one.
    """
    if sidecar.authority is None or sidecar.identity is None:
        raise LabError(f"the sidecar of pod {sidecar.pod.name} has no identity that could expire")
    sidecar.write_certificate(sidecar.authority.issue_expired(sidecar.identity))
    try:
        yield
    finally:
        sidecar.write_certificate(sidecar.authority.issue(sidecar.identity))


@contextmanager
def broken_directory(
    sidecar: Sidecar, text: bytes = b"services: [{name: 'half a file"
) -> Iterator[None]:
    """A directory file with invalid contents."""
    before = sidecar.directory_file.read_bytes()
    sidecar.write(sidecar.directory_file, text)
    try:
        yield
    finally:
        sidecar.write(sidecar.directory_file, before)
