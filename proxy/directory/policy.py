"""The policy of a service: how the proxies of its clients use its endpoints, and when they retry.

It is read from the service's `policy` in the directory, so all clients of a service use the same
one. Settings that are not given have their defaults. A service without a policy has
`DEFAULT_POLICY` itself, so callers can compare with `is`. The
annotation of a field is the only source (proxy/settings/declare.py): the checks, the JSON schema
and the table in docs/configuration.md are generated from it.

A request is never retried after a byte of its response was forwarded, whatever the policy says.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from proxy.settings.declare import described, number, octets, ratio, seconds
from proxy.settings.decode import decode
from proxy.settings.document import Mistakes, Plain, child
from proxy.settings.units import GrpcCode, Statuses, StatusRange, show_duration

_HOUR, _DAY = 3600, 86400

GrpcCodes = tuple[GrpcCode, ...]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a policy."""


# `request` covers the time from the request head to the end of the response, over all attempts. It
# has no default, because any default would end event streams and long polls.
class Timeouts(_Part, frozen=True):
    """Timeouts of a request. None: the settings of the proxy apply (`http.response_timeout`,
    `http.response_body_timeout`).
    """

    request: Annotated[
        float | None,
        seconds(
            0.001,
            _DAY,
            "maximum time from the request to the end of its response, over all attempts;"
            " above: 504",
        ),
    ] = None
    response_head: Annotated[
        float | None,
        seconds(
            0.001,
            _DAY,
            "maximum time from the end of a request to the head of its response; above: 504",
        ),
    ] = None
    idle: Annotated[
        float | None, seconds(0.001, _DAY, "maximum pause within a body, in either direction")
    ] = None


# Linkerd's numbers. With at most a fifth of the requests, retries cannot make an outage much worse.
# The few retries per second that are always allowed are for services with few requests.
class Budget(_Part, frozen=True):
    """Retry budget of this proxy for a service."""

    ratio: Annotated[float, ratio(0, 100, "retries allowed for each request in the last `ttl`")] = (
        0.2
    )
    min_per_second: Annotated[
        float, ratio(0, 10_000, "retries per second that are always allowed")
    ] = 10.0
    ttl: Annotated[float, seconds(1, 60, "how long a request counts towards the budget")] = 10.0


class Retries(_Part, frozen=True):
    """Which requests the proxy retries. A retry goes to another endpoint if there is one.

    The proxy always repeats a request once if its connection was lost before the endpoint can have
    processed it. Within `limit` and `budget`, the proxy retries a request in four cases: the
    endpoint refused its stream; the request is idempotent (RFC 9110 §9.2.2) and failed without a
    response; its response has a status in `statuses` or `grpc`; or there was no response within
    `attempt_timeout`. A failure to connect does not count as an attempt.
    """

    limit: Annotated[int, number(0, 10, "maximum retries of a request; 0: none")] = 1
    statuses: Annotated[Statuses, described("HTTP statuses to retry: 503, 5xx, 500-504", 32)] = ()
    grpc: Annotated[GrpcCodes, described("gRPC statuses to retry, by name or number", 17)] = ()
    all_methods: Annotated[
        bool,
        described(
            "whether `statuses` also applies to methods that are not idempotent, such as POST"
        ),
    ] = False
    attempt_timeout: Annotated[
        float | None,
        seconds(0.001, _HOUR, "maximum time to the response head for each attempt except the last"),
    ] = None
    max_body: Annotated[
        int,
        octets(
            0,
            2**20,
            "maximum size of a request body that is kept for a retry; after a part of a longer body"
            " was sent, the request is not retried",
        ),
    ] = 65536
    backoff: Annotated[
        float,
        seconds(
            0,
            60,
            "delay before the first retry, doubled for each further retry; half of it is random",
        ),
    ] = 0.025
    max_backoff: Annotated[float, seconds(0, 60, "maximum delay before a retry")] = 0.25
    budget: Budget = Budget()


# decay and default_rtt are Finagle's and Linkerd's. zone_share: Envoy uses other localities when a
# third of the own one is not usable.
class Balancing(_Part, frozen=True):
    """How the proxy selects an endpoint."""

    decay: Annotated[
        float,
        seconds(
            0.1,
            _HOUR,
            "time constant of the moving average of response times: after this time, the weight of"
            " a sample is about one third",
        ),
    ] = 10.0
    default_rtt: Annotated[
        float, seconds(0.0001, 60, "assumed response time of an endpoint without a measurement")
    ] = 0.03
    slow_start: Annotated[
        float,
        seconds(
            0,
            _HOUR,
            "time in which the share of a new endpoint grows to its full value; 0: full share at"
            " once",
        ),
    ] = 10.0
    zone: Annotated[
        Literal["prefer", "ignore"],
        described("whether the proxy prefers endpoints in its own zone (`pod.zone`)"),
    ] = "prefer"
    zone_share: Annotated[
        float,
        ratio(
            0,
            1,
            "fraction of the endpoints in the own zone that must be usable; below: other zones get"
            " requests too",
        ),
    ] = 0.7


