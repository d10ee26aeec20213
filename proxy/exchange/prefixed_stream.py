"""A stream that continues after HTTP has ended: bytes that were read ahead come first."""

from __future__ import annotations

import trio

from proxy.net.address import Address
from proxy.net.socket_stream import End, Stream

READ_SIZE = 65536


class PrefixedStream:
    """`stream`, preceded by the bytes `first`, which were already read from it."""

    __slots__ = ("_first", "_stream")

    def __init__(self, stream: Stream, first: bytes) -> None:
        self._stream = stream
        self._first = first

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._first:
            await trio.lowlevel.checkpoint()
            data, self._first = self._first[:max_bytes], self._first[len(self._first[:max_bytes]) :]
            return data
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def close(self) -> None:
        self._stream.close()

    def reset(self) -> None:
        self._stream.reset()

    def is_idle(self) -> bool:
        return not self._first and self._stream.is_idle()

    def ended(self) -> End:
        return "open" if self._first else self._stream.ended()

    @property
    def peer(self) -> Address:
        return self._stream.peer

    @property
    def local(self) -> Address:
        return self._stream.local

    @property
    def bytes_read(self) -> int:
        return self._stream.bytes_read

    @property
    def bytes_written(self) -> int:
        return self._stream.bytes_written
