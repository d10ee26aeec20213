"""The cost of endpoint selection per request: picking, watching, and the possibility of a retry.
Nothing fails here.

Baseline: the same call without the balancer: `await send(exchange, target, target.endpoints[0])`.
Measured are Dispatcher.exchange with a `send` that only reports a good response to the exchange's
judge, and the picking alone. With one endpoint nothing is compared; with several, the response time
of each is recorded.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import trio

from lab.console import print_table
from proxy.balancing.balancer import Balancer
from proxy.directory import Endpoint, Target
from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import ConnectionInfo, Exchange, Whole
from proxy.exchange.timer import ExchangeTimer
from proxy.net.address import Address
from proxy.routing.dispatch import Dispatcher
from proxy.telemetry.metrics import Metrics
from proxy.wire.messages import Headers, RequestHead, ResponseHead

ROUNDS = 20_000
REPEATS = 5


class _Exchange(Exchange):
    inform = respond = switch = abort = None  # type: ignore[assignment]  # nothing is answered here


_Exchange.__abstractmethods__ = frozenset()

_REQUEST = RequestHead(b"GET", b"/api/items/123", Headers([(b"Host", b"shop")]))
_FACTS = ConnectionInfo("outbound", Address("10.0.0.1", 1), Address("10.0.0.2", 2))
_HEAD = ResponseHead(200, Headers([(b"Content-Length", b"0")]))


def _microseconds(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=ROUNDS, repeat=REPEATS)) / ROUNDS * 1e6


def _runs(make: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: _run(make())


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits, so that no scheduler is needed."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waited")


async def _measure() -> None:
    rows = []
    for count in (1, 5, 5000):
        places = tuple(
            Endpoint(Address(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 80)) for n in range(count)
        )
        target = Target("default/shop", places)
        balancer = Balancer(trio.current_time)
        dispatcher, endpoint_set = (
            Dispatcher(balancer, Metrics(), ClientSettings()),
            balancer.endpoint_set("default/shop"),
        )
        exchange = _Exchange(_REQUEST, Whole(), _FACTS)
        exchange.timer = ExchangeTimer(trio.CancelScope())
        exchange.timer.since = trio.current_time()

        async def send(exchange: Exchange, _: Target, __: Endpoint) -> None:
            if exchange.judge is not None:
                exchange.judge(_HEAD, None)

        def choose(_: Exchange, target: Target = target) -> Target:
            return target

        async def bare(
            choose: Callable[[Exchange], Target] = choose, exchange: Exchange = exchange
        ) -> None:
            exchange.judge = None
            target = choose(exchange)
            await send(exchange, target, target.endpoints[0])

        for _ in range(3 * count):  # every endpoint has a history
            _run(dispatcher.exchange(exchange, choose, send))
        picking = _microseconds(partial(endpoint_set.pick, target))
        baseline = _microseconds(_runs(bare))
        whole = _microseconds(_runs(partial(dispatcher.exchange, exchange, choose, send)))
        figures = (picking, baseline, whole, whole - baseline)
        rows.append([f"{count} endpoint(s)", *(f"{figure:.2f}" for figure in figures)])
    print_table(
        ["microseconds a request", "pick alone", "baseline", "all of it", "the difference"], rows
    )


def main() -> None:
    trio.run(_measure)


if __name__ == "__main__":
    main()
