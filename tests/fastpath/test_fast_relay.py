"""A relay on the fast path: its output and its end are those of a relay by two tasks."""

from __future__ import annotations

import errno
from functools import partial
from typing import cast

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.fastpath.fast_path import FastPath
from proxy.fastpath.fast_relay import FastRelay
from proxy.net.exceptions import ConnectionLost, NetError
from proxy.net.relay import Relayed, relay
from tests.fastpath.conversations import (
    IDLE,
    MESH,
    Conversation,
    Either,
    ends,
    held,
    running_fast_path,
)
from tests.kit.build import interpreted
from tests.kit.http import descriptors, until
from tests.net.conftest import both, pair, read_all


def waits(fast_path: FastPath) -> bool:
    """Whether a relay on `fast_path` has bytes that the other side does not read."""
    return any(cast("FastRelay", relay)._state.held[0] for relay in fast_path._relays)


ENDS = st.tuples(st.sampled_from(["eof", "eof", "reset"]), st.sampled_from(["eof", "reset"]))
SIZES = st.sampled_from([1, 700, 16384, 16385, 65536, 131072, 300_000])
TALKS = st.builds(
    Conversation, st.lists(st.tuples(st.integers(0, 1), SIZES), max_size=8), ENDS, st.one_of(st.none(), st.integers(0, 6))
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(TALKS, st.tuples(st.booleans(), st.booleans()))
def test_a_conversation_comes_out_as_it_does_with_tasks(
    talk: Conversation, kinds: tuple[bool, bool]
) -> None:
    async def main() -> tuple[Conversation, Conversation]:
        with_tasks = await held(Conversation(talk.pieces, talk.last), kinds, None)
        async with running_fast_path() as fast_path:
            on_fast_path = await held(
                Conversation(talk.pieces, talk.last, talk.given_back), kinds, fast_path
            )
            assert not fast_path._relays
            assert fast_path.event_loop.lent == 0
        return with_tasks, on_fast_path

    with_tasks, on_fast_path = trio.run(main)
    assert on_fast_path.peers == with_tasks.peers
    # Errors are equal if their messages are
    assert repr(on_fast_path.outcome) == repr(with_tasks.outcome)


async def test_an_end_that_was_read_after_full_records_is_noticed() -> None:
    client, a = pair()
    b, server = await MESH.connect()
    async with running_fast_path() as fast_path:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(relay, a, b, idle=IDLE, carry=fast_path.join))
                await trio.testing.wait_all_tasks_blocked()
                # In one step of this task, so that the relay finds all of it: two full records, and
                # close_notify, without the end of TCP.
                assert server.send_nowait(bytes(32768)) == 32768
                assert server.send_eof_nowait()
                assert await read_all(client) == bytes(32768)
                await client.send_eof()
                assert await read_all(server) == b""
    for stream in (client, a, b, server):
        stream.close()


async def test_no_task_waits_for_either_side() -> None:
    client, a = pair()
    b, server = pair()
    async with running_fast_path() as fast_path:
        before = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(relay, a, b, idle=IDLE, carry=fast_path.join))
            await client.send_all(b"a word")
            assert await server.receive_some() == b"a word"
            assert trio.lowlevel.current_statistics().tasks_living == before + 1
            nursery.cancel_scope.cancel()
        assert fast_path.event_loop.lent == 0
    for stream in (client, a, b, server):
        stream.close()


@pytest.mark.parametrize("tls", [False, True])
async def test_unsent_bytes_are_returned_with_it_when_the_fast_path_is_closed(
    tls: bool,
) -> None:
    client, a = pair()
    b, server = await ends(tls, buffers=16384)
    got = bytearray()

    async def take() -> None:
        while len(got) < 4_000_000:
            data = await server.receive_some()
            assert data
            got.extend(data)

    async with running_fast_path() as fast_path:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(relay, a, b, idle=IDLE, carry=fast_path.join))
                nursery.start_soon(client.send_all, bytes(range(250)) * 16_000)
                await until(lambda: waits(fast_path))
                fast_path.close()
                await take()
                nursery.cancel_scope.cancel()
    assert bytes(got) == bytes(range(250)) * 16_000
    for stream in (client, a, b, server):
        stream.close()


