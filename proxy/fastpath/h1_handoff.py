"""The handoff of an HTTP/1.1 exchange from the fast path: it puts both connections into the state
that the ordinary path expects."""

from __future__ import annotations

from collections.abc import Hashable

from proxy.exchange.exchange import Handoff
from proxy.exchange.h1.server import Http1Exchange
from proxy.fastpath.chunked_body import ChunkedTranscoder
from proxy.fastpath.plan import ConnectionLease
from proxy.wire.h1.body import Framing, Length
from proxy.wire.h1.connection import At, Http1Connection


def hand_off(
    connection: Http1Connection,
    exchange: Http1Exchange,
    lease: ConnectionLease[Hashable],
    body: ChunkedTranscoder | int,
    bytes_left: tuple[bytes, bytes, bytes],
) -> Handoff:
    """Set the protocol state of the client's `connection` and of the leased one, and return the
    state of the exchange.

    `body`: the response body as far as it has passed, or the number of its bytes that are still to
    be read. `bytes_left`: unsent bytes to the server, unsent bytes to the client, and bytes from
    the server that were not parsed.
    """
    to_server, to_client, received = bytes_left
    method, answered, http = (
        exchange.request.method,
        exchange.response is not None,
        lease.upstream.http,
    )
    # The last chunk is written only once. If the server's body has ended, the last chunk has been
    # sent or is in `to_client`.
    to_write: Length = body if isinstance(body, int) else 0 if body.ended else Framing.CHUNKED
    connection.take_over(method, (At.DONE, 0), (At.BODY, to_write) if answered else (At.HEAD, 0))
    reading = At.BODY if answered else At.HEAD
    writing: tuple[At, Length] = (At.BODY, len(to_server)) if to_server else (At.DONE, 0)
    http.take_over(method, (reading, body if isinstance(body, int) else body.reader), writing)
    http.receive_data_if(received if isinstance(body, int) else body.left + received)
    return Handoff(lease.plan, lease, exchange.started, to_server=to_server, to_client=to_client)
