"""Exchanges that begin on the fast path (proxy/fastpath) and end on the ordinary one.

A server may lend its HTTP/1 connection between two exchanges. It comes back between two exchanges too, as a rule; and within one, when that
one turned out to be more than the fast path can do: then it comes with the exchange, as far as that has got. An exchange on a stream of an
HTTP/2 connection comes back alone, for the connection was never lent.

The exchange goes through the same layers as all others, which find its account open and its clock not yet set, and at their end the
client goes on where it stands: what has been begun is the first attempt at it, and may be followed by another like any first attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from proxy.exchange.h1.server import Http1Exchange, Http1Server
    from proxy.exchange.h2.server import Http2Exchange, Http2Server
    from proxy.exchange.upstream import Carrier


class Lease(Protocol):
    """What carries one exchange to an endpoint, lent for that."""

    @property
    def attempt(self) -> object:
        """The flow's own: what it knows of the attempt."""
        ...

    def carrier(self) -> Carrier:
        """As far as it has got."""
        ...

    def end(self, *, usable: bool) -> None:
        """Give it back; `usable`: the exchange has ended well on it."""
        ...


@dataclass(slots=True, eq=False)
class Handoff:
    """What the layers do not see of an exchange that is under way. The protocol states of both connections are in place."""

    lease: Lease | None = None  # None: the request has been read and guarded, and nothing else
    since: float | None = None  # trio's time when it was begun, if that is known
    asked: bool = True  # all of the request has been sent, but for `to_server`; otherwise the rest is the exchange's body
    to_server: bytes = b""  # of the request, not sent yet
    to_client: bytes = b""  # the same of the response
    failure: Exception | None = None  # it is over, because of this


class Carry(Protocol):
    """The fast path, as a server of HTTP/1 sees it."""

    async def __call__(self, server: Http1Server) -> Http1Exchange | None:
        """Carry exchanges of an idle connection for as long as that is plain work. When this returns the connection is the server's
        again, with all that was read and not used put into `server.connection`, and with an exchange that has been begun."""
        ...


class LentConnection(Protocol):
    """A connection on the fast path, as far as its server asks."""

    def busy(self) -> bool:
        """It is in an exchange, or has read something of the next one."""
        ...


class Fork(Protocol):
    """The same for a server of HTTP/2, whose connection stays where it is: its streams take the one path or the other."""

    def __call__(self, server: Http2Server, exchange: Http2Exchange) -> bool:
        """Whether `exchange` is carried from here on; one that turns out to be more than plain work comes to `server.serve`."""
        ...
