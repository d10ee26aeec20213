"""What a pair of proxies is asked to be, and what a peer says of itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perf.pair import Pair

Kind = Literal["http1", "http2", "tcp"]


@dataclass(frozen=True, slots=True)
class Order:
    """What a pair is to be: `kind` of traffic, in front of the server at port `server`; `folder` holds the identities (perf.pair) and takes
    its files; `resume`: whether TLS sessions may be resumed."""

    kind: Kind
    folder: Path
    server: int
    resume: bool = True

    def material(self, side: str) -> Path:
        """Where the certificate, key and roots of a side lie."""
        return self.folder / {"outbound": "client", "inbound": "server"}[side]


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    kinds: frozenset[Kind]
    missing: Callable[[Kind], str | None]  # why it cannot be run here
    start: Callable[[Order], AbstractContextManager[Pair]]
