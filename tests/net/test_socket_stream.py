"""SocketStream: peeking consumes nothing and never spins, a lost connection never looks like a
clean end, closing wakes all waiters."""

from __future__ import annotations

import contextlib
import gc
import socket
import time
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from proxy.net.linger import linger
from proxy.net.socket_stream import Address, ConnectionLost, SocketStream
from tests.net.conftest import (
    LOOPBACKS,
    both,
    clogged_pair,
    pair,
    read_all,
    send_until_it_fails,
    sockets,
)


@pytest.mark.parametrize("host", LOOPBACKS)
async def test_a_stream_knows_both_ends_and_counts_its_bytes(host: str) -> None:
    ours, theirs = pair(host)
    assert ours.peer == theirs.local
    assert ours.local == theirs.peer
    assert ours.peer.host == host
    await ours.send_all(b"12345")
    await theirs.receive_some(3)
    assert (ours.bytes_written, theirs.bytes_read) == (5, 3)
    assert ours.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    ours.close()
    theirs.close()


async def test_an_ipv4_peer_of_an_ipv6_socket_is_an_ipv4_address() -> None:
    with socket.socket(socket.AF_INET6) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        listener.listen()
        dialled = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
        accepted, _ = listener.accept()
    stream = SocketStream(accepted)
    assert stream.peer == Address(*dialled.getsockname())
    assert stream.local.host == "127.0.0.1"
    stream.close()
    dialled.close()


async def test_a_large_transfer_both_ways_at_once_arrives_whole() -> None:
    ours, theirs = pair(buffers=16384)
    data = bytes(range(256)) * 8192

    async def send(stream: SocketStream) -> None:
        await stream.send_all(memoryview(data))
        await stream.send_eof()

    results = await both(
        partial(send, ours),
        partial(send, theirs),
        partial(read_all, ours),
        partial(read_all, theirs),
    )
    assert results == [None, None, data, data]
    ours.close()
    theirs.close()


# Peeking


async def test_peeking_consumes_nothing() -> None:
    ours, theirs = pair()
    await theirs.send_all(b"hello")
    assert await ours.peek(3) == b"hel"
    assert await ours.peek(100, at_least=5) == b"hello"
    assert await ours.receive_some() == b"hello"
    ours.close()
    theirs.close()


async def test_a_peek_for_n_bytes_sleeps_while_they_come_one_by_one() -> None:
    ours, theirs = pair()
    wakes = 0
    recv = ours._recv

    def counting(*arguments: int) -> bytes:
        nonlocal wakes
        wakes += 1
        return recv(*arguments)

    ours._recv = counting

    async def trickle() -> None:
        for byte in b"0123456789":
            await theirs.send_all(bytes([byte]))
            await wait_all_tasks_blocked(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        assert await ours.peek(64, at_least=10) == b"0123456789"
    assert wakes <= 3  # one that finds too little, one that finds all; never one for each byte
    assert ours.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    ours.close()
    theirs.close()


async def test_a_peek_for_more_than_there_is_costs_no_cpu_while_it_waits() -> None:
    ours, theirs = pair()
    await theirs.send_all(b"too little")
    before = time.process_time()
    with trio.move_on_after(0.2) as scope:
        await ours.peek(64, at_least=64)
    assert scope.cancelled_caught
    assert time.process_time() - before < 0.1
    assert ours.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    assert await ours.receive_some() == b"too little"
    ours.close()
    theirs.close()


async def test_a_peek_rests_while_the_kernel_reports_too_few_bytes_as_readable(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """As for all sockets while the kernel is short of memory for TCP: here the receive buffer is so
    small that the kernel takes it for nearly full (tcp_rmem_pressure in the kernel's net/tcp.h)."""
    ours, theirs = pair(buffers=1)
    sent = bytes(900)
    await theirs.send_all(sent)
    looks: list[float] = []
    recv = ours._recv

    def counting(*arguments: int) -> bytes:
        looks.append(trio.current_time())
        return recv(*arguments)

    ours._recv = counting
    with trio.move_on_after(10) as scope:
        await ours.peek(1000, at_least=1000)
    assert scope.cancelled_caught
    pauses = [after - before for before, after in pairwise(looks)]
    assert pauses[1:6] == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32])
    assert max(pauses) == pytest.approx(0.32)
    assert len(looks) <= 40
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, bytes(100))
        assert await ours.peek(1000, at_least=1000) == sent + bytes(100)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("sent", [b"", b"abc"])
