"""The proxies that are measured: two of one kind in front of one server, with mutual TLS 1.3 between them.

    client -> outbound (clear text in, mutual TLS out) -> inbound (mutual TLS in, clear text out) -> server

Each is configured to do the same work with one worker: both sides show a certificate of the same root and verify the other's chain.
Only Envoy and we match the peer's SPIFFE identity as well; the others cannot match a URI name. Statistics and header handling are as they
come; access logs are off. `meshed envoy` does besides what a mesh has it do (perf/peers/envoy.py), the others do not. What a proxy
cannot do, or what is not installed, is left out with a word.
"""

from __future__ import annotations

from perf.peers import envoy, haproxy, isthmus, nghttpx, nginx
from perf.peers.order import Kind, Order, Peer

__all__ = ["PEERS", "Kind", "Order", "Peer"]

PEERS = (isthmus.PEER, isthmus.SOURCES, isthmus.ORDINARY, envoy.PEER, envoy.MESHED, haproxy.PEER, nginx.PEER, nghttpx.PEER)
