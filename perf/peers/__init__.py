"""The measured proxies: two of a kind in front of one server, with mutual TLS 1.3 between them.

    client -> outbound -> inbound -> server      mutual TLS between outbound and inbound only

All are configured for the same work with one worker: both sides present a certificate of the same
root and verify the other's chain. Only Envoy and this proxy also match the peer's SPIFFE identity;
the others cannot match a URI name. Statistics and header handling have their defaults; access logs
are off. `meshed envoy` also does what a mesh configures (perf/peers/envoy.py), the others do not.
Work that a proxy does not support, and proxies that are not installed, are left out with a message.
"""

from __future__ import annotations

from perf.peers import envoy, haproxy, isthmus, nghttpx, nginx
from perf.peers.order import Kind, Order, Peer

__all__ = ["PEERS", "Kind", "Order", "Peer"]

PEERS = (
    isthmus.PEER,
    isthmus.ANOTHER,
    isthmus.SOURCES,
    isthmus.ORDINARY,
    envoy.PEER,
    envoy.MESHED,
    haproxy.PEER,
    nginx.PEER,
    nghttpx.PEER,
)
