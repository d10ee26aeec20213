"""Two streams joined: what arrives on one leaves on the other, in both directions, until both have ended.

The rules
=========

End of one direction is passed on as the end of that direction only (half-close): a client that has said all it wants to say may
still be listening. When both directions have ended, the relay is over; the streams are closed by whoever owns them.

What is not a clean end must not look like one. If a side is lost (reset, or TLS that was cut off), or stays idle too long, or the relay is
cancelled, then the other side is *reset*: its reader learns that what it has may be incomplete. A FIN would say the opposite.

If a side takes no more (it closed while the other was still sending), then that direction is over, but the opposite one may still
hold an answer on its way, and goes on. What the sender sends meanwhile stays where it is: back-pressure.

Memory is bounded: one read per direction, and nothing is read before the last piece has been taken by the kernel. Where both sides are
clear text and much goes through, the bytes stay in the kernel: in a pipe of 1 MiB.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sized
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import trio

from proxy.net.errors import NetError
from proxy.net.linger import linger
from proxy.net.pipe import Pipe
from proxy.net.streams import RECEIVE_SIZE, SocketStream, Stream

# The idle deadline is moved only when it has become stale by this share of the idle time: moving it at every read would cost
# as much as the bookkeeping of a small read itself. So an idle relay ends after one to one and an eighth idle times.
_STALENESS = 1 / 8

# After a side closed without reading to the end, how long (seconds) the other side, which was still sending, is drained so that
# the answer it was given is not destroyed by a reset.
_LINGER = 1.0

How = Literal["eof", "unread", "idle", "lost"]
_WORSE: dict[How, int] = {"eof": 0, "unread": 1, "idle": 2, "lost": 3}


# Pieces in a row as long as a read may be, after which a relay between two sockets goes by a pipe (pipe.py); and shorter ones, after which
# it gives the pipe back: it takes two descriptors, and helps bulk only.
_BULK, _LULL, _NEVER = 4, 64, -1

T = TypeVar("T", bound=Sized)


@dataclass(slots=True)
class _Way(Generic[T]):
    """How bytes get across, and for how long: until `enough` pieces in a row were `full` (or were not)."""

    receive: Callable[[], Awaitable[T]]
    send: Callable[[T], Awaitable[None]]
    full: bool = True
    enough: int = _NEVER


@dataclass(frozen=True, slots=True)
class Relayed:
    """How a relay ended. `forward` and `backward`: bytes from a to b and from b to a.

    `first`: the side that ended first, in whatever way; None if neither did. `how`, the worst that happened: `eof` (both ended
    cleanly, everything was passed on), `unread` (one took no more while the other was still sending), `idle`, `lost` (one was
    reset or cut off). `error` says more about `unread` and `lost`.
    """

    forward: int
    backward: int
    first: Literal["a", "b"] | None
    how: How
    error: NetError | None


async def relay(a: Stream, b: Stream, *, idle: float, on_bytes: Callable[[int, int], None] | None = None) -> Relayed:
    """Join `a` and `b` until both directions have ended, a side is lost, or nothing has moved for `idle` seconds.

    Lost connections are reported in the result, not raised. Both streams stay with their owner, but are reset (which closes
    them) unless the end was clean. `on_bytes(forward, backward)` hears of each piece as it has been passed on.
    """
    joint = _Joint(a, b, idle, on_bytes)
    clean = False
    try:
        with joint.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(joint.pump, 0)
                nursery.start_soon(joint.pump, 1)
        if joint.scope.cancelled_caught and joint.how != "lost":
            joint.end(None, "idle")
        clean = joint.how in ("eof", "unread")
        if clean and joint.unread is not None:
            await linger(joint.unread, seconds=_LINGER)
    finally:
        if not clean:
            a.reset()
            b.reset()
    return joint.result()


class _Joint:
    """What the two pumps share."""

    def __init__(self, a: Stream, b: Stream, idle: float, on_bytes: Callable[[int, int], None] | None) -> None:
        self.sides = (a, b)
        self.moved = [0, 0]
        self.idle = idle
        self.on_bytes = on_bytes
        self.renew_at = 0.0
        self.scope = trio.CancelScope()
        self.first: Literal["a", "b"] | None = None
        self.how: How = "eof"
        self.error: NetError | None = None
        self.unread: Stream | None = None  # a side whose bytes nobody takes any more
        self.alive()

    def alive(self) -> None:
        now = trio.current_time()
        if now >= self.renew_at:
            self.renew_at = now + self.idle * _STALENESS
            self.scope.deadline = self.renew_at + self.idle

    def end(self, side: int | None, how: How, error: NetError | None = None) -> None:
        """Note an end: the first side stays the first, but the worst way of ending counts."""
        if self.first is None and side is not None:
            self.first = ("a", "b")[side]
        if _WORSE[how] > _WORSE[self.how]:
            self.how = how
            self.error = error

    async def pump(self, side: int) -> None:
        """Carry the bytes of sides[side] to the other side, until the end of the one or the other."""
        source, sink = self.sides[side], self.sides[1 - side]
        copying = _Way(partial(source.receive_some, RECEIVE_SIZE), sink.send_all)
        if isinstance(source, SocketStream) and isinstance(sink, SocketStream):
            copying.enough = _BULK
            while await self._carry(side, copying):
                pipe = Pipe.open()
                if pipe is None:
                    copying.enough = _NEVER
                    continue
                with closing(pipe):
                    if not await self._carry(side, _Way(partial(source.receive_into, pipe), sink.send_from, full=False, enough=_LULL)):
                        return
        else:
            await self._carry(side, copying)

    async def _carry(self, side: int, way: _Way[Any]) -> bool:
        """True: another way would be better from here on. False: this direction is over."""
        row = 0
        while row != way.enough:
            try:
                data = await way.receive()
            except NetError as error:
                self.end(side, "lost", error)
                self.scope.cancel()
                return False
            self.alive()
            size = len(data)
            if not size:
                self.end(side, "eof")
            try:
                if not size:
                    await self.sides[1 - side].send_eof()
                    return False
                await way.send(data)
            except NetError as error:
                self.end(1 - side, "unread", error)
                self.unread = self.sides[side]
                return False
            self.count(side, size)
            row = row + 1 if (size >= RECEIVE_SIZE) is way.full else 0
        return True

    def count(self, side: int, size: int) -> None:
        self.alive()
        self.moved[side] += size
        if self.on_bytes is not None:
            self.on_bytes(*((0, size) if side else (size, 0)))

    def result(self) -> Relayed:
        return Relayed(self.moved[0], self.moved[1], self.first, self.how, self.error)
