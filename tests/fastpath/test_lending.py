"""A connection goes to the fast path and comes back, and the fast path counts it once."""

from __future__ import annotations

import trio

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
