"""What an attempt reports about its endpoint: the same on both paths."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf

import pytest
import trio
from trio.testing import MockClock

from proxy.balancing.balancer import Balancer
from proxy.balancing.endpoint_set import EndpointSet
from proxy.directory import Endpoint, Target
from proxy.directory.policy import DEFAULT_POLICY
from proxy.exchange.exchange import ConnectionInfo, Exchange, Handoff
from proxy.net.address import Address
from proxy.routing.attempt import Attempt, policy_deadline
from proxy.wire.messages import Field, Headers, RequestHead, ResponseHead
from tests.kit.dispatch import policy
from tests.kit.exchanges import unanswered

ENDPOINT = Endpoint(Address("10.1.0.5", 8080))
CALL = RequestHead(b"POST", b"/web/Get", Headers([(b"content-type", b"application/grpc")]), b"2")
UNREACHABLE: Field = (b"proxy-status", b"edge;error=connection_refused")
# Each judges a response that has ended with its head.
Judge = Callable[[Attempt, Exchange, ResponseHead], None]


def on_fast_path(attempt: Attempt, exchange: Exchange, head: ResponseHead) -> None:
    exchange.response = head
    attempt.end(exchange)


def on_ordinary_path(attempt: Attempt, exchange: Exchange, head: ResponseHead) -> None:
    attempt.judge_head(exchange, head, Headers(), failing=False)
    attempt.finish()


def judged(judge: Judge, status: int, *fields: Field) -> tuple[EndpointSet, Target]:
    """The endpoint set after one response, where one failure opens the circuit breaker."""
    target = Target("default/web", (ENDPOINT,), policy=policy("breaker: {failures: 1}"))
    endpoint_set = Balancer(lambda: 100.0, random.Random(1)).endpoint_set("default/web")
    work = endpoint_set.begin(target.policy, ENDPOINT, alone=True)
    exchange = unanswered(
        CALL, ConnectionInfo("outbound", Address("10.1.0.9", 9), ENDPOINT.address)
    )
    judge(Attempt(target, ENDPOINT, work, 0.0), exchange, ResponseHead(status, Headers([*fields])))
    return endpoint_set, target


both_paths = pytest.mark.parametrize("judge", [on_fast_path, on_ordinary_path])


@both_paths
@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (200, b"14", "gRPC status 14"),
        (503, b"14", "gRPC status 14"),
        (503, b"3", "status 503"),
        (200, b"3", ""),
        (200, b"0", ""),
    ],
)
def test_a_failure_has_the_name_that_policies_use(
    judge: Judge, status: int, code: bytes, why: str
) -> None:
    endpoint_set, target = judged(judge, status, (b"grpc-status", code))
    assert endpoint_set.why(target) == why


@both_paths
@pytest.mark.parametrize("silent", [True, False])
def test_an_error_of_a_proxy_that_did_not_reach_the_service_is_not_a_response_of_the_service(
    judge: Judge, silent: bool
) -> None:
    endpoint_set, target = judged(
        judge, 200, (b"grpc-status", b"14"), *([UNREACHABLE] if silent else [])
    )
    assert endpoint_set.why(target) == "gRPC status 14"
    assert endpoint_set.may_return(target) == silent


def test_an_attempt_without_a_service_says_nothing() -> None:
    attempt = Attempt.on_fast_path(Target(None, (ENDPOINT,)), ENDPOINT, None)
    exchange = unanswered(
        CALL, ConnectionInfo("outbound", Address("10.1.0.9", 9), ENDPOINT.address)
    )
    attempt.answered()
    attempt.record_failure("upstream_timeout")
    exchange.response = ResponseHead(503)
    attempt.end(exchange)
    assert not attempt.has_outcome


@pytest.mark.parametrize(
    ("since", "expected"), [(None, 1007.5), (0.0, 1007.5), (998.0, 1005.5)], ids=str
)
async def test_the_time_limit_of_a_policy_begins_with_the_exchange(
    mock_clock: MockClock, since: float | None, expected: float
) -> None:
    """The same limit on both paths: a handoff does not start it again."""
    mock_clock.jump(1000.0 - trio.current_time())
    exchange = unanswered(
        CALL, ConnectionInfo("outbound", Address("10.1.0.9", 9), ENDPOINT.address)
    )
    if since is not None:
        exchange.handoff = Handoff(since=since)
    limited = policy("timeouts: {request: 7500ms}")
    assert policy_deadline(exchange, limited) == pytest.approx(expected, abs=0.01)
    assert policy_deadline(exchange, DEFAULT_POLICY) == inf
    assert policy_deadline(exchange, policy("retries: {limit: 1}")) == inf
