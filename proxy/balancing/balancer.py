"""Which of a target's endpoints gets the next request or connection.

Power of two choices: two endpoints are drawn at random, and the one that is less busy (ewma.py says what that is) is taken. That is
nearly as good as asking all of them, costs the same for five endpoints as for five thousand, and, unlike always taking the least busy,
does not send every client's next request to the same newcomer (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing").

Weights. An endpoint of weight w holds w places, and it is places that are drawn (weighted.py). Where endpoints are equally busy shares are
as the weights say, and an endpoint is as busy as what is out for each of its places. What differs by less than a quarter is taken
as equal: such differences are noise, and to follow them would send everything to the one that was lucky last.

Zones. If enough endpoints in the proxy's own zone can be used, it is them that are drawn from; otherwise all.

Slow start. An endpoint that joins others is passed over by chance, the less often the longer it is there. It is not new if all are. One
that was broken and has recovered is new again.

Health. Endpoints whose breaker (circuit_breaker.py) is open are not drawn, and one whose penalty is over is taken first, for one request.
If all are broken, those are drawn that respond after all, as if they were not broken; if none does, the one that has waited longest is
tried early, a first step after the last trial: so one request in about a second finds out
when the service is back, however long it was away, and when one is back the others are tried as soon. While
nothing has failed, none of this is looked at, and while a service has one endpoint, nothing is measured.

What is remembered belongs to a service (endpoint_set.py): the same gateway may lead to one service that is well and to one that is not. It
is forgotten when it says nothing any more. Everything is a plain, synchronous decision; chance and clock are given from outside.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from proxy.balancing.circuit_breaker import State
from proxy.balancing.endpoint_set import Change, EndpointSet, Surroundings
from proxy.directory import Target
from proxy.net.address import Address


def _unheard(_: Change) -> None:
    pass


class Balancer:
    """What is known of the endpoints of all services."""

    def __init__(self, clock: Callable[[], float], chance: random.Random | None = None, zone: str = "") -> None:
        """`clock` gives seconds (trio.current_time); `chance` is for tests that need the same draw twice; `zone` is the proxy's own."""
        self._around = Surroundings(clock, chance or random.Random(), zone, _unheard)  # noqa: S311  (no secret depends on it)
        self._endpoint_sets: dict[str, EndpointSet] = {}

    def on_change(self, tell: Callable[[Change], None]) -> None:
        """`tell` hears of each change of a breaker, in the middle of what has caused it."""
        self._around.on_change = tell

    def endpoint_set(self, service: str) -> EndpointSet:
        """What is known of the endpoints of `service`; kept while there is something to keep."""
        endpoint_set = self._endpoint_sets.get(service)
        if endpoint_set is None:
            endpoint_set = self._endpoint_sets[service] = EndpointSet(self._around, service)
        return endpoint_set

    def usable(self, target: Target) -> int:
        """How many endpoints of `target` are ready and not broken. One that is to be tried, or being tried, is broken until it has
        answered: what depends on the number does not change with each trial."""
        if target.service is None:
            return sum(endpoint.ready for endpoint in target.endpoints)
        return self.endpoint_set(target.service).usable(target)

    def trial(self, target: Target, *, alone: bool = False) -> bool:
        """Whether a request that is sent to `target` now would find out about a broken endpoint of it. Whoever goes elsewhere for want of
        usable endpoints sends such a one, or would not hear that they are back. `alone`: there is no elsewhere."""
        return target.service is not None and self.endpoint_set(target.service).trial(target, alone=alone)

    def broken(self) -> Iterator[tuple[str, Address, State]]:
        """The endpoints that are left alone or on probation, by service."""
        for endpoint_set in self._endpoint_sets.values():
            for address, breaker in endpoint_set.broken.items():
                yield endpoint_set.service, address, breaker.state

    def waiting(self) -> int:
        """How many requests and connections wait for an endpoint."""
        return sum(len(endpoint_set.queue) for endpoint_set in self._endpoint_sets.values())

    def wake(self) -> None:
        """The directory has changed: there may be something for those who wait."""
        for endpoint_set in self._endpoint_sets.values():
            endpoint_set.queue.wake()

    def sweep(self) -> None:
        """Forget what says nothing any more. About every ten seconds."""
        now = self._around.clock()
        self._endpoint_sets = {service: endpoint_set for service, endpoint_set in self._endpoint_sets.items() if endpoint_set.sweep(now)}
