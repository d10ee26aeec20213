"""Where a flow tells the fast road what to do with an exchange, and what the road borrows for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from proxy.exchange.exchange import Exchange
from proxy.exchange.pool import Pool, Upstream

K = TypeVar("K", bound=Hashable)


class Course(Protocol):
    """A flow's decisions, as plain functions; the same that its layers make on the ordinary road."""

    def account(self, exchange: Exchange) -> AbstractContextManager[object]:
        """Open the account of an exchange that is under way from here on."""
        ...

    def take(self, exchange: Exchange, now: float) -> Borrowed[Any] | None:
        """A ready connection for `exchange` (`now` is trio's time); None: the ordinary road has to see to it, and nothing has changed."""
        ...


@dataclass(slots=True, eq=False)
class Borrowed(Generic[K]):
    """A kept connection, lent for one exchange (exchange.begun.Loan)."""

    pool: Pool[K]
    key: K
    upstream: Upstream
    on_end: Callable[[], None]
    attempt: object = None  # the flow's own, for an exchange that is handed over
    on_begin: Callable[[Exchange], None] | None = None  # once its account is open

    def end(self, *, usable: bool) -> None:
        self.pool.give_back(self.key, self.upstream, usable=usable)
        self.on_end()

    def done(self, now: float) -> None:
        """The exchange ended well, and `upstream.http` has not seen it."""
        self.pool.restore(self.key, self.upstream, now)
        self.on_end()
