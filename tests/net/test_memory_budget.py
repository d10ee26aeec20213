"""The memory budget: charged memory is released, thresholds follow the free memory, and members
keep a reserve."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from proxy.net.memory_budget import SMALL, UNCOUNTED, UNLIMITED, Charge, MemoryBudget, Share

MIB = 2**20


def test_nothing_is_limited_while_half_of_the_budget_is_free() -> None:
    budget = MemoryBudget(100 * MIB)
    share = budget.share(50 * MIB)
    assert (share.over, share.full, share.read_size(65536)) == (False, False, 65536)
    share.charge(1)
    assert share.over
    assert share.read_size(65536) == 65536  # a quarter of a sixteenth of 25 MiB
    share.close()
    assert (budget.used, budget.open_used) == (0, 0)


@pytest.mark.parametrize("connections", [30, 120, 1000])
def test_connections_that_take_all_they_may_leave_some_for_others(connections: int) -> None:
    """Each connection without an identity takes 64 KiB at a time until it is above its threshold,
    with 4 MiB wanted by each."""
    budget = MemoryBudget(345 * MIB)
    shares = [budget.share() for _ in range(connections)]
    moved = True
    while moved:
        moved = False
        for share in shares:
            if share.held < 4 * MIB and not share.over:
                share.charge(65536)
                moved = True
    assert budget.open_used <= budget.open_limit
    assert max(share.held for share in shares) - min(share.held for share in shares) <= 65536
    member = budget.share(member=True)
    assert not member.full
    assert member.threshold >= (budget.limit - budget.open_limit) // 2
    assert member.read_size(65536) == 65536


def test_new_work_is_refused_to_clients_without_an_identity_first() -> None:
    budget = MemoryBudget(160 * MIB)
    received: list[str] = []
    budget.on_action = received.append
    client, member = budget.share(), budget.share(member=True)
    client.charge(budget.open_limit - budget.open_limit // 16)
    assert not client.refuses("stream")
    client.charge(1)
    assert client.refuses("stream")
    assert not member.refuses("stream")
    member.charge(budget.limit - budget.used - budget.limit // 16)
    assert not member.refuses("request")
    member.charge(1)
    assert member.refuses("request")
    assert received == ["stream", "request"]
    assert {action: count for action, count in budget.counts.items() if count} == {
        "stream": 1,
        "request": 1,
    }


def test_a_client_that_shows_an_identity_is_counted_as_a_member() -> None:
    budget = MemoryBudget(100)
    share = budget.share(40)
    share.admit()
    share.admit()
    assert (budget.used, budget.open_used) == (40, 0)
    share.release(30)
    assert (budget.used, budget.open_used) == (10, 0)
    share.close()
    assert (budget.used, budget.open_used) == (0, 0)


def test_reads_get_smaller_as_memory_runs_out() -> None:
    budget = MemoryBudget(32 * MIB)
    share = budget.share()
    sizes = []
    while budget.open_used < budget.open_limit:
        sizes.append(share.read_size(262144))
        share.charge(MIB)
    assert sizes[0] == 262144
    assert sizes == sorted(sizes, reverse=True)
    assert share.read_size(262144) == SMALL


async def test_a_connection_above_its_threshold_waits_until_others_release() -> None:
    budget = MemoryBudget(100 * MIB)
    large, small = budget.share(64 * MIB), budget.share(2 * MIB)
    went: list[str] = []

    async def wait(share: Share, name: str) -> None:
        await share.wait_until_below()
        went.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, large, "large")
        nursery.start_soon(wait, small, "small")
        await wait_all_tasks_blocked()
        assert went == []
        large.release(20 * MIB)  # 46 MiB are used: nothing is limited
        await wait_all_tasks_blocked()
        assert sorted(went) == ["large", "small"]
    assert budget.counts["read"] == 2
    budget.sweep(trio.current_time())


async def test_a_cancelled_task_does_not_wait_any_more() -> None:
    budget = MemoryBudget(10)
    share = budget.share(9)
    with trio.move_on_after(0.01) as scope:
        await share.wait_until_below()
    assert scope.cancelled_caught
    share.release(9)
    assert not budget._waiting


def test_the_largest_is_closed_first_after_its_patience() -> None:
    budget = MemoryBudget(100 * MIB, patience=10)
    closed: list[int] = []
    shares = [budget.share((number + 1) * MIB) for number in range(12)]

    def close(number: int) -> None:
        closed.append(number)
        shares[number].close()

    for number, share in enumerate(shares):
        share.on_exhausted = partial(close, number)
    budget.sweep(0.0)
    budget.sweep(9.9)
    assert closed == []
    budget.sweep(10.0)
    assert closed[0] == 11
    before = list(closed)
    budget.sweep(11.0)
    assert closed[: len(before)] == before
    assert sorted(closed, reverse=True) == closed
    for share in shares:
        share.close()
    assert budget.used == 0


def test_the_patience_begins_anew_when_a_connection_was_below() -> None:
    budget = MemoryBudget(100 * MIB, patience=10)
    closed: list[bool] = []
    share = budget.share(60 * MIB)
    share.on_exhausted = lambda: closed.append(True)
    budget.sweep(0.0)
    share.release(20 * MIB)
    budget.sweep(5.0)
    share.charge(20 * MIB)
    budget.sweep(11.0)
    assert not closed
    budget.sweep(21.0)
    assert closed == [True]
    budget.sweep(22.0)
    assert closed == [True]


async def test_one_that_is_not_read_and_whose_client_has_gone_is_closed_at_once() -> None:
    budget = MemoryBudget(100 * MIB, patience=3600)
    closed: list[bool] = []
    share = budget.share(60 * MIB)
    share.on_exhausted = lambda: closed.append(True)
    share.gone = lambda: True
    budget.sweep(0.0)
    assert not closed  # it is being read: the reader notices
    async with trio.open_nursery() as nursery:
        nursery.start_soon(share.wait_until_below)
        await wait_all_tasks_blocked()
        budget.sweep(1.0)
        assert closed == [True]
        share.close()
    assert budget.used == 0


def test_a_charge_after_the_end_is_not_counted() -> None:
    budget = MemoryBudget(100)
    share = budget.share(10)
    charge = Charge(share)
    charge.become(20)
    share.close()
    assert budget.used == 0
    charge.become(0)
    share.charge(5)
    share.release(7)
    assert (budget.used, budget.open_used) == (0, 0)


def test_without_a_budget_nothing_is_limited() -> None:
    assert MemoryBudget().limit == UNLIMITED
    UNCOUNTED.charge(2**40)
    assert not UNCOUNTED.over
    assert not UNCOUNTED.full
    UNCOUNTED.release(2**40)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "member", "charge", "release", "keep", "admit", "close"]),
        st.integers(0, 9),
        st.integers(0, 5 * MIB),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(STEPS)
def test_the_sums_are_those_of_the_shares(steps: list[tuple[str, int, int]]) -> None:
    budget = MemoryBudget(40 * MIB)
    shares: dict[int, tuple[Share, Charge]] = {}
    held: dict[int, int] = {}
    kept: dict[int, int] = {}
    for what, number, size in steps:
        known = shares.get(number)
        if what in ("open", "member") and known is None:
            share = budget.share(size, member=what == "member")
            shares[number], held[number], kept[number] = (share, Charge(share)), size, 0
        elif known is None:
            continue
        elif what == "charge":
            known[0].charge(size)
            held[number] += size
        elif what == "release":
            known[0].release(min(size, held[number]))
            held[number] -= min(size, held[number])
        elif what == "keep":
            known[1].become(size)
            kept[number] = size
        elif what == "admit":
            known[0].admit()
        elif what == "close":
            known[0].close()
            del shares[number], held[number], kept[number]
        assert budget.used == sum(held.values()) + sum(kept.values())
        assert budget.open_used == sum(
            held[n] + kept[n] for n, (share, _) in shares.items() if not share.member
        )
        for share, _ in shares.values():
            assert 0 <= share.threshold <= budget.limit
            assert share.over == (budget.used > budget.half and share.held > share.threshold)
            assert SMALL <= share.read_size(262144) <= 262144


def test_small_buffers_are_not_charged() -> None:
    share = MemoryBudget(100 * MIB).share()
    with share.holding(SMALL):
        assert share.held == 0
    with share.holding(SMALL + 1):
        assert share.held == SMALL + 1
    assert share.held == 0
