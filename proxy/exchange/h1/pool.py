"""The connections that are kept to endpoints.

Every decision is a plain function on plain data: `give_back` keeps, hands over or closes, `sweep` closes what has been idle too long;
none of them awaits, so a cancellation cannot fall between the two halves of a fact. Only `acquire` waits, and it holds what it has
reserved in a `try`.

Who waits is served in order: a connection that comes back, or its room, belongs to the first who waits from that moment, so that no
newcomer can overtake. Hence there are never idle connections, nor room, while somebody waits.

A connection belongs to the pool while it is idle and to one exchange while it is lent out. Idle connections are used last in, first
out, so that those that are not needed grow old and go. They go before a server would close them: most servers keep an idle connection
for 5 s or longer, and a request that crosses with the server's close is one that may have to fail.

So before it is used, a connection is asked whether its server has closed it: by a peek, or of who watches it (`Watch`). The fast path
takes several in one turn and gives several back in it; of those it cannot know yet, so it prefers any that came back before.
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
    """Bounds per endpoint; times in seconds."""

    connections: int = 1024  # open ones, in use and idle together
    idle: int = 128
    idle_timeout: float = 3.0
    max_age: float = 3600.0
    waiting: int = 10_000  # requests that wait for a connection, or for a stream
    wait_timeout: float = 5.0  # in which nobody is served, for a request without a deadline of its own


class Account(Protocol):
    """Where a connection's life is recorded; closed with the connection."""

    def close(self) -> None: ...


class Watch(Protocol):
    """Who waits for what an idle connection may have to say."""

    def is_quiet(self) -> bool:
        """Whether it is known without a system call that just now there was nothing. False: it has to be asked itself."""
        ...

    def forget(self) -> None:
        """The connection is being closed: nobody waits for it any more, and nothing keeps it."""
        ...


@dataclass(slots=True, eq=False)
class Upstream:
    """One HTTP/1 connection to an endpoint."""

    stream: Stream
    http: Http1Connection
    opened: float
    account: Account
    idle_since: float = 0.0
    reused: bool = False  # by the exchange that has it, or will have it: another one has been carried on it
    side: Watch | None = None  # the fast path's own, from one lease to the next
    until: float = math.inf  # when it becomes too old; trio's time


@dataclass(slots=True, eq=False)
class _Turn:
    """One that waits. When `given` is set, `upstream` is its own; None: the room for a new connection is, and is counted as open."""

    fresh: bool
    given: trio.Event = field(default_factory=trio.Event)
    upstream: Upstream | None = None


@dataclass(slots=True)
class _Slot:
    """What is kept for one endpoint."""

    open: int = 0  # connections, and those being opened
    opening: int = 0
    moved: float = -inf  # when the last one was opened, or given to one that waited; trio's time
    idle: deque[Upstream] = field(default_factory=deque)
    waiting: OrderedDict[_Turn, None] = field(default_factory=OrderedDict)


K = TypeVar("K", bound=Hashable)

# Behind the deadline of a request (seconds): it has ended by then.
_GRACE = 1.0

# How far behind the last idle connection one is looked for that has been idle for a moment.
_DEPTH = 16


def _last(idle: deque[Upstream], now: float) -> Upstream:
    """Take the last one that was not given back at this very moment: as a rule it is known to be quiet (`Watch`). All were: the last."""
    last = idle.pop()
    if last.idle_since < now:
        return last
    for back in range(1, min(len(idle), _DEPTH) + 1):
        if idle[-back].idle_since < now:
            earlier = idle[-back]
            idle[-back] = last  # which is younger than those between them, by nothing
            return earlier
    return last


def _retire(upstream: Upstream) -> None:
    """Do not lend it again. The pool's next sweep closes it, if it is idle."""
    upstream.until = -math.inf


