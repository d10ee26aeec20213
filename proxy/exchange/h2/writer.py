"""The writer of a shared HTTP/2 connection. It sends all pending frames in one write.

It is a task of the connection, so cancelling an exchange cannot cut a record that all exchanges
share. The pending output is bounded: beyond `_AHEAD` bytes, a sender waits before it adds more. So
a peer that sends requests but does not read keeps its streams open, and no more is buffered.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio
from trio.lowlevel import (
    Abort,
    ParkingLot,
    RaiseCancelT,
    Task,
    current_task,
    reschedule,
    wait_task_rescheduled,
)

from proxy.net.exceptions import NetError
from proxy.net.memory_budget import UNCOUNTED, Share
from proxy.net.socket_stream import SocketStream, Stream
from proxy.net.tls.handshake import TLSStream
from proxy.wire.h2.connection import Http2Connection

# Bytes that may be pending: enough to fill a write while the next pieces are created.
_AHEAD = 256 * 1024
# Bytes per write. Each write has its own timeout, so a slow peer is not taken for a dead one.
_WRITE = 65536


class Writer:
    """Writes the output of `http` to `stream`. `patience`: seconds for the peer to accept one
    write."""

    __slots__ = ("_ahead", "_http", "_patience", "_sent", "_share", "_stopped", "_stream", "_task")

    def __init__(
        self, stream: Stream, http: Http2Connection, patience: float, share: Share = UNCOUNTED
    ) -> None:
        """`share`: pending output is charged to it."""
        self._stream = stream
        self._http = http
        self._patience = patience
        self._task: Task | None = None  # set while it waits
        self._ahead = 0
        self._sent = ParkingLot()  # senders wait here
        self._share = share
        self._stopped = False

    async def run(self, over: Callable[[], bool]) -> str | None:
        """Write until there is no output and `over` returns True. Otherwise returns why writing has
        failed."""
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
        return f"the peer accepted no data for {self._patience} s"

    async def _wait(self) -> None:
        """Wait for a call of `touch`. No other task waits here, and this wait is the most frequent,
        so it does not use a ParkingLot."""

        def abort(_: RaiseCancelT) -> Abort:
            self._task = None
            return Abort.SUCCEEDED

        self._task = current_task()
        await wait_task_rescheduled(abort)

    async def _send(self, data: bytes, scope: trio.CancelScope) -> None:
        sent, size, stream = 0, len(data), self._stream
        if size <= _WRITE and isinstance(stream, SocketStream | TLSStream):
            # usually this sends everything, and the deadline does not have to be moved twice
            sent = stream.send_nowait(data)
        if sent < size:
            await self._send_rest(data, sent, scope)

    async def _send_rest(self, data: bytes, sent: int, scope: trio.CancelScope) -> None:
        """The peer is slow: send the rest in pieces. The rest is charged, together with the output
        that may become pending meanwhile."""
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
        """Wake the writer: output may be pending, or the connection may be over."""
        task = self._task
        if task is not None:
            self._task = None
            reschedule(task)

    def put(self, size: int) -> None:
        """About `size` bytes of output have been added."""
        self._ahead += size

    @property
    def behind(self) -> bool:
        """Whether too much output is pending for more to be added."""
        return self._ahead > _AHEAD and not self._stopped

    async def paced(self) -> None:
        """Wait until `behind` is False."""
        while self.behind:
            await self._sent.park()

    def stop(self) -> None:
        """The connection cannot be used any more: wake all senders."""
        self._stopped = True
        self._sent.unpark_all()
