"""A play has one outcome: what the client got, byte for byte, what the server heard, all metrics but times, the lines of the log and the
records for spans are the same with the fast road off, with it on, and while it hands over exchanges at any moment."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from proxy.fast import lane, road
from tests.roads.acts import drawn
from tests.roads.server import serve
from tests.roads.stage import Left, Shape, Theatre


@pytest.fixture
def theatre(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Theatre]:
    monkeypatch.setattr("proxy.loops.token_bytes", bytes)  # the same tokens each time
    monkeypatch.setattr(lane, "REST", 0)  # the road is tried again and again, although much of what is done is not plain
    monkeypatch.setattr(road, "PATIENCE", 0.1)
    caplog.set_level(logging.INFO, "isthmus")

    def make(**settings: Any) -> Theatre:
        return Theatre(tmp_path, caplog, serve, settings)

    return make


def same(ordinary: Left, other: Left) -> None:
    assert not ordinary.faults
    assert not other.faults
    for name in ("requests", "clients", "servers", "connections", "spans", "metrics"):
        there, here = getattr(ordinary, name), getattr(other, name)
        if isinstance(there, dict):
            there, here = sorted(there.items()), sorted(here.items())
        for number, (a, b) in enumerate(zip_longest(map(str, there), map(str, here), fillvalue="nothing")):
            at = next((n for n in range(min(len(a), len(b))) if a[n] != b[n]), min(len(a), len(b)))
            part = slice(max(0, at - 300), at + 150)
            assert a == b, f"{name}, {number}: {a[part]!r} on the ordinary road, {b[part]!r} on the fast"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_nobody_can_tell_which_road_an_exchange_took(shape: Shape, seed: int, theatre: Callable[..., Theatre]) -> None:
    acts, stage = drawn(seed, 16), theatre()
    ordinary = await stage.play(acts, shape, "ordinary", seed)
    assert not ordinary.finished
    assert ordinary.spans
    fast = await stage.play(acts, shape, "fast", seed)
    assert fast.finished >= 10, "nothing was put to the test"
    same(ordinary, fast)
    same(ordinary, await stage.play(acts, shape, "disturbed", seed))
