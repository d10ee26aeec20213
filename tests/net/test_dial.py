"""Dialling: one attempt, an exact reason when it fails, nothing left open, and the loop guard is
called first."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from proxy.net.dial import Dialer, _stream
from proxy.net.liveness import Liveness
from proxy.net.socket_stream import Address, ConnectFailed, SocketStream
from tests.net.conftest import LOOPBACKS, listen, no_descriptor_left

TCP_USER_TIMEOUT = 18  # linux/tcp.h


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def address_of(listener: socket.socket) -> Address:
    return Address(*listener.getsockname()[:2])


@pytest.mark.parametrize("host", LOOPBACKS)
async def test_dialling_gives_a_connected_stream(host: str) -> None:
    with listen(host) as listener:
        stream = await Dialer(liveness=Liveness(30.5, 7)).dial(address_of(listener))
        accepted, _ = listener.accept()
    assert stream.peer == address_of(accepted)
    assert stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
    assert stream.socket.getsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT) == 30500
    stream.close()
    accepted.close()


@pytest.mark.parametrize("host", LOOPBACKS)
async def test_local_addresses_are_connected_to_without_a_wait(host: str) -> None:
    """Run by hand: a coroutine that waits would yield to the scheduler."""
    with listen(host) as listener:
        address = address_of(listener)
        with pytest.raises(StopIteration) as returned:
            Dialer(timeout=0).dial(address).send(None)
        stream: SocketStream = returned.value.value
        accepted, _ = listener.accept()
        await stream.send_all(b"hello")
        assert accepted.recv(10) == b"hello"
        stream.close()
        accepted.close()
    with pytest.raises(ConnectFailed, match="refused"):
        Dialer(timeout=0).dial(address).send(None)


async def test_a_slow_connection_is_waited_for() -> None:
    with socket.socket() as busy, socket.socket() as filling, trio.fail_after(30):
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)
        filling.connect(busy.getsockname())
        connected: list[SocketStream] = []

        async def dial() -> None:
            connected.append(await Dialer(timeout=20).dial(address_of(busy)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            await wait_all_tasks_blocked()
            assert not connected, (
                "the backlog is full: its packet is dropped, and sent again after a second"
            )
            busy.accept()[0].close()
        connected[0].close()


async def test_a_cancelled_dial_sends_nothing() -> None:
    with listen() as listener:
        listener.setblocking(False)
        with trio.CancelScope() as scope:
            scope.cancel()
            await Dialer().dial(address_of(listener))
        assert scope.cancelled_caught
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("host", LOOPBACKS)
async def test_a_port_without_a_listener_is_refused(host: str) -> None:
    with listen(host) as listener:
        nobody = address_of(listener)
    before = open_descriptors()
    with pytest.raises(ConnectFailed, match="refused") as caught:
        await Dialer().dial(nobody)
    assert caught.value.reason == "refused"
    assert caught.value.address == nobody
    assert open_descriptors() == before


async def test_no_answer_is_a_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        # A full backlog drops further SYNs. On loopback that is closest to a dead host.
        filling = [socket.socket() for _ in range(3)]
        for sock in filling:
            sock.setblocking(False)
            sock.connect_ex(silent.getsockname())
        before = open_descriptors()
        with trio.fail_after(30), pytest.raises(ConnectFailed, match=r"within 0\.05 s") as caught:
            await Dialer(timeout=0.05).dial(address_of(silent))
        assert caught.value.reason == "timeout"

        with trio.move_on_after(0.02) as scope:
            await Dialer(timeout=30).dial(address_of(silent))
        assert scope.cancelled_caught
        assert open_descriptors() == before
        for sock in filling:
            sock.close()


@pytest.mark.parametrize("address", [Address("224.0.0.1", 80), Address("ff02::1", 80)])
async def test_where_no_tcp_leads_is_unreachable(address: Address) -> None:
    """The kernel reports that for multicast at once, whatever this machine's routes are."""
    before = open_descriptors()
    with pytest.raises(ConnectFailed) as caught:
        await Dialer(timeout=20).dial(address)
    assert caught.value.reason == "unreachable"
    assert str(address) in str(caught.value)
    assert open_descriptors() == before


async def test_the_guard_is_asked_before_a_packet_is_sent() -> None:
    class Loop(Exception):
        pass

    def refuse(address: Address) -> None:
        raise Loop(str(address))

    with listen() as listener:
        listener.setblocking(False)
        before = open_descriptors()
        with pytest.raises(Loop):
            await Dialer(refuse=refuse).dial(address_of(listener))
        assert open_descriptors() == before
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_a_connection_to_itself_is_a_refusal() -> None:
    """It happens when the kernel picks, for our end, the very port that is dialled. Here the test
    makes it do so."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.connect(sock.getsockname())
    with pytest.raises(ConnectFailed, match="connected to itself") as caught:
        _stream(sock, itself := Address(*sock.getsockname()), itself)
    assert caught.value.reason == "refused"
    assert sock.fileno() == -1


async def test_running_out_of_descriptors_is_a_connect_failure_with_a_message() -> None:
    with listen() as listener:
        address = address_of(listener)
        with no_descriptor_left(), pytest.raises(ConnectFailed, match="file descriptor") as caught:
            await Dialer().dial(address)
    assert caught.value.reason == "local"


def may_mark() -> bool:
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)
        except PermissionError:
            return False
        return True


async def test_the_mark_is_set_or_the_missing_capability_is_named() -> None:
    with listen() as listener:
        dialer = Dialer(mark=0x2102)
        if may_mark():
            stream = await dialer.dial(address_of(listener))
            assert stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0x2102
            stream.close()
        else:
            with pytest.raises(ConnectFailed, match="CAP_NET_ADMIN"):
                await dialer.dial(address_of(listener))


class Seen:
    """An observer: the connections that are open, and all that have been."""

    def __init__(self) -> None:
        self.open: dict[tuple[Address, Address], int] = {}
        self.all: list[tuple[Address, Address, int]] = []

    def add(self, local: Address, remote: Address, depth: int) -> None:
        self.open[local, remote] = depth
        self.all.append((local, remote, depth))

    def remove(self, local: Address, remote: Address) -> None:
        del self.open[local, remote]  # a KeyError if it is reported twice


@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize("end", ["close", "reset", "aclose"])
async def test_a_watch_gets_a_connection_from_its_first_packet_to_its_end(
    host: str, end: str
) -> None:
    seen = Seen()
    with listen(host) as listener:
        stream = await Dialer(watch=seen).dial(address_of(listener), 3)
        accepted, peer = listener.accept()
        accepted.close()
    assert seen.open == {(Address(*peer[:2]), stream.peer): 3}, "as the other side sees it"
    if end == "aclose":
        await stream.aclose()
    else:
        getattr(stream, end)()
    stream.close()
    assert seen.open == {}


async def test_a_watch_gets_the_end_of_a_failed_connection() -> None:
    with listen("127.0.0.1") as listener:
        nobody = address_of(listener)
    seen = Seen()
    with pytest.raises(ConnectFailed):
        await Dialer(watch=seen).dial(nobody)
    assert seen.open == {}
