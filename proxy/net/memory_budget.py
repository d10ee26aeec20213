"""The memory budget of a process: how many bytes it may buffer, for which downstream connections.

Everything is buffered for one downstream connection. There are three kinds: data of its client that
the server has not accepted, data of the server that the client has not accepted, and streams and
heads of requests in progress. So each connection has one `Share`. Code that buffers bytes charges
them there, and releases them. The `MemoryBudget` has the sums. All of this is simple arithmetic.

While at most half of the budget is in use, nothing is limited. Above, the limit for one connection
is a dynamic threshold (Choudhury and Hahne, 1998, for switches with shared buffers): a fixed
fraction of the free rest. So a few connections may hold much each. Many connections get little
each, and a part of the budget always stays free. The connection that holds the most is the first to
exceed its threshold. Three measures follow, in this order:

- windows shrink: HTTP/2 grants no more credit than the threshold, and other reads get smaller;
- reading stops: an HTTP/2 connection above its threshold is not read until it is below. After
  `patience` seconds it is closed;
- new work is refused when nearly the whole budget is used: connections, streams, requests.

Clients without a verified identity may use only a part of the budget (`MemoryBudget.open_limit`),
and smaller fractions. The rest is reserved for members of the mesh and for the pod's own
application.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Final

import trio

from proxy.net.tls.openssl_errors import AWS_LC

# The part of the free rest that one connection may hold, as a shift: 1/16 for clients without an
# identity, 1/2 for members.
_OPEN_SHIFT, _MEMBER_SHIFT = 4, 1
# The part of the budget that clients without an identity may use, in eighths.
_OPEN_EIGHTHS = 6
# New work is refused if less than this part of the usable budget is free, as a shift.
_FULL_SHIFT = 4
# The smallest read under pressure (bytes), and the part of the threshold for one read, as a shift.
_LEAST_READ, _READ_SHIFT = 4096, 2
UNLIMITED: Final = 1 << 62
# Buffers up to this size (bytes) need not be charged: the fixed charge of a connection covers them.
SMALL: Final = 4096
# Bytes of an idle connection itself. Measured in clear text: 8 KiB with HTTP/1, 25 KiB with HTTP/2.
# TLS adds little with AWS-LC, and as much again with OpenSSL.
CONNECTION_BYTES: Final = 24 * 1024
TLS_BYTES: Final = 4 * 1024 if AWS_LC else 24 * 1024
# The number of waiting connections that one release may wake up.
_WOKEN = 4

Action = str  # "window", "read", "close", "connection", "stream", "request"
ACTIONS: Final[tuple[Action, ...]] = ("window", "read", "close", "connection", "stream", "request")


def _held(share: Share) -> int:
    return share.held


def _no() -> bool:
    return False


def _ignore(_: str) -> None:
    pass


class MemoryBudget:
    """The bytes that are buffered in this process, and their limit.

    `limit` in bytes. `patience` in seconds.
    """

    __slots__ = (
        "_over",
        "_shares",
        "_waiting",
        "counts",
        "half",
        "limit",
        "on_action",
        "open_limit",
        "open_used",
        "patience",
        "used",
    )

    def __init__(self, limit: int = UNLIMITED, patience: float = 10.0) -> None:
        self.limit = limit
        self.half = limit // 2  # up to this usage nothing is limited
        self.open_limit = limit * _OPEN_EIGHTHS // 8
        self.patience = patience
        self.used = 0
        self.open_used = 0  # the part of `used` for clients without an identity
        self.counts: dict[Action, int] = dict.fromkeys(ACTIONS, 0)  # measures since the start
        self.on_action: Callable[[Action], None] = _ignore  # for each measure; must not raise
        self._shares: set[Share] = set()
        self._waiting: dict[Share, trio.Event] = {}  # connections that are not read
        self._over: dict[Share, float] = {}  # shares above their threshold, and since when

    def share(self, fixed: int = 0, *, member: bool = False) -> Share:
        """Create a share for one connection with a fixed charge of `fixed` bytes.

        The caller closes it.
        """
        share = Share(self, member)
        self._shares.add(share)
        share.charge(fixed)
        return share

    @property
    def connections(self) -> int:
        """The number of open connections of clients."""
        return len(self._shares)

    def act(self, action: Action) -> None:
        """Count a measure that is taken because memory is short."""
        self.counts[action] += 1
        self.on_action(action)

    def sweep(self, now: float) -> None:
        """End connections that have been above their threshold for `patience` seconds.

        Also end those that are not read and whose client has gone. Call it about once a second.
        `now` is trio's time.
        """
        self._wake(len(self._waiting))
        for share in list(self._waiting):
            if share.gone():
                share.exhaust()
        self._over = (
            {share: self._over.get(share, now) for share in self._shares if share.over}
            if self.used > self.half
            else {}
        )
        exhausted = [
            share
            for share, since in self._over.items()
            if now - since >= self.patience and share.on_exhausted is not None
        ]
        # The largest first, and not all at once: each end raises the threshold of the others.
        exhausted.sort(key=_held, reverse=True)
        for share in exhausted[: 1 + len(exhausted) // 8]:
            self.act("close")
            share.exhaust()

    def _wake(self, most: int) -> None:
        """Wake up to `most` waiting connections if they are below their thresholds.

        The others go to the end of the queue.
        """
        for share in list(self._waiting)[:most]:
            event = self._waiting.pop(share)
            if share.over:
                self._waiting[share] = event
            else:
                event.set()


class Share:
    """What is buffered for one connection.

    `member`: the client is the pod's own application, or has a verified identity.
    """

    __slots__ = ("budget", "gone", "held", "member", "on_exhausted")

    def __init__(self, budget: MemoryBudget, member: bool) -> None:
        self.budget = budget
        self.member = member
        self.held = 0  # bytes
        self.on_exhausted: Callable[[], None] | None = None  # ends the connection; must not raise
        # Whether the client has gone. Needed because a connection that is not read cannot show it.
        self.gone: Callable[[], bool] = _no

    def charge(self, size: int) -> None:
        """Add `size` buffered bytes."""
        self.held += size
        budget = self.budget
        budget.used += size
        if not self.member:
            budget.open_used += size

    def release(self, size: int) -> None:
        """Subtract `size` bytes that were charged."""
        self.held -= size
        budget = self.budget
        budget.used -= size
        if not self.member:
            budget.open_used -= size
        if budget._waiting:  # noqa: SLF001  # budget and shares are one unit
            budget._wake(_WOKEN)  # noqa: SLF001  # budget and shares are one unit

    def exhaust(self) -> None:
        """End the connection. Only the first call has an effect."""
        end, self.on_exhausted = self.on_exhausted, None
        if end is not None:
            end()

    def holding(self, size: int) -> AbstractContextManager[None]:
        """Charge `size` bytes within a `with` block. Small buffers are not charged."""
        return _Holding(self, size) if size > SMALL else _SMALL

    def admit(self) -> None:
        """Report that the client has a verified identity."""
        if not self.member:
            self.member = True
            self.budget.open_used -= self.held

    @property
    def threshold(self) -> int:
        """The number of bytes that this connection may hold now."""
        budget = self.budget
        if self.member:
            return max(0, budget.limit - budget.used) >> _MEMBER_SHIFT
        return (
            max(0, min(budget.open_limit - budget.open_used, budget.limit - budget.used))
            >> _OPEN_SHIFT
        )

    @property
    def over(self) -> bool:
        """Whether the connection holds more than it may."""
        budget = self.budget
        return budget.used > budget.half and self.held > self.threshold

    @property
    def full(self) -> bool:
        """Whether new work for the connection must be refused."""
        budget = self.budget
        if budget.used <= budget.half:
            return False
        if budget.limit - budget.used < budget.limit >> _FULL_SHIFT:
            # The thresholds limit what members hold. The last sixteenth is for finishing work that
            # has begun.
            return True
        return (
            not self.member
            and budget.open_limit - budget.open_used < budget.open_limit >> _FULL_SHIFT
        )

    def refuses(self, action: Action) -> bool:
        """Whether new work must be refused. If so, count it as `action`."""
        if not self.full:
            return False
        self.budget.act(action)
        return True

    def read_size(self, most: int) -> int:
        """The number of bytes to read at a time: `most`, or fewer if memory is short."""
        budget = self.budget
        if budget.used <= budget.half:
            return most
        size = self.threshold >> _READ_SHIFT
        if size >= most:
            return most
        return max(_LEAST_READ, size)

    async def wait_until_below(self) -> None:
        """Wait until the connection is below its threshold."""
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
        """Release everything: the connection has ended. Later charges are not counted."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._share.release(self._size)


_SMALL: Final = nullcontext()


class Charge:
    """The variable charge of one buffer, as a part of a share. `size`: bytes charged now."""

    __slots__ = ("_share", "size")

    def __init__(self, share: Share) -> None:
        self._share = share
        self.size = 0

    def become(self, size: int) -> None:
        """Set the charge to `size` bytes."""
        before, self.size = self.size, size
        if size > before:
            self._share.charge(size - before)
        elif size < before:
            self._share.release(before - size)


_NO_BUDGET = MemoryBudget()
# The default share: it limits nothing.
UNCOUNTED = Share(_NO_BUDGET, member=True)
