"""Whose turn it is to send, where a connection's window is used up: whoever runs first would take all of it every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.exchange.h2.stream import MuxStream
    from proxy.wire.h2.connection import Http2Connection


class SendScheduler:
    """The senders of DATA on one connection that wait for its window, in order. One whose own window is used up waits beside them, for
    that: there may be thousands, and `next` must not look at each of them every time."""

    __slots__ = ("_http", "_waiting")

    def __init__(self, http: Http2Connection) -> None:
        self._http = http
        self._waiting: dict[MuxStream, None] = {}

    @property
    def waiting(self) -> bool:
        """Somebody waits."""
        return bool(self._waiting)

    async def wait(self, stream: MuxStream) -> None:
        """Wait for the windows. Whoever returns from here, or is cancelled here, calls `next` when it has taken what it takes."""
        if self._http.stream_window(stream.number) > 0:
            self._waiting[stream] = None
        try:
            await stream.window_opens()
        finally:
            self._waiting.pop(stream, None)

    def leave(self, stream: MuxStream) -> None:
        """It waits no longer: its own window has opened."""
        self._waiting.pop(stream, None)

    def next(self) -> bool:
        """Wake the first sender whose windows are open; False: there is none."""
        if self._http.connection_window <= 0:
            return False
        for stream in self._waiting:
            if stream.may_send:
                del self._waiting[stream]
                stream.wake()
                return True
        return False
