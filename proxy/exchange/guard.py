"""The loop guard's place around an exchange: a request that has been here is refused, any other one goes on with our token.

Between `rescue`, which answers what is raised here, and `deadline`. One pass over the fields finds both that matter, because the pass is
what it costs: most requests come from an application that forwards nothing, and have no tokens yet.
"""

from __future__ import annotations

from collections.abc import Callable

from loopguard.l7 import HEADER, Dropped, Waypoint, from_outside, nameless, outsiders, read
from proxy.errors import LoopDetected
from proxy.exchange.exchange import Exchange, Handler, Layer


def guard(waypoint: Waypoint, dropped: Callable[[Dropped], None]) -> Layer:
    """`dropped` hears why tokens were not believed."""

    def layer(handler: Handler) -> Handler:
        async def handle(exchange: Exchange) -> None:
            if not exchange.guarded:
                leave_token(exchange, waypoint, dropped)
            await handler(exchange)

        return handle

    return layer


def leave_token(exchange: Exchange, waypoint: Waypoint, dropped: Callable[[Dropped], None]) -> None:
    """Put our token on the request. Raises LoopDetected."""
    request, facts = exchange.request, exchange.facts
    items = request.headers.items
    authority, came = b"", None
    for item in items:
        size = len(item[0])
        if size == 4:
            if item[0].lower() == b"host":
                authority = item[1]
        elif size == 12 and item[0].lower() == HEADER:
            came = [item] if came is None else [*came, item]
    token = waypoint.token(request.method, request.target, authority)
    outsider = facts.identity is None and facts.direction != "outbound"
    if outsider:
        token = outsiders(token)
    if came is None:
        items.append((HEADER, waypoint.named(token)))
        return
    field, why = read([value for _, value in came])
    if why:
        dropped(why)
    if outsider:
        field = nameless(field)
    loop = waypoint.met(field, token) if field else None
    if loop is not None:
        exchange.outside = outsider or from_outside(field)
        raise LoopDetected(loop.words, loop.kind, loop.cycle)
    items[items.index(came[0])] = (HEADER, waypoint.extended(field, token) if field else waypoint.named(token))
    for item in came[1:]:
        items.remove(item)


def unguarded(exchange: Exchange, waypoint: Waypoint) -> bool:
    """The same on the fast road. False: there is more to it than a token. Nothing has been counted: the ordinary road will find it too."""
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
