"""Where requests wait until one of a service's endpoints can be used again.

First come, first served: only the first looks whether there is something for it, when there is news and when its own time has come; when it
leaves, with an endpoint or without, the next one looks. So no crowd wakes up for a single request on probation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Place:
    """Of one that waits."""

    __slots__ = ("news",)

    def __init__(self) -> None:
        self.news = trio.Event()


class WaitQueue:
    """Of one service. Empty is false. Whoever takes a place bounds how many there are, and how long he stays."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: OrderedDict[Place, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place at the end, given up behind the block."""
        place = Place()
        self._places[place] = None
        try:
            yield place
        finally:
            del self._places[place]
            self.wake()

    def first(self, place: Place) -> bool:
        return next(iter(self._places)) is place

    async def turn(self, place: Place, until: float, latest: float) -> None:
        """Wait until there is news for `place`, which there is only if it is the first, or until the time `latest`; the first one waits
        until the time `until` at most."""
        with trio.move_on_at(min(until, latest) if self.first(place) else latest):
            await place.news.wait()
        place.news = trio.Event()

    def wake(self) -> None:
        """There is news: the first looks."""
        if self._places:
            next(iter(self._places)).news.set()
