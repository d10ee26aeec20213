"""This project's proxy in three variants: as in the image, with compiled modules and AWS-LC
(docs/decisions/30-compiled.md, 36-aws-lc.md); the plain sources on the OpenSSL of cryptography's
wheel; and as in the image, but without the fast path for plain HTTP/1.1 exchanges
(docs/decisions/21-fast-path.md).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

from perf.pair import IMAGE, Pair, isthmus_pair
from perf.peers.order import Kind, Order, Peer


def start(order: Order, *, fast: bool, image: bool) -> AbstractContextManager[Pair]:
    protocol = "opaque" if order.kind == "tcp" else "detect"
    wishes = {
        "protocol": protocol,
        "resume": order.resume,
        "settings": {"fast_path": fast},
        "image": image,
    }
    return isthmus_pair(order.folder, order.server, wishes)


def missing(_: Kind) -> str | None:
    return (
        None
        if all(folder.is_dir() for folder in IMAGE)
        else "`make aws-lc compiled` has not been run"
    )


PEER = Peer(
    "isthmus", frozenset({"http1", "http2", "tcp"}), missing, partial(start, fast=True, image=True)
)
SOURCES = Peer(
    "checkout",
    frozenset({"http1", "http2", "tcp"}),
    lambda _: None,
    partial(start, fast=True, image=False),
)
ORDINARY = Peer(
    "ordinary path", frozenset({"http1"}), missing, partial(start, fast=False, image=True)
)
