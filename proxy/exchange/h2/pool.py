"""The HTTP/2 connections that are kept to endpoints, each shared by many exchanges.

An exchange takes a stream where there is room: on the first connection that has some, otherwise on a new one, and where an endpoint has
all the connections it may have, it waits. Connections are opened one at a time for an endpoint, and the next one not before the last has
said how many streams it takes (its SETTINGS): who comes meanwhile waits for that one, which most likely has room for all of them.

Who waits is served in order. Room, or the task of opening a connection, is given to the first who waits in the moment in which it is
there, and reserved, so that no newcomer can overtake.

Connections do not live for ever: after `idle_timeout` without an exchange, and after `max_age` in any case, a connection takes nothing
new and ends with its last stream. So memory that a burst has taken is given back, and a service's new endpoints get their share.

Decisions are synchronous; `serve` is the task that owns the connections.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Generic, TypeVar

import trio

from proxy.errors import PoolExhausted
from proxy.exchange.h1.pool import Account, PoolSettings, patiently
from proxy.exchange.h2.connection import Mux
from proxy.exchange.h2.settings import MuxSettings
from proxy.net.socket_stream import Stream
from proxy.wire.h1.connection import Role

K = TypeVar("K", bound=Hashable)

_log = logging.getLogger("isthmus.exchange")

# One connection takes as many streams as the server allows, commonly 100 or more. More than a few for one endpoint only help where the
# server allows next to none, and cost it memory.
_CONNECTIONS = 16


@dataclass(slots=True, eq=False)
class _Turn:
    """One that waits. When `given` is set, `mux` has a stream reserved for it, or `failure` is what it waited for; neither: it is to open
    a connection itself, and that is noted as under way."""

    given: trio.Event = field(default_factory=trio.Event)
    mux: Mux | None = None
    failure: Exception | None = None


@dataclass(slots=True, eq=False)
class _Slot:
    """What is kept for one endpoint."""

    muxes: list[Mux] = field(default_factory=list)
    opening: bool = False
    served: float = -inf  # when the last one that waited was given a stream
    waiting: OrderedDict[_Turn, None] = field(default_factory=OrderedDict)

    def with_room(self) -> Mux | None:
        for mux in self.muxes:
            if mux.room > 0:
                return mux
        return None

    @property
    def moved(self) -> float:
        """When a connection was opened, or a stream given to one that waited, the last time; now, if a connection is being opened."""
        return trio.current_time() if self.opening else max(self.served, max((mux.opened for mux in self.muxes), default=-inf))

    @property
    def may_open(self) -> bool:
        """Connections that take nothing new any more do not count: their last streams may take hours."""
        usable = [mux for mux in self.muxes if mux.usable]
        return not self.opening and len(usable) < _CONNECTIONS and all(mux.greeted.is_set() for mux in usable)


class MuxPool(Generic[K]):
    """`connect` opens a connection, and raises what dialling and TLS raise; `account` records it."""

    def __init__(
        self, connect: Callable[[K], Awaitable[Stream]], account: Callable[[Stream], Account], settings: PoolSettings, mux: MuxSettings
    ) -> None:
        self._connect = connect
        self._account = account
        self._settings = settings
        self._mux = mux
        self._slots: dict[K, _Slot] = {}
        self._nursery: trio.Nursery | None = None
        self.closed = False

    async def serve(self) -> None:
        """Own the connections until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    def counts(self) -> tuple[int, int]:
        """(connections with exchanges, connections without)"""
        muxes = [mux for slot in self._slots.values() for mux in slot.muxes]
        active = sum(1 for mux in muxes if mux.exchanges)
        return active, len(muxes) - active

    def ready(self, key: K) -> Mux | None:
        """The same as `acquire`, if nothing has to be waited for."""
        slot = self._slots.get(key)
        return None if slot is None or slot.waiting else slot.with_room()

    async def acquire(self, key: K, limit: float = inf) -> Mux:
        """A connection with room for a stream, which has to be opened on it with no await in between. `limit`: trio's time of the request's
        deadline, if it has one; it waits until then instead of for `wait_timeout`.

        Raises PoolExhausted, and what `connect` raises.
        """
        while True:
            slot = self._slots.get(key)
            if slot is None:
                slot = self._slots[key] = _Slot()
            mux = None if slot.waiting else slot.with_room()
            if mux is None and not slot.waiting and slot.may_open:
                slot.opening = True
                mux = await self._open(key, slot)
            elif mux is None:
                mux = await self._wait(key, slot, limit)
            if mux.usable:
                return mux

    async def _wait(self, key: K, slot: _Slot, limit: float) -> Mux:
        if len(slot.waiting) >= self._settings.waiting:
            raise PoolExhausted(f"{len(slot.waiting)} requests wait for a stream to {key}")
        turn = _Turn()
        slot.waiting[turn] = None
        try:
            await patiently(turn.given, self._settings.wait_timeout, limit, lambda: slot.moved)
        except BaseException:
            # Cancelled, perhaps in the very moment in which it was given: what it was given is the next one's.
            slot.waiting.pop(turn, None)
            if turn.mux is not None:
                turn.mux.reserved -= 1
            elif turn.given.is_set() and turn.failure is None:
                slot.opening = False
            self._share(key, slot)
            raise
        slot.waiting.pop(turn, None)
        if not turn.given.is_set():
            raise PoolExhausted(f"no stream to {key} became free within {self._settings.wait_timeout} s")
        if turn.failure is not None:
            raise turn.failure.with_traceback(None)  # which is one for all who waited, and would grow with each
        if turn.mux is None:
            return await self._open(key, slot)
        turn.mux.reserved -= 1
        return turn.mux

    def _share(self, key: K, slot: _Slot) -> None:
        """Give what there is to those who wait, in order; forget a slot that holds nothing."""
        while slot.waiting:
            mux = slot.with_room()
            if mux is None and not slot.may_open:
                return
            turn, _ = slot.waiting.popitem(last=False)
            turn.mux = mux
            if mux is not None:
                mux.reserved += 1
                slot.served = trio.current_time()
            else:
                slot.opening = True
            turn.given.set()
        if not slot.muxes and not slot.opening and self._slots.get(key) is slot:
            del self._slots[key]
        if self.closed:
            for mux in list(slot.muxes):
                if mux.unused:
                    mux.retire()

    async def _open(self, key: K, slot: _Slot) -> Mux:
        """Open a connection, which is noted as under way already. What fails has failed for all who wait for it, too."""
        try:
            mux = self._start(key, slot, await self._connect(key))
            mux.reserved += 1  # for us: those who wait come behind
        except Exception as error:
            while slot.waiting and not any(mux.usable for mux in slot.muxes):
                turn, _ = slot.waiting.popitem(last=False)
                turn.failure = error
                turn.given.set()
            raise
        finally:
            slot.opening = False
            self._share(key, slot)
        mux.reserved -= 1
        return mux

    def _start(self, key: K, slot: _Slot, stream: Stream) -> Mux:
        mux = Mux(stream, Role.CLIENT, self._mux)
        mux.on_room = lambda: self._share(key, slot)
        try:
            if self._nursery is None:
                raise RuntimeError("MuxPool.serve is not running")
            self._nursery.start_soon(self._run, key, slot, mux)
        except BaseException:
            stream.close()
            raise
        slot.muxes.append(mux)
        return mux

    async def _run(self, key: K, slot: _Slot, mux: Mux) -> None:
        account = self._account(mux.stream)
        try:
            await mux.run()
        except Exception as error:  # the boundary of these connections, as net.accept is of the clients': the others go on
            _log.error("the connection to %s ended by a fault of this proxy's", mux.stream.peer, exc_info=error)
        finally:
            account.close()
            slot.muxes.remove(mux)
            self._share(key, slot)

    def sweep(self) -> int:
        """Retire what is too old; returns how many. To be called about once a second."""
        now, swept = trio.current_time(), 0
        for slot in list(self._slots.values()):
            for mux in slot.muxes:
                if mux.usable and now - mux.opened > self._settings.max_age:
                    mux.retire()
                    swept += 1
        return swept

    def trim(self, clients: Mapping[K, int]) -> None:
        """Retire connections without a stream, until no key has more connections than `clients` says."""
        for key, slot in list(self._slots.items()):
            surplus = sum(1 for mux in slot.muxes if mux.usable) - clients.get(key, 0)
            for mux in list(slot.muxes):
                if surplus > 0 and mux.unused:
                    mux.retire()
                    surplus -= 1

    def close(self) -> None:
        """Every connection ends with its last stream, also one that is opened from now on."""
        self.closed = True
        for slot in self._slots.values():
            for mux in list(slot.muxes):
                mux.retire()
