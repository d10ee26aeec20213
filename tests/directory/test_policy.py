"""A service's policy: given values are read, the others have their defaults, and every mistake is
reported with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.directory.policy import DEFAULT_POLICY, Policy, read_policy
from proxy.settings.document import Mistakes, load
from proxy.settings.reference import schema, tables
from proxy.settings.units import GrpcCode, StatusRange

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "configuration.md"


def read(text: str) -> Policy:
    mistakes = Mistakes()
    policy = read_policy(load(text, "test"), "services[3].policy", mistakes)
    assert not mistakes, mistakes.found()
    return policy


def mistaken(text: str) -> list[str]:
    mistakes = Mistakes()
    assert read_policy(load(text, "test"), "p", mistakes) is DEFAULT_POLICY
    return list(mistakes.found())


def test_a_policy_that_says_nothing_is_the_default_itself() -> None:
    assert read("{}") is DEFAULT_POLICY
    assert read("") is DEFAULT_POLICY
    assert read("queue: {size: 1024}") is DEFAULT_POLICY


def test_every_part_is_read() -> None:
    policy = read("""
        overrides: true
        timeouts: {request: 10s, response_head: 500ms, idle: 1m}
        retries:
          limit: 3
          statuses: [503, 5xx, 500-502]
          grpc: [unavailable, 4, RESOURCE_EXHAUSTED]
          all_methods: true
          attempt_timeout: 100ms
          max_body: 1KiB
          backoff: 1ms
          max_backoff: 2ms
          budget: {ratio: 0.5, min_per_second: 1, ttl: 5s}
        balancing: {decay: 5s, default_rtt: 10ms, slow_start: 0, zone: ignore, zone_share: 1}
        breaker: {failures: 3, statuses: [], grpc: [], min_penalty: 2s, max_penalty: 3s, jitter: 0}
        queue: {size: 0, timeout: 0}
    """)
    assert policy.overrides
    assert (policy.timeouts.request, policy.timeouts.response_head, policy.timeouts.idle) == (
        10.0,
        0.5,
        60.0,
    )
    assert policy.retries.statuses == (
        StatusRange(503, 503),
        StatusRange(500, 599),
        StatusRange(500, 502),
    )
    assert policy.retries.grpc == (
        GrpcCode.unavailable,
        GrpcCode.deadline_exceeded,
        GrpcCode.resource_exhausted,
    )
    assert (policy.retries.limit, policy.retries.max_body, policy.retries.budget.ratio) == (
        3,
        1024,
        0.5,
    )
    assert (policy.balancing.zone, policy.balancing.zone_share, policy.balancing.slow_start) == (
        "ignore",
        1.0,
        0.0,
    )
    assert (policy.breaker.failures, policy.breaker.statuses, policy.breaker.max_penalty) == (
        3,
        (),
        3.0,
    )
    assert (policy.queue.size, policy.queue.timeout) == (0, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("retry: {}", "p.retry: unknown key (did you mean 'retries'?)"),
        ("[1]", "p: expected a mapping, found a list"),
        ("timeouts: {request: 10}", "p.timeouts.request: expected a duration such as"),
        ("timeouts: {request: 0}", "p.timeouts.request: must be from 1ms to 1d"),
        ("retries: {limit: 11}", "p.retries.limit: must be from 0 to 10"),
        (
            "retries: {statuses: [503, 200]}",
            "p.retries.statuses[1]: expected statuses such as 503, 5xx or 500-504, from 400 to 599",
        ),
        ("retries: {statuses: [504-500]}", "p.retries.statuses[0]: expected statuses"),
        ("retries: {statuses: 503}", "p.retries.statuses: expected a list"),
        (
            "retries: {grpc: [unavailible]}",
            (
                "p.retries.grpc[0]: expected a gRPC status such as unavailable or 14, found"
                " 'unavailible'"
            ),
        ),
        ("retries: {grpc: [0]}", "p.retries.grpc[0]: expected a gRPC status"),
        (
            "retries: {budget: {ratio: .inf}}",
            "p.retries.budget.ratio: expected a number such as 0.2",
        ),
        (
            "retries: {budget: {ratio: true}}",
            "p.retries.budget.ratio: expected a number such as 0.2, found true",
        ),
        ("balancing: {zone_share: 1.5}", "p.balancing.zone_share: must be from 0 to 1, found 1.5"),
        ("balancing: {zone: near}", "p.balancing.zone: expected one of prefer, ignore"),
        ("overrides: yes", "p.overrides: expected true or false, found 'yes'"),
        ("retries: {backoff: 1s}", "p.retries.backoff: is longer than retries.max_backoff (250ms)"),
        (
            "breaker: {min_penalty: 2m}",
            "p.breaker.min_penalty: is longer than breaker.max_penalty (1m)",
        ),
        (
            "timeouts: {request: 1s, response_head: 2s}",
            "p.timeouts.response_head: is longer than timeouts.request (1s)",
        ),
        (
            "{timeouts: {request: 1s}, retries: {attempt_timeout: 2s}}",
            "p.retries.attempt_timeout: is longer than timeouts.request",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_path(text: str, expected: str) -> None:
    assert [line[: len(expected)] for line in mistaken(text)] == [expected]


def test_all_mistakes_are_reported_at_once() -> None:
    assert (
        len(mistaken("{timeouts: {request: 1}, queue: {size: -1}, breaker: {jitter: 2, more: 1}}"))
        == 4
    )


def test_a_mistake_elsewhere_in_the_document_does_not_hide_a_good_policy() -> None:
    mistakes = Mistakes()
    mistakes.add("elsewhere", "wrong")
    assert read_policy({"queue": {"size": 5}}, "p", mistakes).queue.size == 5
    assert mistakes.found() == ("elsewhere: wrong",)


def test_the_documentation_has_the_table_of_the_policy() -> None:
    """To fix it: put what `tables(Policy, "policy")` returns between the two marks."""
    written = DOCUMENT.read_text("utf-8").split("<!-- policy -->")[1].split("<!-- /policy -->")[0]
    assert written.strip() == tables(Policy, "policy").strip()


def test_the_schema_describes_each_part() -> None:
    found = schema(Policy)["properties"]
    assert set(found) == {"overrides", "timeouts", "retries", "balancing", "breaker", "queue"}
    assert found["breaker"]["properties"]["statuses"]["default"] == ["502-504"]
    assert found["breaker"]["properties"]["grpc"]["default"] == ["unavailable"]
    assert {"type": "null"} in found["timeouts"]["properties"]["request"]["anyOf"]
    assert found["retries"]["properties"]["budget"]["properties"]["ratio"] == {
        "type": "number", "minimum": 0, "maximum": 100, "default": 0.2, "description": "retries allowed for each request in the last `ttl`",
    }  # fmt: skip
