"""Who decides whether a trace is recorded: the service that starts it; without one, the ratio; and
a request that is not recorded is not changed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracing.records import PARENT, SPAN, TRACE
from tracing.context import Field
from tracing.propagation import extract
from tracing.sampling import Sampling, Trace, Tracer

HOST: Field = (b"Host", b"a")


def w3c(flags: bytes = b"01") -> Field:
    return (b"traceparent", b"00-%b-%b-%b" % (TRACE, SPAN, flags))


def test_a_recorded_trace_continues_with_our_span() -> None:
    fields = [HOST, w3c(), (b"tracestate", b"a=1")]
    found = Tracer(Sampling()).begin(fields)
    assert found is not None
    assert (found.sampled, found.trace_id, found.parent, found.state) == (
        True,
        TRACE,
        SPAN,
        (b"a=1",),
    )
    assert fields == [
        HOST,
        (b"traceparent", b"00-%b-%b-01" % (TRACE, found.span_id)),
        (b"tracestate", b"a=1"),
    ]
    assert found.span_id != SPAN


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_what_the_caller_does_not_record_is_passed_on_as_it_came(ratio: float) -> None:
    fields = [HOST, w3c(b"00")]
    found = Tracer(Sampling(ratio)).begin(fields)
    assert found is not None
    assert (found.sampled, found.trace_id, found.span_id) == (False, TRACE, SPAN)
    assert fields == [HOST, w3c(b"00")]


_hex = st.sampled_from([TRACE, SPAN, TRACE.upper(), b"0" * 32, b"0" * 16, b"b3", b""])
_values = st.one_of(
    st.builds(
        lambda *parts: b"-".join(parts),
        st.sampled_from([b"00", b"01", b"ff"]),
        _hex,
        _hex,
        st.sampled_from([b"00", b"01", b"02", b"0x"]),
    ),
    st.sampled_from(
        [
            b"1",
            b"0",
            b"",
            b"00-%b-%b-00" % (TRACE, SPAN),
            b"00-%b-%b-00-x" % (TRACE, SPAN),
            b"%b-%b-0" % (TRACE, SPAN),
        ]
    ),
    st.sampled_from(
        [
            TRACE,
            SPAN,
            b"00-%b-%b-01" % (TRACE, SPAN),
            b"%b-%b-1-%b" % (TRACE, SPAN, PARENT),
            b"%b-%b-d" % (TRACE[16:], SPAN),
        ]
    ),
)
_names = st.sampled_from(
    [
        b"traceparent", b"Traceparent", b"TRACEPARENT", b"tracestate", b"b3", b"X-B3-Sampled", b"grpc-trace-bin", b"Host",
        b"X-B3-TraceId", b"x-b3-spanid", b"X-B3-ParentSpanId", b"x-b3-flags", b"X-Trace",
    ]
)  # fmt: skip
# Requests as programs really send them, and others.
_several = st.lists(
    st.sampled_from(
        [
            (b"X-B3-TraceId", TRACE), (b"x-b3-traceid", TRACE[16:]), (b"X-B3-SpanId", SPAN), (b"X-B3-Sampled", b"1"),
            (b"X-B3-Sampled", b"0"), (b"X-B3-ParentSpanId", PARENT), (b"X-B3-Flags", b"1"), (b"b3", b"%b-%b-1-%b" % (TRACE, SPAN, PARENT)),
            w3c(), (b"tracestate", b"a=1"), (b"uber-trace-id", b"%b:%b:0:1" % (TRACE, SPAN)),
            (b"Uber-Trace-Id", b"%b:%b:%b:0" % (TRACE[16:], SPAN, PARENT)), (b"uber-trace-id", b"b3:%b:1:3" % SPAN),
        ]
    ),
    max_size=5,
)  # fmt: skip
_fields = st.one_of(
    st.lists(st.tuples(_names, _values), max_size=4),
    _several,
    _several.map(lambda fields: [HOST, *fields]),
)


def lined(fields: list[Field]) -> bytes:
    return b"".join(b"%b: %b\r\n" % field for field in fields)


def fields_of(lines: bytes) -> list[Field]:
    return [
        (name, value)
        for name, _, value in (line.partition(b": ") for line in lines.split(b"\r\n")[:-1])
    ]


def agree(fields: list[Field], sampling: Sampling, seed: int) -> bool:
    """Whether the quick check decides. If so, the full check has the same result, and so has the
    next attempt."""
    tracer = Tracer(sampling)
    tracer._bits = random.Random(seed).getrandbits
    seen = tracer.glance(lined(fields))
    if seen is None:
        return False
    tracer._bits = random.Random(seed).getrandbits
    trace, found = seen[0], tracer.begin(fields)
    assert seen[1] == lined(fields)
    assert trace == found
    if trace is not None and found is not None and trace.sampled:
        again = fields_of(seen[1])
        glanced = replace(trace)
        for each, these in ((trace, again), (found, fields)):
            tracer._bits = random.Random(seed + 1).getrandbits
            tracer.next_attempt(each, these, PARENT)
        tracer._bits = random.Random(seed + 1).getrandbits
        assert tracer.next_glance(glanced, seen[1], PARENT) == lined(fields)
        assert again == fields
        assert trace == found == glanced
    return True


@given(_fields, st.sampled_from([0.0, 1.0]), st.booleans(), st.integers(0, 2**32))
def test_what_is_seen_at_a_glance_is_what_a_longer_look_finds(
    fields: list[Field], ratio: float, follow: bool, seed: int
) -> None:
    agree(fields, Sampling(ratio, follow), seed)


@pytest.mark.parametrize("name", [b"traceparent", b"Traceparent"])
def test_the_usual_header_is_seen_at_a_glance(name: bytes) -> None:
    lines = b"Host: a\r\n%b: 00-%b-%b-%%b\r\n" % (name, TRACE, SPAN)
    assert Tracer(Sampling()).glance(b"Host: a\r\n") == (None, b"Host: a\r\n")
    assert Tracer(Sampling(1)).glance(b"Host: a\r\n") is None
    no, yes = lines % b"00" + b"tracestate: a=b3\r\n", lines % b"01"
    assert Tracer(Sampling(1)).glance(no) == (Trace(False, TRACE, SPAN), no)
    seen = Tracer(Sampling()).glance(yes)
    assert seen is not None
    assert seen[0] is not None
    assert (seen[0].sampled, seen[0].parent) == (True, SPAN)
    assert seen[1] == yes.replace(SPAN, seen[0].span_id)
    for text in (no, yes):
        assert Tracer(Sampling(1, follow=False)).glance(text) is None
        assert Tracer(Sampling(1)).glance(text + b"b3: 1\r\n") is None
    assert Tracer(Sampling()).glance(yes + b"tracestate: a=1\r\n" * 2) is None


PARENTS, B3 = (
    b"X-B3-ParentSpanId: %b\r\n" % PARENT,
    b"X-B3-TraceId: %b\r\nX-B3-SpanId: %b\r\nX-B3-Sampled: " % (TRACE[16:], SPAN),
)


@pytest.mark.parametrize(
    "lines",
    [
        b"traceparent: 00-%b-%b-01\r\nX-Amzn-Trace-Id: Root=1\r\n" % (TRACE, SPAN),
        b"tracestate: a=1\r\ntraceparent: 00-%b-%b-03\r\n" % (TRACE, SPAN),
        b"traceparent: 00-%b-%b-01\r\nTraceState: %b\r\n" % (TRACE, SPAN, b"," * 5000),
        b"traceparent: 00-%b-%b-01\r\nX-B3-Sampled: 0\r\n" % (TRACE, SPAN),
        b"X-Amzn-Trace-Id: Root=1\r\nb3: %b-%b-1\r\n" % (TRACE, SPAN),
        b"X-Amzn-Trace-Id: Root=1\r\n" + B3 + b"1\r\n",
        b"B3: %b-%b-1\r\n" % (TRACE, SPAN),
        b"b3: %b-%b-d-%b\r\n" % (TRACE[16:], SPAN, PARENT),
        b"b3: %b-%b-0\r\n" % (TRACE, SPAN),
        B3 + b"1\r\n",
        PARENTS + B3 + b"1\r\n",
        B3 + b"0\r\n",
        b"uber-trace-id: %b:%b:0:1\r\n" % (TRACE, SPAN),
        b"Uber-Trace-Id: %b:%b:%b:1\r\n" % (TRACE[16:], SPAN, PARENT),
        b"uber-trace-id: 7:%b:0:0\r\n" % SPAN,
    ],
)
def test_what_comes_in_one_format_is_seen_at_a_glance(lines: bytes) -> None:
    lines = b"Host: a\r\n" + lines + b"Accept: */*\r\n"
    assert agree(fields_of(lines), Sampling(), 1)


@pytest.mark.parametrize(
    "lines",
    [
        b"traceparent: 00-%(trace)b-%(span)b-05\r\n",
        b"traceparent: 01-%(trace)b-%(span)b-01\r\n",
        b"traceparent: 00-%(trace)b-%(span)b-01-\r\n",
        b"traceparent: 00-%(trace)b-%(span)b-01\r\nb3: 1\r\n",
        (
            b"traceparent: 00-%(trace)b-%(span)b-01\r\nX-B3-TraceId: %(trace)b\r\nX-B3-SpanId:"
            b" %(span)b\r\n"
        ),
        b"traceparent: 00-%(trace)b-%(span)b-01\r\ngrpc-trace-bin: AA\r\n",
        b"traceparent: 00-%(trace)b-%(span)b-01\r\nuber-trace-id: %(trace)b:%(span)b:0:1\r\n",
        b"traceparent: 00-%(trace)b-%(span)b-01\r\ntraceparent: 00-%(trace)b-%(span)b-01\r\n",
        b"uber-trace-id: %(trace)b:%(span)b:0:3\r\n",
        b"uber-trace-id: %(trace)b:7:0:1\r\n",
        b"uber-trace-id: %(trace)b%%3A%(span)b%%3A0%%3A1\r\n",
        b"uber-trace-id: 0:%(span)b:0:1\r\n",
        b"uber-trace-id: %(trace)b:0000000000000000:0:1\r\n",
        b"uber-trace-id: %(trace)b:%(span)b:0:1\r\nuber-trace-id: %(trace)b:%(span)b:0:1\r\n",
        b"uber-trace-id: %(trace)b:%(span)b:0:1\r\nb3: 0\r\n",
        b"uber-trace-id: %(trace)b:%(span)b:0:1\r\nX-B3-Sampled: 0\r\n",
        b"b3: %(trace)b-%(span)b\r\n",
        b"b3: %(trace)b-0000000000000000-1\r\n",
        b"b3: 0000000000000000-%(span)b-1\r\n",
        b"b3: %(trace)b-%(span)b-1\r\nX-B3-Sampled: 1\r\n",
        b"X-B3-TraceId: %(trace)b\r\nX-B3-SpanId: %(span)b\r\n",
        b"X-B3-TraceId: %(trace)b\r\nX-B3-SpanId: %(span)b\r\nX-B3-Sampled: 1\r\nX-B3-Flags: 1\r\n",
        (
            b"X-B3-TraceId: %(trace)b\r\nX-B3-SpanId: %(span)b\r\nX-B3-Sampled:"
            b" 1\r\nX-B3-ParentSpanId: x\r\n"
        ),
        b"X-B3-TraceId: %(trace)b\r\nX-B3-SpanId: 0000000000000000\r\nX-B3-Sampled: 1\r\n",
    ],
)
def test_what_is_unusual_is_looked_at_longer(lines: bytes) -> None:
    assert (
        Tracer(Sampling()).glance(b"Host: a\r\n" + lines % {b"trace": TRACE, b"span": SPAN}) is None
    )


TWICE = [
    (b"Traceparent", b"00-%b-%b-01" % (TRACE, SPAN)),
    (b"traceparent", b"00-%b-%b-01" % (TRACE[::-1], SPAN)),
    (b"tracestate", b"a=1"),
]


@pytest.mark.parametrize(
    ("ratio", "follow"), [(0.0, True), (1.0, True), (0.0, False), (1.0, False)]
)
def test_several_traceparents_are_all_ignored_and_one_is_forwarded(
    ratio: float, follow: bool
) -> None:
    """W3C, section 3.2."""
    fields = [HOST, *TWICE, (b"x", b"y")]
    assert Tracer(Sampling(ratio, follow)).glance(lined(fields)) is None
    trace = Tracer(Sampling(ratio, follow)).begin(fields)
    assert trace is not None
    assert (trace.sampled, trace.parent, trace.state) == (ratio == 1, b"", ())
    assert trace.trace_id not in (TRACE, TRACE[::-1])
    flags = b"03" if ratio else b"02"
    assert fields == [
        HOST,
        (b"x", b"y"),
        (b"traceparent", b"00-%b-%b-%b" % (trace.trace_id, trace.span_id, flags)),
    ]


def test_beside_several_traceparents_another_format_says_what_the_trace_is() -> None:
    for sampled in (1, 0):
        fields = [*TWICE, HOST, (b"b3", b"%b-%b-%d" % (TRACE, PARENT, sampled))]
        trace = Tracer(Sampling()).begin(fields)
        assert trace is not None
        assert (trace.sampled, trace.trace_id, trace.parent) == (
            bool(sampled),
            TRACE,
            PARENT if sampled else b"",
        )
        span = trace.span_id
        assert fields == [
            HOST,
            (b"b3", b"%b-%b-%d" % (TRACE, span, sampled)),
            (b"traceparent", b"00-%b-%b-0%d" % (TRACE, span, sampled)),
        ]


@pytest.mark.parametrize("sampled", [True, False])
def test_beside_several_traceparents_a_decision_without_ids_still_counts(sampled: bool) -> None:
    fields = [*TWICE, HOST, (b"b3", b"%d" % sampled)]
    trace = Tracer(Sampling()).begin(fields)
    assert (trace is not None and trace.sampled) is sampled
    assert b"traceparent" not in {name.lower() for name, _ in fields}


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
        assert fields == [
            (b"b3", b"%b-%b%b" % (TRACE, found.span_id, b"-" + state if state else b""))
        ]


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


@pytest.mark.parametrize(
    ("asked", "forwarded"),
    [
        ([w3c(b"01")], [(b"traceparent", b"00-%(trace)b-%(ours)b-00")]),
        ([w3c(b"03")], [(b"traceparent", b"00-%(trace)b-%(ours)b-02")]),
        ([(b"b3", b"%b-%b-1-%b" % (TRACE, SPAN, PARENT))], [(b"b3", b"%(trace)b-%(ours)b-0-%(span)b")]),
        ([(b"b3", b"%b-%b-d" % (TRACE, SPAN))], [(b"b3", b"%(trace)b-%(ours)b-0")]),
        ([(b"b3", b"1")], [(b"b3", b"0")]),
        ([(b"x-b3-flags", b"1")], [(b"x-b3-flags", b"0"), (b"x-b3-sampled", b"0")]),
        (
            [(b"x-b3-traceid", TRACE), (b"x-b3-spanid", SPAN), (b"x-b3-flags", b"1")],
            [(b"x-b3-traceid", b"%(trace)b"), (b"x-b3-spanid", b"%(ours)b"), (b"x-b3-flags", b"0"), (b"x-b3-sampled", b"0")],
        ),
    ],
)  # fmt: skip
def test_an_untrusted_sampling_decision_is_not_forwarded(
    asked: list[Field], forwarded: list[Field]
) -> None:
    fields = list(asked)
    found = Tracer(Sampling(0, follow=False)).begin(fields)
    words = {b"trace": TRACE, b"span": SPAN, b"ours": found.span_id if found is not None else b""}
    assert fields == [(name, value % words) for name, value in forwarded]
    assert found is None or (not found.sampled and found.span_id != SPAN)
    behind = Tracer(Sampling(1)).begin(fields)
    assert behind is None or not behind.sampled


@pytest.mark.parametrize(
    "first",
    [
        [(b"b3", b"%b-%b-1-%b" % (TRACE, SPAN, PARENT))],
        [
            (b"x-b3-traceid", TRACE),
            (b"x-b3-spanid", SPAN),
            (b"x-b3-sampled", b"1"),
            (b"x-b3-parentspanid", PARENT),
        ],
    ],
)
def test_every_attempt_hangs_under_the_same_span(first: list[Field]) -> None:
    fields, tracer = list(first), Tracer(Sampling())
    found = tracer.begin(fields)
    assert found is not None
    for parent in (found.parent, found.parent, b"00000000000000aa"):
        tracer.next_attempt(found, fields, parent)
        assert fields[-1][1].rpartition(b"-")[2] == parent


def test_a_no_does_not_make_a_span_its_own_parent() -> None:
    fields = [(b"x-b3-traceid", TRACE), (b"x-b3-spanid", SPAN), (b"x-b3-parentspanid", PARENT)]
    found = Tracer(Sampling(1e-18)).begin(fields)
    assert found is not None
    assert dict(fields) == {
        b"x-b3-traceid": TRACE, b"x-b3-spanid": found.span_id, b"x-b3-parentspanid": SPAN, b"x-b3-sampled": b"0",
    }  # fmt: skip


def test_an_attempt_has_a_span_of_its_own_in_the_same_trace() -> None:
    for first in ([w3c()], [HOST], [(b"b3", b"%b-%b-d-%b" % (TRACE[16:], SPAN, PARENT))]):
        fields, tracer = list(first), Tracer(Sampling(1))
        found = tracer.begin(fields)
        assert found is not None
        before, ids = found.span_id, found.trace_id
        tracer.next_attempt(found, fields, found.parent)
        carried = extract(fields)
        assert carried is not None
        assert carried.context.span_id == found.span_id != before
        assert (carried.context.trace_id, found.trace_id, carried.context.debug) == (
            ids,
            ids,
            first[0][0] == b"b3",
        )


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
    assert all(
        trace is not None and len(trace.trace_id) == 32 and len(trace.span_id) == 16
        for trace in found
    )


@pytest.mark.parametrize(("sampling", "recorded"), [(Sampling(1.0), True), (Sampling(0.0), False)])
def test_a_connection_without_a_trace_of_its_own_begins_one_by_the_ratio(
    sampling: Sampling, recorded: bool
) -> None:
    found = Tracer(sampling).connection()
    assert (found is not None) == recorded
    if found is not None:
        assert found.sampled
        assert (len(found.trace_id), len(found.span_id)) == (32, 16)


def test_a_connection_that_the_ratio_leaves_out_is_not_recorded() -> None:
    tracer = Tracer(Sampling(1e-18))
    assert [tracer.connection() for _ in range(10)] == [None] * 10


def test_an_attempt_whose_header_was_taken_off_begins_it_again() -> None:
    fields, tracer = [HOST], Tracer(Sampling(1))
    found = tracer.begin(fields)
    assert found is not None
    fields[:] = [HOST]
    tracer.next_attempt(found, fields, b"")
    assert fields == [HOST, (b"traceparent", b"00-%b-%b-03" % (found.trace_id, found.span_id))]


def test_an_attempt_whose_lines_are_unusual_is_not_written_at_a_glance() -> None:
    tracer = Tracer(Sampling(1))
    trace = Trace(True, TRACE, SPAN)
    assert tracer.next_glance(trace, lined([HOST, w3c(), w3c()]), b"") is None
    assert trace.span_id == SPAN