class Breaker(_Part, frozen=True):
    """The circuit breaker of an endpoint.

    The circuit breaker opens after `failures` consecutive failures, or after one failure to
    connect. While it is open, the endpoint gets no requests for a penalty. The penalty doubles each
    time. Then the breaker is half-open: one trial request decides whether
    it closes or opens again. If `failures` is 0, only failures to connect count. If the circuit
    breakers of all endpoints are open, the proxy still uses the endpoints that respond, even if
    they respond with errors or close the connection. If no endpoint responds, the proxy sends one
    trial request after `connect_penalty`. Further trial requests follow at intervals that grow with
    the outage, up to `min_penalty`. These trials do not wait for the penalties.
    """

    failures: Annotated[
        int,
        number(
            0, 1000, "consecutive failures that open the circuit breaker; 0: responses do not count"
        ),
    ] = 7
    statuses: Annotated[Statuses, described("HTTP statuses that count as failures", 32)] = (
        StatusRange(502, 504),
    )
    grpc: Annotated[GrpcCodes, described("gRPC statuses that count as failures", 17)] = (
        GrpcCode.unavailable,
    )
    min_penalty: Annotated[
        float, seconds(0.01, _HOUR, "how long the circuit breaker is open the first time")
    ] = 1.0
    connect_penalty: Annotated[
        float,
        seconds(
            0.01,
            _HOUR,
            "the same if the endpoint refuses connections; applies if it is shorter than"
            " `min_penalty`",
        ),
    ] = 0.2
    max_penalty: Annotated[
        float, seconds(0.01, _HOUR, "maximum time that the circuit breaker is open")
    ] = 60.0
    jitter: Annotated[float, ratio(0, 1, "random addition to the penalty, as a fraction of it")] = (
        0.5
    )


class Queue(_Part, frozen=True):
    """The queue of requests while the circuit breakers of all endpoints are open.

    The proxy rejects a request at the first trial that fails after `timeout`. If the penalties are
    longer than `timeout`, the first failed trial is sufficient.
    """

    size: Annotated[int, number(0, 100_000, "maximum requests that wait; above: 503")] = 1024
    timeout: Annotated[
        float,
        seconds(
            0, _HOUR, "how long a request waits; after that it waits for the next trial; above: 503"
        ),
    ] = 3.0


class Policy(_Part, frozen=True):
    """How the proxy uses the endpoints of a service."""

    overrides: Annotated[
        bool,
        described(
            "whether requests may set their own limits with headers (`isthmus-timeout` and others)"
        ),
    ] = False
    timeouts: Timeouts = Timeouts()
    retries: Retries = Retries()
    balancing: Balancing = Balancing()
    breaker: Breaker = Breaker()
    queue: Queue = Queue()

    @property
    def plain(self) -> bool:
        """Whether the fast path can apply it: it checks timeouts once per second, and statuses at
        response heads only."""
        times, retries = self.timeouts, self.retries
        closely = times.response_head, times.idle, retries.attempt_timeout
        return not (self.overrides or retries.grpc or any(closely))


DEFAULT_POLICY = Policy()


def read_policy(value: Plain, path: str, mistakes: Mistakes) -> Policy:
    """Read the policy in a mapping of the directory. On an error, add at least one mistake and
    return the default."""
    found = Mistakes()
    policy = decode(value, Policy, path, found)
    if policy is not None:
        _contradictions(policy, path, found)
    for mistake in found.found():
        mistakes.add("", mistake)
    if policy is None or found or policy == DEFAULT_POLICY:
        return DEFAULT_POLICY
    return policy


def _contradictions(policy: Policy, path: str, mistakes: Mistakes) -> None:
    """Add a mistake for each pair of settings that contradict each other."""
    retries, timeouts, breaker = policy.retries, policy.timeouts, policy.breaker
    if retries.backoff > retries.max_backoff:
        mistakes.add(
            child(path, "retries.backoff"),
            f"is longer than retries.max_backoff ({show_duration(retries.max_backoff)})",
        )
    if breaker.min_penalty > breaker.max_penalty:
        mistakes.add(
            child(path, "breaker.min_penalty"),
            f"is longer than breaker.max_penalty ({show_duration(breaker.max_penalty)})",
        )
    whole = timeouts.request
    if whole is not None:
        for name, part in (
            ("timeouts.response_head", timeouts.response_head),
            ("retries.attempt_timeout", retries.attempt_timeout),
        ):
            if part is not None and part > whole:
                mistakes.add(
                    child(path, name),
                    f"is longer than timeouts.request ({show_duration(whole)}), of which it is a"
                    " part",
                )
