"""The policy of a service: how its endpoints are used, and what is done when they do not answer as they should.

It is read from the service's `policy` in the directory, so every client of a service keeps to the same one. What it does not say has a
default; a service without a policy has `DEFAULT_POLICY` itself, so that `is` tells. The type of a field says everything about it, as
in proxy/sections.py: the checks, the JSON schema and the table in docs/configuration.md are made from it.

What is never tried again, whatever a policy says: a request of which a byte of the response has been passed on.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from proxy.mesh.document import Mistakes, Plain, child
from proxy.settings import decode, described, number, octets, ratio, seconds
from proxy.units import GrpcCode, Statuses, StatusRange, show_duration

_HOUR, _DAY = 3600, 86400

GrpcCodes = tuple[GrpcCode, ...]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a policy."""


# `request` counts from the head of the request to the end of the response, over all attempts; event streams and long polls would
# fall to any default, so it has none.
class Timeouts(_Part, frozen=True):
    """How long a request may take. None: as the proxy's own settings say (`http.response_timeout`, `http.response_body_timeout`)."""

    request: Annotated[
        float | None, seconds(0.001, _DAY, "from the request to the end of its response, all attempts together; above: 504")
    ] = None
    response_head: Annotated[float | None, seconds(0.001, _DAY, "from the end of a request to the head of its response; above: 504")] = None
    idle: Annotated[float | None, seconds(0.001, _DAY, "longest pause within a body, either way")] = None


# Linkerd's numbers. With a fifth of the requests as their bound, retries cannot make an outage much worse; the few per second that are
# always allowed are for services that are seldom called.
class Budget(_Part, frozen=True):
    """How many retries there may be, to a service, from this proxy."""

    ratio: Annotated[float, ratio(0, 100, "retries for each request of the last `ttl`")] = 0.2
    min_per_second: Annotated[float, ratio(0, 10_000, "retries in a second that are allowed in any case")] = 10.0
    ttl: Annotated[float, seconds(1, 60, "how long a request counts")] = 10.0


class Retries(_Part, frozen=True):
    """What is sent once more, to another endpoint if there is one.

    Always, once: a request whose connection went away before the endpoint can have looked at it. Within `limit` and `budget`: one whose
    stream the endpoint has refused; an idempotent one (RFC 9110 §9.2.2) that broke off without a response; one that was answered with a
    status of `statuses` or `grpc`, or not within `attempt_timeout`. That an endpoint cannot be connected to is no attempt.
    """

    limit: Annotated[int, number(0, 10, "how often at most; 0: never")] = 1
    statuses: Annotated[Statuses, described("HTTP statuses to try again: 503, 5xx, 500-504", 32)] = ()
    grpc: Annotated[GrpcCodes, described("gRPC statuses to try again, by name or number", 17)] = ()
    all_methods: Annotated[bool, described("whether `statuses` also holds for methods that are not idempotent, such as POST")] = False
    attempt_timeout: Annotated[
        float | None, seconds(0.001, _HOUR, "how long an attempt that is not the last may take to the head of its response")
    ] = None
    max_body: Annotated[
        int, octets(0, 2**20, "of a body that is kept to be sent again; a longer one is not, once a part of it has gone")
    ] = 65536
    backoff: Annotated[float, seconds(0, 60, "pause before the first retry, doubled for each further one; half of it is random")] = 0.025
    max_backoff: Annotated[float, seconds(0, 60, "longest pause before a retry")] = 0.25
    budget: Budget = Budget()


# decay and default_rtt are Finagle's and Linkerd's. zone_share: Envoy lets a locality be a third short before others help out.
class Balancing(_Part, frozen=True):
    """Which endpoint gets a request."""

    decay: Annotated[float, seconds(0.1, _HOUR, "how long a response time counts: after this, a third of it is left")] = 10.0
    default_rtt: Annotated[float, seconds(0.0001, 60, "what is expected of an endpoint that has not answered yet")] = 0.03
    slow_start: Annotated[float, seconds(0, _HOUR, "how long a new endpoint's share grows until it is full; 0: at once full")] = 10.0
    zone: Annotated[Literal["prefer", "ignore"], described("whether endpoints in the proxy's own zone (`pod.zone`) come first")] = "prefer"
    zone_share: Annotated[float, ratio(0, 1, "part of the own zone's endpoints that must be usable for the others to get nothing")] = 0.7


