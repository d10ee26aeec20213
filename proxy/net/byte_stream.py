"""The interface of a connection that the relay and the HTTP code use.

SocketStream (socket_stream.py) and TLSStream (tls/tls_stream.py) implement it.
"""

from __future__ import annotations

from typing import Literal, Protocol

from proxy.net.address import Address

End = Literal["open", "half", "lost"]


class Stream(Protocol):
    """A connection whose two directions end separately. socket_stream.py has the details."""

    @property
    def peer(self) -> Address: ...

    @property
    def local(self) -> Address: ...

    @property
    def bytes_read(self) -> int: ...

    @property
    def bytes_written(self) -> int: ...

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return 1 to `max_bytes` bytes (default RECEIVE_SIZE), or `b""` at a clean end.

        Raises ConnectionLost, and TLSFailed if TLS failed.
        """
        ...

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. It must not change until this returns. Raises ConnectionLost."""
        ...

    async def send_eof(self) -> None:
        """End our direction. Reading can continue. Idempotent."""
        ...

    async def aclose(self) -> None:
        """Close the connection. Tell the peer first if this is possible within a short time."""
        ...

    def close(self) -> None:
        """Close at once. Idempotent. Tasks that wait in this stream get ClosedResourceError."""
        ...

    def reset(self) -> None:
        """Close at once, so that the peer sees a broken connection and not a clean end."""
        ...

    def is_idle(self) -> bool:
        """Whether the stream is open, and the peer has neither sent data nor closed."""
        ...

    def ended(self) -> End:
        """Whether the peer has ended its direction (`half`) or the connection (`lost`).

        The answer is meaningful only if nothing is left to read.
        """
        ...
