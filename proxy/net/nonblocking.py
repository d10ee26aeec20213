"""The protocol of streams that also have calls that never wait."""

from __future__ import annotations

import socket
from typing import Protocol

from proxy.net.socket_stream import Stream


class NonblockingStream(Stream, Protocol):
    """A stream with calls that never wait.

    For an owner that observes the readiness of the socket itself (proxy/fastpath).
    """

    @property
    def socket(self) -> socket.socket: ...

    @property
    def end_met(self) -> bool:
        """Whether the end has been read after the last data.

        Then the next call reports it, and the socket's readiness may not. Everything else that is
        left shows as readiness of the socket.
        """
        ...

    def receive_nowait(self, max_bytes: int = ...) -> bytes | None:
        """Like receive_some, but None if it would have to wait.

        A lost connection or a clean end is reported again by each later call.
        """
        ...

    def send_nowait(self, data: bytes | memoryview, *, sound: bool = False) -> int:
        """Send what can be sent at once. Return the number of bytes. Raises ConnectionLost.

        The next call must offer the rest, starting with the same bytes: TLS may have encrypted
        them.

        `sound`: the connection has just been found intact, or the peer's last data is not needed.
        Then TLS does not check before its first record whether the connection is lost. If it is
        lost, nothing more can be read.
        """
        ...

    def send_eof_nowait(self) -> bool:
        """Like send_eof, but False if it cannot be done at once. Raises ConnectionLost."""
        ...
