"""Common to the acceptors of all listeners: connection limits, and the log lines when a limit is
reached.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Awaitable, Callable

from proxy.config.schema_traffic import GatewayConfig, InboundConfig, OutboundConfig
from proxy.errors import known
from proxy.net.accept import Acceptor, Connection
from proxy.net.connection_slots import Bounds, Slots
from proxy.telemetry.log import RateLimit, warn
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus")
_PAUSES = RateLimit(1)

_EVICTED = {
    "idle": "it has been idle longest",
    "pending": "it is the oldest that has sent no ClientHello",
    "handshake": "its handshake is the oldest",
    "busy": "it has a lower priority",
    "source": "its source address has too many connections",
}


def acceptor(
    name: str,
    handler: Callable[[Connection], Awaitable[None]],
    bounds: Bounds,
    metrics: Metrics,
    descriptors: int,
) -> Acceptor:
    """An acceptor of traffic, limited to the connections that the descriptors suffice for.

    `descriptors` are reserved; the rest of RLIMIT_NOFILE serves the traffic of both directions. A
    connection takes one descriptor here and one to its server. While its peer is unknown, it counts
    as half a connection.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = bounds.total if soft == resource.RLIM_INFINITY else max(1, (soft - descriptors) // 5)
    if most < bounds.total:
        _log.info(
            "%s: RLIMIT_NOFILE is %d, so the limit is %d connections, not %d",
            name,
            soft,
            most,
            bounds.total,
        )
        reserved = bounds.reserved * most // bounds.total
        bounds = Bounds(
            most, min(bounds.pending, max(2, most // 2)) if bounds.pending else 0, reserved
        )
    made = Acceptor(handler, limit=bounds, on_error=report, on_pause=_pausing)
    admission(name, made.slots, metrics)
    return made


def bounds_of(config: InboundConfig | GatewayConfig | OutboundConfig, *, mutual: bool) -> Bounds:
    """The connection limits of a listener. `mutual`: peers may have an identity, so some
    connections are reserved for them.
    """
    if isinstance(config, OutboundConfig):
        return Bounds(config.max_connections)
    reserved = int(config.max_connections * config.member_reserve) if mutual else 0
    return Bounds(config.max_connections, config.max_pending, reserved)


def admission(name: str, slots: Slots, metrics: Metrics) -> None:
    """Count and log connections of this listener that are closed or refused because a limit is
    reached.
    """
    evictions, refusals = RateLimit(1), RateLimit(1)

    def evicted(reason: str, source: str) -> None:
        metrics.count_eviction(name, reason)
        words = "%s: a connection from %s was closed to make room for others: %s (%s)"
        warn(_log, evictions, words, name, source, _EVICTED[reason], reason)

    def refused(reason: str, source: str) -> None:
        metrics.count_refusal(name, reason)
        warn(
            _log,
            refusals,
            "%s: a connection from %s was refused: the limit is reached (%s)",
            name,
            source,
            reason,
        )

    slots.on_evict, slots.on_refuse = evicted, refused


def report(connection: Connection, error: BaseException) -> None:
    """Log an unexpected error. Expected errors are already in the connection's log line."""
    if not known(error):
        _log.error("internal error: a connection from %s failed", connection.peer, exc_info=error)


def _pausing(error: OSError) -> None:
    warn(_log, _PAUSES, "new connections have to wait: %s (RLIMIT_NOFILE)", error.strerror)
