"""What the two ends of a TLS connection have agreed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.x509 import Certificate


@dataclass(frozen=True, slots=True)
class TLSInfo:
    """What was agreed on. `peer_identity`: what `verify` gave for the peer's certificate, as text; None without `verify`.

    `peer_not_after`: when the first certificate of the peer's chain ends, in seconds since the epoch; infinity, if it has shown none.
    `peer_root`: the trust root above it; None: not known.
    """

    version: str
    cipher: str
    group: str
    alpn: bytes
    resumed: bool
    peer_identity: str | None
    sni: str
    peer_not_after: float = math.inf
    peer_root: Certificate | None = None


class Expiry:
    """When a connection has to end with the certificates it rests on; see expiry.py. Times in seconds since the epoch.

    `retire` is set by whoever can end the connection politely, and called at `retires`.
    """

    __slots__ = ("ends", "retire", "retired", "retires", "words")

    def __init__(self, ends: float, retires: float, words: str) -> None:
        self.ends = ends
        self.retires = retires
        self.words = words
        self.retired = False
        self.retire: Callable[[], None] | None = None
