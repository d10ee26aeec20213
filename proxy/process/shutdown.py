"""The order in which a proxy's traffic ends.

Kubernetes stops the application and its proxy at the same moment. A native sidecar is stopped
later, after the application has ended. The proxy cannot know which case it is in, so the
application gets what it would have without a proxy:

    inbound   New connections are refused. Accepted ones are served to their end.
    pools     From now on the application has no more connections from the proxy than the proxy has
              from clients: an application that waits for its open connections then waits only for
              those of its clients. Open connections serve the last requests. A new one may meet a
              closing listener, which resets it.
    outbound  The application's connections are served until inbound is empty and the application
              has been quiet for a moment, but for at least `shutdown.outbound_minimum`: its last
              requests may come after a pause.
"""

from __future__ import annotations

from typing import Protocol

import trio

from proxy.config.schema_process import ShutdownConfig
from proxy.exchange.server_settings import Drain
from proxy.net.accept import Acceptor

# An application that is finishing its work makes its next connection within this time (seconds) of
# the last.
_QUIET = 1.0
_TICK = 0.1


class Drainable(Protocol):
    """Pools of connections to the application."""

    def drain(self) -> None: ...


async def drain(
    inbound: Acceptor,
    outbound: Acceptor,
    connections: Drain,
    pools: Drainable,
    settings: ShutdownConfig,
) -> None:
    """Stop accepting, and return when all open connections have ended. Cancels the rest after
    `settings.grace` seconds.
    """
    began = trio.current_time()
    # The order matters: a client whose connection ends reconnects at once. It must find no listener
    # rather than one that is just being closed.
    inbound.drain(settings.grace)
    connections.begin()
    pools.drain()
    quiet, seen = 0.0, outbound.accepted
    with trio.move_on_at(began + settings.grace):
        while (
            inbound.open
            or quiet < _QUIET
            or trio.current_time() < began + settings.outbound_minimum
        ):
            await trio.sleep(_TICK)
            # A short connection may have opened and closed since the last check.
            busy = outbound.open > 0 or outbound.accepted != seen
            quiet, seen = 0.0 if busy else quiet + _TICK, outbound.accepted
        outbound.drain(settings.grace)  # connections accepted at this very moment are served too
        while outbound.open:  # noqa: ASYNC110  # happens once in a process's life
            await trio.sleep(_TICK)
    outbound.drain(0)
