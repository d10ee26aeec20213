"""How a shared HTTP/2 connection is set up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from proxy.exchange.h2.reset_pacing import ResetPace
from proxy.exchange.h2.stream_limit import StreamLimit
from proxy.wire.h2.events import Http2Limits
from proxy.wire.h2.flood_budget import BUDGET


@dataclass(frozen=True, slots=True)
class MuxSettings:
    """Times in seconds."""

    limits: Http2Limits = field(default_factory=Http2Limits)
    budget: float = BUDGET  # of frames that only cost time, and
    mesh_budget: float = 20 * BUDGET  # of a peer that is a verified proxy, and speaks for many clients
    resets: ResetPace = field(default_factory=ResetPace)  # of streams that we have opened and given up
    idle_timeout: float = math.inf  # without a stream, until we say GOAWAY
    write_timeout: float = 60.0  # for the peer to take what it is sent
    ping_interval: float = 20.0  # of silence, while streams are open, until we ask whether the peer is there
    ping_timeout: float = 10.0
    last_call: float = 10.0  # for the client to hear that it is to open no more streams (server)
    streams: StreamLimit = field(default_factory=StreamLimit)  # of all connections from clients, and how fast theirs begin and end
