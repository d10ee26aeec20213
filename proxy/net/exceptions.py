"""The errors of this package.

OSError and OpenSSL's errors are translated once, where the system call is made (socket_stream, tls,
dial). They never leave this package.
"""

from __future__ import annotations

import errno
import os
from typing import Literal

import trio

from proxy.net.address import Address

LossReason = Literal[
    "reset", "closed", "timeout", "truncated", "torn", "expired", "evicted", "other"
]
# `local`: the cause is this machine or this process, not the address.
ConnectReason = Literal["refused", "timeout", "unreachable", "reset", "local", "other"]
TLSKind = Literal["certificate", "protocol", "alert", "timeout"]


class NetError(Exception):
    """The base of all errors of this package."""


class ConnectionLost(NetError, trio.BrokenResourceError):
    """The connection ended without a proper close, or the peer does not read any more.

    `reason`: `reset` (RST), `closed` (the peer has closed and accepts no more data), `timeout` (the
    peer does not answer), `truncated` (TCP ended without the end of TLS), `torn` (an earlier send
    was cancelled half-way), `expired` (a certificate expired, see tls/expiry.py), `evicted` (the
    listener was full, see connection_slots.py), `other`.
    """

    def __init__(self, message: str, reason: LossReason = "other") -> None:
        super().__init__(message)
        self.reason: LossReason = reason


class ConnectFailed(NetError):
    """The connection to `address` failed. `reason` is for metrics and policy."""

    def __init__(self, address: Address, reason: ConnectReason, detail: str) -> None:
        super().__init__(f"cannot connect to {address}: {detail}")
        self.address = address
        self.reason: ConnectReason = reason


class TLSFailed(NetError, trio.BrokenResourceError):
    """The TLS handshake failed, or TLS failed later.

    `kind`: `certificate` (we refuse the peer's), `alert` (the peer refuses us and sent the reason),
    `protocol` (the peer does not speak our TLS), `timeout` (the handshake took too long). It is
    also a BrokenResourceError: in TLS 1.3, the refusal of our certificate arrives only with the
    first read after the handshake (RFC 8446, section 4.4.2.4 and appendix E).
    """

    def __init__(self, kind: TLSKind, message: str) -> None:
        super().__init__(message)
        self.kind: TLSKind = kind


_LOSSES: dict[int, LossReason] = {
    errno.ECONNRESET: "reset",
    errno.EPIPE: "closed",
    errno.ENOTCONN: "closed",
    errno.ESHUTDOWN: "closed",
    errno.ETIMEDOUT: "timeout",
    errno.EHOSTUNREACH: "timeout",
    errno.ENETUNREACH: "timeout",
}


def lost(code: int) -> ConnectionLost:
    """The error for a system call on an established connection that failed with errno `code`."""
    return ConnectionLost(os.strerror(code).lower(), _LOSSES.get(code, "other"))


def again(failure: NetError) -> NetError:
    """Return an equal error to raise again. Each is raised once, because it holds its traceback."""
    if isinstance(failure, ConnectionLost):
        return ConnectionLost(str(failure), failure.reason)
    if isinstance(failure, TLSFailed):
        return TLSFailed(failure.kind, str(failure))
    return failure


def release_frames(error: BaseException) -> None:
    """Drop the traceback of a handled error, and those of its causes.

    A traceback holds the frames that the error has passed through, and their variables. If one of
    those holds the error, that is a reference cycle. Then the connection and its buffers stay until
    a full run of the garbage collector, which is rare (process/memory.py).
    """
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            pending += (each.__cause__, each.__context__)
            if isinstance(each, BaseExceptionGroup):
                pending += each.exceptions
