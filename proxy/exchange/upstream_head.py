"""The head of a request for the next hop."""

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
    """The protocols that the client offers to upgrade to. HTTP/1.0 has no 101 (RFC 9110 §7.8)."""
    return None if request.version == b"1.0" else upgrade_offer(request.headers)


def forwarded_request(exchange: Exchange) -> RequestHead:
    """Return the head for the next hop. The hop-by-hop fields of the previous hop (RFC 9110 §7.6)
    are replaced by those for the next one. The fields that the flow sets (another authority, the
    caller) are added. If the client gave no authority, the original destination is the
    authority."""
    request = exchange.request
    canonical = (
        request.version != b"2" and request.headers.clean and request.target.startswith(b"/")
    )
    if canonical and exchange.authority is None and exchange.caller is None:
        return request  # forwarded unchanged
    if request.headers.block is not None and exchange.authority is None:
        headers = request.headers.onward()  # the lines contain no field that needs special handling
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
        # RFC 9112 §3.2.2: the authority of an absolute-form target takes precedence over Host.
        headers.replace(b"Host", absolute_authority(request.target) or b"")
    elif request.version != b"1.1" and b"host" not in headers:
        # Host is optional in HTTP/1.0 and HTTP/2, but required in HTTP/1.1 (RFC 9112 §3.2).
        headers.items.insert(
            0, (b"Host", request.authority or str(exchange.facts.destination).encode("ascii"))
        )
    if request.version == b"1.0":
        # RFC 9110 §10.1.1: ignored in HTTP/1.0; the next hop, which gets HTTP/1.1, would not ignore
        # it
        headers.remove(b"expect")
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
