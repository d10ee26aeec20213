"""The layer of the loop guard: it refuses a request that has passed this proxy before, and adds our
token to every other one.

It stands between `rescue`, which answers the errors raised here, and `deadline`. Most of its cost
is finding two fields. It searches the header block as it was received, if the block was not split
into fields yet; otherwise it makes one pass over the fields.
"""

from __future__ import annotations

from collections.abc import Callable

from loopguard.l7 import HEADER, Dropped, HopTokens, from_outside, mark_outside, read, strip_names
from proxy.errors import LoopDetected
from proxy.exchange.exchange import Exchange, Handler, Layer
from proxy.wire.messages import place


def guard(hop_tokens: HopTokens, dropped: Callable[[Dropped], None]) -> Layer:
    """Return the layer. `dropped` is called with the reason for each token that was not
    accepted."""

    def layer(handler: Handler) -> Handler:
        async def handle(exchange: Exchange) -> None:
            if not exchange.guarded:
                add_token(exchange, hop_tokens, dropped)
            await handler(exchange)

        return handle

    return layer


_HOST, _HOPS = b"\nhost: ", b"\n" + HEADER + b": "


def add_token(
    exchange: Exchange, hop_tokens: HopTokens, dropped: Callable[[Dropped], None]
) -> None:
    """Add our token to the request. Raises LoopDetected."""
    headers = exchange.request.headers
    block = headers.block
    if block is None:
        _add_among_fields(exchange, hop_tokens, dropped)
        return
    lower = block.lower()
    came = lower.count(HEADER)
    start = place(lower, _HOPS) if came else 0
    if came > 1 or (came and not start):  # several such fields, or the name occurs within a value
        _add_among_fields(exchange, hop_tokens, dropped)
        return
    host = place(lower, _HOST)
    token = _token(exchange, hop_tokens, block[host : block.index(b"\r", host)])
    if came:
        end = block.index(b"\r", start)
        field = _extend(exchange, hop_tokens, token, [block[start:end]], dropped)
        headers.block = b"%b%b%b" % (block[:start], field, block[end:])
    else:
        headers.append(HEADER, hop_tokens.with_name(token))


def _token(exchange: Exchange, hop_tokens: HopTokens, authority: bytes) -> bytes:
    """Our token for this request."""
    request = exchange.request
    token = hop_tokens.token(request.method, request.target, authority)
    return mark_outside(token) if _from_outsider(exchange) else token


def _from_outsider(exchange: Exchange) -> bool:
    return exchange.facts.identity is None and exchange.facts.direction != "outbound"


def _extend(
    exchange: Exchange,
    hop_tokens: HopTokens,
    token: bytes,
    came: list[bytes],
    dropped: Callable[[Dropped], None],
) -> bytes:
    """Return the field's new value. `came`: the values of the received field lines. Raises
    LoopDetected."""
    field, why = read(came)
    if why:
        dropped(why)
    outsider = _from_outsider(exchange)
    if outsider:
        field = strip_names(field)
    loop = hop_tokens.check(field, token) if field else None
    if loop is not None:
        exchange.outside = outsider or from_outside(field)
        raise LoopDetected(loop.words, loop.kind, loop.cycle)
    return hop_tokens.append(field, token) if field else hop_tokens.with_name(token)


def _add_among_fields(
    exchange: Exchange, hop_tokens: HopTokens, dropped: Callable[[Dropped], None]
) -> None:
    items = exchange.request.headers.items
    authority, came = b"", None
    for item in items:
        size = len(item[0])
        if size == 4:
            if item[0].lower() == b"host":
                authority = item[1]
        elif size == 12 and item[0].lower() == HEADER:
            came = [item] if came is None else [*came, item]
    token = _token(exchange, hop_tokens, authority)
    if came is None:
        items.append((HEADER, hop_tokens.with_name(token)))
        return
    field = _extend(exchange, hop_tokens, token, [value for _, value in came], dropped)
    items[items.index(came[0])] = (HEADER, field)
    for item in came[1:]:
        items.remove(item)


def try_add_token(exchange: Exchange, hop_tokens: HopTokens) -> bool:
    """Add our token on the fast path. Returns False if the ordinary path has to run the guard (a
    loop, or a dropped token). Nothing was counted then; the ordinary path will find the same."""
    try:
        add_token(exchange, hop_tokens, _more)
    except (LoopDetected, _More):
        return False
    exchange.guarded = True
    return True


class _More(Exception):
    pass


def _more(_: Dropped) -> None:
    raise _More


def hide_names(exchange: Exchange) -> None:
    """Remove the proxies' names from the request, before it leaves the trust domain."""
    for index, (name, value) in enumerate(exchange.request.headers.items):
        if len(name) == 12 and name.lower() == HEADER:
            exchange.request.headers.items[index] = (HEADER, strip_names(value))