class Breaker(_Part, frozen=True):
    """When an endpoint is left alone.

    After `failures` in a row it gets nothing for a penalty, which doubles each time; then one request on probation, which decides. That
    it cannot be connected to counts as all of them. 0 failures: only that counts. If all endpoints are broken, those that respond, if
    only by errors or by closing, are used as if they were not. If none does, one request is sent to try after `connect_penalty`, and
    then in steps that grow with the outage up to `min_penalty`, however long the penalties are.
    """

    failures: Annotated[int, number(0, 1000, "failures in a row; 0: responses do not count")] = 7
    statuses: Annotated[Statuses, described("HTTP statuses that are failures", 32)] = (StatusRange(502, 504),)
    grpc: Annotated[GrpcCodes, described("gRPC statuses that are failures", 17)] = (GrpcCode.unavailable,)
    min_penalty: Annotated[float, seconds(0.01, _HOUR, "how long an endpoint is left alone the first time")] = 1.0
    connect_penalty: Annotated[
        float, seconds(0.01, _HOUR, "the same for one that refuses connections, if that is shorter than `min_penalty`")
    ] = 0.2
    max_penalty: Annotated[float, seconds(0.01, _HOUR, "how long at most")] = 60.0
    jitter: Annotated[float, ratio(0, 1, "part of the penalty that chance adds")] = 0.5


class Queue(_Part, frozen=True):
    """Where requests wait when all endpoints are broken.

    A request is refused when an endpoint has been tried in vain after `timeout`. If the penalties have grown longer than `timeout`, the
    first trial in vain is enough.
    """

    size: Annotated[int, number(0, 100_000, "requests that may wait; above: 503")] = 1024
    timeout: Annotated[float, seconds(0, _HOUR, "how long one waits, and for the next trial after that; above: 503")] = 3.0


class Policy(_Part, frozen=True):
    """How a service is used."""

    overrides: Annotated[bool, described("whether requests may set limits of their own by header (`isthmus-timeout` and others)")] = False
    timeouts: Timeouts = Timeouts()
    retries: Retries = Retries()
    balancing: Balancing = Balancing()
    breaker: Breaker = Breaker()
    queue: Queue = Queue()

    @property
    def plain(self) -> bool:
        """Whether what it asks for can be seen to by the second, or at the head of a response: proxy/fast does no more."""
        times, retries = self.timeouts, self.retries
        closely = times.response_head, times.idle, retries.attempt_timeout
        return not (self.overrides or retries.grpc or any(closely))


DEFAULT_POLICY = Policy()


def read_policy(value: Plain, path: str, mistakes: Mistakes) -> Policy:
    """The policy in a mapping of the directory; the default, and at least one mistake, when something in it is wrong."""
    found = Mistakes()
    policy: Policy | None = decode(value, Policy, path, found)
    if policy is not None:
        _contradictions(policy, path, found)
    for mistake in found.found():
        mistakes.add("", mistake)
    if policy is None or found or policy == DEFAULT_POLICY:
        return DEFAULT_POLICY
    return policy


def _contradictions(policy: Policy, path: str, mistakes: Mistakes) -> None:
    """What is wrong only when parts are held against each other."""
    retries, timeouts, breaker = policy.retries, policy.timeouts, policy.breaker
    if retries.backoff > retries.max_backoff:
        mistakes.add(child(path, "retries.backoff"), f"is longer than retries.max_backoff ({show_duration(retries.max_backoff)})")
    if breaker.min_penalty > breaker.max_penalty:
        mistakes.add(child(path, "breaker.min_penalty"), f"is longer than breaker.max_penalty ({show_duration(breaker.max_penalty)})")
    whole = timeouts.request
    if whole is not None:
        for name, part in (("timeouts.response_head", timeouts.response_head), ("retries.attempt_timeout", retries.attempt_timeout)):
            if part is not None and part > whole:
                mistakes.add(child(path, name), f"is longer than timeouts.request ({show_duration(whole)}), of which it is a part")
