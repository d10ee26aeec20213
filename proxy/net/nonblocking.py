"""Streams that can be asked without waiting."""

from __future__ import annotations

import socket
from typing import Protocol

from proxy.net.socket_stream import Stream


class Prompt(Stream, Protocol):
    """A stream that can also be asked without waiting, by an owner that knows of its socket's readiness by itself (proxy/fastpath)."""

    @property
    def socket(self) -> socket.socket: ...

    @property
    def end_met(self) -> bool:
        """Whether the end has been read behind the last data: asking again tells it, and the socket's readiness may not. Whatever else is
        left shows as that."""
        ...

    def receive_nowait(self, max_bytes: int = ...) -> bytes | None:
        """As receive_some, if there is something; None: it would have to be waited for. A lost connection, or a clean end, is told again to
        whoever asks next."""
        ...

    def send_nowait(self, data: bytes | memoryview, *, sound: bool = False) -> int:
        """Send what can be sent at once; how many bytes that was. What is left has to be offered again next, the same bytes first: TLS has
        encrypted them already. Raises ConnectionLost.

        `sound`: the connection has just been found in order, or nobody wants to know what the peer has said last. So TLS does not ask
        before its first record whether the connection is lost; if it is, nothing more can be read."""
        ...

    def send_eof_nowait(self) -> bool:
        """As send_eof, if it can be done at once; False: the socket has to take more first. Raises ConnectionLost."""
        ...
