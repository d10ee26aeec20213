"""What the relay and the HTTP engines need of a connection. SocketStream (socket_stream.py) and TLSStream (tls/tls_stream.py) are such."""

from __future__ import annotations

from typing import Literal, Protocol

from proxy.net.address import Address

End = Literal["open", "half", "lost"]


class Stream(Protocol):
    """A connection whose two directions end one by one. The theory of its operations stands in socket_stream.py."""

    @property
    def peer(self) -> Address: ...

    @property
    def local(self) -> Address: ...

    @property
    def bytes_read(self) -> int: ...

    @property
    def bytes_written(self) -> int: ...

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte and at most `max_bytes` (RECEIVE_SIZE if None), or `b""` when the peer ended cleanly."""
        ...

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it. The memory must not change before this returns."""
        ...

    async def send_eof(self) -> None:
        """End our direction; reading goes on. Idempotent."""
        ...

    async def aclose(self) -> None:
        """Close, telling the peer if that is possible within a short time."""
        ...

    def close(self) -> None:
        """Close at once. Idempotent; tasks waiting in this stream get ClosedResourceError."""
        ...

    def reset(self) -> None:
        """Close at once, so that the peer sees a broken connection and never a clean end."""
        ...

    def is_idle(self) -> bool:
        """True if the stream is open, and the peer has neither sent anything nor closed."""
        ...

    def ended(self) -> End:
        """How the peer has ended, where there is nothing left to read: its direction only (`half`), or the connection (`lost`)."""
        ...
