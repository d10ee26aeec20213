"""The loop guard's place around an exchange: a request that has been here is refused, any other one goes on with our token.

Between `rescue`, which answers what is raised here, and `deadline`. Finding the two fields that matter is what it costs, so they are looked
for in the lines as they came, if nobody has split these; otherwise in one pass over the fields.
"""

from __future__ import annotations

from collections.abc import Callable

from loopguard.l7 import HEADER, Dropped, Waypoint, from_outside, nameless, outsiders, read
from proxy.errors import LoopDetected
from proxy.exchange.exchange import Exchange, Handler, Layer
from proxy.wire.messages import place


def guard(waypoint: Waypoint, dropped: Callable[[Dropped], None]) -> Layer:
    """`dropped` hears why tokens were not believed."""

    def layer(handler: Handler) -> Handler:
        async def handle(exchange: Exchange) -> None:
            if not exchange.guarded:
                leave_token(exchange, waypoint, dropped)
            await handler(exchange)

        return handle

    return layer


_HOST, _HOPS = b"\nhost: ", b"\n" + HEADER + b": "


def leave_token(exchange: Exchange, waypoint: Waypoint, dropped: Callable[[Dropped], None]) -> None:
    """Put our token on the request. Raises LoopDetected."""
    headers = exchange.request.headers
    block = headers.block
    if block is None:
        _among_fields(exchange, waypoint, dropped)
        return
    lower = block.lower()
    came = lower.count(HEADER)
    start = place(lower, _HOPS) if came else 0
    if came > 1 or (came and not start):  # there are several, or it is no name but stands within a value
        _among_fields(exchange, waypoint, dropped)
        return
    host = place(lower, _HOST)
    token = _token(exchange, waypoint, block[host : block.index(b"\r", host)])
    if came:
        end = block.index(b"\r", start)
        field = _extended(exchange, waypoint, token, [block[start:end]], dropped)
        headers.block = b"%b%b%b" % (block[:start], field, block[end:])
    else:
        headers.append(HEADER, waypoint.named(token))


def _token(exchange: Exchange, waypoint: Waypoint, authority: bytes) -> bytes:
    """Ours for this request."""
    request = exchange.request
    token = waypoint.token(request.method, request.target, authority)
    return outsiders(token) if _from_outsider(exchange) else token


def _from_outsider(exchange: Exchange) -> bool:
    return exchange.facts.identity is None and exchange.facts.direction != "outbound"


def _extended(exchange: Exchange, waypoint: Waypoint, token: bytes, came: list[bytes], dropped: Callable[[Dropped], None]) -> bytes:
    """The field, whose lines have come with these values, as it goes on. Raises LoopDetected."""
    field, why = read(came)
    if why:
        dropped(why)
    outsider = _from_outsider(exchange)
    if outsider:
        field = nameless(field)
    loop = waypoint.met(field, token) if field else None
    if loop is not None:
        exchange.outside = outsider or from_outside(field)
        raise LoopDetected(loop.words, loop.kind, loop.cycle)
    return waypoint.extended(field, token) if field else waypoint.named(token)


def _among_fields(exchange: Exchange, waypoint: Waypoint, dropped: Callable[[Dropped], None]) -> None:
    items = exchange.request.headers.items
    authority, came = b"", None
    for item in items:
        size = len(item[0])
        if size == 4:
            if item[0].lower() == b"host":
                authority = item[1]
        elif size == 12 and item[0].lower() == HEADER:
            came = [item] if came is None else [*came, item]
    token = _token(exchange, waypoint, authority)
    if came is None:
        items.append((HEADER, waypoint.named(token)))
        return
    field = _extended(exchange, waypoint, token, [value for _, value in came], dropped)
    items[items.index(came[0])] = (HEADER, field)
    for item in came[1:]:
        items.remove(item)


def unguarded(exchange: Exchange, waypoint: Waypoint) -> bool:
    """The same on the fast path. False: there is more to it than a token. Nothing has been counted: the ordinary path will find it too."""
    try:
        leave_token(exchange, waypoint, _more)
    except (LoopDetected, _More):
        return False
    exchange.guarded = True
    return True


class _More(Exception):
    pass


def _more(_: Dropped) -> None:
    raise _More


def hide_names(exchange: Exchange) -> None:
    """Before a request leaves the trust domain: who has carried it is nobody's business there."""
    for index, (name, value) in enumerate(exchange.request.headers.items):
        if len(name) == 12 and name.lower() == HEADER:
            exchange.request.headers.items[index] = (HEADER, nameless(value))
