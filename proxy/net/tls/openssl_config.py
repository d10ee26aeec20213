"""OpenSSL settings for which its binding has no call. They must be made before its import.

A client sends a key share for one group, and names the others. By default OpenSSL adds a share for
X25519. This costs 25 µs for each connection, and peers with the hybrid group, such as ours, ignore
it. A peer without the hybrid group asks for its own (HelloRetryRequest, RFC 8446, section 4.1.4),
which costs it a round trip.

A server sends one session ticket instead of two. Our tickets are valid for more than one
connection, and each resumed connection brings a new one. Every ticket costs time to create, send
and read.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

CONFIGURATION = Path(__file__).with_name("openssl.cnf")


def configure(environment: MutableMapping[str, str]) -> None:
    """Set the path of the OpenSSL configuration in this process's environment.

    Call it before OpenSSL is imported, because OpenSSL reads its configuration once. An existing
    setting stays, because it may be mandatory (FIPS). Then OpenSSL uses its own defaults.
    """
    environment.setdefault("OPENSSL_CONF", str(CONFIGURATION))
