"""A chunked response body on the fast path. Like the ordinary path, it uses the strict chunk reader
and encodes the body again."""

from __future__ import annotations

from proxy.wire.h1.body import ChunkedReader, ChunkedWriter
from proxy.wire.messages import EndOfMessage, Limits, ProtocolError


class ChunkedTranscoder:
    """The state of one chunked body.

    `ended`: the whole body has passed. `left`: bytes that were read but are not used: an incomplete
    line of the framing, or what follows the end. After each `pass_on`: `out` is the data for the
    client, `size` is the number of body bytes in it, and `error` is set if the framing is broken,
    which ends the response.
    """

    __slots__ = ("_writer", "ended", "error", "left", "out", "reader", "size")

    def __init__(self, limits: Limits) -> None:
        self.reader = ChunkedReader(limits.head, limits.fields)
        self.left = self.out = b""
        self.size = 0
        self.ended = False
        self.error: ProtocolError | None = None
        self._writer = ChunkedWriter()

    def pass_on(self, data: bytes) -> None:
        """Process `data`. On an error, `out` has the data before it."""
        buffer, at, self.size = self.left + data if self.left else data, 0, 0
        pieces: list[bytes] = []
        try:
            while True:
                event, at = self.reader.read(buffer, at)
                if not isinstance(event, bytes):
                    break
                self.size += len(event)
                pieces.append(self._writer.data(event))
        except ProtocolError as error:
            error.__traceback__ = None  # it holds this frame
            self.out, self.error = b"".join(pieces), error
            return
        if isinstance(event, EndOfMessage):
            self.ended = True
            pieces.append(self._writer.end(event.trailers))
        self.left = buffer[at:]
        self.out = b"".join(pieces)
