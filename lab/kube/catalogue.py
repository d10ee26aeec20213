"""Which images the test cluster has."""

from pathlib import Path

from lab.kube.archive import archive
from lab.kube.images import Builder
from lab.kube.imagestore import unpacked
from lab.kube.places import CHECKOUT, HERE, cache

ISTHMUS, WEB, APPS = "isthmus:0.1.0", "web:1.0", "apps:1.0"
PAUSE, COREDNS = "pause:1", "coredns:1"


def images(programs: Path) -> Path:
    """All images, unpacked for containerd, built where something has changed. `programs` has pause
    and coredns. Raises LabError."""
    builder = Builder(cache() / "images")
    with builder.store.locked():
        built = {}
        for tag, file, context in (
            (ISTHMUS, CHECKOUT / "Dockerfile", CHECKOUT),
            (WEB, HERE / "docker" / "web" / "Dockerfile", HERE / "docker" / "web"),
            (APPS, HERE / "docker" / "apps.Dockerfile", CHECKOUT / "lab" / "apps"),
            (PAUSE, HERE / "docker" / "pause.Dockerfile", programs),
            (COREDNS, HERE / "docker" / "coredns.Dockerfile", programs),
        ):
            built[tag] = builder.build(file, context)
        found = unpacked(archive(built, cache() / "images" / "archives"))
        builder.store.prune()
    return found
