"""The accept loop never dies: not of a handler's error, not of a flood, not of missing descriptors.
It stops when its scope is cancelled or it drains."""

from __future__ import annotations

import errno
import socket
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from proxy.net.accept import Acceptor, BindFailed, Connection, bind, original_destination
from proxy.net.socket_stream import Address, ConnectionLost, SocketStream
from tests.net.conftest import LOOPBACKS, no_descriptor_left, read_all, sockets

Errors = list[tuple[Connection, BaseException]]


def ignore(_: Connection, __: BaseException) -> None:
    raise AssertionError("no error was expected")


def dial(listener: socket.socket) -> SocketStream:
    sock = socket.socket(listener.family)
    sock.connect(listener.getsockname()[:2])
    return SocketStream(sock)


async def echo(connection: Connection) -> None:
    while data := await connection.stream.receive_some():
        await connection.stream.send_all(data)


# Binding


@pytest.mark.parametrize("host", LOOPBACKS)
def test_an_address_can_be_bound_once(host: str) -> None:
    with bind(Address(host, 0)) as listener:
        taken = Address(host, listener.getsockname()[1])
        with pytest.raises(BindFailed, match="listens there already") as caught:
            bind(taken)
        assert str(taken) in str(caught.value)


def test_both_families_can_be_bound_to_the_same_port() -> None:
    with bind(Address("::", 0)) as six, bind(Address("0.0.0.0", six.getsockname()[1])) as four:
        assert six.getsockname()[1] == four.getsockname()[1]


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(BindFailed, match="does not have that address"):
        bind(Address("192.0.2.77", 0))


# Connections


@pytest.mark.parametrize("host", LOOPBACKS)
async def test_a_connection_knows_its_addresses(host: str) -> None:
    seen: list[Connection] = []

    async def handler(connection: Connection) -> None:
        seen.append(connection)
        await echo(connection)

    listener = bind(Address(host, 0))
    acceptor = Acceptor(handler, limit=10, on_error=ignore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, [listener])
        client = dial(listener)
        await client.send_all(b"hello")
        assert await client.receive_some() == b"hello"
        assert acceptor.open == 1
        assert (seen[0].peer, seen[0].local) == (client.local, client.peer)
        assert seen[0].original is None  # loopback is not redirected
        client.close()
        acceptor.drain(1)
    assert acceptor.open == 0
    assert seen[0].stream.closed


async def test_a_handler_that_returns_early_leaves_nothing_open() -> None:
    async def handler(connection: Connection) -> None:
        await connection.stream.send_all(b"bye")

    listener = bind(Address("127.0.0.1", 0))
    acceptor = Acceptor(handler, limit=10, on_error=ignore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, [listener])
        client = dial(listener)
        assert await read_all(client) == b"bye"
        client.close()
        acceptor.drain(0)


async def test_an_error_ends_its_connection_only_and_is_reported() -> None:
    errors: Errors = []
    problems: list[BaseException] = [
        ValueError("plain"),
        ConnectionLost("gone", "reset"),
        ExceptionGroup("outer", [ExceptionGroup("inner", [KeyError("nested")])]),
        ExceptionGroup("two", [ValueError("1"), ValueError("2")]),
    ]

    async def handler(connection: Connection) -> None:
        number = await connection.stream.receive_some(1)
        raise problems[int(number)]

    listener = bind(Address("127.0.0.1", 0))
    acceptor = Acceptor(
        handler, limit=10, on_error=lambda connection, error: errors.append((connection, error))
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, [listener])
        for number in b"0123":
            client = dial(listener)
            await client.send_all(bytes([number]))
            assert await read_all(client) == b""
            client.close()
        acceptor.drain(0)
    assert [type(error) for _, error in errors] == [
        ValueError,
        ConnectionLost,
        KeyError,
        ExceptionGroup,
    ]
    assert all(connection.stream.closed for connection, _ in errors)


async def test_an_error_beside_a_cancellation_is_reported_and_the_cancellation_continues() -> None:
    errors: Errors = []

    async def handler(_: Connection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while being cancelled")

    listener = bind(Address("127.0.0.1", 0))
    acceptor = Acceptor(
        handler, limit=10, on_error=lambda connection, error: errors.append((connection, error))
    )
    with trio.move_on_after(60) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.serve, [listener])
            client = dial(listener)
            await wait_all_tasks_blocked(0.01)
            scope.cancel()
    assert scope.cancelled_caught
    assert [str(error) for _, error in errors] == ["while being cancelled"]
    client.close()


