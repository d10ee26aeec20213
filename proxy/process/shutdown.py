"""The end of a proxy's traffic: in which order it stops what it does.

Kubernetes tells the application and its proxy to stop at the same moment, unless the proxy is a native sidecar, which is told when the
application has ended. The proxy cannot know which it is, so it gives the application what it would have without a proxy:

    inbound   new connections are refused, and what had been accepted is served to its end
    pools     there are no more connections to the application than clients have to the proxy: an application that waits for its open
              connections waits for those of its clients only. Those that are open serve the last requests, because a new
              connection may meet a listener that is just being closed, which resets it
    outbound  the application's connections are served until inbound is empty and the application has been quiet for a moment, but for
              `shutdown.outbound_minimum` at least: what it has to say at its end may come after a pause
"""

from __future__ import annotations

from typing import Protocol

import trio

from proxy.config.schema import ShutdownConfig
from proxy.exchange.h1.server import Drain
from proxy.net.accept import Acceptor

# An application that is finishing its work makes its next connection within this time (seconds) of its last.
_QUIET = 1.0
_TICK = 0.1


class Drainable(Protocol):
    """Pools of connections to the application."""

    def drain(self) -> None: ...


async def drain(inbound: Acceptor, outbound: Acceptor, connections: Drain, pools: Drainable, settings: ShutdownConfig) -> None:
    """Stop accepting, and return when what is open has ended; what has not ended after `settings.grace` seconds is cancelled."""
    began = trio.current_time()
    # In this order: a client that is sent away comes back at once, and had better meet no listener than one that is just being closed.
    inbound.drain(settings.grace)
    connections.begin()
    pools.drain()
    quiet, seen = 0.0, outbound.accepted
    with trio.move_on_at(began + settings.grace):
        while inbound.open or quiet < _QUIET or trio.current_time() < began + settings.outbound_minimum:
            await trio.sleep(_TICK)
            # A short connection may have come and gone since the last look.
            busy = outbound.open > 0 or outbound.accepted != seen
            quiet, seen = 0.0 if busy else quiet + _TICK, outbound.accepted
        outbound.drain(settings.grace)  # which takes what has come in this very moment: it is served too
        while outbound.open:  # noqa: ASYNC110  # once in the life of a process
            await trio.sleep(_TICK)
    outbound.drain(0)
