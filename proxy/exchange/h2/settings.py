"""The settings of a shared HTTP/2 connection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from proxy.exchange.h2.reset_pacing import ResetLimits
from proxy.exchange.h2.stream_limit import StreamLimit
from proxy.wire.h2.events import Http2Limits
from proxy.wire.h2.flood_budget import BUDGET


@dataclass(frozen=True, slots=True)
class Http2Settings:
    """All times in seconds."""

    limits: Http2Limits = field(default_factory=Http2Limits)
    budget: float = BUDGET  # credit for frames that cost time but carry no data
    mesh_budget: float = 20 * BUDGET  # the same for a verified proxy, which sends for many clients
    # for streams that this side has opened and abandoned
    resets: ResetLimits = field(default_factory=ResetLimits)
    idle_timeout: float = math.inf  # without a stream, until GOAWAY
    write_timeout: float = 60.0  # for the peer to accept sent data
    ping_interval: float = 20.0  # of silence with open streams, until a PING
    ping_timeout: float = 10.0
    last_call: float = 10.0  # server: from the first GOAWAY to the final one
    # shared by all connections from clients; also paces their start and end
    streams: StreamLimit = field(default_factory=StreamLimit)
