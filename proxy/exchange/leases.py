"""Carriers from the pools, leased for one exchange each. On the ordinary path, only this module
takes from a pool and gives back."""

from __future__ import annotations

from math import inf
from types import TracebackType
from typing import Generic

from proxy.exchange.h1.pool import K, Pool, Upstream
from proxy.exchange.h2.pool import Http2Pool
from proxy.exchange.upstream import Carrier, Http1Carrier, Http2Carrier


class Http1Leases(Generic[K]):
    """One connection for each exchange. It goes back to the pool if the exchange ended well."""

    def __init__(self, pool: Pool[K]) -> None:
        self.pool = pool

    def carrier(self, endpoint: K, *, fresh: bool, limit: float = inf) -> _Http1Lease[K]:
        return _Http1Lease(self.pool, endpoint, fresh, limit)


class _Http1Lease(Generic[K]):
    __slots__ = ("_endpoint", "_fresh", "_limit", "_pool", "_upstream")

    def __init__(self, pool: Pool[K], endpoint: K, fresh: bool, limit: float) -> None:
        self._pool = pool
        self._endpoint = endpoint
        self._fresh = fresh
        self._limit = limit
        self._upstream: Upstream | None = None

    async def __aenter__(self) -> Carrier:
        self._upstream = await self._pool.acquire(
            self._endpoint, fresh=self._fresh, limit=self._limit
        )
        return Http1Carrier(self._upstream)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._upstream is not None:
            self._pool.give_back(self._endpoint, self._upstream, usable=kind is None)


class Http2Leases(Generic[K]):
    """One stream for each exchange, on a shared connection. A stream is always new."""

    def __init__(self, pool: Http2Pool[K]) -> None:
        self.pool = pool

    def carrier(
        self,
        endpoint: K,
        *,
        fresh: bool,  # noqa: ARG002  # the pool skips connections that accept no streams
        limit: float = inf,
    ) -> _Http2Lease[K]:
        return _Http2Lease(self.pool, endpoint, limit)


class _Http2Lease(Generic[K]):
    __slots__ = ("_carrier", "_endpoint", "_limit", "_pool")

    def __init__(self, pool: Http2Pool[K], endpoint: K, limit: float) -> None:
        self._limit = limit
        self._pool = pool
        self._endpoint = endpoint
        self._carrier: Http2Carrier | None = None

    async def __aenter__(self) -> Carrier:
        # The carrier's `begin` opens the stream with no await in between, so the capacity is still
        # there.
        self._carrier = Http2Carrier(await self._pool.acquire(self._endpoint, self._limit))
        return self._carrier

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._carrier is not None:
            self._carrier.close()
