"""Exchanges that begin on the fast path (proxy/fastpath) and end on the ordinary path.

A server may lend its HTTP/1 connection between two exchanges. Usually it gets the connection back
between two exchanges too. If an exchange turns out to need the ordinary path, the connection comes
back with that exchange in its current state. An HTTP/2 exchange comes back alone, because its
connection is never lent.

The exchange passes the same layers as all others. They find its account already open and its timer
not set. At the end of the layers, the client continues the exchange. The fast path's attempt counts
as the first attempt and may be followed by another, like any first attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from proxy.exchange.upstream import Carrier


class Lease(Protocol):
    """A connection or stream to an endpoint, leased for one exchange."""

    @property
    def attempt(self) -> object:
        """The flow's own state of the attempt."""
        ...

    def carrier(self) -> Carrier:
        """Return a carrier that continues in the current state."""
        ...

    def end(self, *, usable: bool) -> None:
        """End the lease. `usable`: the exchange ended well, so the connection can be reused."""
        ...


@dataclass(slots=True, eq=False)
class Handoff:
    """The state of an exchange that the fast path has begun. The protocol states of both
    connections are already set."""

    # None: the request was read and the loop guard has run, nothing was sent
    lease: Lease | None = None
    since: float | None = None  # trio's time when it began, if known
    # the whole request has been sent, except `to_server`; False: the rest is in the exchange's body
    asked: bool = True
    to_server: bytes = b""  # unsent bytes of the request
    to_client: bytes = b""  # unsent bytes of the response
    failure: Exception | None = None  # the error that has ended the exchange
