"""The limit on open HTTP/2 streams of all clients of this process, and the pace at which they begin
and end."""

from __future__ import annotations

from proxy.net.memory_budget import Share
from proxy.net.pacing import Pacer

# The part of the limit, in eighths, for clients without a verified identity. The rest is reserved
# for members of the mesh.
_OPEN_EIGHTHS = 6
# Memory of a stream in bytes, without its data: its objects, those of its exchange, and their task.
STREAM_BYTES = 12 * 1024


class StreamLimit:
    """The open streams of all connections from clients. `limit`: the most that may be open."""

    __slots__ = ("_open_limit", "half", "limit", "open", "others", "pacer", "refused")

    def __init__(self, limit: int = 1 << 30, pacer: Pacer | None = None) -> None:
        self.pacer = pacer or Pacer()
        self.limit = limit
        self.half = limit // 2
        self._open_limit = max(1, limit * _OPEN_EIGHTHS // 8)
        self.open = 0  # streams
        self.others = 0  # those of clients without an identity
        self.refused = 0  # since the start

    def opens(self, share: Share) -> None:
        """A client has opened a stream."""
        share.charge(STREAM_BYTES)
        self.open += 1
        if not share.member:
            self.others += 1

    def closes(self, share: Share, count: int = 1) -> None:
        """`count` streams have ended."""
        share.release(STREAM_BYTES * count)
        self.open -= count
        if not share.member:
            self.others -= count

    def refuses(self, share: Share, count: int) -> None:
        """`count` streams were refused because of `left`."""
        self.refused += count
        if share.full:
            share.budget.act("stream")

    def left(self, share: Share) -> int:
        """Return how many more streams may be opened on the connection of `share`."""
        if share.full:
            return 0
        left = self.limit - self.open
        return left if share.member else min(left, self._open_limit - self.others)
