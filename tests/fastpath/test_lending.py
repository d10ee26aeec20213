"""A connection moves to the fast path and back, and the fast path counts it once."""

from __future__ import annotations

import math

import pytest
import trio

from proxy.exchange.server_settings import Drain
from proxy.fastpath.fast_path import FastPath
from tests.kit.hop import Settings, through
from tests.kit.http import GET, answering, until


async def test_a_retired_connection_on_the_ordinary_path_is_not_counted_as_returned() -> None:
    async with through(answering(), Settings(fast=True)) as (client, proxy):
        other = await proxy.connect()
        for peer in (client, other):
            assert (await peer.ask(GET)).status == 200
        fast_path = proxy.fast_path
        assert fast_path is not None
        await until(lambda: len(fast_path._connections) == 2)
        lent = set(fast_path._connections)
        await client.send(GET[:5])  # a head that is not complete goes to the ordinary path
        await until(lambda: len(fast_path._connections) == 1)
        (returned,) = lent - fast_path._connections
        returned._server.retire()  # type: ignore[attr-defined]
        assert fast_path.event_loop.lent == 1
        await client.send(GET[5:])
        answer = await client.response()
        assert answer.get(b"connection") == b"close"
        with trio.fail_after(5):
            assert (await other.ask(GET)).status == 200  # its connection is still polled


class _Carried:
    """An exchange whose first handover fails."""

    moved, limit = 0.0, math.inf

    def __init__(self) -> None:
        self.handed_over = 0

    def hand_over(self) -> None:
        self.handed_over += 1
        raise RuntimeError("not today")


def test_an_exchange_that_cannot_be_handed_over_is_logged_and_does_not_stop_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fast_path = FastPath(Drain(), 60.0, 60.0)
    exchanges = [_Carried(), _Carried()]
    for exchange in exchanges:
        fast_path.exchange_began(exchange)
    fast_path.give_up(math.inf)
    assert [exchange.handed_over for exchange in exchanges] == [1, 1]
    assert caplog.text.count("internal error while handing over an exchange") == 2
    fast_path.give_up(math.inf)
    assert [exchange.handed_over for exchange in exchanges] == [1, 1]
