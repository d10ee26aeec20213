"""Which library does TLS here, for what holds with one of them only."""

from __future__ import annotations

from contextlib import suppress

from OpenSSL import SSL

from proxy.net.tls.handshake import TLSStream

LIBRARY = SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()
AWS_LC = "AWS-LC" in LIBRARY


def send_tickets(server: TLSStream) -> None:
    """Have a server's session tickets lie in its client's socket. OpenSSL has sent them with the
    handshake; AWS-LC keeps them for its next write, and one of nothing is enough."""
    if AWS_LC:
        with suppress(SSL.Error):
            server._connection.send(b"")
