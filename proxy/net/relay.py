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

Who carries the bytes
=====================

What is so far, and how it ends, is a `Joint`. Here two tasks carry, one for each direction, which can do everything. Before them somebody
else may (`carry`; in a proxy the fast path), and they go on from what it has left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sized
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import trio

from proxy.net.exceptions import NetError
from proxy.net.linger import linger
from proxy.net.memory_budget import UNCOUNTED
from proxy.net.socket_stream import RECEIVE_SIZE, SocketStream, Stream
from proxy.net.splice import Pipe

# The idle deadline is moved only when it has become stale by this share of the idle time: moving it at every read would cost
# as much as the bookkeeping of a small read itself. So an idle relay ends after one to one and an eighth idle times.
_STALENESS = 1 / 8

# After a side closed without reading to the end, how long (seconds) the other side, which was still sending, is drained so that
# the answer it was given is not destroyed by a reset.
_LINGER = 1.0

How = Literal["eof", "unread", "idle", "lost"]
_WORSE: dict[How, int] = {"eof": 0, "unread": 1, "idle": 2, "lost": 3}


# Pieces in a row as long as a read may be, after which a relay between two sockets goes by a pipe (splice.py); and shorter ones, after
# which it gives the pipe back: it takes two descriptors, and helps bulk only.
BULK, _LULL, _NEVER = 4, 64, -1

T = TypeVar("T", bound=Sized)

# The sides by their index. A client is whatever was accepted, and a server whatever was dialled for it.
SideName = Literal["client", "server"]
_NAMES: tuple[SideName, SideName] = ("client", "server")


@dataclass(slots=True)
class _Way(Generic[T]):
    """How bytes get across, and for how long: until `enough` pieces in a row were `full` (or were not)."""

    receive: Callable[[], Awaitable[T]]
    send: Callable[[T], Awaitable[None]]
    full: bool = True
    enough: int = _NEVER


@dataclass(frozen=True, slots=True)
class Relayed:
    """How a relay ended. `forward`: bytes from the client to the server; `backward`: bytes from the server to the client.

    `first`: the side that ended first, in whatever way; None if neither did. `how`, the worst that happened: `eof` (both ended
    cleanly, everything was passed on), `unread` (one took no more while the other was still sending), `idle`, `lost` (one was
    reset or cut off). `error` says more about `unread` and `lost`, and `side` is the side that it happened to.
    """

    forward: int
    backward: int
    first: SideName | None
    how: How
    error: NetError | None
    side: SideName | None = None


SILENT = Relayed(0, 0, None, "idle", None)


class Joint:
    """A relay under way. Whoever carries its bytes tells it what has become of them; `over`: there is nothing more to carry."""

    __slots__ = (
        "_ended", "_on_bytes", "error", "first", "held", "how", "idle", "moved", "over", "quiet_since", "share", "side", "sides", "unread",
    )  # fmt: skip

    def __init__(self, client: Stream, server: Stream, idle: float, on_bytes: Callable[[int, int], None] | None) -> None:
        self.sides = (client, server)
        self.share = UNCOUNTED  # what one side has sent and the other has not taken is charged to it
        self.idle = idle
        self.moved = [0, 0]  # bytes, of each side's
        self.held = [b"", b""]  # read from each side, and not taken by the other yet
        self.quiet_since = 0.0  # trio's time, while somebody else than relay() carries
        self.first: SideName | None = None
        self.how: How = "eof"
        self.error: NetError | None = None
        self.side: SideName | None = None  # that `error` happened to
        self.unread: Stream | None = None  # a side whose bytes nobody takes any more
        self.over = False
        self._on_bytes = on_bytes
        self._ended = [False, False]

    def hold(self, side: int, data: bytes) -> None:
        """Keep `data` of `side`, which the other did not take, instead of what was kept before."""
        before = len(self.held[side])
        self.held[side] = data
        if len(data) >= before:
            self.share.charge(len(data) - before)
        else:
            self.share.release(before - len(data))

    def going(self, side: int) -> bool:
        """Whether there may be more from `side`."""
        return not self._ended[side]

    def passed(self, side: int, size: int) -> None:
        """So many bytes of `side` have been taken by the other."""
        self.moved[side] += size
        if self._on_bytes is not None:
            self._on_bytes(*((0, size) if side else (size, 0)))

    def ended(self, side: int) -> None:
        """`side` has ended cleanly; what that is for the other side comes next."""
        self._note(side, "eof")

    def told(self, side: int) -> None:
        """And the other side has been told."""
        self._end(side)

    def refused(self, side: int, error: NetError) -> None:
        """The other side takes no more from `side`, not even its end."""
        self._note(1 - side, "unread", error)
        self.unread = self.sides[side]
        self._end(side)

    def lost(self, side: int, error: NetError) -> None:
        """`side` is lost, and with it the whole."""
        self._note(side, "lost", error)
        self.over = True

    def silent(self) -> None:
        """Nothing has moved for too long."""
        self._note(None, "idle")
        self.over = True

    def _end(self, side: int) -> None:
        self._ended[side] = True
        self.over = self.over or self._ended[1 - side]

    def _note(self, side: int | None, how: How, error: NetError | None = None) -> None:
        """The first side stays the first, but the worst way of ending counts."""
        if self.first is None and side is not None:
            self.first = _NAMES[side]
        if _WORSE[how] > _WORSE[self.how]:
            self.how = how
            self.error = error
            self.side = None if side is None or error is None else _NAMES[side]

    def result(self) -> Relayed:
        return Relayed(self.moved[0], self.moved[1], self.first, self.how, self.error, self.side)


