"""From a target to one of its endpoints: which one, and which other one if that does not do.

A flow knows what may serve a request (a target, asked for anew before each attempt, since what is usable may have changed) and how to
carry it to an endpoint. What lies between the two is here.

A request whose endpoint cannot be connected to has not been sent, so another endpoint may have it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from proxy.errors import NoEndpoint, UpstreamTLSError
from proxy.exchange.exchange import Exchange
from proxy.mesh.balance import Balancer
from proxy.mesh.directory import Endpoint, Target
from proxy.net.errors import ConnectFailed

T = TypeVar("T")

# More than a few tries would only make the client wait: then the service is down, not an endpoint of it.
_ENDPOINTS_TRIED = 3


class Reach:
    """The way from targets to endpoints, for requests and for connections."""

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer

    async def exchange(
        self,
        exchange: Exchange,
        choose: Callable[[Exchange], Target],
        send: Callable[[Exchange, Target, Endpoint], Awaitable[None]],
    ) -> None:
        """Carry `exchange` by `send` to an endpoint of what `choose` says. Raises NoEndpoint, and what `send` raises."""
        await self.connection(lambda: choose(exchange), lambda target, endpoint: send(exchange, target, endpoint))

    async def connection(self, choose: Callable[[], Target], use: Callable[[Target, Endpoint], Awaitable[T]]) -> T:
        """`use` an endpoint of what `choose` says; another one if the first cannot be connected to. Raises NoEndpoint, and what `use`
        raises."""
        tried: list[Endpoint] = []
        failure: ConnectFailed | None = None
        while True:
            target = choose()
            endpoint = self._balancer.pick(target, exclude=tried) if len(tried) < _ENDPOINTS_TRIED else None
            if endpoint is None:
                if failure is not None:
                    raise failure
                raise NoEndpoint(f"none of the {len(target.endpoints)} endpoints of {target.service or 'the destination'} is ready")
            try:
                with self._balancer.using(endpoint):
                    return await use(target, endpoint)
            except UpstreamTLSError:
                self._balancer.failed(endpoint)  # let the next one go elsewhere; this one fails, and says why
                raise
            except ConnectFailed as error:
                if error.reason == "local":
                    raise  # another endpoint would not help, and this one is not to be avoided for it
                self._balancer.failed(endpoint)
                tried.append(endpoint)
                failure = error
