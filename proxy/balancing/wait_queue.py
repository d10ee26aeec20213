"""The queue in which requests wait until an endpoint of the service is usable again.

First in, first out. Only the first one checks for an endpoint, when something has changed or when
its own time has come. When it leaves, with or without an endpoint, the next one checks. So a single
trial request does not wake all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Waiter:
    """One waiting request: its place in the queue."""

    __slots__ = ("wakeup",)

    def __init__(self) -> None:
        self.wakeup = trio.Event()


class WaitQueue:
    """The queue of one service. An empty queue is false. The caller must bound the number of places
    and the time that it holds one."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: OrderedDict[Waiter, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def place(self) -> Iterator[Waiter]:
        """A place at the end of the queue. It is removed at the end of the block."""
        place = Waiter()
        self._places[place] = None
        try:
            yield place
        finally:
            del self._places[place]
            self.wake()

    def first(self, place: Waiter) -> bool:
        return next(iter(self._places)) is place

    async def turn(self, place: Waiter, until: float, latest: float) -> None:
        """Wait until `wake` reaches `place` (only if it is the first), or until the time `latest`.
        The first place waits until the time `until` at most."""
        with trio.move_on_at(min(until, latest) if self.first(place) else latest):
            await place.wakeup.wait()
        place.wakeup = trio.Event()

    def wake(self) -> None:
        """Something has changed: wake the first place."""
        if self._places:
            next(iter(self._places)).wakeup.set()
