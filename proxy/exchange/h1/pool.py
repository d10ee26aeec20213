"""The pool of HTTP/1 connections to endpoints.

Every decision is a plain function on plain data: `give_back` keeps a connection, hands it to a
waiting request, or closes it; `sweep` closes connections that were idle for too long. These
functions do not await, so a cancellation cannot interrupt a change of state. Only `acquire` waits,
and it releases its reservation in an `except` block.

Waiting requests are served in order. A connection that comes back, or the free capacity for a new
one, is assigned to the first waiting request at once, so a later request cannot overtake it. So
there are never idle connections or free capacity while requests wait.

A connection belongs to the pool while it is idle, and to one exchange while it is leased. Idle
connections are used last in, first out, so connections that are not needed grow old and are closed.
The pool closes them before a server would: most servers keep an idle connection for 5 s or longer,
and a request that crosses with the server's close may fail.

So before each use, the pool checks whether the server has closed the connection: with a peek, or by
asking its `IdleWatch`. The fast path takes and returns several connections in one turn. It has no
information yet about those that came back in the same turn, so it prefers connections that came
back earlier.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Generic, Protocol, TypeVar

import trio

from proxy.errors import PoolExhausted
from proxy.net.socket_stream import Stream
from proxy.net.tls.tls_stream import TLSStream
from proxy.wire.h1.connection import Http1Connection, Role
from proxy.wire.messages import Limits


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Limits for each endpoint. Times in seconds."""

    connections: int = 1024  # open connections, in use and idle
    idle: int = 128
    idle_timeout: float = 3.0
    max_age: float = 3600.0
    waiting: int = 10_000  # requests that wait for a connection or a stream
    wait_timeout: float = 5.0  # without progress, for a request without a deadline


class Account(Protocol):
    """Records the lifetime of a connection. Closed with the connection."""

    def close(self) -> None: ...


class IdleWatch(Protocol):
    """Watches an idle connection for events."""

    def is_quiet(self) -> bool:
        """Return True if it is known, without a system call, that no event has occurred. False: the
        caller has to check the connection."""
        ...

    def forget(self) -> None:
        """The connection is being closed: stop watching, and drop all references to it."""
        ...


@dataclass(slots=True, eq=False)
class Upstream:
    """One HTTP/1 connection to an endpoint."""

    stream: Stream
    http: Http1Connection
    opened: float
    account: Account
    idle_since: float = 0.0
    reused: bool = False  # True for its current or next exchange: an earlier exchange has used it
    side: IdleWatch | None = None  # the fast path's state, kept from one lease to the next
    until: float = math.inf  # maximum age, in trio's time


@dataclass(slots=True, eq=False)
class _Waiter:
    """A waiting request. When `given` is set, it has got the connection `upstream`. If that is
    None, it may open a new connection, which is already counted in `_EndpointState.open`."""

    fresh: bool
    given: trio.Event = field(default_factory=trio.Event)
    upstream: Upstream | None = None


@dataclass(slots=True)
class _EndpointState:
    """The state of one endpoint."""

    open: int = 0  # connections, including those being opened
    opening: int = 0
    # trio's time when a connection was last opened or given to a waiting request
    moved: float = -inf
    idle: deque[Upstream] = field(default_factory=deque)
    waiting: OrderedDict[_Waiter, None] = field(default_factory=OrderedDict)


K = TypeVar("K", bound=Hashable)

# Seconds after the deadline of a request, when the deadline layer has certainly ended it.
_GRACE = 1.0

# How many idle connections to search for one that did not come back at this moment.
_DEPTH = 16


def _last(idle: deque[Upstream], now: float) -> Upstream:
    """Take the last idle connection that did not come back at this very moment; usually it is known
    to be quiet (`IdleWatch`). If all came back just now, take the last one."""
    last = idle.pop()
    if last.idle_since < now:
        return last
    for back in range(1, min(len(idle), _DEPTH) + 1):
        if idle[-back].idle_since < now:
            earlier = idle[-back]
            idle[-back] = last  # order by age stays correct: all between have the same time
            return earlier
    return last


def _retire(upstream: Upstream) -> None:
    """Do not lease this connection again. If it is idle, the next sweep closes it."""
    upstream.until = -math.inf


