"""The request for a pair of proxies, and the description of a peer."""

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
    """The requested pair: the `kind` of traffic, in front of the server at port `server`. `folder`
    holds the identities (perf.pair) and the pair's files. `resume`: whether TLS sessions may be
    resumed.
    """

    kind: Kind
    folder: Path
    server: int
    resume: bool = True

    def material(self, side: str) -> Path:
        """The directory with certificate, key and roots of a side."""
        return self.folder / {"outbound": "client", "inbound": "server"}[side]


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    kinds: frozenset[Kind]
    missing: Callable[[Kind], str | None]  # why it cannot be run here
    start: Callable[[Order], AbstractContextManager[Pair]]
