"""The TLS library in use, for tests of properties that only one of them has."""

from __future__ import annotations

from contextlib import suppress

from OpenSSL import SSL

from proxy.net.tls.handshake import TLSStream

LIBRARY = SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()
AWS_LC = "AWS-LC" in LIBRARY


def send_tickets(server: TLSStream) -> None:
    """Make a server's session tickets arrive at its client's socket. OpenSSL has sent them with the
    handshake. AWS-LC sends them with its next write, and an empty one is enough."""
    if AWS_LC:
        with suppress(SSL.Error):
            server._connection.send(b"")
