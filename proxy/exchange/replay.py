"""A request body that can be sent again. It keeps the pieces that were taken, up to a limit.

Only pieces that were taken count. So a long body can still be sent elsewhere before its first piece
arrives. Once more than the limit was taken, the body cannot be repeated, and the kept pieces are
dropped at once.
"""

from __future__ import annotations

from proxy.exchange.exchange import Body
from proxy.net.memory_budget import UNCOUNTED, Share
from proxy.wire.h1.body import Length
from proxy.wire.messages import EndOfMessage


class Replay:
    """A `body` that can be rewound. An exchange.Body."""

    __slots__ = ("_at", "_body", "_charged", "_pieces", "_remaining", "_share", "length")

    def __init__(self, body: Body, limit: int, share: Share = UNCOUNTED) -> None:
        """`limit`: the most bytes to keep. They are charged to `share`. The owner of the exchange
        calls `drop` at its end."""
        self._share = share
        self._charged = 0
        self._body = body
        self._pieces: list[bytes] | None = []  # None: no longer rewindable
        self._at = 0  # index of the next piece within the kept ones
        self._remaining = limit
        self.length: Length = body.length

    @property
    def rewindable(self) -> bool:
        return self._pieces is not None

    def rewind(self) -> None:
        """Start again at the first piece. Only while `rewindable`."""
        self._at = 0

    def release(self) -> None:
        """The body will not be sent again: drop the kept pieces, and keep no more."""
        if self._pieces is not None and self._at == len(self._pieces):
            self._pieces = None

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
        if self._pieces is None or self._at == len(self._pieces):
            return None
        self._at += 1
        return self._pieces[self._at - 1]

    def _keep(self, piece: bytes | EndOfMessage | None) -> bytes | EndOfMessage | None:
        if self._pieces is not None and isinstance(piece, bytes):
            self._remaining -= len(piece)
            if self._remaining < 0:
                self.drop()
            else:
                self._pieces.append(piece)
                self._at += 1
                self._charged += len(piece)
                self._share.charge(len(piece))
        return piece

    def drop(self) -> None:
        """Drop the kept pieces, and keep no more."""
        self._pieces = None
        self._share.release(self._charged)
        self._charged = 0
