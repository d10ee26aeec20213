"""Which of a target's endpoints gets the next request or connection.

Power of two choices: two endpoints are drawn at random, and the one with less to do for its weight is taken. That is nearly as good as
asking all of them, costs the same for five endpoints as for five thousand, and, unlike always taking the least loaded, does not send
every client's next request to the same newcomer (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing").

An endpoint that could not be connected to is avoided for `AVOID` seconds, so that a pod that has just gone costs one attempt and not
one per request; when there is no other, it is tried all the same, for its last failure is older news than its directory entry.

Everything here is a plain, synchronous decision; chance and clock are given from outside.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from proxy.mesh.directory import Endpoint, Target
from proxy.net.address import Address

# Kubernetes takes a pod out of its service within a few seconds; until then, this keeps requests away from it.
AVOID = 5.0
# Addresses with something outstanding are always remembered, and bounded by the proxy's connections; this bounds the failed ones.
MOST_FAILED = 4096


class Balancer:
    """Outstanding work and recent failures by address. An address with neither takes no memory."""

    def __init__(self, clock: Callable[[], float], chance: random.Random | None = None) -> None:
        """`clock` gives seconds (trio.current_time); `chance` is for tests that need the same draw twice."""
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311  (no secret depends on it)
        self._outstanding: dict[Address, int] = {}
        self._failed: OrderedDict[Address, float] = OrderedDict()

    def pick(self, target: Target, exclude: Collection[Endpoint] = ()) -> Endpoint | None:
        """An endpoint that is ready, not in `exclude` and not recently failed, if there is one; then one that failed; else None."""
        if self._failed:
            self._forget()
        every = target.endpoints
        if len(every) > 1:
            one, two = self._draw(every)
            # Nearly always both will do; only otherwise is it worth looking at all of them.
            if all(end.ready and end not in exclude and end.address not in self._failed for end in (one, two)):
                return self._less_loaded(one, two)
        usable = [endpoint for endpoint in every if endpoint.ready and endpoint not in exclude]
        usable = [endpoint for endpoint in usable if endpoint.address not in self._failed] or usable
        if len(usable) > 1:
            return self._less_loaded(*self._draw(usable))
        return usable[0] if usable else None

    def usable(self, target: Target) -> int:
        """How many endpoints of `target` would get a request now."""
        if self._failed:
            self._forget()
        return sum(endpoint.ready and endpoint.address not in self._failed for endpoint in target.endpoints)

    def _draw(self, endpoints: Sequence[Endpoint]) -> tuple[Endpoint, Endpoint]:
        """Two different ones of at least two, every pair as likely as any other."""
        first = int(self._chance.random() * len(endpoints))
        second = int(self._chance.random() * (len(endpoints) - 1))
        return endpoints[first], endpoints[second + (second >= first)]

    def _less_loaded(self, one: Endpoint, two: Endpoint) -> Endpoint:
        # a weight is a share: twice the weight may have twice the work
        return one if self._load(one) * two.weight <= self._load(two) * one.weight else two

    def _load(self, endpoint: Endpoint) -> int:
        return self._outstanding.get(endpoint.address, 0) + 1

    def outstanding(self, address: Address) -> int:
        """How much has been started at `address` and not finished."""
        return self._outstanding.get(address, 0)

    def started(self, endpoint: Endpoint) -> None:
        """A request or connection begins; `finished` has to follow, whatever happens."""
        self._outstanding[endpoint.address] = self._outstanding.get(endpoint.address, 0) + 1

    def finished(self, endpoint: Endpoint) -> None:
        left = self._outstanding[endpoint.address] - 1
        if left:
            self._outstanding[endpoint.address] = left
        else:
            del self._outstanding[endpoint.address]

    @contextmanager
    def using(self, endpoint: Endpoint) -> Iterator[None]:
        """`started` and `finished` around a block."""
        self.started(endpoint)
        try:
            yield
        finally:
            self.finished(endpoint)

    def failed(self, endpoint: Endpoint) -> None:
        """It could not be connected to: avoided for a while."""
        self._failed[endpoint.address] = self._clock() + AVOID
        self._failed.move_to_end(endpoint.address)
        if len(self._failed) > MOST_FAILED:
            self._failed.popitem(last=False)

    def connected(self, endpoint: Endpoint) -> None:
        """It could be connected to: whatever failed there is over."""
        self._failed.pop(endpoint.address, None)

    def _forget(self) -> None:
        """Failures lie in the order of their ends, so the past ones are in front."""
        now = self._clock()
        while self._failed and next(iter(self._failed.values())) <= now:
            self._failed.popitem(last=False)
