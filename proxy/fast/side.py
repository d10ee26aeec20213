"""One end of a lane: a stream on the road."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy.net.prompt import Prompt

if TYPE_CHECKING:
    from proxy.fast.road import Road

IN, OUT = select.EPOLLIN, select.EPOLLOUT


class Side:
    """A stream on the road: what it is watched for, and what it would not take yet."""

    __slots__ = ("_road", "_step", "_watched", "descriptor", "receive", "send", "unsent")

    def __init__(self, road: Road, stream: Prompt, step: Callable[[int], None]) -> None:
        self._road = road
        self._step = step
        self._watched = 0
        self.descriptor = stream.socket.fileno()
        self.receive = stream.receive_nowait
        self.send = stream.send_nowait
        self.unsent = b""

    def watch(self, events: int) -> None:
        """Wait for these events from now on; 0: for none, not even for the end of the connection, which epoll cannot be told to ignore."""
        if events != self._watched:
            self._road.watch(self.descriptor, self._step, self._watched, events)
            self._watched = events
