"""The pauses between two attempts to connect to the control plane."""

from __future__ import annotations

import random

import trio
import trio.testing

from proxy.config.schema_files import ControlPlaneConfig
from proxy.directory.channel.pauses import Pauses
from tests.kit.channel import CONTROL


def pauses(seed: int = 1) -> Pauses:
    settings = ControlPlaneConfig(
        address="control:4190", identity=str(CONTROL), min_pause=1.0, max_pause=8.0
    )
    return Pauses(settings, random.Random(seed))


def test_they_grow_and_start_again_after_a_connection_that_worked() -> None:
    made = pauses()
    for longest in (1, 2, 4, 8, 8):
        assert longest / 2 <= made.next(worked=False) <= longest
    assert 0.5 <= made.next(worked=True) <= 1
    assert 0.5 <= made.next(worked=False) <= 1


async def test_a_doubt_ends_a_pause_early_but_not_often(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    made = pauses()

    async def doubt(after: float) -> None:
        await trio.sleep(after)
        made.hurry()

    began = trio.current_time()
    nursery.start_soon(doubt, 2.0)
    nursery.start_soon(doubt, 3.5)  # too soon after the first
    await made.wait(8.0)
    first = trio.current_time() - began
    assert 2.0 < first <= 3.0, "soon, but not all proxies at the same moment"
    await made.wait(8.0)
    assert trio.current_time() - began == first + 8.0
    made.hurry()
    before = trio.current_time()
    await made.wait(0.25)
    assert trio.current_time() - before <= 0.25, "never longer than without the doubt"


async def test_two_proxies_that_doubt_at_once_return_at_different_moments(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ends = []
    for seed in range(5):
        made = pauses(seed)
        made.hurry()
        began = trio.current_time()
        await made.wait(8.0)
        ends.append(trio.current_time() - began)
    assert len(set(ends)) == 5
    assert max(ends) <= 1.0


async def test_a_replica_is_left_only_once_in_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = pauses()
    assert made.may_leave()
    await trio.sleep(3.9)
    assert not made.may_leave()
    await trio.sleep(4.2)
    assert made.may_leave()
