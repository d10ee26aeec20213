"""Readiness: any number of tasks may wait for the same direction, and each is woken, whatever
happens to the others."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from proxy.net.readiness import Readiness
from tests.net.conftest import clogged_pair, pair


@pytest.mark.parametrize("direction", ["readable", "writable"])
async def test_all_waiters_for_one_direction_are_woken(direction: str) -> None:
    ours, theirs = await clogged_pair() if direction == "writable" else pair()
    readiness = Readiness(ours.socket)
    woken = 0

    async def wait() -> None:
        nonlocal woken
        await getattr(readiness, f"wait_{direction}")()
        woken += 1

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert woken == 0
            if direction == "readable":
                await theirs.send_all(b"x")
            else:
                while theirs.socket.recv(1 << 20):
                    await trio.sleep(0.001)
                    if woken:
                        break
    assert woken == 3
    ours.close()
    theirs.close()


async def test_if_the_first_is_cancelled_the_others_try_again() -> None:
    ours, theirs = pair()
    readiness = Readiness(ours.socket)
    scope = trio.CancelScope()
    order: list[str] = []

    async def first() -> None:
        with scope:
            await readiness.wait_readable()
        order.append("first cancelled")

    async def second() -> None:
        await readiness.wait_readable()  # a spurious wake-up: the caller waits again
        order.append("second woken")
        await readiness.wait_readable()
        order.append("second readable")

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await wait_all_tasks_blocked()
            nursery.start_soon(second)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            assert sorted(order) == ["first cancelled", "second woken"]
            await theirs.send_all(b"x")
    assert order[-1] == "second readable"
    ours.close()
    theirs.close()


async def test_closing_wakes_all() -> None:
    ours, theirs = pair()
    readiness = Readiness(ours.socket)
    ended = 0

    async def wait() -> None:
        nonlocal ended
        try:
            await readiness.wait_readable()
        except trio.ClosedResourceError:
            ended += 1
        else:
            assert ours.closed  # woken by the first one: its caller finds it closed
            ended += 1

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            ours.close()
    assert ended == 2
    theirs.close()
