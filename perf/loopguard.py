"""The cost of the loop guard per request: one call of the layer, in microseconds.

Baseline: building the request's fields without the layer. Three requests: from an application that
forwards nothing (no tokens yet: the outbound side), from a peer (one token), and from an ingress
behind six sidecars.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from lab.console import print_table
from loopguard import HopLimits, HopTokens, ProxyName
from loopguard.l7 import HEADER
from proxy.exchange.exchange import ConnectionInfo, Exchange, Whole
from proxy.exchange.loop_layer import add_token
from proxy.net.address import Address
from proxy.wire.messages import Headers, RequestHead

ROUNDS = 20_000
REPEATS = 5

# Ten fields, like a request of a browser or a gRPC client.
FIELDS = [
    (b"Host", b"shop.default.svc.cluster.local:8080"), (b"User-Agent", b"python-httpx/0.27"),
    (b"Accept", b"*/*"), (b"Accept-Encoding", b"gzip, deflate, br"),
    (b"Content-Type", b"application/json"), (b"Content-Length", b"0"),
    (b"Authorization", b"Bearer " + b"x" * 200),
    (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    (b"X-Request-Id", b"3f1c2d4e-0000-4000-8000-123456789abc"),
    (b"Cookie", b"session=" + b"y" * 64),
]  # fmt: skip


class _Exchange(Exchange):
    inform = respond = switch = abort = None  # type: ignore[assignment]  # nothing is answered here


_Exchange.__abstractmethods__ = frozenset()


def microseconds(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=ROUNDS, repeat=REPEATS)) / ROUNDS * 1e6


def main() -> None:
    who, limits = ProxyName("west", "default", "web-6d4cf56db6-abcde"), HopLimits(4, 64)
    places = [HopTokens("outbound", who, bytes([number]) * 32, limits) for number in range(13)]
    here, facts = (
        places[0],
        ConnectionInfo("outbound", Address("10.0.0.1", 1), Address("10.0.0.2", 2)),
    )
    request = RequestHead(b"GET", b"/api/items/123?expand=all", Headers(FIELDS))
    exchange = _Exchange(request, Whole(), facts)

    def field(count: int) -> bytes:
        return b", ".join(
            place.with_name(place.token(b"GET", request.target, b"shop"))
            for place in places[1 : count + 1]
        )

    rows = []
    for name, hops in (("no tokens yet", 0), ("one token", 1), ("twelve tokens", 12)):
        fields = [*FIELDS, (HEADER, field(hops))] if hops else FIELDS

        def fresh(fields: list[tuple[bytes, bytes]] = fields) -> None:
            request.headers.items = fields.copy()

        def guarded(fields: list[tuple[bytes, bytes]] = fields) -> None:
            request.headers.items = fields.copy()
            add_token(exchange, here, print)

        baseline, whole = microseconds(fresh), microseconds(guarded)
        rows.append([name, *(f"{figure:.2f}" for figure in (baseline, whole, whole - baseline))])
    print_table(["microseconds a request", "baseline", "with the guard", "the guard"], rows)


if __name__ == "__main__":
    main()
