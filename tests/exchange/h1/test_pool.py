"""The pool alone: connections are used again while they are good, bounded in number, and handed out
in order, with a short wait."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from proxy.errors import PoolExhausted
from proxy.exchange.h1.pool import Pool, PoolSettings, Upstream
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.socket_stream import SocketStream
from proxy.wire.messages import EndOfMessage, Headers, Limits, RequestHead
from tests.kit.http import listen

KEY = "endpoint"
HEAD = RequestHead(b"GET", b"/", Headers([(b"Host", b"a")]))


class Bench:
    """A pool with connections to a silent server, and the records of the connections that it
    opened."""

    def __init__(self, **settings: Any) -> None:
        self.listener = listen()
        self.address = Address.of(self.listener.getsockname())
        self.opened = self.closed = 0
        self.pool: Pool[str] = Pool(
            self.dial, lambda _: self.account(), PoolSettings(**settings), Limits()
        )
        self.dials: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    async def dial(self, _: str) -> SocketStream:
        await self.dials()
        return await Dialer().dial(self.address)

    def account(self) -> Bench:
        self.opened += 1
        return self

    def close(self) -> None:
        self.closed += 1

    def end(self) -> None:
        self.pool.close()
        self.listener.close()
        assert self.pool.counts() == (0, 0)
        assert not self.pool._slots
        assert self.opened == self.closed

    def give_back(self, upstream: Upstream, *, usable: bool = True) -> None:
        """Return it after an exchange, usable or not."""
        if usable:
            upstream.http.send_request(HEAD, 0)
            upstream.http.send_end(EndOfMessage())
            upstream.http.receive_data(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            upstream.http.next_response()
            upstream.http.next_body()
        self.pool.give_back(KEY, upstream, usable=usable)


async def test_the_last_connection_given_back_is_the_first_to_be_used_again() -> None:
    bench = Bench()
    first, second = await bench.pool.acquire(KEY), await bench.pool.acquire(KEY)
    assert bench.pool.counts() == (2, 0)
    bench.give_back(first)
    bench.give_back(second)
    assert bench.pool.counts() == (0, 2)
    again = await bench.pool.acquire(KEY)
    assert again is second
    assert again.reused
    bench.give_back(again, usable=False)
    assert bench.pool.counts() == (0, 1)
    bench.end()


async def test_a_connection_returned_now_is_used_after_those_returned_earlier() -> None:
    bench = Bench()
    kept = [await bench.pool.acquire(KEY) for _ in range(5)]
    now = trio.current_time()
    for upstream, since in zip(kept, (now - 2, now - 1, now, now, now), strict=True):
        bench.pool.restore(KEY, upstream, since)
    taken = [bench.pool.take(KEY, now) for _ in range(5)]
    assert taken[:2] == [kept[1], kept[0]]
    assert {id(upstream) for upstream in taken} == {id(upstream) for upstream in kept}
    for upstream in kept:
        bench.pool.restore(KEY, upstream, now)
    assert bench.pool.take(KEY, now + 1) is kept[-1]
    bench.give_back(kept[-1], usable=False)
    bench.end()


async def test_a_connection_that_was_opened_elsewhere_is_used_as_a_new_one() -> None:
    bench = Bench(connections=1)
    stream, beyond = await Dialer().dial(bench.address), await Dialer().dial(bench.address)
    bench.pool.adopt(KEY, stream, bench.account())
    assert bench.pool.counts() == (0, 1)
    bench.pool.adopt(KEY, beyond, bench.account())
    assert (bench.pool.counts(), bench.closed) == ((0, 1), 1)
    upstream = await bench.pool.acquire(KEY)
    assert upstream.stream is stream
    assert not upstream.reused, "so nothing is retried that it fails to answer"
    bench.give_back(upstream)
    again = await bench.pool.acquire(KEY)
    assert again is upstream
    assert again.reused
    bench.give_back(again)
    bench.end()


async def test_no_more_than_so_many_idle_connections_are_kept() -> None:
    bench = Bench(idle=1)
    first, second = await bench.pool.acquire(KEY), await bench.pool.acquire(KEY)
    bench.give_back(first)
    bench.give_back(second)
    assert bench.pool.counts() == (0, 1)
    assert bench.closed == 1
    bench.end()


async def test_idle_connections_are_dropped_in_time(autojump_clock: MockClock) -> None:
    bench = Bench(idle_timeout=3)
    bench.give_back(await bench.pool.acquire(KEY))
    await trio.sleep(2.9)
    assert bench.pool.sweep() == 0
    kept = await bench.pool.acquire(KEY)
    assert kept.reused
    bench.give_back(kept)
    await trio.sleep(3.1)
    fresh = await bench.pool.acquire(KEY)  # also before the sweep has come
    assert not fresh.reused
    bench.give_back(fresh)
    await trio.sleep(3.1)
    assert bench.pool.sweep() == 1
    assert not bench.pool._slots  # nothing is remembered about an unused endpoint
    bench.end()


async def test_a_connection_has_a_greatest_age(autojump_clock: MockClock) -> None:
    bench = Bench(max_age=10)
    old = await bench.pool.acquire(KEY)
    for _ in range(5):
        await trio.sleep(2)
        bench.give_back(old)
        assert await bench.pool.acquire(KEY) is old
    await trio.sleep(1)
    bench.give_back(old)
    young = await bench.pool.acquire(KEY)
    assert young is not old
    assert bench.closed == 1
    bench.give_back(young)
    bench.end()


async def test_a_connection_that_the_server_has_closed_is_not_used() -> None:
    bench = Bench()
    upstream = await bench.pool.acquire(KEY)
    bench.give_back(upstream)
    bench.listener.accept()[0].close()
    fresh = await bench.pool.acquire(KEY)
    assert fresh is not upstream
    bench.give_back(fresh)
    bench.end()


async def test_a_connection_with_unexpected_data_of_the_server_is_not_used() -> None:
    bench = Bench()
    bench.give_back(await bench.pool.acquire(KEY))
    sock, _ = bench.listener.accept()
    with sock:
        sock.sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        fresh = await bench.pool.acquire(KEY)
        assert not fresh.reused
    bench.give_back(fresh)
    bench.end()


class Side:
    """A side of the fast path, with what a pool uses of it."""

    def __init__(self, upstream: Upstream) -> None:
        self.forgotten = False
        upstream.side = self
        self._stream = upstream.stream

    def is_quiet(self) -> bool:
        return True

    def forget(self) -> None:
        assert self._stream.ended() == "open", (
            "its descriptor does not belong to another connection yet"
        )
        self.forgotten = True


async def test_the_observer_of_a_connection_is_called_before_it_is_closed() -> None:
    bench = Bench(idle=1)
    broken, *others = [await bench.pool.acquire(KEY) for _ in range(3)]
    sides = [Side(upstream) for upstream in (broken, *others)]
    bench.give_back(broken, usable=False)
    for upstream in others:
        bench.give_back(upstream)
    assert sides[0].forgotten
    assert sum(side.forgotten for side in sides) == 2, "one is kept"
    bench.end()
    assert all(side.forgotten for side in sides)


async def test_waiting_requests_are_served_in_order() -> None:
    bench = Bench(connections=1)
    served: list[str] = []

    async def use(name: str) -> None:
        upstream = await bench.pool.acquire(KEY)
        served.append(name)
        await trio.lowlevel.checkpoint()
        bench.give_back(upstream)

    held = await bench.pool.acquire(KEY)
    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(use, name)
            await wait_all_tasks_blocked()
        bench.give_back(held)
        await use("newcomer")
    assert served == ["a", "b", "c", "newcomer"]
    assert bench.opened == 1
    bench.end()


async def test_a_connection_that_breaks_makes_room_for_a_waiting_request() -> None:
    bench = Bench(connections=1)
    reused: list[bool] = []

    async def use() -> None:
        upstream = await bench.pool.acquire(KEY)
        reused.append(upstream.reused)
        bench.give_back(upstream)

    held = await bench.pool.acquire(KEY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        nursery.start_soon(use)
        await wait_all_tasks_blocked()
        bench.give_back(held, usable=False)
    assert reused == [False, True]
    bench.end()


async def test_waiting_has_a_deadline_that_overtaking_cannot_move(
    autojump_clock: MockClock,
) -> None:
    bench = Bench(connections=1, wait_timeout=5)
    held = await bench.pool.acquire(KEY)
    started = trio.current_time()
    with pytest.raises(
        PoolExhausted, match="none of the 1 connections to endpoint became free within 5"
    ):
        await bench.pool.acquire(KEY)
    assert trio.current_time() - started == pytest.approx(5)
    bench.give_back(held)
    bench.end()


async def test_while_a_connection_is_being_opened_no_request_is_refused(
    autojump_clock: MockClock,
) -> None:
    bench, served = Bench(connections=1, wait_timeout=5), 0

    async def slow() -> None:
        await trio.sleep(60)

    async def ask() -> None:
        nonlocal served
        bench.give_back(await bench.pool.acquire(KEY))
        served += 1

    bench.dials = slow
    async with trio.open_nursery() as nursery:
        for _ in range(300):
            nursery.start_soon(ask)
    assert served == 300
    assert bench.opened == 1
    bench.end()


async def test_one_that_waits_is_patient_as_long_as_others_are_served_before_it(
    autojump_clock: MockClock,
) -> None:
    bench, served = Bench(connections=1, wait_timeout=5), 0

    async def ask() -> None:
        nonlocal served
        upstream = await bench.pool.acquire(KEY)
        await trio.sleep(4)
        bench.give_back(upstream)
        served += 1

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask)
    assert served == 10
    bench.end()


async def test_a_request_with_a_deadline_waits_until_then(autojump_clock: MockClock) -> None:
    bench = Bench(connections=1, wait_timeout=5)
    held = await bench.pool.acquire(KEY)
    async with trio.open_nursery() as nursery:

        async def ask(seconds: float, *, served: bool) -> None:
            limit = trio.current_time() + seconds
            with trio.move_on_at(limit) as scope:  # as the deadline layer does
                bench.give_back(await bench.pool.acquire(KEY, limit=limit))
            assert scope.cancelled_caught is not served

        nursery.start_soon(partial(ask, 20, served=False))
        nursery.start_soon(partial(ask, 40, served=True))
        await trio.sleep(30)
        bench.give_back(held)
    bench.end()


async def test_the_queue_is_bounded() -> None:
    bench = Bench(connections=1, waiting=2)
    held = await bench.pool.acquire(KEY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.pool.acquire, KEY)
        nursery.start_soon(bench.pool.acquire, KEY)
        await wait_all_tasks_blocked()
        with pytest.raises(
            PoolExhausted, match="1 connections to endpoint are in use, and 2 requests wait"
        ):
            await bench.pool.acquire(KEY)
        nursery.cancel_scope.cancel()
    bench.give_back(held)
    bench.end()


@pytest.mark.parametrize("usable", [True, False], ids=["a connection", "room"])
async def test_a_connection_handed_to_a_cancelled_waiter_goes_to_the_next(
    usable: bool,
) -> None:
    bench = Bench(connections=1)
    held = await bench.pool.acquire(KEY)
    served = False

    async def next_one() -> None:
        nonlocal served
        bench.give_back(await bench.pool.acquire(KEY))
        served = True

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as cancelled:
                cancelled.start_soon(bench.pool.acquire, KEY)
                await wait_all_tasks_blocked()
                nursery.start_soon(next_one)
                await wait_all_tasks_blocked()
                scope.cancel()
                bench.give_back(held, usable=usable)
        await wait_all_tasks_blocked()
        assert served
    bench.end()


async def test_a_fresh_connection_is_to_be_had_although_all_places_are_taken_by_idle_ones() -> None:
    bench = Bench(connections=2)
    first, second = await bench.pool.acquire(KEY), await bench.pool.acquire(KEY)
    bench.give_back(first)
    bench.give_back(second)
    with trio.fail_after(30):
        fresh = await bench.pool.acquire(KEY, fresh=True)
    assert fresh not in (first, second)
    assert bench.pool.counts() == (1, 1)
    bench.give_back(fresh)
    bench.end()


async def test_dialling_that_fails_leaves_room_for_the_next() -> None:
    bench = Bench(connections=1)

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise OSError("no")

    bench.dials = fail
    for _ in range(3):
        with pytest.raises(OSError, match="no"):
            await bench.pool.acquire(KEY)
    assert not bench.pool._slots
    bench.end()


async def test_a_closed_pool_keeps_nothing_that_comes_back() -> None:
    bench = Bench()
    lent, idle = await bench.pool.acquire(KEY), await bench.pool.acquire(KEY)
    bench.give_back(idle)
    bench.pool.close()
    assert bench.pool.counts() == (1, 0)
    bench.give_back(lent)
    bench.end()


async def test_a_closed_pool_closes_later_connections_after_their_exchange() -> None:
    bench = Bench()
    bench.pool.close()
    bench.give_back(await bench.pool.acquire(KEY))
    assert bench.pool.counts() == (0, 0)
    bench.end()


async def test_trimming_closes_the_oldest_idle_connections_and_none_that_is_lent() -> None:
    bench = Bench()
    lent, *kept = [await bench.pool.acquire(KEY) for _ in range(4)]
    for upstream in kept:
        bench.give_back(upstream)
    bench.pool.trim({KEY: 4})
    assert bench.pool.counts() == (1, 3)
    bench.pool.trim({KEY: 2})
    assert bench.pool.counts() == (1, 1)
    assert (await bench.pool.acquire(KEY)) is kept[-1]
    bench.pool.trim({})
    assert bench.pool.counts() == (2, 0)
    bench.give_back(lent)
    bench.give_back(kept[-1])
    bench.pool.trim({"another": 5})
    assert bench.pool.counts() == (0, 0)
    assert not bench.pool._slots
    bench.end()
