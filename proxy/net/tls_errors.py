"""OpenSSL's errors in words.

pyOpenSSL hands over OpenSSL's error queue as texts: library, function, reason. The reason is a stable identifier in lower case
(it is compiled from SSL_R_...), so it is matched whole, here and nowhere else. What the queue does not say is *why* a certificate
was refused; that is noted by `note_verdict`, a verification callback, while the handshake runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from OpenSSL import SSL, crypto

from proxy.net.errors import ConnectionLost, NetError, TLSFailed, TLSKind, lost

_V = SSL.X509VerificationCodes
_REFUSALS = {
    _V.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: "is not signed by a trust root",
    _V.ERR_UNABLE_TO_GET_ISSUER_CERT: "is not signed by a trust root",
    _V.ERR_SELF_SIGNED_CERT_IN_CHAIN: "is not signed by a trust root (its own root is not trusted here)",
    _V.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: "is not signed by a trust root (it is self-signed)",
    _V.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: "is not signed by a trust root",
    _V.ERR_CERT_SIGNATURE_FAILURE: "carries a signature that is not its issuer's",
    _V.ERR_CERT_CHAIN_TOO_LONG: "has too long a chain",
    _V.ERR_INVALID_CA: "is signed by a certificate that is not an authority's",
    _V.ERR_INVALID_PURPOSE: "is not meant for this use (extended key usage)",
    _V.ERR_PATH_LENGTH_EXCEEDED: "has a longer chain than its authority allows",
    _V.ERR_PERMITTED_VIOLATION: "names what its authority may not (name constraints)",
    _V.ERR_EXCLUDED_VIOLATION: "names what its authority may not (name constraints)",
}

# What the peer sent, if it is not the TLS we speak.
_NOT_TLS = {
    "http request": "the peer speaks HTTP in clear text, not TLS",
    "https proxy request": "the peer speaks HTTP in clear text (CONNECT), not TLS",
    "wrong version number": "the peer does not speak TLS (or a version too old to be recognised)",
    "packet length too long": "the peer does not speak TLS (its first bytes are no TLS record)",
    "unsupported protocol": "the peer does not speak a TLS version that is accepted here",
    "version too low": "the peer does not speak a TLS version that is accepted here",
    "no protocols available": "no TLS version is left to speak",
    "no shared cipher": "the peer knows none of our cipher suites",
    "no suitable key share": "the peer knows none of our key-exchange groups",
    "no suitable groups": "the peer knows none of our key-exchange groups",
    "no suitable signature algorithm": "the peer knows none of our certificate's signature algorithms",
    "no application protocol": "the peer offers none of our inner protocols (ALPN)",
    "decryption failed or bad record mac": "a record was altered on its way",
    "bad record type": "the peer broke the TLS protocol (a record of unknown type)",
}

_CERTIFICATE_MISSING = "peer did not return a certificate"
_CERTIFICATE_REFUSED = "certificate verify failed"


def note_verdict(connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, accepted: int) -> bool:
    """The verification callback: agrees with OpenSSL's verdict, and keeps the first reason for a refusal with the connection, as text;
    otherwise the peer's own certificate. OpenSSL begins with the authorities, and asks for nothing when a session is resumed."""
    if not accepted:
        if not isinstance(connection.get_app_data(), str):
            connection.set_app_data(_refusal(certificate, code, depth))
        return False
    if depth == 0:
        connection.set_app_data(certificate)
    return True


def take_verified(connection: SSL.Connection) -> crypto.X509 | None:
    """The certificate that the peer has shown in this very handshake, and that was found good; once. None: it has shown none, or a session
    was resumed, which has its own."""
    certificate: crypto.X509 | None = connection.get_app_data()
    connection.set_app_data(None)
    return certificate


def _refusal(certificate: crypto.X509, code: int, depth: int) -> str:
    owner = "the peer's certificate" if depth == 0 else "an authority's certificate in the peer's chain"
    if code == _V.ERR_CERT_HAS_EXPIRED:
        return f"{owner} has expired (not after {_day(certificate.get_notAfter)})"
    if code == _V.ERR_CERT_NOT_YET_VALID:
        return f"{owner} is not valid yet (not before {_day(certificate.get_notBefore)})"
    return f"{owner} {_REFUSALS.get(code) or f'was refused (X.509 verification error {code})'}"


def _day(when: Callable[[], bytes | None]) -> str:
    """ASN.1 GeneralizedTime `20260131120000Z` as `2026-01-31 12:00:00 UTC`."""
    t = (when() or b"").decode("ascii", "replace")
    return f"{t[:4]}-{t[4:6]}-{t[6:8]} {t[8:10]}:{t[10:12]}:{t[12:14]} UTC"


def explain(error: SSL.Error, connection: SSL.Connection, doing: str) -> NetError:
    """The one translation of OpenSSL's errors. `doing`: what was going on, for the message. Not for the Want... errors."""
    arguments: tuple[Any, ...] = error.args
    if isinstance(error, SSL.SysCallError):
        code = arguments[0]
        if code == -1:
            return ConnectionLost(f"the peer closed the connection {doing} without ending TLS (truncated)", "truncated")
        return lost(code)
    if isinstance(error, SSL.ZeroReturnError):
        return ConnectionLost(f"the peer ended TLS {doing}", "closed")
    if arguments and isinstance(arguments[0], str):  # not OpenSSL's: a callback of the context raised it, in its own words
        return TLSFailed("protocol", f"{arguments[0]} ({doing})")
    reasons = [reason for _, _, reason in arguments[0]] if arguments else []
    kind, words = _judge(reasons, connection)
    return TLSFailed(kind, f"{words} ({doing})" if words else f"TLS failed {doing}: {', '.join(reasons) or 'no reason given'}")


def _judge(reasons: list[str], connection: SSL.Connection) -> tuple[TLSKind, str]:
    for reason in reasons:
        if reason == _CERTIFICATE_REFUSED:
            words = connection.get_app_data()
            return "certificate", words if isinstance(words, str) else "the peer's certificate was refused"
        if reason == _CERTIFICATE_MISSING:
            return "certificate", "the peer has shown no certificate"
        if " alert " in reason:
            return "alert", f"the peer refused: {reason.partition(' alert ')[2]}"
        if reason in _NOT_TLS:
            return "protocol", _NOT_TLS[reason]
    return "protocol", ""