Carry = Callable[[Joint], Awaitable[None]]


async def relay(
    client: Stream, server: Stream, *, idle: float, on_bytes: Callable[[int, int], None] | None = None, carry: Carry | None = None
) -> Relayed:
    """Join `client` and `server` until both directions have ended, a side is lost, or nothing has moved for `idle` seconds.

    Lost connections are reported in the result, not raised. Both streams stay with their owner, but are reset (which closes
    them) unless the end was clean. `on_bytes(forward, backward)` hears of the bytes that have been passed on. `carry` takes the relay as
    far as it can.
    """
    joint = Joint(client, server, idle, on_bytes)
    clean = False
    try:
        if carry is not None:
            await carry(joint)
        if not joint.over:
            await _Pumps(joint).run()
        clean = joint.how in ("eof", "unread")
        if clean and joint.unread is not None:
            await linger(joint.unread, seconds=_LINGER)
    finally:
        if not clean:
            client.reset()
            server.reset()
    return joint.result()


class _Pumps:
    """The two tasks, under one deadline."""

    def __init__(self, joint: Joint) -> None:
        self._joint = joint
        self._renew_at = 0.0
        self._scope = trio.CancelScope()
        self._alive(joint.quiet_since or trio.current_time())

    def _alive(self, now: float) -> None:
        if now >= self._renew_at:
            self._renew_at = now + self._joint.idle * _STALENESS
            self._scope.deadline = self._renew_at + self._joint.idle

    async def run(self) -> None:
        joint = self._joint
        with self._scope:
            async with trio.open_nursery() as nursery:
                for side in (0, 1):
                    if joint.going(side):
                        nursery.start_soon(self._pump, side)
        if self._scope.cancelled_caught and joint.how != "lost":
            joint.silent()

    async def _pump(self, side: int) -> None:
        """Carry the bytes of sides[side] to the other side, until the end of the one or the other."""
        source, sink = self._joint.sides[side], self._joint.sides[1 - side]
        share = self._joint.share
        copying = _Way(lambda: source.receive_some(share.read_size(RECEIVE_SIZE)), sink.send_all)
        if isinstance(source, SocketStream) and isinstance(sink, SocketStream):
            copying.enough = BULK
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
        joint, row = self._joint, 0
        while row != way.enough:
            held = joint.held[side]
            joint.hold(side, b"")
            try:
                data = held or await way.receive()
            except NetError as error:
                joint.lost(side, error)
                self._scope.cancel()
                return False
            self._alive(trio.current_time())
            size = len(data)
            if not size:
                joint.ended(side)
            joint.share.charge(size)
            try:
                if not size:
                    await joint.sides[1 - side].send_eof()
                    joint.told(side)
                    return False
                await (joint.sides[1 - side].send_all(held) if held else way.send(data))
            except NetError as error:
                joint.refused(side, error)
                return False
            finally:
                joint.share.release(size)
            self._alive(trio.current_time())
            joint.passed(side, size)
            row = row + 1 if (size >= RECEIVE_SIZE) is way.full else 0
        return True