async def patiently(given: trio.Event, timeout: float, limit: float, moved: Callable[[], float]) -> None:
    """Wait for `given` until `limit`, the time of the request's deadline, if it has one: that is the deadline layer's to enforce. Otherwise
    until nothing has `moved` for `timeout` seconds: a pool that fills, or a queue that is being served, is not exhausted."""
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
    """Connections by endpoint. `connect` opens one, and raises what dialling and TLS raise; `account` records it."""

    def __init__(
        self, connect: Callable[[K], Awaitable[Stream]], account: Callable[[Stream], Account], settings: PoolSettings, limits: Limits
    ) -> None:
        self._connect = connect
        self._account = account
        self._settings = settings
        self._limits = limits
        self._slots: dict[K, _Slot] = {}
        self.closed = False

    # Synchronous decisions...

    def counts(self) -> tuple[int, int]:
        """(connections in use, idle connections)"""
        idle = sum(len(slot.idle) for slot in self._slots.values())
        return sum(slot.open for slot in self._slots.values()) - idle, idle

    def _slot(self, key: K) -> _Slot:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot()
        return slot

    def _take_idle(self, slot: _Slot, now: float) -> Upstream | None:
        while slot.idle:
            upstream = _last(slot.idle, now)
            if self._good(upstream, now):
                return upstream
            self._close(slot, upstream)
        return None

    @staticmethod
    def _close(slot: _Slot, upstream: Upstream) -> None:
        slot.open -= 1
        if upstream.side is not None:
            upstream.side.forget()
        stream = upstream.stream
        stream.close()
        if isinstance(stream, TLSStream) and stream.expiry is not None:
            stream.expiry.retire = None  # which leads back here
        upstream.account.close()

    def _fresh(self, upstream: Upstream, now: float) -> bool:
        return now - upstream.idle_since <= self._settings.idle_timeout and now <= upstream.until

    def _good(self, upstream: Upstream, now: float) -> bool:
        """Neither too old, nor closed by its server."""
        side = upstream.side
        return self._fresh(upstream, now) and ((side is not None and side.is_quiet()) or upstream.stream.is_idle())

    def take(self, key: K, now: float) -> Upstream | None:
        """An idle connection to `key` if there is one; `now` is trio's time. To be ended with `give_back` or `restore`."""
        slot = self._slots.get(key)
        return None if slot is None else self._take_idle(slot, now)

    def restore(self, key: K, upstream: Upstream, now: float) -> None:
        """End a lease whose exchange was carried past `upstream.http` (by the fast path) and ended well."""
        upstream.idle_since = now
        upstream.reused = True
        self._keep(key, self._slots[key], upstream)

    def adopt(self, key: K, stream: Stream, account: Account) -> None:
        """Keep a connection to `key` that was opened elsewhere, and that nothing has been sent on or read from. The pool closes both, at
        once if it is full."""
        slot, now = self._slot(key), trio.current_time()
        slot.open += 1
        upstream = self._upstream(stream, account, now)
        upstream.idle_since = now
        if slot.open > self._settings.connections:
            self._close(slot, upstream)
        else:
            self._keep(key, slot, upstream)

    def _upstream(self, stream: Stream, account: Account, now: float) -> Upstream:
        return Upstream(stream, Http1Connection(Role.CLIENT, self._limits), now, account, until=now + self._settings.max_age)

    def give_back(self, key: K, upstream: Upstream, *, usable: bool) -> None:
        """End a lease. A connection that is not usable, or not reusable, is closed and leaves room for another."""
        slot = self._slots[key]  # the lease has kept it
        if usable and upstream.http.reusable:
            upstream.http.next_cycle()
            upstream.idle_since = trio.current_time()
            upstream.reused = True
            self._keep(key, slot, upstream)
        else:
            self._close(slot, upstream)
            self._freed(key, slot)

    def _keep(self, key: K, slot: _Slot, upstream: Upstream) -> None:
        """A connection for the first who waits; nobody does: an idle one."""
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

    def _freed(self, key: K, slot: _Slot) -> None:
        """There is room in `slot`: for the first who waits."""
        if slot.waiting:
            slot.open += 1
            slot.moved = _now()
            slot.waiting.popitem(last=False)[0].given.set()
        elif not slot.open:
            self._slots.pop(key, None)

    def sweep(self) -> int:
        """Close what has been idle too long; returns how many. To be called about once a second."""
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
        """Close idle connections, the oldest first, until no key has more open connections than `clients` says."""
        for key, slot in list(self._slots.items()):
            while slot.idle and slot.open > clients.get(key, 0):
                self._close(slot, slot.idle.popleft())
            if not slot.open:
                del self._slots[key]

    def close(self) -> None:
        """Close the idle connections; those in use are closed as they come back, and so are those that are opened from now on."""
        self.closed = True
        for key, slot in list(self._slots.items()):
            while slot.idle:
                self._close(slot, slot.idle.pop())
            if not slot.open:
                del self._slots[key]

    # Waiting...

    async def acquire(self, key: K, *, fresh: bool = False, limit: float = inf) -> Upstream:
        """A connection to `key`: an idle one (unless `fresh`), a new one, or one that another exchange gives back. `limit`: trio's time of
        the request's deadline, if it has one; it waits until then instead of for `wait_timeout`.

        To be ended with `give_back` in every case. Raises PoolExhausted, and what `connect` raises.
        """
        slot = self._slot(key)
        upstream = None if fresh else self._take_idle(slot, trio.current_time())
        if upstream is None and slot.open >= self._settings.connections and slot.idle:
            self._close(slot, slot.idle.popleft())  # a fresh one is wanted: the oldest makes room
        if upstream is None and slot.open >= self._settings.connections:
            upstream = await self._wait(key, slot, _Turn(fresh), limit)
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

    async def _wait(self, key: K, slot: _Slot, turn: _Turn, limit: float) -> Upstream | None:
        """Wait for a connection, or for the room to open one (None)."""
        if len(slot.waiting) >= self._settings.waiting:
            raise PoolExhausted(f"{slot.open} connections to {key} are in use, and {len(slot.waiting)} requests wait for one")
        slot.waiting[turn] = None
        try:
            await patiently(turn.given, self._settings.wait_timeout, limit, lambda: _now() if slot.opening else slot.moved)
        except BaseException:
            # Cancelled in the very moment in which it was given: what it was given is the next one's.
            slot.waiting.pop(turn, None)
            if turn.upstream is not None:
                self._keep(key, slot, turn.upstream)
            elif turn.given.is_set():
                slot.open -= 1
                self._freed(key, slot)
            raise
        slot.waiting.pop(turn, None)
        if turn.given.is_set():
            return turn.upstream
        raise PoolExhausted(
            f"none of the {self._settings.connections} connections to {key} became free within {self._settings.wait_timeout} s"
        )
