"""Traffic loops: what they are and how they are seen. Pure: facts in, verdict out. No socket, no clock, no logging, no trio.

l4.py   loops that addresses show: traffic for a proxy's own listener, connections of a pod to itself
l7.py   loops that requests show: tokens that they carry from proxy to proxy
"""

from loopguard.l4 import Loop, OwnListeners, loopback
from loopguard.l7 import HopLimits, Waypoint, Who

__all__ = ["HopLimits", "Loop", "OwnListeners", "Waypoint", "Who", "loopback"]
