"""The pool of HTTP/2 connections to endpoints, each shared by many exchanges.

An exchange opens its stream on the first connection with free capacity, otherwise on a new
connection. If the endpoint has its maximum number of connections, the exchange waits. For each
endpoint, one connection is opened at a time, and the next one only after the last has announced how
many streams it accepts (its SETTINGS). Requests that arrive meanwhile wait for that connection,
which probably has capacity for all of them.

Waiting requests are served in order. Free capacity, or the task of opening a connection, is
reserved for the first waiting request at once, so a later request cannot overtake it.

Connections have a limited lifetime. After `idle_timeout` without an exchange, and after `max_age`
in any case, a connection accepts no new streams and ends with its last stream. So the memory of a
burst is freed, and new endpoints of a service get their share.

Decisions are synchronous. `serve` is the task that owns the connections.
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
from proxy.exchange.h2.connection import MultiplexedConnection
from proxy.exchange.h2.settings import Http2Settings
from proxy.net.socket_stream import Stream
from proxy.wire.h1.connection import Role

K = TypeVar("K", bound=Hashable)

_log = logging.getLogger("isthmus.exchange")

# The most connections to an endpoint. One connection carries as many streams as the server allows,
# usually 100 or more. More than a few connections only help if the server allows very few streams,
# and they cost it memory.
_CONNECTIONS = 16


@dataclass(slots=True, eq=False)
class _Waiter:
    """A waiting request. When `given` is set, `mux` has a stream reserved for it, or `failure` is
    the error of the connection that it waited for. If both are None, it must open a connection
    itself, which is already recorded in `_EndpointState.opening`."""

    given: trio.Event = field(default_factory=trio.Event)
    mux: MultiplexedConnection | None = None
    failure: Exception | None = None


@dataclass(slots=True, eq=False)
class _EndpointState:
    """The state of one endpoint."""

    muxes: list[MultiplexedConnection] = field(default_factory=list)
    opening: bool = False
    served: float = -inf  # trio's time when a waiting request last got a stream
    waiting: OrderedDict[_Waiter, None] = field(default_factory=OrderedDict)

    def with_capacity(self) -> MultiplexedConnection | None:
        for mux in self.muxes:
            if mux.capacity > 0:
                return mux
        return None

    @property
    def moved(self) -> float:
        """The time (trio's) of the last progress: a connection was opened, or a waiting request got
        a stream. Now, while a connection is being opened."""
        return (
            trio.current_time()
            if self.opening
            else max(self.served, max((mux.opened for mux in self.muxes), default=-inf))
        )

    @property
    def may_open(self) -> bool:
        """Whether to open another connection. Connections that accept no new streams do not count,
        because their last streams may take hours."""
        usable = [mux for mux in self.muxes if mux.usable]
        return (
            not self.opening
            and len(usable) < _CONNECTIONS
            and all(mux.settings_received.is_set() for mux in usable)
        )


class Http2Pool(Generic[K]):
    """Connections by endpoint. `connect` opens one, and raises the errors of the dial and of TLS.
    `account` records it."""

    def __init__(
        self,
        connect: Callable[[K], Awaitable[Stream]],
        account: Callable[[Stream], Account],
        settings: PoolSettings,
        mux: Http2Settings,
    ) -> None:
        self._connect = connect
        self._account = account
        self._settings = settings
        self._mux = mux
        self._slots: dict[K, _EndpointState] = {}
        self._nursery: trio.Nursery | None = None
        self.closed = False

    async def serve(self) -> None:
        """Own the connections until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    def counts(self) -> tuple[int, int]:
        """Return (connections with exchanges, connections without)."""
        muxes = [mux for slot in self._slots.values() for mux in slot.muxes]
        active = sum(1 for mux in muxes if mux.exchanges)
        return active, len(muxes) - active

    def ready(self, key: K) -> MultiplexedConnection | None:
        """Return a connection with capacity for a stream, if there is one without waiting. The
        stream must be opened with no await in between."""
        slot = self._slots.get(key)
        return None if slot is None or slot.waiting else slot.with_capacity()

    async def acquire(self, key: K, limit: float = inf) -> MultiplexedConnection:
        """Return a connection with capacity for a stream. The caller must open the stream with no
        await in between. `limit`: the request's deadline in trio's time; with it, the request waits
        until then instead of for `wait_timeout`.

        Raises PoolExhausted, and the errors of `connect`.
        """
        while True:
            slot = self._slots.get(key)
            if slot is None:
                slot = self._slots[key] = _EndpointState()
            mux = None if slot.waiting else slot.with_capacity()
            if mux is None and not slot.waiting and slot.may_open:
                slot.opening = True
                mux = await self._open(key, slot)
            elif mux is None:
                mux = await self._wait(key, slot, limit)
            if mux.usable:
                return mux

    async def _wait(self, key: K, slot: _EndpointState, limit: float) -> MultiplexedConnection:
        if len(slot.waiting) >= self._settings.waiting:
            raise PoolExhausted(f"{len(slot.waiting)} requests wait for a stream to {key}")
        waiter = _Waiter()
        slot.waiting[waiter] = None
        try:
            await patiently(waiter.given, self._settings.wait_timeout, limit, lambda: slot.moved)
        except BaseException:
            # Cancelled, possibly at the same moment at which it was served: pass on to the next
            # one.
            slot.waiting.pop(waiter, None)
            if waiter.mux is not None:
                waiter.mux.reserved -= 1
            elif waiter.given.is_set() and waiter.failure is None:
                slot.opening = False
            self._share(key, slot)
            raise
        slot.waiting.pop(waiter, None)
        if not waiter.given.is_set():
            raise PoolExhausted(
                f"no stream to {key} became free within {self._settings.wait_timeout} s"
            )
        if waiter.failure is not None:
            # all waiting requests raise this error object, so its traceback would grow with each
            raise waiter.failure.with_traceback(None)
        if waiter.mux is None:
            return await self._open(key, slot)
        waiter.mux.reserved -= 1
        return waiter.mux

    def _share(self, key: K, slot: _EndpointState) -> None:
        """Give the free capacity to the waiting requests, in order. Remove a slot without
        connections."""
        while slot.waiting:
            mux = slot.with_capacity()
            if mux is None and not slot.may_open:
                return
            waiter, _ = slot.waiting.popitem(last=False)
            waiter.mux = mux
            if mux is not None:
                mux.reserved += 1
                slot.served = trio.current_time()
            else:
                slot.opening = True
            waiter.given.set()
        if not slot.muxes and not slot.opening and self._slots.get(key) is slot:
            del self._slots[key]
        if self.closed:
            for mux in list(slot.muxes):
                if mux.unused:
                    mux.retire()

    async def _open(self, key: K, slot: _EndpointState) -> MultiplexedConnection:
        """Open a connection; `slot.opening` is already set. An error also ends the requests that
        wait for this connection."""
        try:
            mux = self._start(key, slot, await self._connect(key))
            mux.reserved += 1  # for this request: the waiting ones come after it
        except Exception as error:
            while slot.waiting and not any(mux.usable for mux in slot.muxes):
                waiter, _ = slot.waiting.popitem(last=False)
                waiter.failure = error
                waiter.given.set()
            raise
        finally:
            slot.opening = False
            self._share(key, slot)
        mux.reserved -= 1
        return mux

    def _start(self, key: K, slot: _EndpointState, stream: Stream) -> MultiplexedConnection:
        mux = MultiplexedConnection(stream, Role.CLIENT, self._mux)
        mux.on_capacity = lambda: self._share(key, slot)
        try:
            if self._nursery is None:
                raise RuntimeError("Http2Pool.serve is not running")
            self._nursery.start_soon(self._run, key, slot, mux)
        except BaseException:
            stream.close()
            raise
        slot.muxes.append(mux)
        return mux

    async def _run(self, key: K, slot: _EndpointState, mux: MultiplexedConnection) -> None:
        account = self._account(mux.stream)
        try:
            await mux.run()
        # error boundary: a bug in one connection must not affect the others
        except Exception as error:
            _log.error(
                "internal error on the HTTP/2 connection to %s", mux.stream.peer, exc_info=error
            )
        finally:
            account.close()
            slot.muxes.remove(mux)
            self._share(key, slot)

    def sweep(self) -> int:
        """Retire the connections that are too old. Returns their number. Call it about once a
        second."""
        now, swept = trio.current_time(), 0
        for slot in list(self._slots.values()):
            for mux in slot.muxes:
                if mux.usable and now - mux.opened > self._settings.max_age:
                    mux.retire()
                    swept += 1
        return swept

    def trim(self, clients: Mapping[K, int]) -> None:
        """Retire connections without a stream, until no key has more connections than `clients`
        says."""
        for key, slot in list(self._slots.items()):
            surplus = sum(1 for mux in slot.muxes if mux.usable) - clients.get(key, 0)
            for mux in list(slot.muxes):
                if surplus > 0 and mux.unused:
                    mux.retire()
                    surplus -= 1

    def close(self) -> None:
        """End each connection with its last stream, including those that are opened later."""
        self.closed = True
        for slot in self._slots.values():
            for mux in list(slot.muxes):
                mux.retire()
