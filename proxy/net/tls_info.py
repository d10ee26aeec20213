"""What the two ends of a TLS connection have agreed on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TLSInfo:
    """What was agreed on. `peer_identity`: what `verify` gave for the peer's certificate, as text; None without `verify`."""

    version: str
    cipher: str
    group: str
    alpn: bytes
    resumed: bool
    peer_identity: str | None
    sni: str
