"""Datagrams: receive from many peers, or ask one.

As with streams, the system call comes first, and only EAGAIN waits. Nothing is queued here: a
datagram that cannot be sent at once is dropped. Users of UDP must expect this.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio
from trio.lowlevel import checkpoint, wait_readable

from proxy.net.address import Address
from proxy.net.dial import failure

_MOST = 65535  # bytes; the longest possible datagram
# Datagrams received in a row before other tasks run, so these continue in a flood.
_BURST = 8

Sender = tuple[str, int] | tuple[str, int, int, int]


async def receive(sock: socket.socket, take: Callable[[bytes, Sender], None]) -> None:
    """Pass everything that arrives at a bound socket to `take`, until cancelled.

    `take` is synchronous and must not raise.
    """
    streak = 0
    while True:
        try:
            data, sender = sock.recvfrom(_MOST)
        except BlockingIOError:
            streak = 0
            await wait_readable(sock)
            continue
        except OSError:  # ICMP error of an earlier datagram, or no memory: try the next one
            await checkpoint()
            continue
        take(data, sender)
        streak += 1
        if streak >= _BURST:
            streak = 0
            await checkpoint()


def send(sock: socket.socket, data: bytes, to: Sender) -> bool:
    """Send at once or not at all. Return whether it was sent."""
    try:
        sock.sendto(data, to)
    except OSError:
        return False
    return True


async def ask(
    sock: socket.socket, peer: Address, data: bytes, accept: Callable[[bytes], bool]
) -> bytes:
    """Send `data` to the peer of a connected socket, and return its answer.

    The answer is the first datagram that `accept` accepts. Other datagrams are ignored. The caller
    sets the deadline. Raises ConnectFailed if the peer or a router reports that the destination is
    unreachable.
    """
    try:
        sock.send(data)
        while True:
            try:
                answer = sock.recv(_MOST)
            except BlockingIOError:
                await wait_readable(sock)
                continue
            if accept(answer):
                return answer
            await trio.lowlevel.checkpoint()
    except OSError as error:
        raise failure(peer, error.errno or 0) from error
