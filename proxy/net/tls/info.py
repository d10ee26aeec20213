"""What the two ends of a TLS connection agreed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.x509 import Certificate


@dataclass(frozen=True, slots=True)
class TLSInfo:
    """The result of a handshake.

    `peer_identity`: what `verify` returned, as text; None without `verify`. `peer_not_after`: when
    the first certificate of the peer's chain expires, in seconds since the epoch; infinity if it
    presented none. `peer_root`: the trust root of this chain; None: unknown. `peer_serial`: the
    serial number of the peer's certificate; None: it presented none.
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
    peer_serial: int | None = None


class Expiry:
    """When a connection must end because of its certificates; see expiry.py.

    Times in seconds since the epoch. `retire` is called at `retires`; the code that can end the
    connection gracefully sets it.
    """

    __slots__ = ("ends", "retire", "retired", "retires", "words")

    def __init__(self, ends: float, retires: float, words: str) -> None:
        self.ends = ends
        self.retires = retires
        self.words = words
        self.retired = False
        self.retire: Callable[[], None] | None = None
