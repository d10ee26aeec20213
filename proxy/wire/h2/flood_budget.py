"""The budget of an HTTP/2 peer for frames that only cost time.

Some frames cost us work and the peer nothing: a stream that is opened and reset (CVE-2023-44487), PING and SETTINGS, which
must be answered, empty DATA, WINDOW_UPDATE by the byte, PRIORITY and unknown frames. All of them draw on one account. Streams that
end well in both directions, DATA that we send (which is what honest peers answer with WINDOW_UPDATE and PING) and time passing pay
into it. What the peer sends pays nothing: it could buy resets with padding.

These are free:

- A reset of a stream that has lived for a while, or that we have answered. The number of streams bounds the former, and the latter is no
  cheaper than a request.
- Frames that the peer may have sent before our reset of the stream reached it: a few header blocks, one reset, and what the window
  allowed of DATA.
- What a server does to streams that we have opened, once for each stream.

When the account is empty, GOAWAY with ENHANCE_YOUR_CALM asks the peer to open no new streams. The open ones go on: a peer that is itself
a proxy carries the requests of many clients on them, and one of its clients may have caused the resets. A peer that does not stop uses
up the second, smaller account that it has from then on. Then the connection ends.
"""

from __future__ import annotations

from proxy.wire.h2.frames import Code, ConnectionFault

BUDGET = 1000.0
# What comes back in a second, and what a peer has after GOAWAY, in parts of the budget.
_PER_SECOND = 1 / 10
_AFTERWARDS = 1 / 2
# For a frame of DATA that we send: grpc-go answers each one with a PING while it measures the bandwidth, others with WINDOW_UPDATE for
# the stream and for the connection; and for each largest frame's worth of it.
PER_FRAME = 1.0
PER_STREAM = 2.0
COST_RESET = 2.0
COST_CONTROL = 1.0
COST_WINDOW = 0.25

# A stream that has lived so long (seconds) may be reset for nothing.
OF_AGE = 0.1
FLOOD = "too many frames that only cost time (resets, pings, settings, empty data)"


class FrameBudget:
    """What the peer of one connection may still spend. `budget`: in the beginning; a tenth of it comes back each second."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._patience = budget  # what is left of it
        self._per_second = budget * _PER_SECOND
        self._exhausted = False

    def _earn(self, amount: float) -> None:
        self._patience = min(self._budget, self._patience + amount)

    def _spend(self, amount: float) -> None:
        self._patience -= amount
        if self._patience < 0:
            self._exhaust()

    def _exhaust(self) -> None:
        """Ask the peer to stop; end the connection if it has been asked before."""
        if self._exhausted:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, FLOOD)
        self._exhausted = True
        self._budget *= _AFTERWARDS
        self._patience = self._budget
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        """Put down GOAWAY; the streams that are open go on."""
        raise NotImplementedError
