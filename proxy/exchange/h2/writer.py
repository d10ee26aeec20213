"""The writer of a shared HTTP/2 connection: what has been put down since it last looked goes out in one write.

It is a task of the connection's, so cancelling an exchange cannot tear a record that belongs to all. What is put down is bounded:
beyond `_AHEAD` bytes, whoever would send waits before it puts anything down, so that a peer that asks and does not read has its streams
open and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio
from trio.lowlevel import Abort, ParkingLot, RaiseCancelT, Task, current_task, reschedule, wait_task_rescheduled

from proxy.net.exceptions import NetError
from proxy.net.memory_budget import UNCOUNTED, Share
from proxy.net.socket_stream import SocketStream, Stream
from proxy.net.tls.handshake import TLSStream
from proxy.wire.h2.connection import Http2Connection

# What may be put down ahead of the writer: enough to fill a write while the next pieces are made.
_AHEAD = 256 * 1024
# One write, which has its time to itself: a slow peer is not one that takes nothing.
_WRITE = 65536


class Writer:
    """Of the output of `http` to `stream`; `patience`: seconds for the peer to take a write."""

    __slots__ = ("_ahead", "_http", "_patience", "_sent", "_share", "_stopped", "_stream", "_task")

    def __init__(self, stream: Stream, http: Http2Connection, patience: float, share: Share = UNCOUNTED) -> None:
        """`share`: what waits to be sent is charged to it."""
        self._stream = stream
        self._http = http
        self._patience = patience
        self._task: Task | None = None  # while it waits
        self._ahead = 0
        self._sent = ParkingLot()  # senders wait here
        self._share = share
        self._stopped = False

    async def run(self, over: Callable[[], bool]) -> str | None:
        """Write until there is nothing to write and it is `over`; or say why that cannot be done any more."""
        with trio.CancelScope() as scope:
            try:
                while True:
                    data = self._http.data_to_send()
                    if data:
                        self._ahead = 0
                        await self._send(data, scope)
                        self._sent.unpark_all()
                    elif over():
                        return None
                    else:
                        await self._wait()
            except (NetError, trio.ClosedResourceError) as error:
                return str(error)
        return f"the peer took nothing for {self._patience} s"

    async def _wait(self) -> None:
        """Until somebody says `touch`. Nobody else waits here, and this is the commonest wait of all: so no ParkingLot."""

        def abort(_: RaiseCancelT) -> Abort:
            self._task = None
            return Abort.SUCCEEDED

        self._task = current_task()
        await wait_task_rescheduled(abort)

    async def _send(self, data: bytes, scope: trio.CancelScope) -> None:
        sent, size, stream = 0, len(data), self._stream
        if size <= _WRITE and isinstance(stream, SocketStream | TLSStream):
            sent = stream.send_nowait(data)  # as a rule that is all: no deadline has to be moved, twice
        if sent < size:
            await self._send_rest(data, sent, scope)

    async def _send_rest(self, data: bytes, sent: int, scope: trio.CancelScope) -> None:
        """The peer is slower than we are: what it has still to take is charged, and as much as may be put down meanwhile."""
        charged = len(data) + (_AHEAD if len(data) > _WRITE else 0)
        self._share.charge(charged)
        try:
            whole = memoryview(data)
            for at in range(sent, len(data), _WRITE):
                scope.deadline = trio.current_time() + self._patience
                await self._stream.send_all(whole[at : at + _WRITE])
            scope.deadline = math.inf
        finally:
            self._share.release(charged)

    def touch(self) -> None:
        """Something may have been put down, or it may be over."""
        task = self._task
        if task is not None:
            self._task = None
            reschedule(task)

    def put(self, size: int) -> None:
        """So many bytes, about, have been put down."""
        self._ahead += size

    @property
    def behind(self) -> bool:
        """Too far for more to be put down."""
        return self._ahead > _AHEAD and not self._stopped

    async def paced(self) -> None:
        """Wait until it is not too far behind."""
        while self.behind:
            await self._sent.park()

    def stop(self) -> None:
        """The connection is of no further use: nobody waits any more."""
        self._stopped = True
        self._sent.unpark_all()
