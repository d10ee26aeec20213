"""Who decides whether a trace is recorded: its beginner; where nobody has, the ratio; and what is not recorded is not changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracing.records import PARENT, SPAN, TRACE
from tracing.context import Field
from tracing.propagation import extract
from tracing.sampling import Sampling, Tracer

HOST: Field = (b"Host", b"a")


def w3c(flags: bytes = b"01") -> Field:
    return (b"traceparent", b"00-%b-%b-%b" % (TRACE, SPAN, flags))


def test_a_recorded_trace_goes_on_with_our_span() -> None:
    fields = [HOST, w3c(), (b"tracestate", b"a=1")]
    found = Tracer(Sampling()).begin(fields)
    assert found is not None
    assert (found.sampled, found.trace_id, found.parent, found.state) == (True, TRACE, SPAN, (b"a=1",))
    assert fields == [HOST, (b"traceparent", b"00-%b-%b-01" % (TRACE, found.span_id)), (b"tracestate", b"a=1")]
    assert found.span_id != SPAN


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_what_the_caller_does_not_record_is_passed_on_as_it_came(ratio: float) -> None:
    fields = [HOST, w3c(b"00")]
    found = Tracer(Sampling(ratio)).begin(fields)
    assert found is not None
    assert (found.sampled, found.trace_id, found.span_id) == (False, TRACE, SPAN)
    assert fields == [HOST, w3c(b"00")]


def test_without_a_context_and_a_ratio_nothing_happens() -> None:
    fields = [HOST, (b"traceparent", b"rubbish")]
    assert Tracer(Sampling()).begin(fields) is None
    assert fields == [HOST, (b"traceparent", b"rubbish")]


def test_a_trace_that_begins_here_is_written_for_those_behind_us() -> None:
    fields = [HOST]
    found = Tracer(Sampling(1)).begin(fields)
    assert found is not None
    assert (found.sampled, found.parent) == (True, b"")
    assert fields == [HOST, (b"traceparent", b"00-%b-%b-03" % (found.trace_id, found.span_id))]


def test_a_no_is_passed_on_too_or_the_next_proxy_would_draw_lots_again() -> None:
    fields = [HOST]
    found = Tracer(Sampling(1e-18)).begin(fields)
    assert found is not None
    assert not found.sampled
    assert fields[1][1].endswith(b"-02")
    again = Tracer(Sampling(1)).begin(fields)
    assert again is not None
    assert not again.sampled


def test_a_decision_that_was_left_open_is_made_and_passed_on() -> None:
    undecided = (b"b3", b"%b-%b" % (TRACE, SPAN))
    for ratio, sampled, state in ((1.0, True, b"1"), (1e-18, False, b"0"), (0.0, False, b"")):
        fields = [undecided]
        found = Tracer(Sampling(ratio)).begin(fields)
        assert found is not None
        assert found.sampled is sampled
        assert fields == [(b"b3", b"%b-%b%b" % (TRACE, found.span_id, b"-" + state if state else b""))]


def test_b3s_bare_yes_begins_a_trace_and_its_bare_no_prevents_one() -> None:
    fields = [(b"b3", b"1")]
    found = Tracer(Sampling()).begin(fields)
    assert found is not None
    assert found.sampled
    assert fields == [(b"b3", b"%b-%b-1" % (found.trace_id, found.span_id))]
    assert found.parent == b""
    assert Tracer(Sampling(1)).begin([(b"b3", b"0")]) is None


def test_a_sampler_that_does_not_follow_decides_by_itself() -> None:
    fields = [w3c(b"00")]
    found = Tracer(Sampling(1, follow=False)).begin(fields)
    assert found is not None
    assert found.sampled
    assert fields[0][1].endswith(b"-01")
    fields = [w3c(b"01")]
    found = Tracer(Sampling(0, follow=False)).begin(fields)
    assert found is not None
    assert not found.sampled
    assert fields == [w3c(b"01")]


def test_an_attempt_has_a_span_of_its_own_in_the_same_trace() -> None:
    for first in ([w3c()], [HOST], [(b"b3", b"%b-%b-d-%b" % (TRACE[16:], SPAN, PARENT))]):
        fields, tracer = list(first), Tracer(Sampling(1))
        found = tracer.begin(fields)
        assert found is not None
        before, ids = found.span_id, found.trace_id
        tracer.next_attempt(found, fields)
        carried = extract(fields)
        assert carried is not None
        assert carried.context.span_id == found.span_id != before
        assert (carried.context.trace_id, found.trace_id, carried.context.debug) == (ids, ids, first[0][0] == b"b3")


@given(st.floats(0, 1), st.binary(min_size=8, max_size=8))
def test_the_ratio_is_opentelemetrys(ratio: float, end: bytes) -> None:
    from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

    trace = b"12345678" + end
    theirs = TraceIdRatioBased(ratio).should_sample(None, int.from_bytes(trace, "big"), "").decision
    assert Sampling(ratio).records(trace.hex().encode()) == (theirs is Decision.RECORD_AND_SAMPLE)


def test_about_the_ratio_is_recorded() -> None:
    tracer = Tracer(Sampling(0.25))
    recorded = sum(found.sampled for _ in range(4000) if (found := tracer.begin([])) is not None)
    assert 800 < recorded < 1200


def test_ids_are_valid_and_distinct() -> None:
    tracer = Tracer(Sampling(1))
    found = [tracer.begin([]) for _ in range(1000)]
    assert len({trace.trace_id for trace in found if trace is not None}) == 1000
    assert len({trace.span_id for trace in found if trace is not None}) == 1000
    assert all(trace is not None and len(trace.trace_id) == 32 and len(trace.span_id) == 16 for trace in found)
