"""The budget of an HTTP/2 peer for frames that cost us work and the peer nothing.

Such frames are: a stream that is opened and reset (CVE-2023-44487), PING and SETTINGS (which must
be answered), empty DATA, WINDOW_UPDATE with small increments, PRIORITY and unknown frames. They all
use one budget. The budget is refilled by streams that end normally in both directions, by DATA that
we send (honest peers answer it with WINDOW_UPDATE and PING), and by time. DATA of the peer does not
refill it: otherwise a peer could pay for resets with padding.

These cost nothing:

- A reset of a stream that has existed for a while, or that we have answered. The number of streams
  limits the former, and the latter costs us no less than a request.
- Frames that the peer may have sent before it received our reset of the stream: a few header
  blocks, one reset, and DATA up to the window.
- What a server does to streams that we have opened, once for each stream.

When the budget is empty, GOAWAY with ENHANCE_YOUR_CALM asks the peer to open no new streams. The
open ones continue: if the peer is a proxy, they carry the requests of many clients, of which one
may have caused the resets. The peer then has a second, smaller budget. When that is empty too, the
connection ends.
"""

from __future__ import annotations

from proxy.wire.h2.frames import Code, ConnectionFault

BUDGET = 1000.0
# The refill in a second, and the second budget after GOAWAY, as fractions of the budget.
_PER_SECOND = 1 / 10
_AFTERWARDS = 1 / 2
# The refill for a DATA frame that we send, and again for each maximum-size frame's worth of data.
# grpc-go answers each frame with a PING while it measures bandwidth. Other peers send WINDOW_UPDATE
# for the stream and for the connection.
PER_FRAME = 1.0
PER_STREAM = 2.0
COST_RESET = 2.0
COST_CONTROL = 1.0
COST_WINDOW = 0.25

# The age (seconds) from which a reset of a stream costs nothing.
OF_AGE = 0.1
FLOOD = "too many frames that only cause work (resets, pings, settings, empty data)"


class FrameBudget:
    """The frame budget of the peer of one connection.

    `budget`: the initial value and maximum. A tenth of it is refilled each second.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._patience = budget  # the rest of the budget
        self._per_second = budget * _PER_SECOND
        self._exhausted = False

    def _earn(self, amount: float) -> None:
        self._patience = min(self._budget, self._patience + amount)

    def _spend(self, amount: float) -> None:
        self._patience -= amount
        if self._patience < 0:
            self._exhaust()

    def _exhaust(self) -> None:
        """Ask the peer to stop. Raises ConnectionFault if it was asked before."""
        if self._exhausted:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, FLOOD)
        self._exhausted = True
        self._budget *= _AFTERWARDS
        self._patience = self._budget
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        """Queue GOAWAY. Open streams continue."""
        raise NotImplementedError  # pragma: no cover  # Http2Connection overrides it
