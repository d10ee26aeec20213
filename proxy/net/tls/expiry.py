"""Connections end with the certificates that they rest on.

A peer is who its certificate says until that ends, and the handshake looks only once. So every TLS connection is watched for the end of
the chain that was verified for it, and for the removal of the trust root above that chain. When the time has come,

- the connection is retired: it takes no new request. An HTTP/1 server closes behind the response under way, an HTTP/2 connection says
  GOAWAY, and pools do not lend it any more. Whoever can do that sets `Expiry.retire`;
- `grace` seconds later it is cut, whatever is under way in it. A relay knows no requests, and is only cut.

Times are of the wall clock, which certificates speak of; it is looked at about once a second, so a clock that was set counts at once.
Nothing is done on the way of a connection's bytes. A connection that ends by itself is forgotten with its stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Literal
from weakref import WeakSet

from cryptography.x509 import Certificate

from proxy.net.exceptions import ConnectionLost
from proxy.net.tls.info import Expiry
from proxy.net.tls.tls_stream import TLSStream

How = Literal["retired", "cut"]

# Connections are kept by the minute in which they end, and only those of the minutes that have come are looked at.
_MINUTE = 60.0
# A client stops using a connection so many seconds before its server ends it, or a request could meet its end.
EARLY = 1.0

_EXPIRED = "a certificate of the peer's has expired, and with it this connection"
_OWN_EXPIRED = "the certificate with which this connection was opened has expired"
_UNTRUSTED = "the trust root of the peer's certificate was removed, and with it this connection ends"


class Expiries:
    """The TLS connections of a proxy. `grace` in seconds, from the end of a certificate to that of the connection. `on_end` is told of each
    connection that is retired, and of each that is cut. `clock`: the wall clock, in seconds since the epoch. Not `enabled`: nothing is.
    """

    def __init__(
        self, grace: float, on_end: Callable[[How], None], clock: Callable[[], float] = time.time, *, enabled: bool = True
    ) -> None:
        self._enabled = enabled
        self._grace = grace
        self._on_end = on_end
        self._clock = clock
        self._minutes: dict[float, WeakSet[TLSStream]] = {}

    def watch(self, stream: TLSStream, own_end: float = math.inf) -> None:
        """Watch a connection from here on. `own_end`, in seconds since the epoch: for one that we have opened, when our own certificate
        ends; such a connection is retired `EARLY`."""
        if not self._enabled:
            return
        theirs, early = stream.info.peer_not_after, EARLY if own_end < math.inf else 0.0
        end = min(theirs, own_end)
        stream.expiry = Expiry(end, end - early, _EXPIRED if theirs <= own_end else _OWN_EXPIRED)
        self._file(stream, stream.expiry.retires)

    def _file(self, stream: TLSStream, due: float) -> None:
        minute = due // _MINUTE
        known = self._minutes.get(minute)
        if known is None:
            known = self._minutes[minute] = WeakSet()
        known.add(stream)

    def untrust(self, roots: Collection[Certificate]) -> None:
        """`roots` are all that is trusted now. End the connections that rest on another one, or on one that is not known: a session was
        resumed that nothing is remembered of."""
        now = self._clock()
        for stream in [stream for known in self._minutes.values() for stream in known]:
            expiry = stream.expiry
            if expiry is not None and expiry.ends > now and stream.info.peer_root not in roots:
                expiry.ends = expiry.retires = now
                expiry.words = _UNTRUSTED
                self._file(stream, now)

    def look(self) -> None:
        """Retire and cut what is due. About once a second."""
        now = self._clock()
        for minute, known in list(self._minutes.items()):
            if minute <= now // _MINUTE:
                for stream in list(known):
                    if self._end(stream, now):
                        known.discard(stream)
            if not known:
                del self._minutes[minute]

    def _end(self, stream: TLSStream, now: float) -> bool:
        """True: there is nothing more to do."""
        expiry = stream.expiry
        if expiry is None:
            return True
        if now >= expiry.retires and not expiry.retired:
            expiry.retired = True
            if expiry.retire is not None:
                self._on_end("retired")
                expiry.retire()
        if now < expiry.ends + self._grace:
            return False
        if stream.fail(ConnectionLost(expiry.words, "expired")):
            self._on_end("cut")
        return True

    def __len__(self) -> int:
        return sum(len(known) for known in self._minutes.values())
