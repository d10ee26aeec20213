"""What OpenSSL is told before it begins: two settings for which its binding has no call.

A client sends a share of the key exchange for one group, and names the others. By itself OpenSSL adds one for X25519: 25 µs of arithmetic
for each connection, thrown away by every peer that has the hybrid, as ours have. One that has not asks for its own (HelloRetryRequest, RFC
8446, section 4.1.4), which costs it a round trip.

A server gives one session ticket instead of two. Ours are good for more than one connection, and each resumed one brings its own; every
ticket is sealed, sent and read in a step of its own.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

CONFIGURATION = Path(__file__).with_name("openssl.cnf")


def configure(environment: MutableMapping[str, str]) -> None:
    """To be called with this process's environment before anybody imports OpenSSL, which reads its configuration once. One that is named
    already stays, as it has to where another is prescribed (FIPS); then OpenSSL does as it does by itself."""
    environment.setdefault("OPENSSL_CONF", str(CONFIGURATION))
