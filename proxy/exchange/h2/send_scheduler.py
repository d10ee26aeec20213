"""The order in which streams send when a connection window is used up. Without it, the task that
runs first would take the whole window every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.exchange.h2.stream import Http2Stream
    from proxy.wire.h2.connection import Http2Connection


class SendScheduler:
    """The senders of DATA that wait for the connection window, in order. A sender whose stream
    window is used up waits for that one and is not in this queue. There may be thousands of them,
    and `next` must not check each."""

    __slots__ = ("_http", "_waiting")

    def __init__(self, http: Http2Connection) -> None:
        self._http = http
        self._waiting: dict[Http2Stream, None] = {}

    @property
    def waiting(self) -> bool:
        """Whether a sender waits."""
        return bool(self._waiting)

    async def wait(self, stream: Http2Stream) -> None:
        """Wait for the windows. After this returns or is cancelled, the sender calls `next` once it
        has used its share of the window."""
        if self._http.stream_window(stream.number) > 0:
            self._waiting[stream] = None
        try:
            await stream.window_opens()
        finally:
            self._waiting.pop(stream, None)

    def leave(self, stream: Http2Stream) -> None:
        """Remove a stream: it does not wait any more, because its own window has opened."""
        self._waiting.pop(stream, None)

    def next(self) -> bool:
        """Wake the first sender whose windows are open. Returns False if there is none."""
        if self._http.connection_window <= 0:
            return False
        for stream in self._waiting:
            if stream.may_send:
                del self._waiting[stream]
                stream.wake()
                return True
        return False
