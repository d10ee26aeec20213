"""The path of a request in the field `Forwarded` (RFC 7239), at a gateway.

A gateway adds an element to the field, for software that wants to know the path. It reads the field
too: this shows loops through software that drops the mesh's tokens and keeps the standard field."""

from __future__ import annotations

from functools import lru_cache

from proxy.exchange.exchange import Exchange
from proxy.flows.runtime import Runtime
from proxy.identity.spiffe import SpiffeId
from proxy.wire import forwarded
from proxy.wire.messages import ProtocolError

LONGEST = 16384  # bytes of Forwarded that are read: enough for more than loops.max_hops hops


def add_forwarded(rt: Runtime, exchange: Exchange, caller: SpiffeId) -> None:
    """Add an element to Forwarded: the sender of the request and its destination. Raises
    LoopDetected if this gateway is in the field too often already.

    Drops and counts lines that cannot be parsed on their own: a quoted string that such a line
    leaves open would swallow this gateway's element. Drops all lines if they are longer than
    `LONGEST` together."""
    request = exchange.request
    headers, host = request.headers, request.authority or b""
    by = gateway_name(rt.config.cluster, rt.identity.id if rt.identity is not None else caller)
    if b"forwarded" in headers:
        path: list[tuple[bytes, bytes]] = []
        came = len(headers.items)
        few = sum(map(len, headers.all(b"forwarded"))) <= LONGEST
        headers.items = [
            item
            for item in headers.items
            if item[0].lower() != b"forwarded" or (few and read_path(item[1], path))
        ]
        if len(headers.items) < came:
            rt.recorder.metrics.count_dropped_forwarded("malformed" if few else "oversized")
        if path:
            rt.loops.check_forwarded(exchange, path, (by, host))
    element = {"by": by, "for": forwarded.obfuscated(caller.sni), "host": host, "proto": b"https"}
    headers.add(b"Forwarded", forwarded.encode(element))


@lru_cache(maxsize=16)
def gateway_name(cluster: str, own: SpiffeId) -> bytes:
    """The name of a gateway in `by=`, one name for all replicas:
    `_east.gateway.isthmus.sa.cluster.local`. The gateways of two clusters may have the same
    identity, so the name includes the cluster, which has no dot."""
    return forwarded.obfuscated(f"{cluster}.{own.sni}")


def read_path(line: bytes, path: list[tuple[bytes, bytes]]) -> bool:
    """Append (by, host) of each element of a line to `way`. Returns False if the line is
    malformed."""
    try:
        path += [
            (element.get("by", b""), element.get("host", b""))
            for element in forwarded.parse([line])
        ]
    except ProtocolError:
        return False
    return True
