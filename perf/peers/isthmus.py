"""This project's proxy in four variants: as in the image, with compiled modules and AWS-LC
(docs/decisions/30-compiled.md, 36-aws-lc.md); as in the image, but built from another commit; the
plain sources on the OpenSSL of cryptography's wheel; and as in the image, but without the fast path
for plain HTTP/1.1 exchanges (docs/decisions/21-fast-path.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from perf.pair import IMAGE, IMAGE_ENVIRONMENT, PACKAGES, Pair, isthmus_pair
from perf.peers.order import Kind, Order, Peer

# "build" of another checkout, in which `make aws-lc compiled` has been run.
BEFORE = os.environ.get("ISTHMUS_PERF_BEFORE", "")


def start(
    order: Order, *, packages: Sequence[Path] = (), fast: bool = True
) -> AbstractContextManager[Pair]:
    environment = {"PYTHONPATH": os.pathsep.join(map(str, packages)), **IMAGE_ENVIRONMENT}
    options: dict[str, object] = {
        "protocol": "opaque" if order.kind == "tcp" else "detect",
        "resume": order.resume,
        "settings": {"fast_path": fast},
        "environment": environment if packages else {},
    }
    return isthmus_pair(order.folder, order.server, options)


def missing(packages: Sequence[Path], _: Kind) -> str | None:
    return (
        None
        if all(folder.is_dir() for folder in packages)
        else "`make aws-lc compiled` has not been run"
    )


def missing_before(kind: Kind) -> str | None:
    return missing(OTHER, kind) if BEFORE else "ISTHMUS_PERF_BEFORE names no other build"


ALL: frozenset[Kind] = frozenset({"http1", "http2", "tcp"})
OTHER = tuple(Path(BEFORE) / package for package in PACKAGES)
PEER = Peer("isthmus", ALL, partial(missing, IMAGE), partial(start, packages=IMAGE))
ANOTHER = Peer("before", ALL, missing_before, partial(start, packages=OTHER))
SOURCES = Peer("checkout", ALL, lambda _: None, start)
ORDINARY = Peer(
    "ordinary path",
    frozenset({"http1"}),
    partial(missing, IMAGE),
    partial(start, packages=IMAGE, fast=False),
)
