"""Datagrams: taking them in from many, and asking one.

A datagram is taken by the system call first, and only EAGAIN waits, as with streams. Nothing is ever queued here: what cannot be sent at
once is dropped, which whoever uses UDP must be ready for anyway.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio
from trio.lowlevel import checkpoint, wait_readable

from proxy.net.address import Address
from proxy.net.dial import failure

_MOST = 65535  # bytes; no datagram is longer
# Datagrams taken in a row before other tasks run: in a flood, those must go on.
_BURST = 8

Sender = tuple[str, int] | tuple[str, int, int, int]


async def receive(sock: socket.socket, take: Callable[[bytes, Sender], None]) -> None:
    """Give all that arrives at a bound socket to `take`, for ever. `take` is synchronous and must not raise."""
    streak = 0
    while True:
        try:
            data, sender = sock.recvfrom(_MOST)
        except BlockingIOError:
            streak = 0
            await wait_readable(sock)
            continue
        except OSError:  # an earlier datagram of ours came back by ICMP, or memory is short: the next one may be fine
            await checkpoint()
            continue
        take(data, sender)
        streak += 1
        if streak >= _BURST:
            streak = 0
            await checkpoint()


def send(sock: socket.socket, data: bytes, to: Sender) -> bool:
    """Send at once or not at all; whether it was sent."""
    try:
        sock.sendto(data, to)
    except OSError:
        return False
    return True


async def ask(sock: socket.socket, peer: Address, data: bytes, accept: Callable[[bytes], bool]) -> bytes:
    """Send `data` to the peer of a connected socket, and wait for the first datagram that `accept` takes; others are ignored.

    The caller sets the deadline. Raises ConnectFailed if the peer, or somebody on the way, says that nobody is there.
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
