"""Archives of images, as `docker save` writes them: what containerd imports."""

import io
import json
import os
import platform
import tarfile
from collections.abc import Mapping
from pathlib import Path

from lab.kube.images import Built, fingerprint

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_CREATED = "1970-01-01T00:00:00Z"


def archive(images: Mapping[str, Built], directory: Path) -> Path:
    """One archive of all these images by their tags, with each layer once. The name of the file
    follows from what is in it."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = (
        f"{tag} {built.key} {json.dumps(built.settings())}" for tag, built in sorted(images.items())
    )
    target = directory / f"{fingerprint(*parts)}.tar"
    if not target.exists():
        part = target.with_suffix(".part")
        _write(images, part)
        part.rename(target)
    os.utime(target)
    return target


def described(built: Built) -> bytes:
    """The image's configuration, by whose hash it is named (OCI image specification, config.md)."""
    whole = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "created": _CREATED,
        "config": built.settings(),
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{layer.digest()}" for layer in built.layers],
        },
        "history": [{"created": _CREATED} for _ in built.layers],
    }
    return json.dumps(whole).encode()


def _write(images: Mapping[str, Built], target: Path) -> None:
    index = []
    written: set[str] = set()
    with tarfile.open(target, "w") as file:
        for tag, built in images.items():
            text = described(built)
            name = f"{fingerprint(text.decode())}.json"
            _add(file, name, text)
            layers = [f"{layer.digest()}/layer.tar" for layer in built.layers]
            for place, layer in zip(layers, built.layers, strict=True):
                if place not in written:
                    written.add(place)
                    file.add(layer.archive(), place)
            index.append({"Config": name, "RepoTags": [tag], "Layers": layers})
        _add(file, "manifest.json", json.dumps(index).encode())


def _add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    file.addfile(info, io.BytesIO(content))
