"""Traffic loops: what they are and how they are seen. Pure: facts in, verdict out. No socket, no clock, no logging, no trio.

l4.py        loops that addresses show: traffic for a proxy's own listener
nesting.py   connections of a pod to itself: which are legitimate, which are a loop
l7.py        loops that requests show: tokens that they carry from proxy to proxy
forwarded_loops.py loops that only `Forwarded` shows, to gateways
graph.py    loops that are written down, in a directory
"""

from loopguard.l4 import Loop, OwnListeners, loopback
from loopguard.l7 import HopLimits, Waypoint, Who
from loopguard.nesting import OwnConnections, SelfCalls

__all__ = ["HopLimits", "Loop", "OwnConnections", "OwnListeners", "SelfCalls", "Waypoint", "Who", "loopback"]
