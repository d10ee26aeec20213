"""Exchanges that begin on the fast road (proxy/fast) and end on the ordinary one.

A server may lend its connection between two exchanges. It comes back between two exchanges too, as a rule; and within one, when that
one turned out to be more than the fast road can do: then it comes with the exchange, as far as that has got. The exchange goes through
the same layers as all others, which find its account open and its clock not yet set, and at their end the client goes on where it stands:
what has been begun is the first attempt at it, and may be followed by another like any first attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from proxy.exchange.pool import Upstream

if TYPE_CHECKING:
    from proxy.exchange.server import Http1Exchange, Http1Server


class Loan(Protocol):
    """A kept connection to an endpoint, lent for one exchange."""

    @property
    def upstream(self) -> Upstream: ...

    @property
    def attempt(self) -> object:
        """The flow's own: what it knows of the attempt."""
        ...

    def end(self, *, usable: bool) -> None:
        """Give the connection back; `usable`: its http says whether another exchange may have it."""
        ...


@dataclass(slots=True, eq=False)
class Begun:
    """What the layers do not see of an exchange that is under way. The protocol states of both connections are in place."""

    exchange: Http1Exchange
    loan: Loan | None = None  # None: the request has been read and guarded, and nothing else
    to_server: bytes = b""  # of the request, not sent yet
    to_client: bytes = b""  # the same of the response
    failure: Exception | None = None  # it is over, because of this


class Carry(Protocol):
    """The fast road, as a server sees it."""

    async def __call__(self, server: Http1Server) -> Begun | None:
        """Carry exchanges of an idle connection for as long as that is plain work. When this returns the connection is the server's
        again, with all that was read and not used put into `server.connection`."""
        ...
