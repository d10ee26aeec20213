"""How fast the proxy reads the connection of an HTTP/2 client, and how many streams it may have
open.

The proxy does not read a connection while new streams of that connection wait for their start, or
while the connection exceeds its memory limit. The connection window and the number of streams
follow the free memory and free streams of the process. This costs almost nothing while both are
plentiful.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from proxy.exchange.h2.settings import Http2Settings
from proxy.net.memory_budget import SMALL, Charge, Share
from proxy.net.pacing import Line
from proxy.wire.h2.connection import Http2Connection

if TYPE_CHECKING:
    from proxy.exchange.h2.stream import Http2Stream


class ReadPacer:
    """The reading side of one connection."""

    __slots__ = (
        "_http",
        "_limit",
        "_rest",
        "_share",
        "_streams",
        "_tight",
        "_window",
        "line",
        "window",
    )

    def __init__(self, http: Http2Connection, share: Share, settings: Http2Settings) -> None:
        self._http = http
        self._share = share
        self._streams = settings.limits.streams
        self._limit = settings.streams
        # `_window` is the current one, `window` the normal one
        self._window = self.window = settings.limits.connection_window
        self._tight = False  # the window, or the number of streams, is below normal
        self._rest = Charge(share)  # for an incomplete frame or header block
        self.line = Line(member=share.member)

    def prepare(self) -> None:
        """Call before a read is parsed: adjust the window and the number of streams that the client
        may open."""
        budget, limit = self._share.budget, self._limit
        if budget.used > budget.half or limit.open > limit.half or self._tight:
            self._adjust()

    def _adjust(self) -> None:
        http, share = self._http, self._share
        window = min(share.threshold, self.window)
        if window != self._window:
            if window < self._window == self.window:
                share.budget.act("window")
            self._window = window
            http.resize(window)
        left = max(0, self._limit.left(share))
        self._tight = window < self.window or left < self._streams
        http.stream_limit = (
            self._streams
            if left >= self._streams
            else min(self._streams, http.opened_by_peer + left)
        )

    def note(self) -> None:
        """Call after a read was parsed."""
        http = self._http
        if http.refused:
            refused, http.refused = http.refused, 0
            if http.stream_limit < self._streams:
                self._limit.refuses(self._share, refused)
        rest = http.buffered
        if rest > SMALL or self._rest.size:
            self._rest.become(rest)

    def begin(self, streams: list[Http2Stream], on_request: Callable[[Http2Stream], None]) -> None:
        """Call `on_request` for the streams that a read has opened, now or in a later pass of the
        scheduler."""
        pacer, line = self._limit.pacer, self.line
        for stream in streams:
            if pacer.now(line):
                on_request(stream)
            else:
                pacer.queue(line, partial(on_request, stream))

    @property
    def full(self) -> bool:
        """Whether to call `ready` before the next read."""
        budget = self._share.budget
        return (
            self._http.paused
            or bool(self.line.steps)
            or (budget.used > budget.half and self._share.over)
        )

    async def ready(self, go_on: Callable[[], None]) -> None:
        """Wait until the connection may be read. `go_on` parses the rest of the last read."""
        await self.line.emptied()
        while self._http.paused:
            await self._limit.pacer.turn(self.line)
            go_on()
            await self.line.emptied()
        if self._share.over:
            await self._share.wait_until_below()