async def patiently(
    given: trio.Event, timeout: float, limit: float, moved: Callable[[], float]
) -> None:
    """Wait for `given`. With a deadline (`limit`, trio's time), wait until then; the deadline layer
    enforces it. Without one, wait until there was no progress (`moved`) for `timeout` seconds: a
    pool that is opening connections, or whose queue moves, is not exhausted."""
    since = _now()
    while not given.is_set():
        until = limit + _GRACE if limit < inf else max(since, moved()) + timeout
        if _now() >= until:
            return
        with trio.move_on_at(until):
            await given.wait()


def _now() -> float:
    return trio.current_time()


class Pool(Generic[K]):
    """Connections by endpoint. `connect` opens one, and raises the errors of the dial and of TLS.
    `account` records it."""

    def __init__(
        self,
        connect: Callable[[K], Awaitable[Stream]],
        account: Callable[[Stream], Account],
        settings: PoolSettings,
        limits: Limits,
    ) -> None:
        self._connect = connect
        self._account = account
        self._settings = settings
        self._limits = limits
        self._slots: dict[K, _EndpointState] = {}
        self.closed = False

    # Synchronous decisions...

    def counts(self) -> tuple[int, int]:
        """Return (connections in use, idle connections)."""
        idle = sum(len(slot.idle) for slot in self._slots.values())
        return sum(slot.open for slot in self._slots.values()) - idle, idle

    def _slot(self, key: K) -> _EndpointState:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _EndpointState()
        return slot

    def _take_idle(self, slot: _EndpointState, now: float) -> Upstream | None:
        while slot.idle:
            upstream = _last(slot.idle, now)
            if self._good(upstream, now):
                return upstream
            self._close(slot, upstream)
        return None

    @staticmethod
    def _close(slot: _EndpointState, upstream: Upstream) -> None:
        slot.open -= 1
        if upstream.side is not None:
            upstream.side.forget()
        stream = upstream.stream
        stream.close()
        if isinstance(stream, TLSStream) and stream.expiry is not None:
            stream.expiry.retire = None  # breaks a reference cycle
        upstream.account.close()

    def _fresh(self, upstream: Upstream, now: float) -> bool:
        return now - upstream.idle_since <= self._settings.idle_timeout and now <= upstream.until

    def _good(self, upstream: Upstream, now: float) -> bool:
        """Neither too old, nor closed by its server."""
        side = upstream.side
        return self._fresh(upstream, now) and (
            (side is not None and side.is_quiet()) or upstream.stream.is_idle()
        )

    def take(self, key: K, now: float) -> Upstream | None:
        """Take an idle connection to `key`, if there is one. `now`: trio's time. End the lease with
        `give_back` or `restore`."""
        slot = self._slots.get(key)
        return None if slot is None else self._take_idle(slot, now)

    def restore(self, key: K, upstream: Upstream, now: float) -> None:
        """End a lease after an exchange that ended well and bypassed `upstream.http` (on the fast
        path)."""
        upstream.idle_since = now
        upstream.reused = True
        self._keep(key, self._slots[key], upstream)

    def adopt(self, key: K, stream: Stream, account: Account) -> None:
        """Add a connection to `key` that was opened elsewhere and not used yet. The pool then owns
        `stream` and `account`, and closes both, immediately if the pool is full."""
        slot, now = self._slot(key), trio.current_time()
        slot.open += 1
        upstream = self._upstream(stream, account, now)
        upstream.idle_since = now
        if slot.open > self._settings.connections:
            self._close(slot, upstream)
        else:
            self._keep(key, slot, upstream)

    def _upstream(self, stream: Stream, account: Account, now: float) -> Upstream:
        return Upstream(
            stream,
            Http1Connection(Role.CLIENT, self._limits),
            now,
            account,
            until=now + self._settings.max_age,
        )

    def give_back(self, key: K, upstream: Upstream, *, usable: bool) -> None:
        """End a lease. A connection that is not `usable`, or not reusable, is closed, which frees
        capacity."""
        slot = self._slots[key]  # the lease keeps the slot
        if usable and upstream.http.reusable:
            upstream.http.next_cycle()
            upstream.idle_since = trio.current_time()
            upstream.reused = True
            self._keep(key, slot, upstream)
        else:
            self._close(slot, upstream)
            self._freed(key, slot)

    def _keep(self, key: K, slot: _EndpointState, upstream: Upstream) -> None:
        """Give the connection to the first waiting request. If none waits, keep it idle."""
        first = next(iter(slot.waiting), None)
        if first is not None and not first.fresh and self._good(upstream, trio.current_time()):
            del slot.waiting[first]
            first.upstream = upstream
            first.given.set()
            slot.moved = _now()
        elif first is None and not self.closed and len(slot.idle) < self._settings.idle:
            slot.idle.append(upstream)
        else:
            self._close(slot, upstream)
            self._freed(key, slot)

    def _freed(self, key: K, slot: _EndpointState) -> None:
        """Capacity is free in `slot`: give it to the first waiting request."""
        if slot.waiting:
            slot.open += 1
            slot.moved = _now()
            slot.waiting.popitem(last=False)[0].given.set()
        elif not slot.open:
            self._slots.pop(key, None)

    def sweep(self) -> int:
        """Close the connections that were idle for too long. Returns their number. Call it about
        once a second."""
        now, swept = trio.current_time(), 0
        for key, slot in list(self._slots.items()):
            stale = [upstream for upstream in slot.idle if not self._fresh(upstream, now)]
            for upstream in stale:
                slot.idle.remove(upstream)
                self._close(slot, upstream)
            swept += len(stale)
            if not slot.open:
                del self._slots[key]
        return swept

    def trim(self, clients: Mapping[K, int]) -> None:
        """Close idle connections, oldest first, until no key has more open connections than
        `clients` says."""
        for key, slot in list(self._slots.items()):
            while slot.idle and slot.open > clients.get(key, 0):
                self._close(slot, slot.idle.popleft())
            if not slot.open:
                del self._slots[key]

    def close(self) -> None:
        """Close the idle connections. Connections in use are closed when they come back, and so are
        connections that are opened later."""
        self.closed = True
        for key, slot in list(self._slots.items()):
            while slot.idle:
                self._close(slot, slot.idle.pop())
            if not slot.open:
                del self._slots[key]

    # Waiting...

    async def acquire(self, key: K, *, fresh: bool = False, limit: float = inf) -> Upstream:
        """Return a connection to `key`: an idle one (unless `fresh`), a new one, or one that
        another exchange gives back. `limit`: the request's deadline in trio's time; with it, the
        request waits until then instead of for `wait_timeout`.

        The caller must end the lease with `give_back` in every case. Raises PoolExhausted, and the
        errors of `connect`.
        """
        slot = self._slot(key)
        upstream = None if fresh else self._take_idle(slot, trio.current_time())
        if upstream is None and slot.open >= self._settings.connections and slot.idle:
            # a new connection is required: close the oldest idle one
            self._close(slot, slot.idle.popleft())
        if upstream is None and slot.open >= self._settings.connections:
            upstream = await self._wait(key, slot, _Waiter(fresh), limit)
        elif upstream is None:
            slot.open += 1
        if upstream is not None:
            return upstream
        slot.opening += 1
        try:
            stream = await self._connect(key)
        except BaseException:
            slot.open -= 1
            self._freed(key, slot)
            raise
        finally:
            slot.opening -= 1
        now = slot.moved = trio.current_time()
        upstream = self._upstream(stream, self._account(stream), now)
        if isinstance(stream, TLSStream) and stream.expiry is not None:
            stream.expiry.retire = partial(_retire, upstream)
        return upstream

    async def _wait(
        self, key: K, slot: _EndpointState, waiter: _Waiter, limit: float
    ) -> Upstream | None:
        """Wait for a connection, or for capacity to open one (None)."""
        if len(slot.waiting) >= self._settings.waiting:
            raise PoolExhausted(
                f"{slot.open} connections to {key} are in use, and {len(slot.waiting)} requests"
                " wait for one"
            )
        slot.waiting[waiter] = None
        try:
            await patiently(
                waiter.given,
                self._settings.wait_timeout,
                limit,
                lambda: _now() if slot.opening else slot.moved,
            )
        except BaseException:
            # Cancelled at the same moment at which it was served: pass on to the next one.
            slot.waiting.pop(waiter, None)
            if waiter.upstream is not None:
                self._keep(key, slot, waiter.upstream)
            elif waiter.given.is_set():
                slot.open -= 1
                self._freed(key, slot)
            raise
        slot.waiting.pop(waiter, None)
        if waiter.given.is_set():
            return waiter.upstream
        raise PoolExhausted(
            f"none of the {self._settings.connections} connections to {key} became free within"
            f" {self._settings.wait_timeout} s"
        )
