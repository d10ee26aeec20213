"""Which images the test cluster has."""

from collections.abc import Callable
from pathlib import Path

from lab.kube.archive import archive
from lab.kube.images import Builder
from lab.kube.imagestore import unpacked
from lab.kube.places import CHECKOUT, HERE, cache

ISTHMUS, WEB, APPS = "isthmus:0.1.0", "web:1.0", "apps:1.0"
PAUSE, COREDNS = "pause:1", "coredns:1"


def images(programs: Callable[[], Path]) -> Path:
    """All images, unpacked for containerd, built where something has changed. `programs` returns
    a directory with pause and coredns. It is called when all other images are built, and may wait.
    Raises LabError."""
    builder = Builder(cache() / "images")
    with builder.store.locked():
        built = {
            tag: builder.build(file, context)
            for tag, file, context in (
                (ISTHMUS, CHECKOUT / "Dockerfile", CHECKOUT),
                (WEB, HERE / "docker" / "web" / "Dockerfile", HERE / "docker" / "web"),
                (APPS, HERE / "docker" / "apps.Dockerfile", CHECKOUT / "lab" / "apps"),
            )
        }
        tools = (programs() / "pause").resolve().parent  # the older version has links
        for tag, name in ((PAUSE, "pause"), (COREDNS, "coredns")):
            built[tag] = builder.build(HERE / "docker" / f"{name}.Dockerfile", tools)
        found = unpacked(archive(built, cache() / "images" / "archives"))
        builder.store.prune()
    return found
