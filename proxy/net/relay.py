"""Joins two streams: forwards bytes in both directions until both have ended.

The rules
=========

The end of one direction is forwarded as the end of this direction only (half-close): a client that
has sent everything may still wait for data. The relay ends when both directions have ended. The
owner of the streams closes them.

An unclean end must not look like a clean one. The other side is *reset* if a side is lost (reset,
or truncated TLS) or idle for too long, or if the relay is cancelled. So the reader at that side
learns that the data may be incomplete. FIN would say the opposite.

If a side accepts no more data (it closed while the other side was still sending), this direction is
over. The opposite direction may still carry an answer, and continues. What the sender sends
meanwhile is not read, so it gets back-pressure.

Memory is limited: one read in each direction, and the next read happens after the kernel has
accepted the previous piece. If both sides are clear text and the volume is large, the bytes stay in
the kernel, in a pipe of 1 MiB.

Two ways to move the bytes
==========================

A `RelayState` is the state of a relay and the way in which it ends. In this module, two tasks move
the bytes, one for each direction, in all cases. Before them, the fast path may move the bytes
(`carry`). The two tasks continue where it stopped.
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

# The idle deadline is renewed only if it is older than this part of the idle time. A renewal at
# each read would cost as much as a small read itself. So an idle relay ends after 1 to 1 1/8 idle
# times.
_STALENESS = 1 / 8

# If a side closed without reading to the end, the other side is still sending. It is drained for
# this time (seconds), so that a reset does not destroy the answer that it was given.
_LINGER = 1.0

How = Literal["eof", "unread", "idle", "lost"]
_WORSE: dict[How, int] = {"eof": 0, "unread": 1, "idle": 2, "lost": 3}


# After this many full reads in a row, a relay between two sockets uses a pipe (splice.py). After
# this many short ones, it gives the pipe back, which needs two descriptors and only helps bulk
# data.
BULK, _LULL, _NEVER = 4, 64, -1

T = TypeVar("T", bound=Sized)

# The sides by index. The client is the accepted connection, the server the dialled one.
SideName = Literal["client", "server"]
_NAMES: tuple[SideName, SideName] = ("client", "server")


@dataclass(slots=True)
class _Way(Generic[T]):
    """How bytes are moved, and when to change: after `enough` pieces in a row that were `full`.

    If `full` is False: after `enough` pieces in a row that were not full.
    """

    receive: Callable[[], Awaitable[T]]
    send: Callable[[T], Awaitable[None]]
    full: bool = True
    enough: int = _NEVER


@dataclass(frozen=True, slots=True)
class Relayed:
    """The result of a relay. `forward`: bytes from client to server; `backward`: the other way.

    `first`: the side that ended first, in any way; None if neither did. `how` is the worst event:
    `eof` (both ended cleanly, and everything was forwarded), `unread` (one side accepted no more
    while the other was still sending), `idle`, `lost` (one was reset or truncated). For `unread`
    and `lost`, `error` has details, and `side` is the side to which it happened.
    """

    forward: int
    backward: int
    first: SideName | None
    how: How
    error: NetError | None
    side: SideName | None = None


SILENT = Relayed(0, 0, None, "idle", None)


class RelayState:
    """The state of a relay in progress. The code that moves the bytes reports all events to it.

    `over`: the relay has ended.
    """

    __slots__ = (
        "_ended", "_on_bytes", "error", "first", "held", "how", "idle", "moved", "over",
        "quiet_since", "share", "side", "sides", "unread",
    )  # fmt: skip

    def __init__(
        self,
        client: Stream,
        server: Stream,
        idle: float,
        on_bytes: Callable[[int, int], None] | None,
    ) -> None:
        self.sides = (client, server)
        self.share = UNCOUNTED  # the share that is charged for bytes in transit
        self.idle = idle
        self.moved = [0, 0]  # bytes from each side
        self.held = [b"", b""]  # read from each side, but not accepted by the other side yet
        self.quiet_since = 0.0  # trio's time; maintained while `carry` moves the bytes
        self.first: SideName | None = None
        self.how: How = "eof"
        self.error: NetError | None = None
        self.side: SideName | None = None  # the side of `error`
        self.unread: Stream | None = None  # a side whose bytes the other side refuses
        self.over = False
        self._on_bytes = on_bytes
        self._ended = [False, False]

    def hold(self, side: int, data: bytes) -> None:
        """Replace the held data of `side` by `data`, which the other side has not accepted yet."""
        before = len(self.held[side])
        self.held[side] = data
        if len(data) >= before:
            self.share.charge(len(data) - before)
        else:
            self.share.release(before - len(data))

    def going(self, side: int) -> bool:
        """Whether more bytes may come from `side`."""
        return not self._ended[side]

    def passed(self, side: int, size: int) -> None:
        """Report that the other side has accepted `size` bytes of `side`."""
        self.moved[side] += size
        if self._on_bytes is not None:
            self._on_bytes(*((0, size) if side else (size, 0)))

    def ended(self, side: int) -> None:
        """Report that `side` has ended cleanly.

        The caller then ends the other direction's stream.
        """
        self._note(side, "eof")

    def end_forwarded(self, side: int) -> None:
        """Report that the end of `side` has been forwarded."""
        self._end(side)

    def refused(self, side: int, error: NetError) -> None:
        """Report that the other side accepts nothing more from `side`, not even its end."""
        self._note(1 - side, "unread", error)
        self.unread = self.sides[side]
        self._end(side)

    def lost(self, side: int, error: NetError) -> None:
        """Report that `side` is lost. This ends the relay."""
        self._note(side, "lost", error)
        self.over = True

    def silent(self) -> None:
        """Report that no bytes have moved for too long. This ends the relay."""
        self._note(None, "idle")
        self.over = True

    def _end(self, side: int) -> None:
        self._ended[side] = True
        self.over = self.over or self._ended[1 - side]

    def _note(self, side: int | None, how: How, error: NetError | None = None) -> None:
        """Keep the first side that ended, and the worst way of ending."""
        if self.first is None and side is not None:
            self.first = _NAMES[side]
        if _WORSE[how] > _WORSE[self.how]:
            self.how = how
            self.error = error
            self.side = None if side is None or error is None else _NAMES[side]

    def result(self) -> Relayed:
        return Relayed(self.moved[0], self.moved[1], self.first, self.how, self.error, self.side)


RelayFastPath = Callable[[RelayState], Awaitable[None]]


async def relay(
    client: Stream,
    server: Stream,
    *,
    idle: float,
    on_bytes: Callable[[int, int], None] | None = None,
    carry: RelayFastPath | None = None,
) -> Relayed:
    """Join `client` and `server` until both directions end, a side is lost, or the relay is idle.

    `idle`: seconds without any bytes. Lost connections are reported in the result, not raised. Both
    streams stay with their owner, but are reset (which closes them) unless the end was clean.
    `on_bytes(forward, backward)` is called with the numbers of bytes that were forwarded. `carry`
    moves the bytes first, as long as it can.
    """
    state = RelayState(client, server, idle, on_bytes)
    clean = False
    try:
        if carry is not None:
            await carry(state)
        if not state.over:
            await _Pumps(state).run()
        clean = state.how in ("eof", "unread")
        if clean and state.unread is not None:
            await linger(state.unread, seconds=_LINGER)
    finally:
        if not clean:
            client.reset()
            server.reset()
    return state.result()


class _Pumps:
    """The two tasks of a relay, with one idle deadline."""

    def __init__(self, state: RelayState) -> None:
        self._state = state
        self._renew_at = 0.0
        self._scope = trio.CancelScope()
        self._alive(state.quiet_since or trio.current_time())

    def _alive(self, now: float) -> None:
        if now >= self._renew_at:
            self._renew_at = now + self._state.idle * _STALENESS
            self._scope.deadline = self._renew_at + self._state.idle

    async def run(self) -> None:
        state = self._state
        with self._scope:
            async with trio.open_nursery() as nursery:
                for side in (0, 1):
                    if state.going(side):
                        nursery.start_soon(self._pump, side)
        if self._scope.cancelled_caught and state.how != "lost":
            state.silent()

    async def _pump(self, side: int) -> None:
        """Move the bytes of sides[side] to the other side until this direction ends."""
        source, sink = self._state.sides[side], self._state.sides[1 - side]
        share = self._state.share
        copying = _Way(lambda: source.receive_some(share.read_size(RECEIVE_SIZE)), sink.send_all)
        if isinstance(source, SocketStream) and isinstance(sink, SocketStream):
            copying.enough = BULK
            while await self._carry(side, copying):
                pipe = Pipe.open()
                if pipe is None:
                    copying.enough = _NEVER
                    continue
                with closing(pipe):
                    if not await self._carry(
                        side,
                        _Way(
                            partial(source.receive_into, pipe),
                            sink.send_from,
                            full=False,
                            enough=_LULL,
                        ),
                    ):
                        return
        else:
            await self._carry(side, copying)

    async def _carry(self, side: int, way: _Way[Any]) -> bool:
        """Move bytes. True: continue in another way. False: this direction has ended."""
        state, row = self._state, 0
        while row != way.enough:
            held = state.held[side]
            state.hold(side, b"")
            try:
                data = held or await way.receive()
            except NetError as error:
                state.lost(side, error)
                self._scope.cancel()
                return False
            self._alive(trio.current_time())
            size = len(data)
            if not size:
                state.ended(side)
            state.share.charge(size)
            try:
                if not size:
                    await state.sides[1 - side].send_eof()
                    state.end_forwarded(side)
                    return False
                await (state.sides[1 - side].send_all(held) if held else way.send(data))
            except NetError as error:
                state.refused(side, error)
                return False
            finally:
                state.share.release(size)
            self._alive(trio.current_time())
            state.passed(side, size)
            row = row + 1 if (size >= RECEIVE_SIZE) is way.full else 0
        return True
