"""Max-Forwards: how many more proxies may forward a TRACE or an OPTIONS request (RFC 9110 §7.6.2).

Each proxy decrements it. A proxy that receives 0 is the final recipient and answers the request.
Requests with other methods are forwarded unchanged.
"""

from __future__ import annotations

from proxy.exchange.exchange import Exchange, Whole
from proxy.wire.messages import OWN, Headers, RequestHead, ResponseHead

METHODS = frozenset({b"TRACE", b"OPTIONS"})
_NAME = b"max-forwards"
# RFC 9110 §9.3.8: fields that probably contain secrets are not sent back. The sender may be a
# script in another user's browser.
_SECRET = frozenset({b"authorization", b"proxy-authorization", b"cookie", b"isthmus-client-id"})


def left(request: RequestHead) -> int | None:
    """Return how many more proxies may forward the request. None: no limit, or an invalid one."""
    values = request.headers.all(_NAME) if request.method in METHODS else ()
    return (
        int(values[0]) if len(values) == 1 and values[0].isdigit() and len(values[0]) < 10 else None
    )


def count_down(request: RequestHead, headers: Headers) -> None:
    """Write the decremented value into `headers` for the next hop. The value in `request` must not
    be 0."""
    limit = left(request)
    if limit is not None:
        headers.replace(b"Max-Forwards", b"%d" % (limit - 1))


async def answer(exchange: Exchange) -> None:
    """Answer as the final recipient: TRACE with the received head, OPTIONS with an empty
    response."""
    request = exchange.request
    if request.method == b"OPTIONS":
        await exchange.respond(ResponseHead(200, Headers(), b"OK"), Whole())
        return
    kept = [
        item
        for item in request.headers.items
        if item[0].lower() not in _SECRET and not item[0].lower().startswith(OWN)
    ]
    version = b"1.1" if request.version == b"2" else request.version
    received = b"TRACE %b HTTP/%b\r\n%b\r\n" % (request.target, version, Headers(kept).encode())
    await exchange.respond(
        ResponseHead(200, Headers([(b"Content-Type", b"message/http")]), b"OK"), Whole(received)
    )
