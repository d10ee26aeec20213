"""The body of a response in chunks, as it passes: read by the one strict reader of chunks, and written anew, as on the ordinary road."""

from __future__ import annotations

from proxy.wire.bodies import ChunkedReader, ChunkedWriter
from proxy.wire.messages import EndOfMessage, Limits, ProtocolError


class Chunks:
    """`ended`: all of it has passed. `left`: what has been read and is not a whole line of the framing yet, or lies behind the end.

    Of the last read: `out`, what the client gets for it, and `size`, how many bytes of the body it brought."""

    __slots__ = ("_writer", "ended", "left", "out", "reader", "size")

    def __init__(self, limits: Limits) -> None:
        self.reader = ChunkedReader(limits.head, limits.fields)
        self.left = self.out = b""
        self.size = 0
        self.ended = False
        self._writer = ChunkedWriter()

    def pass_on(self, data: bytes) -> ProtocolError | None:
        """Go on with `data`. What is returned ends the response: then there is no `out`, as nothing that was read with a fault is sent."""
        buffer, at, self.size, self.out = self.left + data if self.left else data, 0, 0, b""
        pieces: list[bytes] = []
        try:
            while True:
                event, at = self.reader.read(buffer, at)
                if not isinstance(event, bytes):
                    break
                self.size += len(event)
                pieces.append(self._writer.data(event))
        except ProtocolError as error:
            return error
        if isinstance(event, EndOfMessage):
            self.ended = True
            pieces.append(self._writer.end(event.trailers))
        self.left = buffer[at:]
        self.out = b"".join(pieces)
        return None
