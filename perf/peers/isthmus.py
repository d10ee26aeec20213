"""Ours: as the image has it, with the path of a request compiled (docs/decisions/30-compiled.md); the sources as they are; and without the
fast road for plain HTTP/1.1 exchanges (docs/decisions/21-fast-road.md)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

from perf.pair import COMPILED, Pair, isthmus_pair
from perf.peers.order import Kind, Order, Peer


def start(order: Order, *, fast: bool, compiled: bool) -> AbstractContextManager[Pair]:
    protocol = "opaque" if order.kind == "tcp" else "detect"
    wishes = {"protocol": protocol, "resume": order.resume, "settings": {"fast_path": fast}, "compiled": compiled}
    return isthmus_pair(order.folder, order.server, wishes)


def missing(_: Kind) -> str | None:
    return None if (COMPILED / "proxy").is_dir() else "`make compiled` has not been run"


PEER = Peer("isthmus", frozenset({"http1", "http2", "tcp"}), missing, partial(start, fast=True, compiled=True))
SOURCES = Peer("not compiled", frozenset({"http1", "http2", "tcp"}), lambda _: None, partial(start, fast=True, compiled=False))
ORDINARY = Peer("ordinary road", frozenset({"http1"}), missing, partial(start, fast=False, compiled=True))