async def test_a_reporter_that_fails_does_not_end_the_service(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(_: Connection) -> None:
        raise ValueError("first")

    listener = bind(Address("127.0.0.1", 0))
    acceptor = Acceptor(handler, limit=10, on_error=ignore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, [listener])
        for _ in range(2):
            client = dial(listener)
            assert await read_all(client) == b""
            client.close()
        acceptor.drain(0)
    assert "cannot report the error" in caplog.text
    assert "first" in caplog.text


async def test_a_connection_that_is_reset_before_it_is_accepted_is_not_an_error() -> None:
    listener = bind(Address("127.0.0.1", 0))
    for _ in range(3):
        dial(listener).reset()
    acceptor = Acceptor(echo, limit=10, on_error=lambda _, error: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, [listener])
        client = dial(listener)
        await client.send_all(b"still here")
        assert await client.receive_some() == b"still here"
        client.close()
        acceptor.drain(1)
    assert acceptor.open == 0


# Bounds


async def test_over_the_limit_connections_wait_in_the_kernel() -> None:
    listeners = [bind(Address("127.0.0.1", 0)) for _ in range(2)]
    acceptor = Acceptor(echo, limit=2, on_error=ignore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, listeners)
        clients = [dial(listeners[number % 2]) for number in range(4)]
        for client in clients:
            await client.send_all(b"x")
        await wait_all_tasks_blocked(0.02)
        assert acceptor.open == 2
        answered = [client for client in clients if not client.is_idle()]
        waiting = [client for client in clients if client.is_idle()]
        assert len(answered) == len(waiting) == 2
        for done, freed in zip(answered, waiting, strict=True):
            done.close()
            with trio.fail_after(30):
                assert await freed.receive_some() == b"x"
            assert acceptor.open == 2
        for client in waiting:
            client.close()
        acceptor.drain(1)


async def test_running_out_of_descriptors_pauses_accepting_and_nothing_more() -> None:
    pauses: list[OSError] = []
    listener = bind(Address("127.0.0.1", 0))
    paused = trio.Event()

    def pause(error: OSError) -> None:
        pauses.append(error)
        paused.set()

    acceptor = Acceptor(echo, limit=10, on_error=ignore, on_pause=pause)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, [listener])
        open_before = dial(listener)
        await open_before.send_all(b"a")
        assert await open_before.receive_some() == b"a"
        late = socket.socket()
        with no_descriptor_left():
            late.connect(listener.getsockname())
            with trio.fail_after(30):
                await paused.wait()
            await open_before.send_all(b"b")  # the open ones are not affected
            assert await open_before.receive_some() == b"b"
        client = SocketStream(late)
        await client.send_all(b"c")
        with trio.fail_after(30):
            assert await client.receive_some() == b"c"
        client.close()
        open_before.close()
        acceptor.drain(1)
    assert {pause.errno for pause in pauses} == {errno.EMFILE}


def test_a_limit_of_none_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="limit"):
        Acceptor(echo, limit=0, on_error=ignore)


# Draining


async def test_draining_stops_accepting_at_once_and_lets_connections_finish() -> None:
    listener = bind(Address("127.0.0.1", 0))
    address = listener.getsockname()
    acceptor = Acceptor(echo, limit=10, on_error=ignore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, [listener])
        client = dial(listener)
        await client.send_all(b"1")
        assert await client.receive_some() == b"1"
        acceptor.drain(60)
        await wait_all_tasks_blocked(0.01)
        assert acceptor.draining
        assert listener.fileno() == -1
        with pytest.raises(ConnectionRefusedError), socket.socket() as late:
            late.connect(address)
        await client.send_all(b"2")
        assert await client.receive_some() == b"2"
        client.close()


async def test_connections_in_the_kernels_queue_are_accepted_while_there_is_room() -> None:
    """For these clients the connection is open already, and they may have sent something."""
    listener = bind(Address("127.0.0.1", 0))
    acceptor = Acceptor(echo, limit=3, on_error=ignore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve, [listener])
        await wait_all_tasks_blocked()
        clients = [dial(listener) for _ in range(4)]
        acceptor.drain(60)
        for client in clients[:3]:
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
            client.close()
        with pytest.raises(ConnectionLost):
            await clients[3].receive_some()
        clients[3].close()
    assert (acceptor.accepted, acceptor.open, listener.fileno()) == (3, 0, -1)


async def test_connections_that_do_not_finish_in_the_grace_period_are_cancelled() -> None:
    listener = bind(Address("127.0.0.1", 0))
    acceptor = Acceptor(echo, limit=10, on_error=ignore)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.serve, [listener])
            client = dial(listener)
            await wait_all_tasks_blocked(0.01)
            acceptor.drain(0.02)
            acceptor.drain(60)  # cannot lengthen it
    assert acceptor.open == 0
    assert await read_all(client) == b""
    client.close()


async def test_a_drain_before_serving_serves_only_connections_that_are_there() -> None:
    listener = bind(Address("127.0.0.1", 0))
    acceptor = Acceptor(echo, limit=10, on_error=ignore)
    acceptor.drain(60)
    with trio.fail_after(30):
        await acceptor.serve([listener])
    assert listener.fileno() == -1


async def test_cancelling_the_service_closes_everything() -> None:
    listener = bind(Address("127.0.0.1", 0))
    acceptor = Acceptor(echo, limit=10, on_error=ignore)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(acceptor.serve, [listener]))
        client = dial(listener)
        await wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    assert (acceptor.open, listener.fileno()) == (0, -1)
    assert await read_all(client) == b""
    client.close()


# The original destination


@pytest.mark.parametrize("host", LOOPBACKS)
def test_a_connection_that_was_not_redirected_has_no_other_destination(host: str) -> None:
    ours, theirs = sockets(host)
    assert original_destination(theirs, Address.of(theirs.getsockname())) is None
    ours.close()
    theirs.close()
