"""TLSStream: ends and losses that differ from each other clearly, and closing."""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
from OpenSSL import SSL
from trio.testing import wait_all_tasks_blocked

from proxy.net.exceptions import NetError
from proxy.net.socket_stream import ConnectionLost, SocketStream, TLSFailed
from proxy.net.tls import tls_stream
from proxy.net.tls.handshake import tls_server
from tests.net.conftest import Mesh, pair, read_all, send_until_it_fails


async def test_the_last_data_of_a_peer_can_be_read_after_a_send_has_failed(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"413 enough")
    await server.aclose()
    with pytest.raises(ConnectionLost) as caught:
        await send_until_it_fails(client)
    assert caught.value.reason in {"closed", "reset"}
    assert await read_all(client) == b"413 enough"
    client.close()


async def test_each_direction_ends_by_itself(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await client.send_all(b"question")
    await client.send_eof()
    await client.send_eof()
    with pytest.raises(trio.ClosedResourceError):
        await client.send_all(b"more")
    assert await read_all(server) == b"question"
    assert await server.receive_some() == b""
    await server.send_all(b"answer" * 10_000)
    await server.send_eof()
    assert await read_all(client) == b"answer" * 10_000
    client.close()
    server.close()


@pytest.mark.parametrize("unread", [b"", b"ers"])
async def test_a_reset_is_reported_as_one_whichever_call_sees_it_first(
    mesh: Mesh, unread: bytes
) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"answ" + unread)
    assert await client.receive_some(4) == b"answ"
    server.reset()
    await trio.lowlevel.wait_readable(client.socket)
    if unread:
        assert client.receive_nowait() == unread
    for _ in range(2):
        with pytest.raises(ConnectionLost, match="reset by peer") as caught:
            await client.receive_some()
        assert caught.value.reason == "reset"
    client.close()


async def test_last_data_can_be_read_when_a_read_has_taken_the_sockets_error_from_a_send(
    mesh: Mesh,
) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"a")
    assert await client.receive_some() == b"a"
    await server.send_all(b"enough")
    await server.send_all(b"of that")
    await wait_all_tasks_blocked(0.01)
    assert (
        client.receive_nowait(1000) == b"enough"
    )  # AWS-LC reads the socket's error before it reads
    server.close()
    client.send_nowait(b"more")
    await wait_all_tasks_blocked(0.01)
    client.is_idle()
    with pytest.raises(ConnectionLost):
        client.send_nowait(b"and more")
    assert client.receive_nowait() == b"of that"
    client.close()


@pytest.mark.parametrize("said", [b"", b"half an ans"])
async def test_the_end_of_tcp_is_not_the_end_of_tls(mesh: Mesh, said: bytes) -> None:
    client, server = await mesh.connect()
    if said:
        await server.send_all(said)
    server.socket.shutdown(socket.SHUT_WR)
    if said:
        assert await client.receive_some() == said
    with pytest.raises(ConnectionLost, match="truncated") as caught:
        await client.receive_some()
    assert caught.value.reason == "truncated"
    with pytest.raises(NetError):  # and it stays so
        await client.receive_some()
    client.close()
    server.close()


