"""Requests that a server has not processed, with real servers behind the proxy.

What must hold: a refused stream is retried only by the policy, within limit and budget. A
connection that ends under a request causes one more attempt in total. So two proxies in a row do
not multiply the requests of the server."""

from __future__ import annotations

import h2.errors
import h2.events
import pytest
import trio

from proxy.directory import Endpoint, Target
from tests.kit.dispatch import Mesh, mesh, policy
from tests.kit.http import GET, OK, Peer, origin, until
from tests.kit.http2_hop import Settings2, hop2
from tests.kit.http2_peers import GRPC, Answer, Peer2, speaking
from tests.routing.grpc_calls import calls


async def refused(peer: Peer2, number: int, _: Answer) -> None:
    await peer.reset(number, h2.errors.ErrorCodes.REFUSED_STREAM)


@pytest.mark.parametrize("limit", [0, 1, 2])
async def test_a_stream_that_is_refused_again_and_again_is_sent_once_and_as_often_as_the_policy_allows(
    limit: int,
) -> None:
    async with mesh([calls([refused] * 20)], policy(f"retries: {{limit: {limit}}}"), up=b"2") as (
        world,
        _,
    ):
        answer = await (await world.hop.connect2()).ask(GRPC, b"message")
        assert answer.reset == h2.errors.ErrorCodes.REFUSED_STREAM, "the client may send it again"
        assert world.hop.ended[0].attempts == 1 + limit
        assert world.count("retries_total", cause="refused") == limit
        assert world.count("retries_refused_total", reason="limit") == (1 if limit else 0)
        assert not world.broken


async def test_a_refused_stream_is_a_retry_of_the_budgets() -> None:
    rules = policy("retries: {limit: 5, budget: {ratio: 0, min_per_second: 0}}")
    async with mesh([calls([refused] * 20)], rules, up=b"2") as (world, _):
        assert (
            await (await world.hop.connect2()).ask(GRPC, b"message")
        ).reset == h2.errors.ErrorCodes.REFUSED_STREAM
        assert world.hop.ended[0].attempts == 1
        assert world.count("retries_refused_total", reason="budget") == 1


@pytest.mark.parametrize("limit", [0, 1, 3])
async def test_connections_that_always_go_away_cost_one_attempt_more_in_all(limit: int) -> None:
    async def leaves(peer: Peer2) -> None:
        await peer.next(h2.events.RequestReceived)
        peer.h2.close_connection(last_stream_id=0)
        await peer.flush()

    async with mesh([speaking(leaves)] * 2, policy(f"retries: {{limit: {limit}}}"), up=b"2") as (
        world,
        _,
    ):
        answer = await (await world.hop.connect2()).ask()
        assert answer.reset == h2.errors.ErrorCodes.REFUSED_STREAM
        assert world.hop.ended[0].attempts == limit + 2


@pytest.mark.parametrize("limit", [0, 1, 3])
async def test_kept_connections_that_always_break_cost_one_attempt_more_in_all(limit: int) -> None:
    asked, all_asked = 0, trio.Event()

    async def script(peer: Peer) -> None:
        nonlocal asked
        await peer.request()
        asked += 1
        if asked <= 3:
            if asked == 3:
                all_asked.set()
            await all_asked.wait()
            await peer.send(OK)
            await peer.request()
        peer.reset()

    async with mesh([script], policy(f"retries: {{limit: {limit}}}")) as (world, _):
        clients = [await world.hop.connect() for _ in range(3)]
        for client in clients:
            await client.send(GET)
        for client in clients:
            assert (await client.response()).status == 200
        await until(lambda: world.hop.pool1.counts() == (0, 3))
        assert (await clients[0].ask()).status == 502
        assert world.hop.ended[-1].attempts == limit + 2


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("how", ["reset", "goaway"])
async def test_refused_streams_are_not_multiplied_by_the_proxies_on_the_path(
    how: str, limit: int
) -> None:
    seen = 0

    async def application(peer: Peer2) -> None:
        nonlocal seen
        while True:
            number = (await peer.next(h2.events.RequestReceived)).stream_id
            seen += 1
            if how == "goaway":
                peer.h2.close_connection(last_stream_id=0)
                await peer.flush()
                return
            await peer.reset(number, h2.errors.ErrorCodes.REFUSED_STREAM)

    async with origin(speaking(application)) as server, hop2(server.address) as inner:
        world = Mesh(
            Target(
                "default/web",
                (Endpoint(inner.address),),
                policy=policy(f"retries: {{limit: {limit}}}"),
            )
        )
        async with hop2(inner.address, settings=Settings2(steer=world.steer)) as world.hop:
            answer = await (await world.hop.connect2()).ask()
            assert answer.reset == h2.errors.ErrorCodes.REFUSED_STREAM
    assert seen == (1 + limit) * (2 if how == "goaway" else 1)
