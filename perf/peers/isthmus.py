"""Ours."""

from __future__ import annotations

from contextlib import AbstractContextManager

from perf.pair import Pair, isthmus_pair
from perf.peers.order import Order, Peer


def start(order: Order) -> AbstractContextManager[Pair]:
    protocol = "opaque" if order.kind == "tcp" else "detect"
    return isthmus_pair(order.folder, order.server, {"protocol": protocol, "resume": order.resume})


PEER = Peer("isthmus", frozenset({"http1", "http2", "tcp"}), lambda _: None, start)
