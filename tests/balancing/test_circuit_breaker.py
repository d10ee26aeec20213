"""The circuit breaker of an endpoint: failures in a row open it, one trial request decides, and the
open time grows up to a limit."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.balancing.circuit_breaker import BreakerState, CircuitBreaker, Failure
from proxy.directory.policy import Breaker as Rules

BAD, SILENT, GONE, REFUSED = Failure.RESPONSE, Failure.SILENCE, Failure.UNREACHABLE, Failure.REFUSED
NOT_CONNECTED = (GONE, REFUSED, Failure.REJECTED)
RULES = Rules(failures=3, min_penalty=1.0, max_penalty=8.0, jitter=0.5)


def opened(now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for _ in range(RULES.failures):
        breaker.record_failure(now, RULES, 0.0)
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_only_a_row_of_failures_opens() -> None:
    breaker = CircuitBreaker()
    for _ in range(10):
        breaker.record_failure(0, RULES, 0)
        breaker.record_failure(0, RULES, 0)
        breaker.record_success()
    assert breaker.state is BreakerState.CLOSED
    assert [breaker.record_failure(0, RULES, 0) for _ in range(3)] == [False, False, True]


def test_a_failure_to_connect_opens_at_once() -> None:
    breaker = CircuitBreaker()
    assert breaker.record_failure(0, RULES, 0, GONE)
    assert breaker.state is BreakerState.OPEN


def test_responses_do_not_count_where_the_policy_says_so() -> None:
    breaker, rules = CircuitBreaker(), Rules(failures=0)
    assert not any(breaker.record_failure(0, rules, 0) for _ in range(100))
    assert breaker.record_failure(0, rules, 0, GONE)


def test_penalties_double_up_to_the_limit_and_begin_anew_after_a_recovery() -> None:
    breaker, now, penalties = opened(), 0.0, []
    for _ in range(6):
        penalties.append(breaker.until - now)
        now = breaker.until
        assert breaker.begin_trial(now, RULES, 0.0)
        assert breaker.record_failure(now, RULES, 0.0, probe=True)
    assert penalties == [1, 2, 4, 8, 8, 8]
    assert breaker.begin_trial(now, RULES, 0.0)
    assert breaker.record_success(probe=True)
    for _ in range(3):
        breaker.record_failure(now, RULES, 0.0)
    assert breaker.until - now == 1


def test_chance_adds_a_part_of_the_penalty() -> None:
    low, high = CircuitBreaker(), CircuitBreaker()
    low.record_failure(0, RULES, 0.0, GONE)
    high.record_failure(0, RULES, 1.0, GONE)
    assert (low.until, high.until) == (1.0, 1.5)


def test_responses_to_requests_from_before_the_opening_do_not_count() -> None:
    breaker = opened()
    until = breaker.until
    assert not breaker.record_failure(0.5, RULES, 1.0)
    assert not breaker.record_success()
    assert (breaker.state, breaker.until) == (BreakerState.OPEN, until)
    breaker.begin_trial(1.0, RULES, 0.0)
    assert not breaker.record_failure(1.5, RULES, 1.0)
    assert not breaker.record_success()
    assert breaker.state is BreakerState.HALF_OPEN


def test_an_answer_shows_that_an_endpoint_can_be_connected_to_after_all() -> None:
    breaker = CircuitBreaker()
    breaker.record_failure(0, RULES, 0, GONE)
    assert breaker.record_success()
    assert breaker.state is BreakerState.CLOSED


def test_an_early_probe_that_fails_leaves_the_penalty_as_it_was_and_another_may_follow_after_a_step() -> (
    None
):
    breaker, now = opened(), 0.0
    for _ in range(5):
        now = breaker.until
        breaker.begin_trial(now, RULES, 0.0)
        breaker.record_failure(now, RULES, 0.0, probe=True)
    until = breaker.until
    assert (until, breaker.early) == (now + 8, now + 1)
    for _ in range(3):
        now = breaker.early
        assert breaker.begin_trial(now, RULES, 1.0)
        assert breaker.early == now + 1.5, "without a response"
        now += 0.5
        assert breaker.record_failure(now, RULES, 0.0, probe=True)
        assert (breaker.until, breaker.early) == (until, now + 1)


def test_one_that_refuses_connections_is_tried_soon_and_in_steps_that_grow_with_the_outage() -> (
    None
):
    breaker, now, gaps = CircuitBreaker(), 100.0, []
    assert breaker.record_failure(now, RULES, 0.0, REFUSED)
    assert breaker.until == pytest.approx(now + 0.2)
    while now < 120:
        step = min(breaker.until, breaker.early)
        gaps.append((now - 100, step - now))
        now = step
        breaker.begin_trial(now, RULES, 0.0)
        breaker.record_failure(now, RULES, 0.0, REFUSED, probe=True)
    assert [gap for _, gap in gaps[:4]] == pytest.approx([0.2] * 4)
    assert all(gap <= max(0.2, age * 0.1) + 1e-9 for age, gap in gaps)
    assert max(gap for _, gap in gaps) == pytest.approx(1.0)
    assert breaker.until - now <= RULES.max_penalty + 1e-6


def test_a_penalty_that_ends_while_an_early_probe_is_out_has_not_ended_well() -> None:
    breaker = opened()
    breaker.begin_trial(0.5, RULES, 0.0)
    assert breaker.record_failure(3.0, RULES, 0.0, probe=True)
    assert breaker.until == 5.0


def test_a_penalty_can_be_cut_short_but_not_prolonged() -> None:
    breaker = opened()
    breaker.until = 60.0
    breaker.shorten_penalty(10.0, RULES, 1.0)
    assert breaker.until == 11.5
    breaker.shorten_penalty(11.0, RULES, 1.0)
    assert breaker.until == 11.5


@pytest.mark.parametrize(
    ("row", "responds"),
    [
        ([BAD] * 3, True),
        ([GONE], False),
        ([SILENT] * 3, False),
        ([SILENT, SILENT, BAD], True),
        ([BAD, BAD, SILENT], True),
        (
            [BAD, BAD, SILENT, SILENT, SILENT],
            False,
        ),  # the last two while it was used because there were no better ones
        ([BAD, BAD, BAD, SILENT, SILENT, BAD], True),
        ([BAD, BAD, BAD, GONE], False),
        ([GONE, SILENT], False),
        ([GONE, BAD], True),
    ],
)
def test_one_that_fails_responds_until_it_is_unreachable_or_silent_in_a_row(
    row: list[Failure], responds: bool
) -> None:
    breaker = CircuitBreaker()
    for how in row:
        breaker.record_failure(0, RULES, 0, how, probe=breaker.state is not BreakerState.CLOSED)
    assert breaker.state is BreakerState.OPEN
    assert breaker.responds is responds


def test_one_that_is_used_for_want_of_better_ones_is_closed_by_the_first_good_answer() -> None:
    breaker = opened()
    until = breaker.until
    assert not breaker.record_failure(0.5, RULES, 1.0, probe=True)
    assert breaker.until == until, "its open time has not grown"
    assert breaker.record_success(probe=True)
    assert breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("state", ["closed", "open"])
def test_a_probe_can_only_be_given_up_while_there_is_one(state: str) -> None:
    breaker = CircuitBreaker() if state == "closed" else opened()
    assert not breaker.record_no_outcome(5.0)
    assert breaker.state.value == state


class Life(RuleBasedStateMachine):
    """Any order of events, beside a simple model: how many failures in a row, is the circuit open,
    and until when."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = CircuitBreaker()
        self.now = 0.0
        self.row = 0
        self.out = False
        self.probing = False
        self.unreached = False
        self.trips = 0
        self.quiet = 0  # silences since the last response
        self.responds = True

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(chance=st.floats(0, 1), how=st.sampled_from(Failure))
    def a_request_fails(self, chance: float, how: Failure) -> None:
        changed = self.breaker.record_failure(self.now, RULES, chance, how)
        unreachable = how in NOT_CONNECTED
        self.record_outcome(how)
        if self.out:
            assert not changed
            return
        self.row += 1
        self.out = unreachable or self.row >= RULES.failures
        assert changed == self.out
        if changed:
            self.unreached = unreachable
            self.judged(how)
            self.check_penalty(how)

    @rule()
    def a_request_is_answered(self) -> None:
        changed = self.breaker.record_success()
        assert changed == (self.out and self.unreached)
        self.quiet = 0
        if not self.out:
            self.row = 0
        elif self.unreached:
            self.recovered()

    @precondition(lambda self: self.out)
    @rule(chance=st.floats(0, 1))
    def a_probe_is_sent(self, chance: float) -> None:
        """When the open time is over, or early. Maybe a second one."""
        assert self.breaker.begin_trial(self.now, RULES, chance) == (not self.probing)
        assert self.breaker.early >= self.now + (RULES.connect_penalty if self.unreached else 1)
        self.probing = True

    @precondition(lambda self: self.probing)
    @rule(chance=st.floats(0, 1), how=st.sampled_from(Failure))
    def the_probe_fails(self, chance: float, how: Failure) -> None:
        until = self.breaker.until
        assert self.breaker.record_failure(self.now, RULES, chance, how, probe=True)
        self.probing, self.unreached = False, how in NOT_CONNECTED
        self.record_outcome(how)
        self.judged(how)
        if self.now >= until:
            self.trips += 1
            self.check_penalty(how)
        else:
            assert self.breaker.until == until

    @precondition(lambda self: self.out and self.responds and not self.probing)
    @rule(chance=st.floats(0, 1), how=st.sampled_from(Failure))
    def one_that_is_used_for_want_of_better_ones_fails(self, chance: float, how: Failure) -> None:
        until = self.breaker.until
        changed = self.breaker.record_failure(self.now, RULES, chance, how, probe=True)
        self.record_outcome(how)
        self.judged(how)
        assert changed != self.responds
        if changed:
            self.unreached = how in NOT_CONNECTED
        assert self.breaker.until == until, "it was not a trial"

    @precondition(lambda self: self.out and self.responds)
    @rule()
    def one_that_is_used_for_want_of_better_ones_is_answered(self) -> None:
        assert self.breaker.record_success(probe=True)
        self.recovered()

    @precondition(lambda self: self.probing)
    @rule()
    def the_probe_is_answered(self) -> None:
        assert self.breaker.record_success(probe=True)
        self.recovered()

    @precondition(lambda self: self.probing)
    @rule()
    def the_probe_is_given_up(self) -> None:
        due = self.now >= self.breaker.until
        assert self.breaker.record_no_outcome(self.now)
        self.probing = False
        assert self.breaker.due(self.now) == due
        assert self.breaker.early <= self.now

    def record_outcome(self, how: Failure) -> None:
        self.quiet = 0 if how is BAD else self.quiet + (how is SILENT)

    def judged(self, how: Failure) -> None:
        self.responds = how is BAD or (
            how is SILENT and self.responds and self.quiet < RULES.failures
        )

    def recovered(self) -> None:
        self.out = self.probing = self.unreached = False
        self.row = self.trips = self.quiet = 0
        self.responds = True

    def check_penalty(self, how: Failure) -> None:
        first = RULES.connect_penalty if how is REFUSED else RULES.min_penalty
        penalty = min(RULES.max_penalty, first * 2**self.trips)
        assert penalty <= self.breaker.until - self.now + 1e-9 <= penalty * 1.5 + 1e-6

    @invariant()
    def the_states_agree(self) -> None:
        expected = (
            BreakerState.HALF_OPEN
            if self.probing
            else BreakerState.OPEN
            if self.out
            else BreakerState.CLOSED
        )
        assert self.breaker.state is expected
        assert self.breaker.responds is self.responds
        assert not self.breaker.due(self.now) or (self.out and not self.probing)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
