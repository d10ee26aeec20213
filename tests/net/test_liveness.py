"""TCP detects dead peers, and a peer that reads slowly is not taken for a dead one. The kernel is
under test, so time is real here. The link that is cut is in tests/e2e/test_dead_peers.py."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest
import trio

from proxy.net.accept import Acceptor, Connection, bind
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectionLost
from proxy.net.liveness import Liveness
from proxy.net.socket_stream import SocketStream
from tests.net.conftest import LOOPBACKS, listen

TCP_USER_TIMEOUT = 18  # linux/tcp.h
TIMEOUT = 0.6  # seconds
LONG = 4 * TIMEOUT


def options(sock: socket.socket) -> dict[str, int]:
    tcp = {
        "idle": socket.TCP_KEEPIDLE,
        "interval": socket.TCP_KEEPINTVL,
        "timeout": TCP_USER_TIMEOUT,
    }
    found = {name: sock.getsockopt(socket.IPPROTO_TCP, number) for name, number in tcp.items()}
    return {**found, "keepalive": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)}


@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize(("keepalive", "interval"), [(3, 3), (40, 10)])
def test_accepted_sockets_inherit_the_options_of_the_listening_one(
    host: str, keepalive: int, interval: int
) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(bind(Address(host, 0)))
        Liveness(20, keepalive).prepare(listener)
        client = stack.enter_context(socket.socket(listener.family))
        client.connect(listener.getsockname()[:2])
        accepted = stack.enter_context(listener.accept()[0])
        assert options(accepted) == {
            "idle": keepalive,
            "interval": interval,
            "timeout": 20_000,
            "keepalive": 1,
        }


def test_zero_leaves_a_socket_as_it_is() -> None:
    with socket.socket() as sock, socket.socket() as untouched:
        Liveness(0, 0).prepare(sock)
        assert options(sock) == options(untouched)


def fill(sock: socket.socket) -> int:
    """Send until the peer's window is closed and the send buffer is full; returns the number of
    bytes."""
    sock.setblocking(False)
    sent = 0
    try:
        while True:
            sent += sock.send(bytes(65536))
    except BlockingIOError:
        return sent


def drain(sock: socket.socket, most: int) -> int:
    """Read until the end, or `most` bytes. Blocks."""
    sock.settimeout(10)
    got = 0
    while got < most and (data := sock.recv(1 << 20)):
        got += len(data)
    return got


async def test_the_kernel_ends_a_closed_window_and_the_watch_prevents_it() -> None:
    """The first connection shows what would happen to the others: the option alone ends it."""
    liveness = Liveness(TIMEOUT, 0)
    with listen() as listener:
        address = Address(*listener.getsockname()[:2])
        unwatched, dialled = (
            await Dialer().dial(address),
            await Dialer(liveness=liveness).dial(address),
        )
        peers = [listener.accept()[0] for _ in range(2)]
    liveness.prepare(unwatched.socket)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(liveness.run)
        fill(unwatched.socket)
        sent = fill(dialled.socket)
        await trio.sleep(LONG)
        with pytest.raises(ConnectionLost):
            await unwatched.receive_some()
        assert dialled.receive_nowait() is None
        assert dialled.socket.getsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT) == 0
        assert await trio.to_thread.run_sync(drain, peers[1], sent) == sent
        await dialled.send_all(b"on")
        await trio.sleep(TIMEOUT)  # the window is open: the option is set again
        assert dialled.socket.getsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT) == round(
            TIMEOUT * 1000
        )
        nursery.cancel_scope.cancel()
    for stream in (unwatched, dialled):
        stream.close()
    for sock in peers:
        sock.close()


async def test_data_sent_before_a_close_reaches_a_slow_reader() -> None:
    liveness = Liveness(TIMEOUT, 0)
    sent: list[int] = []

    async def send_and_close(connection: Connection) -> None:
        sent.append(fill(connection.stream.socket))

    def report(_: Connection, error: BaseException) -> None:
        raise AssertionError from error

    listener = bind(Address("127.0.0.1", 0))
    liveness.prepare(listener)
    acceptor = Acceptor(send_and_close, limit=10, on_error=report, on_accept=liveness.watch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(liveness.run)
        address = listener.getsockname()
        nursery.start_soon(acceptor.serve, [listener])
        with socket.create_connection(address) as client:
            await trio.sleep(LONG)
            assert acceptor.accepted == 1
            assert acceptor.open == 0
            assert await trio.to_thread.run_sync(drain, client, 1 << 40) == sent[0]
        nursery.cancel_scope.cancel()


async def test_closed_streams_are_removed_and_the_callback_is_called() -> None:
    liveness = Liveness(TIMEOUT, 0)
    closed: list[bool] = []
    with listen() as listener:
        stream = await Dialer().dial(Address(*listener.getsockname()[:2]))
        stream.on_close = lambda: closed.append(stream.closed)
        liveness.watch(stream)
        assert liveness._open == {stream}  # this test is about whether it is freed
        stream.close()
        stream.close()
    assert closed == [True]
    assert liveness._open == set()


def test_a_stream_is_a_key() -> None:
    assert SocketStream.__hash__ is object.__hash__
