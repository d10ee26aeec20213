"""Detects traffic loops. Pure functions of facts: no socket, no clock, no logging, no trio.

l4.py               loops that addresses show: traffic for a listener of the proxy itself
nesting.py          connections of a pod to itself: which are legitimate, which are a loop
l7.py               loops that requests show: tokens that requests carry from proxy to proxy
forwarded_loops.py  loops through gateways that only `Forwarded` shows
graph.py            loops in a configuration (a directory)
"""

from loopguard.l4 import Loop, OwnListeners, loopback
from loopguard.l7 import HopLimits, HopTokens, ProxyName
from loopguard.nesting import OwnConnections, SelfCalls

__all__ = [
    "HopLimits",
    "HopTokens",
    "Loop",
    "OwnConnections",
    "OwnListeners",
    "ProxyName",
    "SelfCalls",
    "loopback",
]