@pytest.mark.parametrize("early", [True, False])
async def test_the_end_during_a_peek_returns_the_available_bytes(sent: bytes, early: bool) -> None:
    ours, theirs = pair()

    async def end() -> None:
        if not early:
            await wait_all_tasks_blocked()
        if sent:
            await theirs.send_all(sent)
            await wait_all_tasks_blocked()
        await theirs.send_eof()

    async with trio.open_nursery() as nursery:
        if early:
            await end()
        else:
            nursery.start_soon(end)
        assert await ours.peek(64, at_least=10) == sent
    assert await read_all(ours) == sent
    ours.close()
    theirs.close()


async def test_a_reset_during_a_peek_is_a_lost_connection() -> None:
    ours, theirs = pair()
    async with trio.open_nursery() as nursery:

        async def peek() -> None:
            with pytest.raises(ConnectionLost) as caught:
                await ours.peek(64, at_least=10)
            assert caught.value.reason == "reset"

        nursery.start_soon(peek)
        await wait_all_tasks_blocked()
        theirs.reset()
    ours.close()


async def test_after_a_peek_a_read_wakes_at_one_byte() -> None:
    ours, theirs = pair()
    with trio.move_on_after(0.01):
        await ours.peek(64, at_least=10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, b"x")
        with trio.fail_after(30):
            assert await ours.receive_some() == b"x"
    ours.close()
    theirs.close()


async def test_a_peek_beyond_what_the_receive_buffer_can_hold_does_not_hang_at_the_end() -> None:
    ours, theirs = pair(buffers=4096)
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await theirs.send_all(bytes(1000))
            await theirs.send_eof()

        nursery.start_soon(send)
        with trio.fail_after(30):
            assert len(await ours.peek(1 << 20, at_least=1 << 20)) == 1000
    ours.close()
    theirs.close()


@pytest.mark.parametrize(("max_bytes", "at_least"), [(0, 0), (4, 0), (4, 5)])
async def test_a_peek_that_cannot_be_met_is_a_mistake(max_bytes: int, at_least: int) -> None:
    ours, theirs = pair()
    with pytest.raises(ValueError, match="peek"):
        await ours.peek(max_bytes, at_least)
    ours.close()
    theirs.close()


# Ends, clean and others


async def test_half_close_ends_one_direction_only() -> None:
    ours, theirs = pair()
    await ours.send_all(b"question")
    await ours.send_eof()
    assert await read_all(theirs) == b"question"
    await theirs.send_all(b"answer")
    await theirs.send_eof()
    assert await read_all(ours) == b"answer"
    ours.close()
    theirs.close()


async def test_reset_is_seen_as_lost_and_never_as_an_end() -> None:
    ours, theirs = pair()
    ours.reset()
    with pytest.raises(ConnectionLost, match="reset") as caught:
        await theirs.receive_some()
    assert caught.value.reason == "reset"
    theirs.close()


async def test_a_lost_stream_does_not_wait_for_the_garbage_collector() -> None:
    ours, theirs = pair()
    ours.reset()
    with pytest.raises(ConnectionLost):
        await theirs.receive_some()
    theirs.close()
    gone = weakref.ref(theirs)
    gc.disable()
    try:
        del theirs
        assert gone() is None
    finally:
        gc.enable()


async def test_a_reset_that_a_send_has_met_is_not_an_end_for_the_reader() -> None:
    """The kernel reports a reset once, and returns b"" afterwards."""
    ours, theirs = pair()
    ours.reset()
    await wait_all_tasks_blocked()
    with pytest.raises(ConnectionLost):
        await theirs.send_all(b"x")
    with pytest.raises(ConnectionLost) as caught:
        await theirs.receive_some()
    assert caught.value.reason == "reset"
    theirs.close()


async def test_data_sent_before_the_peer_closed_can_be_read_after_a_send_has_failed() -> None:
    ours, theirs = pair()
    await ours.send_all(b"enough, thank you")
    ours.close()
    with pytest.raises(ConnectionLost) as caught:
        await send_until_it_fails(theirs)
    assert caught.value.reason == "closed"
    assert await read_all(theirs) == b"enough, thank you"
    theirs.close()


