"""Ours: as it is by default, and without the fast road for plain HTTP/1.1 exchanges (docs/decisions/21-fast-road.md)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

from perf.pair import Pair, isthmus_pair
from perf.peers.order import Order, Peer


def start(order: Order, fast: bool) -> AbstractContextManager[Pair]:
    protocol = "opaque" if order.kind == "tcp" else "detect"
    return isthmus_pair(order.folder, order.server, {"protocol": protocol, "resume": order.resume, "settings": {"fast_path": fast}})


PEER = Peer("isthmus", frozenset({"http1", "http2", "tcp"}), lambda _: None, partial(start, fast=True))
ORDINARY = Peer("ordinary road", frozenset({"http1"}), lambda _: None, partial(start, fast=False))
