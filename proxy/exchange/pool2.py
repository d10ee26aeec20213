"""The HTTP/2 connections that are kept to endpoints, each shared by many exchanges.

An exchange takes a stream where there is room: on the first connection that has some, otherwise on a new one, and where an endpoint has
all the connections it may have, it waits for the first stream that ends. Connections are opened one at a time for an endpoint; who comes
meanwhile waits for that one, which most likely has room for all of them.

Connections do not live for ever: after `idle_timeout` without an exchange, and after `max_age` in any case, a connection takes nothing
new and ends with its last stream. So memory that a burst has taken is given back, and a service's new endpoints get their share.

Decisions are synchronous; `serve` is the task that owns the connections.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio
from trio.lowlevel import ParkingLot

from proxy.errors import PoolExhausted
from proxy.exchange.mux import Mux, MuxSettings
from proxy.exchange.pool import Account, PoolSettings
from proxy.net.streams import Stream
from proxy.wire.http1 import Role

K = TypeVar("K", bound=Hashable)

# One connection takes as many streams as the server allows, commonly 100 or more. More than a few for one endpoint only help where the
# server allows next to none, and cost it memory.
_CONNECTIONS = 16


@dataclass(slots=True, eq=False)
class _Slot:
    """What is kept for one endpoint."""

    muxes: list[Mux] = field(default_factory=list)
    opening: bool = False
    attempts: int = 0
    failure: tuple[int, Exception] | None = None  # of which attempt
    waiting: ParkingLot = field(default_factory=ParkingLot)


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

    async def acquire(self, key: K) -> Mux:
        """A connection with room for a stream, which has to be opened on it with no await in between.

        Raises PoolExhausted, and what `connect` raises.
        """
        deadline = trio.current_time() + self._settings.wait_timeout
        while True:
            slot = self._slots.get(key)
            if slot is None:
                slot = self._slots[key] = _Slot()
            for mux in slot.muxes:
                if mux.room > 0:
                    return mux
            if not slot.opening and len(slot.muxes) < _CONNECTIONS:
                return await self._open(key, slot)
            attempt = slot.attempts
            with trio.move_on_at(deadline) as scope:
                await slot.waiting.park()
            if slot.failure is not None and slot.failure[0] == attempt:
                raise slot.failure[1]  # it was our attempt, too
            if scope.cancelled_caught:
                raise PoolExhausted(f"no stream to {key} became free within {self._settings.wait_timeout} s")

    async def _open(self, key: K, slot: _Slot) -> Mux:
        if self._nursery is None:
            raise RuntimeError("MuxPool.serve is not running")
        slot.opening = True
        slot.attempts += 1
        try:
            stream = await self._connect(key)
            mux = Mux(stream, Role.CLIENT, self._mux)
            mux.on_room = slot.waiting.unpark_all
            slot.muxes.append(mux)
            self._nursery.start_soon(self._run, key, slot, mux)
            return mux
        except Exception as error:
            slot.failure = (slot.attempts, error)
            raise
        finally:
            slot.opening = False
            slot.waiting.unpark_all()

    async def _run(self, key: K, slot: _Slot, mux: Mux) -> None:
        account = self._account(mux.stream)
        try:
            await mux.run()
        finally:
            account.close()
            slot.muxes.remove(mux)
            slot.waiting.unpark_all()
            if not slot.muxes and not slot.opening and self._slots.get(key) is slot and not slot.waiting:
                del self._slots[key]

    def sweep(self) -> int:
        """Retire what is too old; returns how many. To be called about once a second."""
        now, swept = trio.current_time(), 0
        for slot in list(self._slots.values()):
            for mux in slot.muxes:
                if mux.usable and now - mux.opened > self._settings.max_age:
                    mux.retire()
                    swept += 1
        return swept

    def close(self) -> None:
        """Take nothing new; connections end with their last stream."""
        for slot in self._slots.values():
            for mux in list(slot.muxes):
                mux.retire()
