"""What can go wrong with a connection, in the words of this room.

OSError and OpenSSL's errors are translated once, where the system call is made (streams, tls, dial), and never leave this room.
"""

from __future__ import annotations

import errno
import os
from typing import Literal

import trio

from proxy.net.address import Address

LossReason = Literal["reset", "closed", "timeout", "truncated", "torn", "expired", "evicted", "other"]
# `local`: it is this machine, or this process, that cannot; the address is not to blame.
ConnectReason = Literal["refused", "timeout", "unreachable", "reset", "local", "other"]
TLSKind = Literal["certificate", "protocol", "alert", "timeout"]


class NetError(Exception):
    """All errors of this room."""


class ConnectionLost(NetError, trio.BrokenResourceError):
    """The connection ended without having been closed properly, or nobody reads it any more.

    `reason`: `reset` (RST), `closed` (the peer had closed and does not take any more), `timeout` (the peer stopped answering),
    `truncated` (end of TCP without the end of TLS), `torn` (an earlier send was cancelled in the middle), `expired` (a certificate has, see
    tls/expiry.py), `evicted` (there was no room for all, see connection_slots.py), `other`.
    """

    def __init__(self, message: str, reason: LossReason = "other") -> None:
        super().__init__(message)
        self.reason: LossReason = reason


class ConnectFailed(NetError):
    """No connection to `address` came about. `reason` is for metrics and policy, the message for people."""

    def __init__(self, address: Address, reason: ConnectReason, detail: str) -> None:
        super().__init__(f"cannot connect to {address}: {detail}")
        self.address = address
        self.reason: ConnectReason = reason


class TLSFailed(NetError, trio.BrokenResourceError):
    """TLS could not be agreed on, or was broken later.

    `kind`: `certificate` (we refuse the peer's), `alert` (the peer refuses us and said why), `protocol` (it does not speak our
    TLS), `timeout` (the handshake took too long). A BrokenResourceError too, because the peer's refusal of our certificate
    arrives, in TLS 1.3, only with the first read after the handshake (RFC 8446, section 4.4.2.4 and appendix E).
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
    """The same failure for the next one who asks: an exception is raised once, because it carries its traceback."""
    if isinstance(failure, ConnectionLost):
        return ConnectionLost(str(failure), failure.reason)
    if isinstance(failure, TLSFailed):
        return TLSFailed(failure.kind, str(failure))
    return failure