async def test_a_send_that_was_cancelled_half_way_tears_the_stream() -> None:
    ours, theirs = pair(buffers=16384)
    with trio.move_on_after(0.02):
        await ours.send_all(bytes(1 << 20))
    for operation in (partial(ours.send_all, b"x"), ours.send_eof):
        with pytest.raises(ConnectionLost) as caught:
            await operation()
        assert caught.value.reason == "torn"
    ours.reset()
    with pytest.raises(ConnectionLost):
        await read_all(theirs)
    theirs.close()


async def test_closing_wakes_the_reader_and_the_writer_and_can_be_repeated() -> None:
    ours, theirs = await clogged_pair()
    await read_nowait(ours)
    woken = 0

    async def expect(operation: Callable[[], Awaitable[object]]) -> None:
        nonlocal woken
        with pytest.raises(trio.ClosedResourceError):
            await operation()
        woken += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, partial(ours.peek, 1 << 22, 1 << 22))
        nursery.start_soon(expect, partial(ours.send_all, bytes(65536)))
        await wait_all_tasks_blocked()
        ours.close()
        ours.close()
        ours.reset()
    assert woken == 2
    assert not ours.is_idle()
    theirs.close()


async def read_nowait(stream: SocketStream) -> None:
    try:
        while stream.socket.recv(1 << 20):
            pass
    except BlockingIOError:
        return


async def test_idle_means_open_and_silent() -> None:
    ours, theirs = pair()
    assert ours.is_idle()
    await theirs.send_all(b"x")
    assert not ours.is_idle()
    await ours.receive_some()
    assert ours.is_idle()
    await theirs.send_eof()
    assert not ours.is_idle()
    theirs.close()
    ours.close()
    assert not ours.is_idle()


async def test_a_socket_that_is_already_dead_makes_no_stream() -> None:
    ours, theirs = sockets()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    ours.close()
    with pytest.raises(ConnectionLost):
        SocketStream(theirs)
    assert theirs.fileno() == -1


async def test_lingering_saves_an_answer_from_the_reset() -> None:
    ours, theirs = pair()
    await ours.send_all(bytes(500_000))  # a body that is not read
    await theirs.send_all(b"413")

    async def finish() -> None:
        assert await read_all(ours) == b"413"
        await ours.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        await linger(theirs, seconds=2)
        theirs.close()
    ours.close()


async def test_lingering_is_bounded_in_time_and_ends_when_the_peer_is_quiet() -> None:
    ours, theirs = pair()
    with trio.fail_after(30):
        await linger(theirs, seconds=0.02)
        await ours.send_all(bytes(300_000))
        await linger(theirs, seconds=3600, quiet=0.05)

    async def flood() -> None:
        with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            while True:
                await ours.send_all(bytes(65536))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        before = theirs.bytes_read
        with trio.fail_after(30):
            await linger(theirs, seconds=0.5, quiet=10)
        # 1 MiB at full speed, and 4 MiB/s for half a second: a flood is not read as fast as it
        # comes.
        assert 1 << 20 < theirs.bytes_read - before < 4 << 20
        nursery.cancel_scope.cancel()
    ours.close()
    theirs.close()


# Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:80", Address("10.0.0.1", 80)),
        ("[fd00::1]:443", Address("fd00::1", 443)),
        ("[FD00:0::1]:443", Address("fd00::1", 443)),
        ("[::ffff:10.0.0.1]:80", Address("10.0.0.1", 80)),
    ],
)
def test_addresses_are_read_in_their_canonical_form(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("10.0.0.1", "no port"),
        ("10.0.0.1:", "not a port"),
        ("10.0.0.1:65536", "not a port"),
        ("10.0.0.1:٣", "not a port"),
        ("example.com:80", "not an IP literal"),
        ("fd00::1:80", "brackets"),
        ("[10.0.0.1]:80", "brackets"),
        ("10.0.0.01:80", "not an IP literal"),
        (":80", "not an IP literal"),
    ],
)
def test_what_is_not_an_address_is_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Address.parse(text)
