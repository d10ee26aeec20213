"""A proxy that balances between real servers, and scripted servers, which do one step for each
request."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import trio

from proxy.balancing.balancer import Balancer
from proxy.directory import Endpoint, Target
from proxy.directory.policy import Policy, read_policy
from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import Exchange, FailedAttempt
from proxy.net.address import Address
from proxy.routing.dispatch import Dispatcher
from proxy.settings.document import Mistakes, load
from proxy.telemetry.metrics import Metrics
from tests.kit.http import Message, Peer, Script, origin
from tests.kit.http2_hop import Hop2, Settings2, hop2
from tests.kit.http2_peers import reserve

# Seconds of real time without an event after which a MockClock jumps. It is longer than any delay
# of the kernel between two ends of this process.
AUTOJUMP = 0.06
PUT = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"
# Responses of a sidecar whose application has closed, and of one that quotes another proxy.
CLOSED = (
    b"HTTP/1.1 502 x\r\nProxy-Status:"
    b' a;error=connection_terminated;details="b;error=connection_refused"\r\nContent-Length:'
    b" 0\r\n\r\n"
)
# The response of a sidecar whose application does not listen.
NOT_LISTENING = (
    b"HTTP/1.1 502 Bad Gateway\r\nProxy-Status:"
    b" web-1.default.inbound;error=connection_refused\r\nContent-Length: 4\r\n\r\nnone"
)


def policy(text: str = "") -> Policy:
    mistakes = Mistakes()
    found = read_policy(load(text, "test"), "policy", mistakes)
    assert not mistakes, mistakes.found()
    return found


@dataclass
class Mesh:
    """A proxy, its balancer, and what it has done."""

    target: Target
    metrics: Metrics = field(default_factory=Metrics)
    balancer: Balancer = field(
        default_factory=lambda: Balancer(trio.current_time, random.Random(5))
    )
    tried: list[list[FailedAttempt]] = field(default_factory=list)
    hop: Hop2 = field(init=False)

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher(self.balancer, self.metrics, ClientSettings())

    async def steer(self, exchange: Exchange, send: Callable[[Address], Awaitable[None]]) -> None:
        async def to(exchange: Exchange, _: Target, endpoint: Endpoint) -> None:
            exchange.upstream = endpoint.address
            await send(endpoint.address)

        try:
            await self.dispatcher.exchange(exchange, lambda _: self.target, to)
        finally:
            self.tried.append(exchange.tried or [])

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"isthmus_{name}", labels) or 0.0

    @property
    def broken(self) -> int:
        return len(list(self.balancer.broken()))


@asynccontextmanager
async def mesh(
    scripts: list[Script], rules: Policy, *, dead: int = 0, up: bytes = b"1.1"
) -> AsyncIterator[tuple[Mesh, list[Address]]]:
    """A proxy to servers that run `scripts`, and to this number of addresses without a listener."""
    async with AsyncExitStack() as stack:
        places = [(await stack.enter_async_context(origin(script))).address for script in scripts]
        for _ in range(dead):
            taken, place = reserve()  # so that no other program listens there
            stack.enter_context(taken)
            places.append(place)
        world = Mesh(
            Target("default/web", tuple(Endpoint(place) for place in places), policy=rules)
        )
        world.hop = await stack.enter_async_context(
            hop2(*places, settings=Settings2(up=up, steer=world.steer))
        )
        yield world, places


Step = Callable[[Peer, Message], Awaitable[None]]


def saying(data: bytes) -> Step:
    async def step(peer: Peer, _: Message) -> None:
        await peer.send(data)

    return step


async def breaking(peer: Peer, _: Message) -> None:
    peer.reset()
    raise trio.BrokenResourceError


async def silent(_: Peer, __: Message) -> None:
    await trio.sleep_forever()


def taking(steps: list[Step], received: list[Message]) -> Script:
    """A server that answers its requests in sequence as `steps` say. All its connections, and other
    servers, share the steps."""

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            received.append(request)
            await steps.pop(0)(peer, request)

    return script


@dataclass
class Outcome:
    status: int
    body: bytes
    proxy_status: bytes
    received: list[Message]
    world: Mesh


async def response_to(
    request: bytes, steps: list[Step], rules: str = "", *, servers: int = 2
) -> Outcome:
    """The client's response if the servers, in any order, do these steps in sequence."""
    received: list[Message] = []
    async with mesh([taking(steps, received)] * servers, policy(rules)) as (world, _):
        client = await world.hop.connect()
        answer = await client.ask(request, request.split()[0].decode())
        return Outcome(
            answer.status, answer.body, answer.get(b"proxy-status") or b"", received, world
        )
