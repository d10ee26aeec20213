"""The log line of a relay that did not end cleanly names the side where it happened, as a reader of
the log knows it."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from proxy.exchange.server_settings import Drain
from proxy.fastpath.fast_path import FastPath
from proxy.net.relay import Relayed, relay
from proxy.telemetry.records import describe_end
from tests.net.conftest import both, pair


@pytest.mark.parametrize("lost", ["client", "server"])
@pytest.mark.parametrize("fast", [False, True])
async def test_a_side_that_is_lost_is_named(
    lost: str, nursery: trio.Nursery, *, fast: bool
) -> None:
    fast_path = FastPath(Drain(), 60, 60)
    if fast:
        await fast_path.open()
        nursery.start_soon(fast_path.run)
    client, accepted = pair()
    dialled, server = pair()

    async def lose() -> None:
        await client.send_all(b"x")
        await server.receive_some()
        (client if lost == "client" else server).reset()

    with trio.fail_after(30):
        outcome, _ = await both(
            partial(relay, accepted, dialled, idle=60, carry=fast_path.join if fast else None), lose
        )
    assert isinstance(outcome, Relayed)
    assert describe_end(outcome).startswith(f"{lost}: ")
    for stream in (client, accepted, dialled, server):
        stream.close()


async def test_the_side_that_is_lost_is_named_even_if_the_other_one_ended_first() -> None:
    client, accepted = pair()
    dialled, server = pair()

    async def end() -> None:
        await client.send_eof()
        assert await server.receive_some() == b""
        server.reset()

    with trio.fail_after(30):
        outcome, _ = await both(partial(relay, accepted, dialled, idle=60), end)
    assert isinstance(outcome, Relayed)
    assert outcome.first == "client"
    assert describe_end(outcome).startswith("server: ")
    for stream in (client, accepted, dialled, server):
        stream.close()


async def test_silence_is_of_neither_side(autojump_clock: trio.abc.Clock) -> None:
    client, accepted = pair()
    dialled, server = pair()
    outcome = await relay(accepted, dialled, idle=60)
    assert describe_end(outcome) == "neither side sent data for too long"
    for stream in (client, accepted, dialled, server):
        stream.close()
