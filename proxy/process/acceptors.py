"""What the acceptors of all listeners have in common: how many connections each may have, and what is said when there is no room."""

from __future__ import annotations

import logging
import resource
from collections.abc import Awaitable, Callable

from proxy.config.schema import GatewayConfig, InboundConfig, OutboundConfig
from proxy.errors import known
from proxy.net.accept import Acceptor, Connection
from proxy.net.connection_slots import Bounds, Slots
from proxy.telemetry.log import RateLimit, warn
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus")
_PAUSES = RateLimit(1)

_EVICTED = {
    "idle": "it has waited longest for a request",
    "pending": "it is the oldest that has sent no ClientHello",
    "handshake": "its handshake is the oldest",
    "busy": "what it is doing counts less",
    "source": "its address has too many",
}


def acceptor(
    name: str, handler: Callable[[Connection], Awaitable[None]], bounds: Bounds, metrics: Metrics, descriptors: int
) -> Acceptor:
    """An acceptor of traffic, for as many connections as there are descriptors for: all but `descriptors` of what the system allows are for
    the traffic of both directions. A connection takes one here, one to its server, and half a one while its peer is not known."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = bounds.total if soft == resource.RLIM_INFINITY else max(1, (soft - descriptors) // 5)
    if most < bounds.total:
        _log.info("%s: RLIMIT_NOFILE is %d: %d connections are accepted at a time, not %d", name, soft, most, bounds.total)
        reserved = bounds.reserved * most // bounds.total
        bounds = Bounds(most, min(bounds.pending, max(2, most // 2)) if bounds.pending else 0, reserved)
    made = Acceptor(handler, limit=bounds, on_error=report, on_pause=_pausing)
    admission(name, made.slots, metrics)
    return made


def bounds_of(config: InboundConfig | GatewayConfig | OutboundConfig, *, mutual: bool) -> Bounds:
    """How many connections a listener may have. `mutual`: there are peers with an identity, for whom to reserve some."""
    if isinstance(config, OutboundConfig):
        return Bounds(config.max_connections)
    reserved = int(config.max_connections * config.member_reserve) if mutual else 0
    return Bounds(config.max_connections, config.max_pending, reserved)


def admission(name: str, slots: Slots, metrics: Metrics) -> None:
    """Count and log connections of this listener that are ended or refused for want of room."""
    evictions, refusals = RateLimit(1), RateLimit(1)

    def evicted(reason: str, source: str) -> None:
        metrics.evicted(name, reason)
        words = "%s: a connection from %s was closed to make room for others: %s (%s)"
        warn(_log, evictions, words, name, source, _EVICTED[reason], reason)

    def refused(reason: str, source: str) -> None:
        metrics.refused(name, reason)
        warn(_log, refusals, "%s: a connection from %s was refused, for there is no room (%s)", name, source, reason)

    slots.on_evict, slots.on_refuse = evicted, refused


def report(connection: Connection, error: BaseException) -> None:
    """Errors that the table knows stand in the connection's line in the log already; the others are bugs."""
    if not known(error):
        _log.error("a connection from %s failed by a fault of this proxy's", connection.peer, exc_info=error)


def _pausing(error: OSError) -> None:
    warn(_log, _PAUSES, "new connections have to wait: %s (RLIMIT_NOFILE)", error.strerror)
