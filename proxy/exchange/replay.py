"""A request's body that can be sent again: what has been taken of it is kept, up to a limit.

Only what has been sent counts. So a long body whose first piece is still to come can be sent elsewhere, and one of which more than the
limit is gone cannot; what was kept of it is dropped in that moment.
"""

from __future__ import annotations

from proxy.exchange.exchange import Body
from proxy.net.memory_budget import UNCOUNTED, Share
from proxy.wire.h1.body import Length
from proxy.wire.messages import EndOfMessage


class Replay:
    """`body` from its beginning as often as need be. An exchange.Body."""

    __slots__ = ("_at", "_body", "_charged", "_kept", "_room", "_share", "length")

    def __init__(self, body: Body, limit: int, share: Share = UNCOUNTED) -> None:
        """`limit`: bytes that are kept. They are charged to `share`; whoever ends the exchange calls `drop`."""
        self._share = share
        self._charged = 0
        self._body = body
        self._kept: list[bytes] | None = []  # None: too much has gone
        self._at = 0  # of what was kept, the piece that is the next to be taken
        self._room = limit
        self.length: Length = body.length

    @property
    def rewindable(self) -> bool:
        return self._kept is not None

    def rewind(self) -> None:
        """The next piece is the first. Only while it is `rewindable`."""
        self._at = 0

    def release(self) -> None:
        """It will not be sent again: drop what was kept, and keep nothing more."""
        if self._kept is not None and self._at == len(self._kept):
            self._kept = None

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        piece = self._again()
        return self._keep(self._body.receive_nowait()) if piece is None else piece

    async def receive(self) -> bytes | EndOfMessage:
        piece = self._again()
        if piece is not None:
            return piece
        new = await self._body.receive()
        self._keep(new)
        return new

    def _again(self) -> bytes | None:
        if self._kept is None or self._at == len(self._kept):
            return None
        self._at += 1
        return self._kept[self._at - 1]

    def _keep(self, piece: bytes | EndOfMessage | None) -> bytes | EndOfMessage | None:
        if self._kept is not None and isinstance(piece, bytes):
            self._room -= len(piece)
            if self._room < 0:
                self.drop()
            else:
                self._kept.append(piece)
                self._at += 1
                self._charged += len(piece)
                self._share.charge(len(piece))
        return piece

    def drop(self) -> None:
        """Keep nothing any more."""
        self._kept = None
        self._share.release(self._charged)
        self._charged = 0
