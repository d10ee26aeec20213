"""The head of a request as it goes to the next hop."""

from __future__ import annotations

from proxy.exchange import max_forwards
from proxy.exchange.exchange import Exchange
from proxy.wire.messages import (
    CALLER,
    Headers,
    RequestHead,
    absolute_authority,
    origin_form,
    strip_hop_by_hop,
    upgrade_offer,
    wants_trailers,
)


def offered(request: RequestHead) -> bytes | None:
    """The protocols that the client would rather speak. HTTP/1.0 knows no 101 (RFC 9110 §7.8)."""
    return None if request.version == b"1.0" else upgrade_offer(request.headers)


def forwarded_request(exchange: Exchange) -> RequestHead:
    """The head as it goes to the next hop: without what belonged to the last one (RFC 9110 §7.6), with what it offers to the next, and
    with what the flow says of it: another authority, and who sent it. Where the client went is the authority of one that names none."""
    request = exchange.request
    canonical = request.version != b"2" and request.headers.clean and request.target.startswith(b"/")
    if canonical and exchange.authority is None and exchange.caller is None:
        return request  # it goes on as it is
    if request.headers.block is not None and exchange.authority is None:
        headers = request.headers.onward()  # there is nothing among its lines that would have to be weighed
        if exchange.caller is not None:
            headers.append(CALLER, exchange.caller)
        return RequestHead(request.method, request.target, headers)
    headers, target = Headers(request.headers.items), request.target
    offer, trailers = offered(request), wants_trailers(headers)
    strip_hop_by_hop(headers)
    if exchange.authority is not None:
        target = origin_form(request)
        headers.replace(b"Host", exchange.authority)
    elif request.target[:1] not in (b"/", b"*") and request.method != b"CONNECT":
        # RFC 9112 §3.2.2: the absolute-form's authority is the one that counts, whatever Host said.
        headers.replace(b"Host", absolute_authority(request.target) or b"")
    elif request.version != b"1.1" and b"host" not in headers:
        # HTTP/1.0 and HTTP/2 may do without; HTTP/1.1 may not (RFC 9112 §3.2).
        headers.items.insert(0, (b"Host", request.authority or str(exchange.facts.destination).encode("ascii")))
    if request.version == b"1.0":
        headers.remove(b"expect")  # RFC 9110 §10.1.1: it is ignored, and the next hop, which is told 1.1, would not know that
    if request.method in max_forwards.METHODS:
        max_forwards.count_down(request, headers)
    if exchange.caller is not None:
        headers.add(CALLER, exchange.caller)
    options = []
    if trailers:
        headers.add(b"TE", b"trailers")
        options.append(b"TE")
    if offer is not None:
        headers.add(b"Upgrade", offer)
        options.append(b"Upgrade")
    if options:
        headers.add(b"Connection", b", ".join(options))
    return RequestHead(request.method, target, headers, request.version, request.protocol)
