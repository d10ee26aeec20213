"""Translates the errors of OpenSSL and AWS-LC.

pyOpenSSL returns the error queue as texts: library, function, reason. The reason is a stable
identifier (from SSL_R_...), so this module compares it as a whole; no other code does. OpenSSL
writes `certificate verify failed`, AWS-LC `CERTIFICATE_VERIFY_FAILED`. The queue does not say *why*
a certificate was refused. This is recorded during the handshake (verify.py).

AWS-LC reads the socket's error (SO_ERROR) before it reads or writes, and ignores it. So it reports
a lost connection as one that has ended (a read returns 0, a write EPIPE). TCP_INFO still shows the
difference: the state is CLOSE_WAIT after the peer's FIN, and CLOSE if the connection was lost, by
RST or by a timeout.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from OpenSSL import SSL, crypto

from proxy.net.exceptions import ConnectionLost, NetError, TLSFailed, TLSKind, lost

# AWS-LC does not distinguish a lost connection from an ended one, and still reads after a failed
# write.
AWS_LC = b"AWS-LC" in SSL.SSLeay_version(SSL.SSLEAY_VERSION)

# From <linux/tcp.h> and <net/tcp_states.h>: the first bytes of struct tcp_info.
_STATE, _RETRANSMITS, _PROBES = 0, 2, 3
_CLOSE = 7
# The number of unanswered segments in a row after which the connection times out. With fewer, a
# reset ended it (liveness.py sends as many probes).
_UNANSWERED = 3

# Errors in the peer's certificate that are found before its verification.
_UNFIT = {
    "peer did not return a certificate": "the peer presented no certificate",
    "key usage bit incorrect": "the peer's certificate is not meant for this use (key usage)",
    "ecc cert not for signing": "the peer's certificate is not meant for this use (key usage)",
    "cannot parse leaf cert": "the peer's certificate is malformed",
    "bad ecc cert": "the peer's certificate has a key of a kind that is not accepted here",
    "unknown certificate type": (
        "the peer's certificate has a key of a kind that is not accepted here"
    ),
    "wrong certificate type": (
        "the peer's certificate has a key of a kind that is not accepted here"
    ),
}

# What the peer sent, if it is not the TLS that we support.
_NOT_TLS = {
    "http request": "the peer speaks HTTP in clear text, not TLS",
    "https proxy request": "the peer speaks HTTP in clear text (CONNECT), not TLS",
    "wrong version number": "the peer does not speak TLS (or a version too old to be recognised)",
    "packet length too long": "the peer does not speak TLS (its first bytes are not a TLS record)",
    "encrypted length too long": (
        "the peer does not speak TLS, or violates it (a record is too long)"
    ),
    "unsupported protocol": "the peer does not support a TLS version that is accepted here",
    "version too low": "the peer does not support a TLS version that is accepted here",
    "no protocols available": "no TLS version is available",
    "no supported versions enabled": "no TLS version is available",
    "no shared cipher": "the peer supports none of our cipher suites",
    "no suitable key share": "the peer supports none of our key-exchange groups",
    "no suitable groups": "the peer supports none of our key-exchange groups",
    "no shared group": "the peer supports none of our key-exchange groups",
    "no suitable signature algorithm": (
        "the peer supports none of our certificate's signature algorithms"
    ),
    "no common signature algorithms": (
        "the peer supports none of our certificate's signature algorithms"
    ),
    "no application protocol": "the peer offers none of our inner protocols (ALPN)",
    "decryption failed or bad record mac": "a record was altered in transit",
    "bad record type": "the peer violated the TLS protocol (a record of unknown type)",
    "unexpected record": "the peer violated the TLS protocol (an unexpected record)",
    "invalid outer record type": "the peer violated the TLS protocol (an unexpected record)",
    "unexpected message": "the peer violated the TLS protocol (an unexpected message)",
}

_CERTIFICATE_REFUSED = "certificate verify failed"


def explain(error: SSL.Error, connection: SSL.Connection, doing: str) -> NetError:
    """Translate an error of OpenSSL, except the Want... errors. `doing`: for the message."""
    arguments: tuple[Any, ...] = error.args
    if isinstance(error, SSL.SysCallError):
        code = arguments[0]
        if AWS_LC and code in (-1, errno.EPIPE):
            code = _loss(connection) or code
        if code == -1:
            return ConnectionLost(
                f"the peer closed the connection {doing} without ending TLS (truncated)",
                "truncated",
            )
        return lost(code)
    if isinstance(error, SSL.ZeroReturnError):
        return ConnectionLost(f"the peer ended TLS {doing}", "closed")
    if arguments and isinstance(arguments[0], str):  # raised by a callback of the context
        return TLSFailed("protocol", f"{arguments[0]} ({doing})")
    found = reasons(error)
    kind, words = _judge(found, connection)
    return TLSFailed(
        kind,
        (
            f"{words} ({doing})"
            if words
            else f"TLS failed {doing}: {', '.join(found) or 'no reason given'}"
        ),
    )


def reasons(error: SSL.Error | crypto.Error) -> list[str]:
    """The reasons in the error queue in OpenSSL's style (`unknown ca`), the most general last."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return [
        reason.lower().replace("_", " ") if reason.isupper() else reason
        for _library, _function, reason in queue
        if reason
    ]


def _loss(connection: SSL.Connection) -> int:
    """The errno of a lost connection whose SO_ERROR was already read. 0: the peer has ended it.

    A peer that ended properly and then sent a reset counts as reset.
    """
    try:
        about = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _PROBES + 1)
    except OSError:  # not a TCP socket
        return 0
    if about[_STATE] != _CLOSE:
        return 0
    return (
        errno.ETIMEDOUT
        if max(about[_RETRANSMITS], about[_PROBES]) >= _UNANSWERED
        else errno.ECONNRESET
    )


def _judge(found: list[str], connection: SSL.Connection) -> tuple[TLSKind, str]:
    for reason in found:
        if reason == _CERTIFICATE_REFUSED:
            # an attribute of verify.VerificationState
            words = getattr(connection.get_app_data(), "refusal", None)
            return "certificate", (
                words if isinstance(words, str) else "the peer's certificate was refused"
            )
        if reason in _UNFIT:
            return "certificate", _UNFIT[reason]
        protocol, alert, description = reason.partition(" alert ")
        if alert and protocol.startswith(("ssl", "tls")):
            return "alert", f"the peer refused: {description}"
        if reason in _NOT_TLS:
            return "protocol", _NOT_TLS[reason]
    return "protocol", ""
