"""A relay on the fast path: two connections that are joined byte for byte.

The task of the relay waits in `carry`, like the task of a lent connection. The bytes of one read of
a side are sent to the other side. If the other side does not accept all of them, the rest is kept,
and nothing more is read until it is sent. The relay reports ends and errors to the `RelayState`, by
the same rules as the ordinary path. It returns to the ordinary path for plain TCP in bulk, because
splice(2) moves those bytes within the kernel.
"""

from __future__ import annotations

from functools import partial

from trio.lowlevel import Abort, RaiseCancelT, Task, current_task, reschedule, wait_task_rescheduled

from proxy.fastpath.host import Host
from proxy.fastpath.ready_socket import IN, OUT, ReadySocket
from proxy.net.exceptions import NetError
from proxy.net.nonblocking import NonblockingStream
from proxy.net.relay import BULK, RelayState
from proxy.net.socket_stream import RECEIVE_SIZE


class FastRelay:
    """One relay. Its task calls `carry`. Any code may call `leave` and `expire`. The fast path
    calls the rest."""

    __slots__ = (
        "_event_loop",
        "_fast_path",
        "_fault",
        "_full_reads",
        "_lent",
        "_sides",
        "_spliceable",
        "_state",
        "_task",
    )

    def __init__(
        self,
        fast_path: Host,
        state: RelayState,
        client: NonblockingStream,
        server: NonblockingStream,
    ) -> None:
        self._fast_path = fast_path
        self._event_loop = fast_path.event_loop
        self._state = state
        self._sides = (
            ReadySocket(fast_path.event_loop, client),
            ReadySocket(fast_path.event_loop, server),
        )
        # both are plain TCP, so the kernel could splice them
        self._spliceable = self._sides[0].tls is None and self._sides[1].tls is None
        self._full_reads = [0, 0]  # by side: consecutive reads that filled the buffer
        self._lent = False
        self._task: Task | None = None  # while it is suspended in `carry`
        self._fault: Exception | None = None

    async def carry(self) -> None:
        """Pass bytes until the relay has ended or the ordinary path has to continue. The state then
        has the state."""
        self._lent, self._state.quiet_since = True, self._event_loop.now
        try:
            for side in (0, 1):
                self._sides[side].set_step(partial(self._on, side))
                self._sides[side].watch(IN)
        # the user's limit of epoll watches is reached (epoll_ctl(2): ENOSPC); trio may still
        # succeed
        except OSError:
            self.leave()
            return
        for side in (0, 1):  # data may already be here, usually the client's first bytes
            if self._lent:
                self._on(side, IN)
        if self._lent:
            self._task = current_task()
            await wait_task_rescheduled(self._abort)
        if self._fault is not None:
            raise self._fault

    def _abort(self, _: RaiseCancelT) -> Abort:
        self._release()
        return Abort.SUCCEEDED

    def _release(self) -> None:
        self._lent = False
        for side in self._sides:
            side.forget()
        self._fast_path.relay_left(self)

    def leave(self) -> None:
        """Return the relay to the ordinary path."""
        if not self._lent:
            return
        task, self._task = self._task, None
        self._release()
        if task is not None:
            reschedule(task)

    def expire(self, now: float) -> float:
        """End the relay if it has been silent for its idle timeout. Returns the seconds that are
        left until then. `now`: trio's time."""
        left = self._state.quiet_since + self._state.idle - now
        if left <= 0:
            self._state.silent()
            self.leave()
        return left

    # The steps...

    def _on(self, side: int, mask: int) -> None:
        """The socket of this side is ready."""
        if not self._lent:
            return  # it was returned earlier in this turn
        state = self._state
        state.quiet_since = self._event_loop.now
        try:
            if mask & OUT and state.held[1 - side]:
                self._send(1 - side, state.held[1 - side])
            if not mask & ~OUT or not self._lent:
                return
            if state.going(side) and not state.held[side]:
                self._receive(side)
            elif not mask & IN:
                # a hang-up or an error, which epoll always reports; nothing reads from this side
                # now
                self.leave()
        except Exception as error:  # error boundary: a bug in one relay must not affect the others
            self._fault = error
            self.leave()

    def _receive(self, side: int) -> None:
        state, source = self._state, self._sides[side]
        try:
            data = source.take(state.share, bulk=self._full_reads[side] > 0)
        except NetError as error:
            state.lost(side, error)
            self.leave()
            return
        if data:
            self._full_reads[side] = self._full_reads[side] + 1 if len(data) >= RECEIVE_SIZE else 0
            self._send(side, data)
            if self._spliceable and self._full_reads[side] >= BULK and self._lent:
                self.leave()
        elif data is not None:
            state.ended(side)
            self._end(side)

    def _send(self, side: int, data: bytes) -> None:
        """Send data that was read from `side` to the other side."""
        state = self._state
        try:
            sent = self._sides[1 - side].send(data)
        except NetError as error:
            state.hold(side, b"")
            state.refused(side, error)
            self._watch_both()
            return
        state.passed(side, sent)
        if sent < len(data) or state.held[side]:
            state.hold(side, data[sent:])
            self._watch_both()
        if sent == len(data) and self._sides[side].stream.end_met:
            self._receive(side)

    def _end(self, side: int) -> None:
        """Pass the end of this side's data on to the other side."""
        state = self._state
        try:
            done = self._sides[1 - side].send_eof()
        except NetError as error:
            state.refused(side, error)
        else:
            if not done:
                self.leave()
                return
            state.end_forwarded(side)
        self._watch_both()

    def _watch_both(self) -> None:
        state = self._state
        if state.over:
            self.leave()
            return
        for side in (0, 1):
            reading = IN if state.going(side) and not state.held[side] else 0
            self._sides[side].watch(reading | (OUT if state.held[1 - side] else 0))
