"""OpenSSL's errors in words, and AWS-LC's.

pyOpenSSL hands over the error queue as texts: library, function, reason. The reason is a stable identifier (it is compiled from
SSL_R_...), so it is matched whole, here and nowhere else; OpenSSL writes `certificate verify failed`, AWS-LC `CERTIFICATE_VERIFY_FAILED`.
What the queue does not say is *why* a certificate was refused; that is noted while the handshake runs (verify.py).

AWS-LC asks the socket for its error (SO_ERROR) before it reads or writes, and throws the answer away. So it takes a connection that was
lost for one that has ended (a read gives 0, a write EPIPE). What is left of the truth is in TCP_INFO: the state is CLOSE_WAIT after the
peer's FIN, and CLOSE when the connection is no more, by RST or because nothing answered.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from OpenSSL import SSL, crypto

from proxy.net.exceptions import ConnectionLost, NetError, TLSFailed, TLSKind, lost

# The library below does not tell a lost connection from one that has ended, and goes on reading after a write has failed.
AWS_LC = b"AWS-LC" in SSL.SSLeay_version(SSL.SSLEAY_VERSION)

# From <linux/tcp.h> and <net/tcp_states.h>: the first bytes of struct tcp_info.
_STATE, _RETRANSMITS, _PROBES = 0, 2, 3
_CLOSE = 7
# Segments in a row that went unanswered before the connection was given up; fewer, and it was a reset that ended it (net/dial.py sends
# as many probes).
_UNANSWERED = 3

# What is wrong with the peer's certificate before anybody verifies it.
_UNFIT = {
    "peer did not return a certificate": "the peer has shown no certificate",
    "key usage bit incorrect": "the peer's certificate is not meant for this use (key usage)",
    "ecc cert not for signing": "the peer's certificate is not meant for this use (key usage)",
    "cannot parse leaf cert": "the peer's certificate is malformed",
    "bad ecc cert": "the peer's certificate has a key of a kind that is not accepted here",
    "unknown certificate type": "the peer's certificate has a key of a kind that is not accepted here",
    "wrong certificate type": "the peer's certificate has a key of a kind that is not accepted here",
}

# What the peer sent, if it is not the TLS we speak.
_NOT_TLS = {
    "http request": "the peer speaks HTTP in clear text, not TLS",
    "https proxy request": "the peer speaks HTTP in clear text (CONNECT), not TLS",
    "wrong version number": "the peer does not speak TLS (or a version too old to be recognised)",
    "packet length too long": "the peer does not speak TLS (its first bytes are no TLS record)",
    "encrypted length too long": "the peer does not speak TLS, or breaks it (a record longer than records are)",
    "unsupported protocol": "the peer does not speak a TLS version that is accepted here",
    "version too low": "the peer does not speak a TLS version that is accepted here",
    "no protocols available": "no TLS version is left to speak",
    "no supported versions enabled": "no TLS version is left to speak",
    "no shared cipher": "the peer knows none of our cipher suites",
    "no suitable key share": "the peer knows none of our key-exchange groups",
    "no suitable groups": "the peer knows none of our key-exchange groups",
    "no shared group": "the peer knows none of our key-exchange groups",
    "no suitable signature algorithm": "the peer knows none of our certificate's signature algorithms",
    "no common signature algorithms": "the peer knows none of our certificate's signature algorithms",
    "no application protocol": "the peer offers none of our inner protocols (ALPN)",
    "decryption failed or bad record mac": "a record was altered on its way",
    "bad record type": "the peer broke the TLS protocol (a record of unknown type)",
    "unexpected record": "the peer broke the TLS protocol (a record that has no place here)",
    "invalid outer record type": "the peer broke the TLS protocol (a record that has no place here)",
    "unexpected message": "the peer broke the TLS protocol (a message that has no place here)",
}

_CERTIFICATE_REFUSED = "certificate verify failed"


def explain(error: SSL.Error, connection: SSL.Connection, doing: str) -> NetError:
    """The one translation of OpenSSL's errors. `doing`: what was going on, for the message. Not for the Want... errors."""
    arguments: tuple[Any, ...] = error.args
    if isinstance(error, SSL.SysCallError):
        code = arguments[0]
        if AWS_LC and code in (-1, errno.EPIPE):
            code = _loss(connection) or code
        if code == -1:
            return ConnectionLost(f"the peer closed the connection {doing} without ending TLS (truncated)", "truncated")
        return lost(code)
    if isinstance(error, SSL.ZeroReturnError):
        return ConnectionLost(f"the peer ended TLS {doing}", "closed")
    if arguments and isinstance(arguments[0], str):  # not OpenSSL's: a callback of the context raised it, in its own words
        return TLSFailed("protocol", f"{arguments[0]} ({doing})")
    told = reasons(error)
    kind, words = _judge(told, connection)
    return TLSFailed(kind, f"{words} ({doing})" if words else f"TLS failed {doing}: {', '.join(told) or 'no reason given'}")


def reasons(error: SSL.Error | crypto.Error) -> list[str]:
    """The reasons in the error queue, the last of them the most general, as OpenSSL writes them: `unknown ca`."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return [reason.lower().replace("_", " ") if reason.isupper() else reason for _library, _function, reason in queue if reason]


def _loss(connection: SSL.Connection) -> int:
    """The errno with which a connection was lost, after somebody has asked the socket for it; 0: it was not, the peer has ended it.

    A peer that had ended properly and then resets counts as reset."""
    try:
        about = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _PROBES + 1)
    except OSError:  # it is no TCP
        return 0
    if about[_STATE] != _CLOSE:
        return 0
    return errno.ETIMEDOUT if max(about[_RETRANSMITS], about[_PROBES]) >= _UNANSWERED else errno.ECONNRESET


def _judge(told: list[str], connection: SSL.Connection) -> tuple[TLSKind, str]:
    for reason in told:
        if reason == _CERTIFICATE_REFUSED:
            words = getattr(connection.get_app_data(), "refusal", None)  # see tls_verdict.Verdict
            return "certificate", words if isinstance(words, str) else "the peer's certificate was refused"
        if reason in _UNFIT:
            return "certificate", _UNFIT[reason]
        protocol, alert, said = reason.partition(" alert ")
        if alert and protocol.startswith(("ssl", "tls")):
            return "alert", f"the peer refused: {said}"
        if reason in _NOT_TLS:
            return "protocol", _NOT_TLS[reason]
    return "protocol", ""