async def relay_recorded(found: list[Relayed], a: Either, b: Either, fast_path: FastPath) -> None:
    """Relay, and record the outcome."""
    found.append(await relay(a, b, idle=IDLE, carry=fast_path.join))


async def test_a_lost_side_is_found_when_the_other_reads_again() -> None:
    client, a = pair()
    b, server = pair(buffers=16384)
    found: list[Relayed] = []
    async with running_fast_path() as fast_path:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay_recorded, found, a, b, fast_path)
                with trio.move_on_after(0.1):
                    await client.send_all(bytes(64 << 20))
                await until(lambda: waits(fast_path))
                client.reset()
                with pytest.raises(NetError):
                    await read_all(server)
    (outcome,) = found
    assert (outcome.first, outcome.how) == ("client", "lost")
    for stream in (client, a, b, server):
        stream.close()


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("clogged", [False, True])
async def test_a_side_that_is_known_to_be_dead_ends_the_relay(tls: bool, clogged: bool) -> None:
    client, a = pair()
    b, server = await ends(tls, buffers=16384)
    found: list[Relayed] = []
    async with running_fast_path() as fast_path:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay_recorded, found, a, b, fast_path)
                await trio.testing.wait_all_tasks_blocked()
                if clogged:
                    with trio.move_on_after(0.1):
                        await client.send_all(bytes(64 << 20))
                    await until(lambda: waits(fast_path))
                b.fail(ConnectionLost("it has not answered", "timeout"))
        assert fast_path.event_loop.lent == 0
    (outcome,) = found
    assert (outcome.how, str(outcome.error)) == ("lost", "it has not answered")
    for stream in (client, a, b, server):
        stream.close()


async def test_silence_ends_it_although_exchanges_are_in_progress(
    autojump_clock: trio.abc.Clock,
) -> None:
    client, a = pair()
    b, server = pair()
    async with running_fast_path(silence=IDLE) as fast_path:
        began = trio.current_time()
        results = await both(partial(relay, a, b, idle=IDLE, carry=fast_path.join))
        assert results == [Relayed(0, 0, None, "idle", None)]
        assert IDLE <= trio.current_time() - began <= IDLE * 9 / 8
    for stream in (client, a, b, server):
        stream.close()


@interpreted
async def test_a_relay_for_which_there_is_no_room_in_the_set_takes_the_ordinary_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, a = pair()
    b, server = pair()
    async with running_fast_path() as fast_path:

        def full(descriptor: int, before: int, events: int) -> None:
            if events and descriptor == b.socket.fileno():
                raise OSError(errno.ENOSPC, "no room")
            watch(descriptor, before, events)

        watch = fast_path.event_loop.watch
        monkeypatch.setattr(fast_path.event_loop, "watch", full)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(relay, a, b, idle=IDLE, carry=fast_path.join))
                await client.send_all(b"a word")
                assert await server.receive_some() == b"a word"
                assert fast_path.event_loop.lent == 0
                nursery.cancel_scope.cancel()
    for stream in (client, a, b, server):
        stream.close()


async def test_a_side_that_was_closed_elsewhere_is_released() -> None:
    client, a = pair()
    b, server = pair()
    async with running_fast_path() as fast_path:
        with trio.move_on_after(0.05):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(relay, a, b, idle=IDLE, carry=fast_path.join))
                await trio.testing.wait_all_tasks_blocked()
                b.close()
        assert fast_path.event_loop.lent == 0
        assert fast_path.running
    for stream in (client, a, server):
        stream.close()


async def test_nothing_is_left_open() -> None:
    before = descriptors()
    for _ in range(3):
        async with running_fast_path() as fast_path:
            client, a = pair()
            b, server = pair()
            client.close()
            server.close()
            await relay(a, b, idle=IDLE, carry=fast_path.join)
            a.close()
            b.close()
    assert descriptors() == before