async def test_an_altered_record_is_refused(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    server.socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(TLSFailed, match="altered") as caught:
        await client.receive_some()
    assert caught.value.kind == "protocol"
    client.close()
    server.close()


async def test_full_records_are_read_together_within_the_bound(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    sent = bytes(range(256)) * 200  # three records and a rest
    await server.send_all(sent)
    assert await client.receive_some() == sent
    await server.send_all(sent)
    assert await client.receive_some(20_000) == sent[:20_000]
    rest = bytearray()
    while len(rest) < len(sent) - 20_000:
        rest += await client.receive_some()
    assert rest == sent[20_000:]
    await server.send_all(sent)
    assert client.receive_nowait() == sent
    assert client.receive_nowait() is None
    client.close()
    server.close()


@pytest.mark.parametrize("prompt", [False, True])
async def test_an_error_after_a_full_record_is_raised_by_the_next_call(
    mesh: Mesh, prompt: bool
) -> None:
    client, server = await mesh.connect()
    await server.send_all(bytes(16384))
    server.socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    first = client.receive_nowait() if prompt else await client.receive_some()
    assert first == bytes(16384)
    for _ in range(2):
        with pytest.raises(TLSFailed):
            await client.receive_some()
    client.close()
    server.close()


@pytest.mark.parametrize("sound", [False, True])
async def test_a_lost_connection_has_the_same_message_in_each_call(mesh: Mesh, sound: bool) -> None:
    client, server = await mesh.connect()
    server.reset()
    await trio.lowlevel.wait_readable(client.socket)
    with pytest.raises(ConnectionLost, match="connection reset by peer") as caught:
        client.send_nowait(b"a request", sound=sound)
    assert caught.value.reason == "reset"
    with pytest.raises(ConnectionLost, match="an earlier operation"):
        client.send_nowait(b"another")
    assert client.ended() == "lost"
    assert not client.is_idle()
    client.close()


@pytest.mark.parametrize("sound", [False, True])
async def test_the_last_data_of_a_peer_that_no_longer_reads_can_be_read(
    mesh: Mesh, sound: bool
) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"enough")
    server.close()
    # Both ends have the same kernel: the response to the first record is here before the second.
    with pytest.raises(ConnectionLost):
        client.send_nowait(bytes(20_000), sound=sound)
    assert client.receive_nowait() == b"enough"
    client.close()


@pytest.mark.parametrize(
    ("size", "sound", "asked"),
    [(1000, False, 1), (1000, True, 0), (20_000, False, 2), (20_000, True, 1)],
)
async def test_the_socket_is_polled_before_each_record_except_the_first_if_not_needed(
    mesh: Mesh, size: int, sound: bool, asked: int
) -> None:
    client, server = await mesh.connect()
    questions: list[tuple[int, ...]] = []
    option: Any = client._option

    def ask(*which: int) -> Any:
        questions.append(which)
        return option(*which)

    client._option = ask
    assert client.send_nowait(bytes(size), sound=sound) == size
    assert questions == [(socket.SOL_SOCKET, socket.SO_ERROR)] * asked
    client.close()
    server.close()


@pytest.mark.parametrize("polite", [False, True])
async def test_an_end_after_a_full_record_is_returned_by_the_next_call(
    mesh: Mesh, polite: bool
) -> None:
    client, server = await mesh.connect()
    await server.send_all(bytes(16384))
    if polite:
        await server.send_eof()
    else:
        server.socket.shutdown(socket.SHUT_WR)
    assert await client.receive_some() == bytes(16384)
    if polite:
        assert await client.receive_some() == b""
    else:
        with pytest.raises(ConnectionLost, match="truncated"):
            await client.receive_some()
    client.close()
    server.close()


async def test_aclose_sends_close_notify_and_does_not_wait_for_the_response(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_stream, "_CLOSE_TIMEOUT", 60)
    client, server = await mesh.connect()
    await server.send_all(b"last words")
    with trio.fail_after(30):
        await server.aclose()
    assert await read_all(client) == b"last words"
    await server.aclose()
    client.close()


async def test_aclose_in_a_cancelled_task_still_sends_close_notify(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    with trio.CancelScope() as scope:
        scope.cancel()
        await server.aclose()
    assert await read_all(client) == b""
    client.close()


async def test_aclose_with_unread_tickets_does_not_reset(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await client.send_all(b"fire and forget")
    await client.aclose()
    await wait_all_tasks_blocked(0.01)
    assert (
        server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    )  # no RST has come, only FIN
    assert await read_all(server) == b"fire and forget"
    server.close()


async def test_aclose_gives_up_on_a_peer_that_does_not_read(
    mesh: Mesh, autojump_clock: trio.abc.Clock
) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    sender_done = trio.Event()
    while True:  # fill with whole records until not even the first byte of another is accepted
        try:
            client._connection.send(b"x" * 1000)
        except SSL.WantWriteError:
            break
    started = time.monotonic()
    before = trio.current_time()
    await client.aclose()
    assert trio.current_time() - before <= 1.5
    assert time.monotonic() - started < 10
    sender_done.set()
    server.close()


async def test_a_send_cancelled_in_a_record_breaks_the_stream_and_the_peer_gets_no_close_notify(
    mesh: Mesh,
) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    with trio.move_on_after(0.03) as scope:
        await client.send_all(bytes(1 << 20))
    assert scope.cancelled_caught
    for operation in (partial(client.send_all, b"x"), client.send_eof):
        with pytest.raises(ConnectionLost) as caught:
            await operation()
        assert caught.value.reason == "torn"
    await client.aclose()
    with pytest.raises(ConnectionLost):
        await read_all(server)
    server.close()


async def test_closing_wakes_both_halves_and_openssl_is_not_called_again(mesh: Mesh) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    woken = 0

    async def expect(operation: Callable[[], Awaitable[object]]) -> None:
        nonlocal woken
        with pytest.raises(trio.ClosedResourceError):
            await operation()
        woken += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, partial(client.receive_some))
        nursery.start_soon(expect, partial(client.send_all, bytes(1 << 20)))
        await wait_all_tasks_blocked()
        client.close()
    assert woken == 2
    with pytest.raises(trio.ClosedResourceError):
        await client.receive_some()
    server.close()


async def test_two_senders_or_two_readers_are_a_mistake(mesh: Mesh) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.receive_some)
        nursery.start_soon(client.send_all, bytes(1 << 20))
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await client.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await client.send_all(b"x")
        with pytest.raises(trio.BusyResourceError):
            await client.send_eof()
        nursery.cancel_scope.cancel()
    client.close()
    server.close()


async def test_a_stream_that_failed_in_the_handshake_is_closed(mesh: Mesh) -> None:
    dialled, accepted = pair()
    assert isinstance(dialled, SocketStream)
    await dialled.send_all(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(TLSFailed):
        await tls_server(accepted, mesh.server_context, verify=None, timeout=20)
    assert accepted.closed
    dialled.close()
