"""An exchange of HTTP/1.1 that goes from the fast path to the ordinary one: both connections as the ordinary path has to find them."""

from __future__ import annotations

from proxy.exchange.h1.server import Http1Exchange
from proxy.exchange.handoff import Handoff
from proxy.fastpath.chunked_body import Chunks
from proxy.fastpath.plan import ConnectionLease
from proxy.wire.h1.body import Framing, Length
from proxy.wire.h1.connection import At, Http1Connection


def hand_off(
    connection: Http1Connection, exchange: Http1Exchange, lease: ConnectionLease, body: Chunks | int, bytes_left: tuple[bytes, bytes, bytes]
) -> Handoff:
    """Set the state of the client's `connection` and of the lent one, and say how far the exchange has got.

    `body`: the response's, as far as it has passed, or how many bytes of it are still to be read. `bytes_left`: to the server and to the
    client, which have not been sent; from the server, which nobody has looked at.
    """
    to_server, to_client, received = bytes_left
    method, answered, http = exchange.request.method, exchange.response is not None, lease.upstream.http
    # The end of the last chunk is written once: where the server has ended, it has been sent, or is in `to_client`.
    to_write: Length = body if isinstance(body, int) else 0 if body.ended else Framing.CHUNKED
    connection.take_over(method, (At.DONE, 0), (At.BODY, to_write) if answered else (At.HEAD, 0))
    reading = At.BODY if answered else At.HEAD
    writing: tuple[At, Length] = (At.BODY, len(to_server)) if to_server else (At.DONE, 0)
    http.take_over(method, (reading, body if isinstance(body, int) else body.reader), writing)
    http.receive_data_if(received if isinstance(body, int) else body.left + received)
    return Handoff(lease, exchange.started, to_server=to_server, to_client=to_client)
