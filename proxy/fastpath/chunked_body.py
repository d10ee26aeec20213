"""The body of a response in chunks, as it passes: read by the one strict reader of chunks, and written anew, as on the ordinary path."""

from __future__ import annotations

from proxy.wire.h1.body import ChunkedReader, ChunkedWriter
from proxy.wire.messages import EndOfMessage, Limits, ProtocolError


class Chunks:
    """`ended`: all of it has passed. `left`: what has been read and is not a whole line of the framing yet, or lies behind the end.

    Of the last read: `out`, what the client gets for it, and `size`, how many bytes of the body it brought. `error` ends the response."""

    __slots__ = ("_writer", "ended", "error", "left", "out", "reader", "size")

    def __init__(self, limits: Limits) -> None:
        self.reader = ChunkedReader(limits.head, limits.fields)
        self.left = self.out = b""
        self.size = 0
        self.ended = False
        self.error: ProtocolError | None = None
        self._writer = ChunkedWriter()

    def pass_on(self, data: bytes) -> None:
        """Go on with `data`. Where it has an error, `out` is what came in front of that."""
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
            self.out, self.error = b"".join(pieces), error
            return
        if isinstance(event, EndOfMessage):
            self.ended = True
            pieces.append(self._writer.end(event.trailers))
        self.left = buffer[at:]
        self.out = b"".join(pieces)
