"""The settings and the shutdown state that the HTTP/1 and HTTP/2 servers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from proxy.net.disconnects import Disconnects
from proxy.net.pacing import Pacer
from proxy.wire.messages import Limits


class Idle(Protocol):
    """A connection that waits for a request."""

    def hurry(self) -> None:
        """The proxy is shutting down: wait only for a request that may be on its way."""
        ...


@dataclass(slots=True)
class Drain:
    """The state of the shutdown, shared by all downstream HTTP connections.

    Each connection ends after its next response, which says so. A connection that waits for a
    request may wait a moment longer, because a request may be on its way. Its client cannot know
    whether the request was processed, and may not send it again if it is not idempotent.
    """

    draining: bool = False
    idle: set[Idle] = field(default_factory=set)
    # called when the shutdown begins
    on_begin: set[Callable[[], None]] = field(default_factory=set)
    # reports clients that disconnect while they wait, if it is open
    disconnects: Disconnects = field(default_factory=Disconnects)
    # limits how many connections end in one pass of the scheduler
    pacer: Pacer = field(default_factory=Pacer)

    def begin(self) -> None:
        self.draining = True
        for tell in list(self.on_begin):
            tell()
        for server in self.idle:
            server.hurry()


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits of a downstream connection. All times in seconds."""

    limits: Limits = field(default_factory=Limits)
    idle_timeout: float = 90.0  # between two requests
    head_timeout: float = 10.0  # from a head's first byte to its last
    # from the start of the connection to the end of the first request's head
    first_timeout: float = math.inf
    body_timeout: float = 60.0  # between two pieces of a request body
    body_min_rate: float = 0.0  # bytes per second that a body must reach on average; 0: any
    write_timeout: float = 60.0  # for the client to accept sent data
    # to read the rest of an answered request, before the connection is closed
    linger_timeout: float = 10.0
    # between two pieces of an HTTP/2 request body, where pauses are normal
    stream_timeout: float = 3600.0
