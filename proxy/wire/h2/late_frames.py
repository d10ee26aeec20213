"""Frames that the peer sent before it received our reset of their stream (RFC 9113 §5.1)."""

from __future__ import annotations

# Frames without a body that may be in flight: interim heads, the head, trailers, an empty end.
_HEADS = 6


class Late:
    """What the peer may still send on a stream that we have reset, without cost to its budget."""

    __slots__ = ("credit", "heads", "reset")

    def __init__(self, credit: int) -> None:
        self.credit = credit  # bytes of DATA
        self.heads = _HEADS
        self.reset = True  # one reset

    def takes(self, credit: int) -> bool:
        """Whether a frame is covered.

        `credit`: its bytes of the window if it is DATA, otherwise 0.
        """
        if credit:
            self.credit -= credit
            return self.credit >= 0
        self.heads -= 1
        return self.heads >= 0

    def takes_reset(self) -> bool:
        """Record a reset by the peer, after which nothing can be in flight.

        False for a second one.
        """
        was, self.reset = self.reset, False
        self.credit = self.heads = 0
        return was
