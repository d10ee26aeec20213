"""The retry budget on simulated time: a share of the requests, and a minimum for each second."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.balancing.retry_budget import RetryBudget
from proxy.directory.policy import Budget

LINKERDS = Budget(ratio=0.2, min_per_second=10.0, ttl=10.0)


def retries(rules: Budget, per_second: int, seconds: int) -> list[int]:
    """How many retries are granted in each second if every request wants one."""
    budget, granted = RetryBudget(100.0), []
    for second in range(seconds):
        now, count = 100.0 + second, 0
        for request in range(per_second):
            budget.requests += 1
            count += budget.withdraw(now + request / per_second, rules)
        granted.append(count)
    return granted


def test_of_many_requests_a_part_is_tried_again() -> None:
    granted = retries(LINKERDS, 1000, 60)
    for begin in range(10, 50, 10):
        assert sum(granted[begin : begin + 10]) == pytest.approx(0.2 * 10_000 + 100, rel=0.1)


def test_of_few_requests_all_are() -> None:
    assert retries(LINKERDS, 8, 30) == [8] * 30


def test_nothing_is_left_over_from_long_ago() -> None:
    budget = RetryBudget(0.0)
    budget.requests += 100_000
    assert budget.withdraw(1.0, LINKERDS)
    granted = sum(budget.withdraw(1000.0, LINKERDS) for _ in range(1000))
    assert granted == 100


def test_a_service_that_was_quiet_gets_its_minimum_and_no_more() -> None:
    budget = RetryBudget(0.0)
    assert sum(budget.withdraw(50.0, LINKERDS) for _ in range(1000)) == 100
    assert not budget.withdraw(55.0, LINKERDS)
    assert sum(budget.withdraw(60.0, LINKERDS) for _ in range(1000)) == 100


def test_none_at_all_where_the_policy_says_so() -> None:
    none = Budget(ratio=0.0, min_per_second=0.0)
    assert sum(retries(none, 100, 20)) == 0


def test_requests_that_were_not_looked_at_count_where_they_came() -> None:
    budget, rules = RetryBudget(0.0), Budget(ratio=0.1, min_per_second=0.0, ttl=10.0)
    budget.requests += 1000
    assert sum(budget.withdraw(5.0, rules) for _ in range(1000)) == 100
    assert not budget.withdraw(9.0, rules)
    assert not budget.withdraw(40.0, rules), "they expire with their retries"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 50), st.integers(0, 60)), max_size=60))
def test_in_no_window_are_there_more_than_its_requests_allow(
    steps: list[tuple[float, int, int]],
) -> None:
    """The window moves in tenths. So in `ttl` seconds there may be a tenth more, and simultaneous
    requests are spread over the time before."""
    rules = Budget(ratio=0.2, min_per_second=1.0, ttl=10.0)
    budget, now, made, came = RetryBudget(0.0), 0.0, [], []
    for pause, requests, wanted in steps:
        now += pause
        budget.requests += requests
        came.append((now, requests))
        made += [now for _ in range(wanted) if budget.withdraw(now, rules)]
        inside = sum(1 for at in made if at > now - 9.0)
        asked = sum(count for at, count in came if at > now - 16.0)
        assert inside <= rules.ratio * asked + rules.min_per_second * rules.ttl + 1e-6
