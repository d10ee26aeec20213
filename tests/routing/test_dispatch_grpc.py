"""Attempts at gRPC calls: a status may be at the head or at the end of a response, and a deadline
is the client's own.

What must hold: a call is retried only for a status that its policy names and that came before
anything was forwarded. A status after messages counts for the circuit breaker. No attempt outlives
the deadline of the call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from tests.kit.dispatch import mesh, policy
from tests.kit.http import until
from tests.kit.http2_peers import GRPC, Answer, Peer2, Respond
from tests.routing.grpc_calls import calls


async def unavailable(peer: Peer2, number: int, _: Answer) -> None:
    head = [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"14")]
    peer.h2.send_headers(number, head, end_stream=True)
    await peer.flush()


async def unavailable_by_trailers(peer: Peer2, number: int, _: Answer) -> None:
    peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    await peer.trailers(number, [(b"grpc-status", b"14")])


async def fine(peer: Peer2, number: int, message: Answer) -> None:
    peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    await peer.send(number, message.body)
    await peer.trailers(
        number, [(b"grpc-status", b"0"), (b"left", message.get(b"grpc-timeout") or b"none")]
    )


@pytest.mark.parametrize(
    "first", [unavailable, unavailable_by_trailers], ids=["by its head", "by trailers"]
)
async def test_a_call_that_ends_with_a_status_of_the_policys_is_tried_again(
    first: Callable[[Peer2, int, Answer], Awaitable[None]],
) -> None:
    async with mesh(
        [calls(steps := [first, fine])] * 2, policy("retries: {grpc: [unavailable]}"), up=b"2"
    ) as (world, _):
        client = await world.hop.connect2()
        answer = await client.ask([*GRPC, (b"grpc-timeout", b"20S")], b"message")
        assert (answer.body, answer.trailers[0]) == (b"message", (b"grpc-status", b"0"))
        left = dict(answer.trailers)[b"left"]
        assert left.endswith(b"u"), left
        assert 5_000_000 < int(left[:-1]) < 20_000_000, "the second server gets the remaining time"
        assert not steps
        assert world.tried[0][0].reason == "grpc_status"


async def test_a_call_is_not_tried_again_for_another_status() -> None:
    async with mesh([calls([unavailable])] * 2, policy("retries: {grpc: [aborted]}"), up=b"2") as (
        world,
        _,
    ):
        answer = await (await world.hop.connect2()).ask(GRPC, b"message")
        assert answer.get(b"grpc-status") == b"14"
        assert not world.tried[0]


async def unavailable_at_the_end(peer: Peer2, number: int, message: Answer) -> None:
    peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    await peer.send(number, message.body)
    await peer.trailers(number, [(b"grpc-status", b"14")])


async def aborted_at_the_end(peer: Peer2, number: int, message: Answer) -> None:
    peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    await peer.send(number, message.body)
    await peer.trailers(number, [(b"grpc-status", b"10")])


Ends = Callable[[Peer2, int, Answer], Awaitable[None]]


async def statuses(
    steps: list[Ends], fields: list[tuple[bytes, bytes]] = GRPC
) -> tuple[list[bytes], int]:
    """The statuses of calls that end like this, in sequence, and how many circuits are open
    then."""
    rules = policy("{breaker: {failures: 3}, retries: {grpc: [unavailable]}}")
    async with mesh([calls(list(steps))], rules, up=b"2") as (world, _):
        client = await world.hop.connect2()
        seen = [
            dict((await client.ask(fields, b"message")).trailers).get(b"grpc-status", b"")
            for _ in steps
        ]
        assert not any(world.tried), "what has been forwarded is not retried"
        return seen, world.broken


async def test_a_status_after_messages_counts_for_the_breaker() -> None:
    assert await statuses([unavailable_at_the_end] * 3) == ([b"14"] * 3, 1)


@pytest.mark.parametrize("between", [fine, aborted_at_the_end], ids=["OK", "the call's own fault"])
async def test_a_call_that_ends_well_ends_the_row(between: Ends) -> None:
    bad = unavailable_at_the_end
    seen, broken = await statuses([bad, bad, between, bad, bad])
    assert (len(seen), broken) == (5, 0)


async def test_such_trailers_mean_nothing_outside_of_grpc() -> None:
    fields = [field for field in GRPC if field[0] != b"content-type"]
    seen, broken = await statuses([unavailable_at_the_end] * 4, fields)
    assert (seen, broken) == ([b"14"] * 4, 0)


async def test_an_unfinished_call_neither_resets_the_failure_count_nor_keeps_a_circuit_half_open() -> (
    None
):
    rules = policy("{breaker: {failures: 3, min_penalty: 50ms, jitter: 0}, queue: {timeout: 20s}}")
    release = trio.Event()

    async def streaming(peer: Peer2, number: int, message: Answer) -> None:
        peer.h2.send_headers(number, [(b":status", b"200"), (b"content-type", b"application/grpc")])
        await peer.send(number, message.body)
        await release.wait()
        await peer.trailers(number, [(b"grpc-status", b"0")])

    steps: list[Respond] = [*[unavailable_at_the_end] * 3, streaming]
    async with mesh([calls(steps)], rules, up=b"2") as (
        world,
        _,
    ):
        client = await world.hop.connect2()
        for _ in range(3):
            await client.ask(GRPC, b"message")
        assert world.broken == 1
        number = await client.request(GRPC, end=False)
        await client.send(number, b"message", end=True)
        await until(lambda: not world.broken, 20)
        release.set()
        assert (await client.message(number)).trailers == [(b"grpc-status", b"0")]


async def test_no_attempt_outlives_the_deadline_of_the_call() -> None:
    async def late(_: Peer2, __: int, ___: Answer) -> None:
        await trio.sleep_forever()

    async with mesh([calls([late])], policy(), up=b"2") as (world, _):
        answer = await (await world.hop.connect2()).ask(
            [*GRPC, (b"grpc-timeout", b"100m")], b"message"
        )
        assert answer.get(b"grpc-status") == b"4"
        assert b"http_response_timeout" in (answer.get(b"grpc-message") or b"")
        assert world.broken == 0, "the client's short deadline does not count against the endpoint"


async def test_a_call_that_has_no_time_left_for_another_attempt_gets_its_answer() -> None:
    rules = policy("retries: {grpc: [unavailable], backoff: 30s, max_backoff: 30s}")
    async with mesh([calls([unavailable])], rules, up=b"2") as (world, _):
        answer = await (await world.hop.connect2()).ask(
            [*GRPC, (b"grpc-timeout", b"20S")], b"message"
        )
        assert answer.get(b"grpc-status") == b"14"
        assert world.count("retries_refused_total", reason="deadline") == 1
