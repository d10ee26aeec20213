"""The choice of an endpoint for each attempt of one request or connection.

The fast path, the ordinary path and opaque connections call the same function. The fast path takes
the first choice only, and only while all endpoints of the service are healthy."""

from __future__ import annotations

from typing import Final

from proxy.balancing.endpoint_set import EndpointSet
from proxy.directory import Endpoint, Target

# More tries to connect would only make the client wait: the service as a whole is down.
ENDPOINTS_TRIED = 3


class EndpointChoice:
    """`first`: drawn on the fast path, without a connection there. It is the first choice if it is
    still usable, because a second draw would change the odds."""

    __slots__ = ("failure", "first", "tried", "unreached")

    def __init__(self, first: Endpoint | None = None) -> None:
        self.first = first
        self.tried: tuple[Endpoint, ...] = ()
        self.unreached: tuple[Endpoint, ...] = ()  # those of `tried` without a connection
        self.failure: Exception | None = None  # why the last endpoint could not be connected to

    def pick(self, endpoint_set: EndpointSet, target: Target) -> Endpoint | None:
        """The endpoint of the next attempt. None: wait for one, because none can be used now, or
        because others wait already. Raises `failure` if neither a wait nor another endpoint helps.
        """
        first, self.first = self.first, None
        if first is not None and endpoint_set.is_usable(first, target):
            endpoint: Endpoint | None = first
        else:
            endpoint = endpoint_set.pick(target, self.tried)
            if endpoint is None and len(self.tried) > len(self.unreached):
                endpoint = endpoint_set.pick(target, self.unreached)
        failure = self.failure
        if failure is not None and endpoint is None and not endpoint_set.may_return(target):
            raise failure
        if endpoint is None or endpoint_set.queue:
            return None
        if failure is not None and len(self.unreached) >= ENDPOINTS_TRIED:
            raise failure
        return endpoint

    def answered(self, endpoint: Endpoint) -> None:
        """The attempt at `endpoint` has failed after there was a connection."""
        self.tried += (endpoint,)

    def not_connected(self, endpoint: Endpoint, failure: Exception) -> None:
        """`endpoint` could not be connected to."""
        self.tried += (endpoint,)
        self.unreached += (endpoint,)
        self.failure = failure

    def waited(self) -> None:
        """An endpoint was found by a wait. It may be one that failed before."""
        self.tried = self.unreached = ()


_FIRST: Final = EndpointChoice()  # never changed: nothing was tried


def pick_healthy(endpoint_set: EndpointSet, target: Target) -> Endpoint | None:
    """The endpoint of a first attempt that cannot wait and makes no trials. None: there is none, or
    a circuit breaker of the service is not closed, or others wait."""
    return None if endpoint_set.broken else _FIRST.pick(endpoint_set, target)


def only_endpoint(target: Target) -> Endpoint | None:
    """The endpoint of an address without a service, which has no alternative and no history."""
    for endpoint in target.endpoints:
        if endpoint.ready:
            return endpoint
    return None
