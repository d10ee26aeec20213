"""Frames for a stream that we have reset: the peer may have sent them before it knew (RFC 9113 §5.1)."""

from __future__ import annotations

# Frames without a body that may have been under way: interim heads, the head, trailers or an empty end.
_HEADS = 6


class Late:
    """What may still come, for nothing, on a stream that we have reset, because the peer has sent it before it knew."""

    __slots__ = ("credit", "heads", "reset")

    def __init__(self, credit: int) -> None:
        self.credit = credit  # bytes of DATA
        self.heads = _HEADS
        self.reset = True  # one reset

    def takes(self, credit: int) -> bool:
        """Whether DATA that used `credit` bytes of the window (0: another frame) is one of those."""
        if credit:
            self.credit -= credit
            return self.credit >= 0
        self.heads -= 1
        return self.heads >= 0

    def takes_reset(self) -> bool:
        """The peer resets the stream too; nothing can be under way behind that."""
        was, self.reset = self.reset, False
        self.credit = self.heads = 0
        return was
