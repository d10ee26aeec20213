"""The deadline of one exchange, which its steps move."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio


class ExchangeTimer:
    """The deadline of one exchange. Each step moves it, because moving the deadline of one cancel
    scope costs 2 µs, and a new scope 6 to 11 µs.

    `expect` sets what is awaited now and for how long. When the time is up, the deadline layer
    raises the error. In addition, the exchange as a whole may have a limit.
    """

    __slots__ = ("_overdue", "client_awaited", "late", "limit", "scope", "since", "stopped")

    def __init__(self, scope: trio.CancelScope) -> None:
        self.scope = scope
        self.late: Callable[[], Exception] | None = None
        self.limit = math.inf  # of the whole exchange, in trio's time
        self.since = 0.0  # trio's time when the last step began
        self.stopped = False  # by `give_up`
        # the awaited peer is the client: a timeout is not the server's fault
        self.client_awaited = False
        self._overdue: Callable[[], Exception] | None = None

    def expect(self, late: Callable[[], Exception], seconds: float) -> None:
        """Allow at most `seconds` until the next step. `late()` creates the error for the
        timeout."""
        self.since = now = trio.current_time()
        deadline = now + seconds
        self.client_awaited = False
        if deadline < self.limit:
            self.late = late
            self.scope.deadline = deadline
        else:
            self.rest()

    def rest(self) -> None:
        """Only the limit of the whole exchange applies."""
        self.late = self._overdue
        self.scope.deadline = self.limit

    def await_client(self) -> None:
        """The rest of the request is awaited. Only the limit of the whole exchange applies here;
        the body has its own timeouts for the client."""
        self.rest()
        self.client_awaited = True

    def limit_to(self, limit: float, overdue: Callable[[], Exception]) -> None:
        """Limit the whole exchange to `limit` (trio's time), unless it already has an earlier
        limit."""
        if limit < self.limit:
            self.limit, self._overdue = limit, overdue
            if limit < self.scope.deadline:
                self.rest()

    def unlimit(self) -> None:
        """The exchange has become a tunnel (101, or 2xx to CONNECT), which has no deadline."""
        self.limit, self._overdue = math.inf, None
        self.rest()

    def give_up(self, late: Callable[[], Exception]) -> None:
        """End the exchange now, with the error that `late()` creates."""
        self.late = late
        self.stopped = True
        self.scope.cancel()

    def end(self) -> Callable[[], Exception] | None:
        """The exchange has ended. Returns `late`, and drops it: its owner has the timer, so that
        would be a reference cycle."""
        late, self.late, self._overdue = self.late, None, None
        return late

    @property
    def ran_out(self) -> bool:
        """Whether a timeout has ended the exchange."""
        return self.scope.cancel_called and not self.stopped


class _NoTimer(ExchangeTimer):
    """The timer of an exchange outside the deadline layer. It limits nothing."""

    def expect(self, late: Callable[[], Exception], seconds: float) -> None:
        pass

    def rest(self) -> None:
        pass

    def await_client(self) -> None:
        pass

    def limit_to(self, limit: float, overdue: Callable[[], Exception]) -> None:
        pass

    def unlimit(self) -> None:
        pass

    def give_up(self, late: Callable[[], Exception]) -> None:
        pass


NO_TIMER: ExchangeTimer = _NoTimer(trio.CancelScope())
