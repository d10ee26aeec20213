"""The memory budget of a process: how many bytes it may buffer, and how that is divided between its downstream connections.

Everything that is buffered is buffered for one downstream connection: what its client has sent and the server has not taken, what the
server has sent and the client has not taken, and the streams and heads of requests in progress. So each connection has one `Share`, and
whatever buffers bytes charges them there, and releases them. The `Budget` has the sums. All of it is plain arithmetic.

While no more than half of the budget is in use, nothing is limited. Then the limit for one connection is a dynamic threshold (Choudhury
and Hahne, 1998, for switches with shared buffers): a fixed fraction of what is still free. A few connections may each hold a lot. Many
get little each, and a part of the budget always stays free. The connection that holds the most is the first to exceed its threshold.
Three things follow from it, in this order:

- windows shrink: HTTP/2 grants no more credit than the threshold, other reads get smaller;
- reading stops: an HTTP/2 connection above its threshold is not read until it is below. After `patience` seconds it is closed;
- new work is refused, when nearly all of the budget is used: connections, streams, requests.

Clients without a verified identity have a part of the budget only (`Budget.open_limit`), and smaller fractions. The rest is a reserve for
members of the mesh and for the pod's own application.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Final

import trio

from proxy.net.tls.openssl_errors import AWS_LC

# Of what is free, the part that one connection may hold, as a shift: a sixteenth for clients without an identity, half for members.
_OPEN_SHIFT, _MEMBER_SHIFT = 4, 1
# Of the budget, the part that clients without an identity may use, in eighths.
_OPEN_EIGHTHS = 6
# New work is refused when less than this part of what may be used is free, as a shift.
_FULL_SHIFT = 4
# The smallest read under pressure (bytes), and the part of the threshold that one read may take, as a shift.
_LEAST_READ, _READ_SHIFT = 4096, 2
UNLIMITED: Final = 1 << 62
# Buffers of up to so many bytes need not be charged one by one: what a connection is charged for itself covers them.
SMALL: Final = 4096
# Bytes that a connection takes itself, idle: 8 KiB were measured with HTTP/1 and 25 with HTTP/2, in clear text. TLS adds little to it with
# AWS-LC, and as much again with OpenSSL.
CONNECTION_BYTES: Final = 24 * 1024
TLS_BYTES: Final = 4 * 1024 if AWS_LC else 24 * 1024
# Connections that are told, for each release, that they may go on.
_WOKEN = 4

Action = str  # "window", "read", "close", "connection", "stream", "request"
ACTIONS: Final[tuple[Action, ...]] = ("window", "read", "close", "connection", "stream", "request")


def _held(share: Share) -> int:
    return share.held


def _no() -> bool:
    return False


def _ignore(_: str) -> None:
    pass


class Budget:
    """Bytes that are buffered in this process, and how many may be. `limit`: bytes; `patience`: seconds."""

    __slots__ = ("_over", "_shares", "_waiting", "counts", "half", "limit", "on_action", "open_limit", "open_used", "patience", "used")

    def __init__(self, limit: int = UNLIMITED, patience: float = 10.0) -> None:
        self.limit = limit
        self.half = limit // 2  # until so much is used nothing is limited
        self.open_limit = limit * _OPEN_EIGHTHS // 8
        self.patience = patience
        self.used = 0
        self.open_used = 0  # of these, for clients without an identity
        self.counts: dict[Action, int] = dict.fromkeys(ACTIONS, 0)  # what was done since the start because memory is short
        self.on_action: Callable[[Action], None] = _ignore  # told each time; must not raise
        self._shares: set[Share] = set()
        self._waiting: dict[Share, trio.Event] = {}  # that are not read
        self._over: dict[Share, float] = {}  # above their thresholds, and since when

    def share(self, fixed: int = 0, *, member: bool = False) -> Share:
        """A share for one connection, which itself takes `fixed` bytes. The caller closes it."""
        share = Share(self, member)
        self._shares.add(share)
        share.charge(fixed)
        return share

    def act(self, action: Action) -> None:
        """Count something that is done because memory is short."""
        self.counts[action] += 1
        self.on_action(action)

    def sweep(self, now: float) -> None:
        """End the connections that have been above their threshold for `patience` seconds, and those that are not read and whose client has
        gone. To be called about once a second; `now` is trio's time."""
        self._wake(len(self._waiting))
        for share in list(self._waiting):
            if share.gone():
                share.exhaust()
        self._over = {share: self._over.get(share, now) for share in self._shares if share.over} if self.used > self.half else {}
        exhausted = [share for share, since in self._over.items() if now - since >= self.patience and share.on_exhausted is not None]
        # The largest first, and not all at once: each that ends raises the threshold of the others.
        exhausted.sort(key=_held, reverse=True)
        for share in exhausted[: 1 + len(exhausted) // 8]:
            self.act("close")
            share.exhaust()

    def _wake(self, most: int) -> None:
        """Wake up to `most` of the connections that wait, those that are below their thresholds; the others go to the end."""
        for share in list(self._waiting)[:most]:
            event = self._waiting.pop(share)
            if share.over:
                self._waiting[share] = event
            else:
                event.set()


class Share:
    """What is buffered for one connection. `member`: it is the pod's own, or its client has a verified identity."""

    __slots__ = ("budget", "gone", "held", "member", "on_exhausted")

    def __init__(self, budget: Budget, member: bool) -> None:
        self.budget = budget
        self.member = member
        self.held = 0  # bytes
        self.on_exhausted: Callable[[], None] | None = None  # ends the connection; must not raise
        self.gone: Callable[[], bool] = _no  # whether the client has closed its end, which is not noticed while nothing is read

    def charge(self, size: int) -> None:
        """So many bytes more are buffered."""
        self.held += size
        budget = self.budget
        budget.used += size
        if not self.member:
            budget.open_used += size

    def release(self, size: int) -> None:
        """So many bytes of those charged are not buffered any more."""
        self.held -= size
        budget = self.budget
        budget.used -= size
        if not self.member:
            budget.open_used -= size
        if budget._waiting:  # noqa: SLF001  # budget and shares are one unit
            budget._wake(_WOKEN)  # noqa: SLF001  # budget and shares are one unit

    def exhaust(self) -> None:
        """End the connection, once."""
        end, self.on_exhausted = self.on_exhausted, None
        if end is not None:
            end()

    def holding(self, size: int) -> AbstractContextManager[None]:
        """Charge `size` bytes within a block; small buffers are not charged."""
        return _Holding(self, size) if size > SMALL else _SMALL

    def admit(self) -> None:
        """The client has shown a verified identity."""
        if not self.member:
            self.member = True
            self.budget.open_used -= self.held

    @property
    def threshold(self) -> int:
        """The most bytes that this connection may hold now."""
        budget = self.budget
        if self.member:
            return max(0, budget.limit - budget.used) >> _MEMBER_SHIFT
        return max(0, min(budget.open_limit - budget.open_used, budget.limit - budget.used)) >> _OPEN_SHIFT

    @property
    def over(self) -> bool:
        """It holds more than it may."""
        budget = self.budget
        return budget.used > budget.half and self.held > self.threshold

    @property
    def full(self) -> bool:
        """Nothing new is to be begun for it."""
        budget = self.budget
        if budget.used <= budget.half:
            return False
        if budget.limit - budget.used < budget.limit >> _FULL_SHIFT:
            # What members hold themselves is bounded by their thresholds; the last sixteenth is for finishing what they have begun.
            return True
        return not self.member and budget.open_limit - budget.open_used < budget.open_limit >> _FULL_SHIFT

    def refuses(self, action: Action) -> bool:
        """Whether something new is to be refused; that is counted as `action`."""
        if not self.full:
            return False
        self.budget.act(action)
        return True

    def read_size(self, most: int) -> int:
        """How many bytes to read at a time: `most`, or fewer when memory is short."""
        budget = self.budget
        if budget.used <= budget.half:
            return most
        size = self.threshold >> _READ_SHIFT
        if size >= most:
            return most
        return max(_LEAST_READ, size)

    async def below(self) -> None:
        """Wait until it is below its threshold."""
        budget = self.budget
        if self.over:
            budget.act("read")
            while self.over:
                event = budget._waiting[self] = trio.Event()  # noqa: SLF001  # budget and shares are one unit
                try:
                    await event.wait()
                finally:
                    budget._waiting.pop(self, None)  # noqa: SLF001  # budget and shares are one unit

    def close(self) -> None:
        """The connection has ended, and with it whatever was buffered for it. What is charged later is not counted."""
        budget = self.budget
        budget._shares.discard(self)  # noqa: SLF001  # budget and shares are one unit
        self.on_exhausted = None
        self.gone = _no
        budget._over.pop(self, None)  # noqa: SLF001  # budget and shares are one unit
        self.release(self.held)
        self.budget = _NO_BUDGET


class _Holding(AbstractContextManager[None]):
    __slots__ = ("_share", "_size")

    def __init__(self, share: Share, size: int) -> None:
        self._share = share
        self._size = size

    def __enter__(self) -> None:
        self._share.charge(self._size)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._share.release(self._size)


_SMALL: Final = nullcontext()


class Charge:
    """What one place keeps, as a part of a share. `size`: bytes that are charged now."""

    __slots__ = ("_share", "size")

    def __init__(self, share: Share) -> None:
        self._share = share
        self.size = 0

    def become(self, size: int) -> None:
        """Charge `size` bytes instead of those charged before."""
        before, self.size = self.size, size
        if size > before:
            self._share.charge(size - before)
        elif size < before:
            self._share.release(before - size)


_NO_BUDGET = Budget()
# The share where none is given: it limits nothing.
UNCOUNTED = Share(_NO_BUDGET, member=True)
