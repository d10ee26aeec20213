"""Steps of connections: at once while there are few, in turns and with a limit for each pass when
there are many."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from time import thread_time

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from proxy.net.pacing import _FIRST, _LEAST, Line, Pacer


@asynccontextmanager
async def running() -> AsyncIterator[Pacer]:
    pacer = Pacer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pacer.run)
        await wait_all_tasks_blocked()
        yield pacer
        nursery.cancel_scope.cancel()


def spend(seconds: float) -> None:
    """Processor time."""
    until = thread_time() + seconds
    while thread_time() < until:
        pass


def test_without_its_task_nothing_waits() -> None:
    pacer, line, done = Pacer(), Line(), list[int]()
    for number in range(3 * _FIRST):
        pacer.take(line, partial(done.append, number))
    assert done == list(range(3 * _FIRST))
    assert (pacer.waiting, pacer.waited) == (0, 0)


async def test_few_steps_are_taken_at_once() -> None:
    async with running() as pacer:
        done: list[int] = []
        for number in range(_FIRST):
            pacer.take(Line(), partial(done.append, number))
        assert done == list(range(_FIRST))
        assert pacer.waited == 0


async def test_further_steps_wait_for_later_passes_and_keep_their_order() -> None:
    async with running() as pacer:
        line, done, total = Line(), list[int](), 5 * _FIRST
        for number in range(total):
            pacer.take(line, partial(done.append, number))
        assert len(done) == _FIRST
        assert pacer.waiting == total - _FIRST
        most, before = 0, len(done)
        while len(done) < total:
            await trio.lowlevel.checkpoint()
            most, before = max(most, len(done) - before), len(done)
        assert done == list(range(total))
        assert most < total - _FIRST
        assert pacer.waiting == 0


async def test_one_with_many_steps_does_not_delay_another_with_one() -> None:
    async with running() as pacer:
        greedy, modest, done = Line(), Line(), list[str]()
        for _ in range(20 * _FIRST):
            pacer.take(greedy, partial(done.append, "greedy"))
        pacer.take(modest, partial(done.append, "modest"))
        assert len(done) == _FIRST
        await wait_all_tasks_blocked()
        assert done.index("modest") == _FIRST + 1


async def test_members_come_first_and_others_still_get_their_turns() -> None:
    async with running() as pacer:
        pacer.left = 0
        member, other, done = Line(member=True), Line(), list[str]()
        for _ in range(40):
            pacer.take(other, partial(done.append, "other"))
            pacer.take(member, partial(done.append, "member"))
        await wait_all_tasks_blocked()
        assert done[:8].count("member") == 6
        assert done.index("other") == 3
        assert sorted(done) == ["member"] * 40 + ["other"] * 40


async def test_a_pass_gets_fewer_steps_when_they_are_slow() -> None:
    async with running() as pacer:
        pacer.left = 0
        sizes: list[
            int
            # Of the passes, one entry for each step: a pass is more than one checkpoint of this task
        ] = []
        done = trio.Event()

        def dear() -> None:
            spend(0.0002)
            sizes.append(pacer._steps)
            if len(sizes) == 1500:
                done.set()

        for _ in range(1500):
            pacer.take(Line(), dear)
        await done.wait()
        assert sizes.count(_FIRST) == _FIRST == sizes.index(_FIRST // 2), (
            "one pass, and the next one is half as large"
        )
        assert sizes[-1] <= 64  # 10 ms, which is 50 of them, is the limit of a pass
        assert pacer._steps >= _LEAST


async def test_a_turn_is_waited_for_and_a_cancelled_one_is_lost() -> None:
    async with running() as pacer:
        pacer.left = 0
        with trio.move_on_after(0) as scope:
            await pacer.turn()
        assert scope.cancelled_caught
        pacer.left = 0
        with trio.fail_after(1):
            await pacer.turn(member=True)
        await wait_all_tasks_blocked()
        assert pacer.waiting == 0
        pacer.left = 1
        await pacer.turn()
        assert pacer.left == 0


async def test_a_line_says_when_none_of_its_steps_waits() -> None:
    async with running() as pacer:
        line, done = Line(), list[int]()
        await line.emptied()
        pacer.left = 0
        pacer.take(line, partial(done.append, 1))
        pacer.take(line, partial(done.append, 2))
        with trio.fail_after(1):
            await line.emptied()
        assert done == [1, 2]


@pytest.mark.parametrize("by", ["hurry", "cancel"])
async def test_nothing_that_waits_is_lost_at_the_end(by: str) -> None:
    done: list[int] = []
    async with running() as pacer:
        pacer.left = 0
        line = Line()
        for number in range(100):
            pacer.take(line, partial(done.append, number))
        assert done == []
        if by == "hurry":
            pacer.hurry(line)
            assert done == list(range(100))
    assert done == list(range(100))
    assert pacer.waiting == 0


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=120),
    st.integers(1, 64),
)
def test_each_step_is_taken_once_in_the_order_of_its_line(
    steps: list[tuple[int, bool]], quota: int
) -> None:
    pacer = Pacer()
    pacer._running, pacer.left = True, 0
    lines = {
        (number, member): Line(member=member) for number in range(6) for member in (False, True)
    }
    done: dict[tuple[int, bool], list[int]] = {key: [] for key in lines}
    wanted: dict[tuple[int, bool], list[int]] = {key: [] for key in lines}
    for index, (number, member) in enumerate(steps):
        key = number, member
        wanted[key].append(index)
        pacer.take(lines[key], partial(done[key].append, index))
    while pacer.waiting:
        before = pacer.waiting
        pacer._take(quota)
        assert pacer.waiting == max(0, before - quota)
    assert done == wanted
    assert not any(line.steps for line in lines.values())


async def test_a_step_that_fails_is_logged_and_does_not_stop_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise RuntimeError("not today")

    async with running() as pacer:
        line, done = Line(), list[int]()
        pacer.queue(line, fail)
        pacer.queue(line, partial(done.append, 1))
        with trio.fail_after(5):
            await line.emptied()
            await pacer.turn()
        assert done == [1]
    assert "internal error in a step that had waited" in caplog.text
