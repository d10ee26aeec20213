"""Many mixed requests at once, and attacks: afterwards nothing is left, and memory is what it
was."""

from __future__ import annotations

import contextlib
import random
import resource
import tracemalloc
from functools import partial

import h2.errors
import trio
from trio.lowlevel import current_statistics

from tests.kit.http import descriptors, until
from tests.kit.http2_hop import Settings2, through2
from tests.kit.http2_peers import GET, POST, Answer, Gone, Peer2, answering2, echo2

REQUESTS = 1500


async def test_mixed_requests_cancelled_at_any_moment_leave_nothing_behind() -> None:
    dice = random.Random(7)
    async with through2(answering2(echo2)) as (first, proxy):
        assert (await first.ask()).status == 200
        clients = [first, *[await proxy.connect2() for _ in range(3)]]
        for client in clients[1:]:
            await client.ask()
        await proxy.idle()
        before = descriptors(), current_statistics().tasks_living

        async def one(client: object, number: int, size: int, ends: int) -> None:
            for _ in range(ends % 3):
                await trio.lowlevel.checkpoint()
            try:
                if ends < 4:
                    await client.send(number, bytes(size))  # type: ignore[attr-defined]
                    await client.reset(number)  # type: ignore[attr-defined]
                else:
                    await client.send(number, bytes(size), end=True)  # type: ignore[attr-defined]
            except Exception:  # noqa: S110  # a stream that the other side ended first
                pass

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.pump)
            for start in range(0, REQUESTS, 40):
                wanted = []
                async with trio.open_nursery() as uploads:
                    for _ in range(40):
                        client, ends = dice.choice(clients), dice.randrange(20)
                        number = await client.request(POST, end=False)
                        uploads.start_soon(
                            one, client, number, dice.choice([0, 1, 500, 30_000]), ends
                        )
                        if ends >= 4:
                            wanted.append((client, number))
                with trio.fail_after(60):
                    await until(partial(_ended, wanted), 60)
                assert all(c.messages[n].reset is None for c, n in wanted), start
            await proxy.idle()
            nursery.cancel_scope.cancel()
        await proxy.idle()
        assert all(mux._held == 0 and mux.reserved == 0 for mux in proxy.muxes())
        assert all(server.mux._held == 0 for server in proxy.servers)
        await until(lambda: (descriptors(), current_statistics().tasks_living) <= before)


def _ended(streams: list[tuple[Peer2, int]]) -> bool:
    return all(number in client.ended for client, number in streams)


async def test_a_rapid_reset_ends_only_the_attacker_s_connection() -> None:
    async with through2(answering2()) as (other, proxy):
        await other.ask()
        resource.getrusage(resource.RUSAGE_SELF)
        tracemalloc.start()
        for _ in range(3):
            attacker = await proxy.connect2()
            try:
                for _ in range(1500):
                    number = attacker.h2.get_next_available_stream_id()
                    attacker.h2.send_headers(number, GET, end_stream=True)
                    attacker.h2.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
                    if number % 100 == 1:
                        await attacker.flush()
                await attacker.flush()
                while await attacker.peer.stream.receive_some(65536):
                    pass
            except (trio.BrokenResourceError, Gone):
                pass
            assert (await other.ask()).body == b"ok"
        await proxy.idle()
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert grown < 12_000_000
        await until(lambda: proxy.acceptor.open == 1)


async def test_more_streams_than_allowed_are_refused_and_the_others_continue() -> None:
    async with through2(answering2(), Settings2()) as (client, proxy):
        client.h2.remote_settings.max_concurrent_streams = 10_000
        numbers = []
        for _ in range(400):
            number = client.h2.get_next_available_stream_id()
            client.h2.send_headers(number, POST)
            numbers.append(number)
        await client.flush()
        with trio.fail_after(30):
            while (
                sum(client.messages[n].reset is not None for n in numbers if n in client.messages)
                < 144
            ):
                await client.read()
        refused = [
            n for n in numbers if n in client.messages and client.messages[n].reset is not None
        ]
        assert {client.messages[n].reset for n in refused} == {h2.errors.ErrorCodes.REFUSED_STREAM}
        await client.send(1, b"", end=True)
        assert (await client.message(1)).body == b"ok"
        assert proxy.servers[0].mux.exchanges <= 256


async def test_a_peer_that_asks_and_does_not_read_holds_no_more_than_its_streams() -> None:
    async def respond(peer: Peer2, number: int, _: Answer) -> None:
        peer.h2.send_headers(
            number, [(b":status", b"204"), (b"x-fill", b"y" * 900)], end_stream=True
        )
        await peer.flush()

    async with through2(answering2(respond), Settings2(buffers=4096), buffers=4096) as (
        client,
        proxy,
    ):
        client.h2.remote_settings.max_concurrent_streams = 10_000_000
        client.h2.config.logger = client.h2.config.logger
        sent = 0

        async def ask() -> None:
            nonlocal sent
            while sent < 6000:
                client.h2.send_headers(
                    client.h2.get_next_available_stream_id(), GET, end_stream=True
                )
                sent += 1
                if sent % 20 == 0:
                    await client.flush()

        with trio.move_on_after(3):
            with contextlib.suppress(trio.BrokenResourceError):
                await ask()
        for server in proxy.servers:
            assert server.mux.http.pending is not None
            assert sum(map(len, server.mux.http._out)) < 700_000
            assert server.mux.exchanges <= 256
