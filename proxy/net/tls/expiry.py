"""Ends connections whose certificates have expired, are not trusted any more, or are revoked.

A certificate proves the peer's identity only until it expires, but the handshake checks it only
once. So every TLS connection is watched for the end of its verified chain, and for the removal of
the trust root of this chain. When that happens:

- The connection is retired: it accepts no new request. An HTTP/1 server closes it after the
  response in progress, an HTTP/2 connection sends GOAWAY, and pools do not lease it any more. The
  code that can do this sets `Expiry.retire`.
- `grace` seconds later it is cut, even if it is busy. A relay has no requests, so it is only cut.

A connection whose peer is revoked is cut at once, without the grace.

A root may be removed, or a peer revoked, while a handshake is in progress, after its chain was
checked. So the caller reads `trust` before the handshake, and `watch` compares.

Times are of the wall clock, like those in certificates. It is checked about once a second, so a
change of the clock takes effect at once. Nothing is done for each byte. A connection that ends
earlier is dropped together with its stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Literal
from weakref import WeakSet

from cryptography.x509 import Certificate

from proxy.net.exceptions import ConnectionLost
from proxy.net.tls.info import Expiry, TLSInfo
from proxy.net.tls.tls_stream import TLSStream

How = Literal["retired", "cut"]

# Connections are grouped by the minute in which they end. Only groups whose minute has come are
# checked.
_MINUTE = 60.0
# A client stops using a connection this many seconds before its server ends it. Otherwise a request
# could be lost.
EARLY = 1.0

_EXPIRED = "the peer's certificate has expired, and this connection with it"
_OWN_EXPIRED = "the certificate with which this connection was opened has expired"
_REVOKED = "the peer was revoked, so this connection ends"
_UNTRUSTED = "the trust root of the peer's certificate was removed, so this connection ends"


class Expiries:
    """The TLS connections of a proxy.

    `grace`: seconds from the end of a certificate to the end of the connection. `on_end` is called
    for each connection that is retired, and for each that is cut. `clock`: the wall clock, in
    seconds since the epoch. If not `enabled`, nothing is watched.
    """

    def __init__(
        self,
        grace: float,
        on_end: Callable[[How], None],
        clock: Callable[[], float] = time.time,
        *,
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        self._grace = grace
        self._on_end = on_end
        self._clock = clock
        self._minutes: dict[float, WeakSet[TLSStream]] = {}
        self.trust = 0  # changes with the trust roots, and with the list of revoked peers
        self._roots: Collection[Certificate] | None = None
        self._is_revoked: Callable[[TLSInfo], bool] = lambda _: False

    def watch(self, stream: TLSStream, own_end: float = math.inf, *, trust: int) -> None:
        """Watch a connection from now on.

        `trust`: the value of the attribute before the handshake. `own_end`: for a connection that
        we have opened, the end of our own certificate in seconds since the epoch. Such a connection
        is retired `EARLY` seconds before.
        """
        if not self._enabled:
            return
        theirs, early = stream.info.peer_not_after, EARLY if own_end < math.inf else 0.0
        end = min(theirs, own_end)
        stream.expiry = Expiry(end, end - early, _EXPIRED if theirs <= own_end else _OWN_EXPIRED)
        self._file(stream, stream.expiry.retires)
        if trust != self.trust:
            if self._roots is not None and stream.info.peer_root not in self._roots:
                self._distrust(stream, stream.expiry)
            if self._is_revoked(stream.info):
                self._revoke(stream, stream.expiry)

    def _file(self, stream: TLSStream, due: float) -> None:
        minute = due // _MINUTE
        known = self._minutes.get(minute)
        if known is None:
            known = self._minutes[minute] = WeakSet()
        known.add(stream)

    def untrust(self, roots: Collection[Certificate]) -> None:
        """End the connections whose trust root is not in `roots`, or is unknown.

        It is unknown if a session was resumed whose chain is not cached any more.
        """
        self.trust += 1
        self._roots = roots
        for stream in [stream for known in self._minutes.values() for stream in known]:
            if stream.expiry is not None and stream.info.peer_root not in roots:
                self._distrust(stream, stream.expiry)

    def revoke(self, is_revoked: Callable[[TLSInfo], bool]) -> None:
        """End the connections to peers for which `is_revoked` is true, now and from now on."""
        self.trust += 1
        self._is_revoked = is_revoked
        for stream in [stream for known in self._minutes.values() for stream in known]:
            if stream.expiry is not None and is_revoked(stream.info):
                self._revoke(stream, stream.expiry)

    def _revoke(self, stream: TLSStream, expiry: Expiry) -> None:
        now = self._clock()
        expiry.ends = expiry.retires = min(expiry.ends, now - self._grace)
        expiry.words = _REVOKED
        self._file(stream, now)

    def _distrust(self, stream: TLSStream, expiry: Expiry) -> None:
        now = self._clock()
        if expiry.ends > now:
            expiry.ends = expiry.retires = now
            expiry.words = _UNTRUSTED
            self._file(stream, now)

    def close_expired(self) -> None:
        """Retire and cut what is due. Call it about once a second."""
        now = self._clock()
        for minute, known in list(self._minutes.items()):
            if minute <= now // _MINUTE:
                for stream in list(known):
                    if self._end(stream, now):
                        known.discard(stream)
            if not known:
                del self._minutes[minute]

    def _end(self, stream: TLSStream, now: float) -> bool:
        """Retire or cut a connection if it is due. True: nothing is left to do."""
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
