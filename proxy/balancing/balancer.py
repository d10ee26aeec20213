"""The balancer: it selects the endpoint of a target for the next request or connection.

Power of two choices: it draws two endpoints at random and takes the less busy one (ewma.py defines
the load). This is nearly as good as a comparison of all endpoints, and costs the same for five
endpoints as for five thousand. A choice of the least busy endpoint would send the next request of
every client to the same new endpoint. This choice does not (Mitzenmacher, "The Power of Two Choices
in Randomized Load Balancing").

Weights. An endpoint of weight w holds w places, and the draw selects places (weighted.py). If all
endpoints are equally busy, their shares follow the weights. The load counts the pending requests
per place. Loads that differ by less than a quarter count as equal. Such differences are noise:
without this rule, all requests would go to the endpoint with the fastest last response.

Zones. If enough endpoints in the proxy's own zone are usable, the draw uses these only, otherwise
all.

Slow start. The draw skips an endpoint that joins others with a probability that decreases with its
age. An endpoint is not new if all are new. After a recovery, an endpoint counts as new again.

Health. The draw skips endpoints whose circuit breaker (circuit_breaker.py) is open. If a penalty
has ended, that endpoint gets the next request, as a trial. If all circuit breakers are open, the
draw uses the endpoints that still respond, as if their breakers were closed. If none responds, the
endpoint that has waited longest gets an early trial, one step after the last trial. So about one
request per second finds out when the service recovers, however long the outage was. When one
endpoint has recovered, the remaining penalties of the others are cut to one step. While nothing has
failed, the balancer skips these checks. For a service with one endpoint, it measures nothing.

The state belongs to a service (endpoint_set.py), because a gateway may lead to a healthy service
and to one that fails. The balancer drops state that is no longer meaningful. All decisions are
synchronous functions. The caller provides the random generator and the clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from proxy.balancing.circuit_breaker import BreakerState
from proxy.balancing.endpoint_set import BreakerChange, EndpointSet, Surroundings
from proxy.directory import Target
from proxy.net.address import Address


def _ignore(_: BreakerChange) -> None:
    pass


class Balancer:
    """The endpoint sets of all services."""

    def __init__(
        self, clock: Callable[[], float], chance: random.Random | None = None, zone: str = ""
    ) -> None:
        """`clock` returns seconds (trio.current_time). `chance`: a random generator, for tests that
        need repeatable draws. `zone`: the proxy's own."""
        self._around = Surroundings(clock, chance or random.Random(), zone, _ignore)  # noqa: S311  (no secret depends on it)
        self._endpoint_sets: dict[str, EndpointSet] = {}

    def on_change(self, tell: Callable[[BreakerChange], None]) -> None:
        """Set the function that gets each change of a circuit breaker. It is called while the
        change happens."""
        self._around.on_change = tell

    def endpoint_set(self, service: str) -> EndpointSet:
        """The endpoint set of `service`. It is kept as long as it has state."""
        endpoint_set = self._endpoint_sets.get(service)
        if endpoint_set is None:
            endpoint_set = self._endpoint_sets[service] = EndpointSet(self._around, service)
        return endpoint_set

    def usable(self, target: Target) -> int:
        """The number of endpoints of `target` that are ready and whose circuit breaker is closed.
        An endpoint that is due for a trial, or has one in progress, does not count until it has
        answered, so that the number does not change with each trial."""
        if target.service is None:
            return sum(endpoint.ready for endpoint in target.endpoints)
        return self.endpoint_set(target.service).usable(target)

    def trial(self, target: Target, *, alone: bool = False) -> bool:
        """Whether a request to `target` now would be the trial of an endpoint. A caller that uses
        another target because too few endpoints are usable must send such a request here, otherwise
        it never learns that they have recovered. `alone`: there is no other target."""
        return target.service is not None and self.endpoint_set(target.service).trial(
            target, alone=alone
        )

    def broken(self) -> Iterator[tuple[str, Address, BreakerState]]:
        """(service, address, state) of each endpoint whose circuit breaker is open or half-open."""
        for endpoint_set in self._endpoint_sets.values():
            for address, breaker in endpoint_set.broken.items():
                yield endpoint_set.service, address, breaker.state

    def waiting(self) -> int:
        """The number of requests and connections that wait for an endpoint."""
        return sum(len(endpoint_set.queue) for endpoint_set in self._endpoint_sets.values())

    def wake(self) -> None:
        """The directory has changed: wake the waiting requests."""
        for endpoint_set in self._endpoint_sets.values():
            endpoint_set.queue.wake()

    def sweep(self) -> None:
        """Drop state that is no longer meaningful. Called about every ten seconds."""
        now = self._around.clock()
        self._endpoint_sets = {
            service: endpoint_set
            for service, endpoint_set in self._endpoint_sets.items()
            if endpoint_set.sweep(now)
        }
