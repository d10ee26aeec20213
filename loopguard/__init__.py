"""Traffic loops: what they are and how they are seen. Pure: facts in, verdict out. No socket, no clock, no logging, no trio.

l4.py   loops that addresses show: traffic for a proxy's own listener
"""

from loopguard.l4 import Loop, OwnListeners, loopback

__all__ = ["Loop", "OwnListeners", "loopback"]
