"""Rules of propagation for every format: what was written is read back. Our span replaces the
caller's, and nothing else changes. Any bytes are a context or none, never an error. Invalid fields
stay unchanged."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracing.context import Field, TraceContext
from tracing.propagation import NAMES, begin, extract, header, recognise, replace

TRACE, SHORT = b"463ac35c9f6413ad48485a3953bb6124", b"48485a3953bb6124"
SPAN, PARENT, OURS = b"a2fb4a1d1a96d312", b"0020000000000001", b"00f067aa0ba902b7"

trace_ids = st.binary(min_size=16, max_size=16).filter(any).map(lambda raw: raw.hex().encode())
short_ids = st.binary(min_size=8, max_size=8).filter(any).map(lambda raw: raw.hex().encode())
sampling = st.sampled_from([True, False])


def grpc(trace: bytes, span: bytes, options: bytes = b"\x02\x01", *, padded: bool = False) -> bytes:
    raw = b"\0\0" + bytes.fromhex(trace.decode()) + b"\1" + bytes.fromhex(span.decode()) + options
    return base64.b64encode(raw) if padded else base64.b64encode(raw).rstrip(b"=")


def child(
    context: TraceContext, span: bytes = OURS, *, sampled: bool | None = True
) -> TraceContext:
    return TraceContext(
        context.trace_id, span, sampled, context.random, context.debug, parent=context.span_id
    )


def passed_on(fields: list[Field], span: bytes = OURS, *, sampled: bool = True) -> list[Field]:
    """The fields with our span in the caller's place."""
    found = extract(fields)
    assert found is not None
    written = list(fields)
    replace(written, found, child(found.context, span, sampled=sampled))
    return written


# name, fields as received, sampled, debug, fields as forwarded
CASES: list[tuple[str, list[Field], bool | None, bool, list[Field]]] = [
    (
        "w3c",
        [(b"traceparent", b"00-%b-%b-01" % (TRACE, SPAN))],
        True,
        False,
        [(b"traceparent", b"00-%b-%b-01" % (TRACE, OURS))],
    ),
    (
        "w3c random",
        [(b"traceparent", b"00-%b-%b-03" % (TRACE, SPAN))],
        True,
        False,
        [(b"traceparent", b"00-%b-%b-03" % (TRACE, OURS))],
    ),
    (
        "single, sampled",
        [(b"b3", b"%b-%b-1" % (TRACE, SPAN))],
        True,
        False,
        [(b"b3", b"%b-%b-1" % (TRACE, OURS))],
    ),
    (
        "single, debug",
        [(b"B3", b"%b-%b-d" % (SHORT, SPAN))],
        True,
        True,
        [(b"B3", b"%b-%b-d" % (SHORT, OURS))],
    ),
    (
        "single, with a parent",
        [(b"b3", b"%b-%b-1-%b" % (SHORT, SPAN, PARENT))],
        True,
        False,
        [(b"b3", b"%b-%b-1-%b" % (SHORT, OURS, SPAN))],
    ),
    (
        "single, undecided",
        [(b"b3", b"%b-%b" % (TRACE, SPAN))],
        None,
        False,
        [(b"b3", b"%b-%b-1" % (TRACE, OURS))],
    ),
    (
        "several, as Envoy sends them",
        [
            (b"X-B3-TraceId", TRACE),
            (b"X-B3-SpanId", SPAN),
            (b"X-B3-ParentSpanId", PARENT),
            (b"X-B3-Sampled", b"1"),
        ],
        True,
        False,
        [
            (b"X-B3-TraceId", TRACE),
            (b"X-B3-SpanId", OURS),
            (b"X-B3-ParentSpanId", SPAN),
            (b"X-B3-Sampled", b"1"),
        ],
    ),
    (
        "several, without a parent, an old sender",
        [(b"x-b3-sampled", b"true"), (b"x-b3-spanid", SPAN), (b"x-b3-traceid", SHORT)],
        True,
        False,
        [(b"x-b3-sampled", b"true"), (b"x-b3-spanid", OURS), (b"x-b3-traceid", SHORT)],
    ),
    (
        "several, debug",
        [(b"x-b3-traceid", SHORT), (b"x-b3-spanid", SPAN), (b"x-b3-flags", b"1")],
        True,
        True,
        [(b"x-b3-traceid", SHORT), (b"x-b3-spanid", OURS), (b"x-b3-flags", b"1")],
    ),
    (
        "several, debug beside a no",
        [
            (b"x-b3-traceid", SHORT),
            (b"x-b3-spanid", SPAN),
            (b"x-b3-sampled", b"0"),
            (b"x-b3-flags", b"1"),
        ],
        True,
        True,
        [
            (b"x-b3-traceid", SHORT),
            (b"x-b3-spanid", OURS),
            (b"x-b3-sampled", b"0"),
            (b"x-b3-flags", b"1"),
        ],
    ),
    (
        "several, undecided",
        [(b"x-b3-traceid", SHORT), (b"x-b3-spanid", SPAN)],
        None,
        False,
        [(b"x-b3-traceid", SHORT), (b"x-b3-spanid", OURS), (b"x-b3-sampled", b"1")],
    ),
    (
        "jaeger",
        [(b"uber-trace-id", b"%b:%b:0:1" % (TRACE, SPAN))],
        True,
        False,
        [(b"uber-trace-id", b"%b:%b:%b:1" % (TRACE, OURS, SPAN))],
    ),
    (
        "jaeger, 64 bits, a parent",
        [(b"Uber-Trace-Id", b"%b:%b:%b:01" % (SHORT, SPAN, PARENT))],
        True,
        False,
        [(b"Uber-Trace-Id", b"%b:%b:%b:01" % (SHORT, OURS, SPAN))],
    ),
    (
        "jaeger, debug",
        [(b"uber-trace-id", b"%b:%b:0:3" % (TRACE, SPAN))],
        True,
        True,
        [(b"uber-trace-id", b"%b:%b:%b:3" % (TRACE, OURS, SPAN))],
    ),
    (
        "jaeger, a flag of its own",
        [(b"uber-trace-id", b"%b:%b:0:9" % (TRACE, SPAN))],
        True,
        False,
        [(b"uber-trace-id", b"%b:%b:%b:9" % (TRACE, OURS, SPAN))],
    ),
    (
        "jaeger, encoded, in capitals",
        [(b"uber-trace-id", b"%b%%3A%b%%3A0%%3A1" % (TRACE.upper(), SPAN.upper()))],
        True,
        False,
        [(b"uber-trace-id", b"%b%%3A%b%%3A%b%%3A1" % (TRACE.upper(), OURS, SPAN))],
    ),
    (
        "grpc",
        [(b"grpc-trace-bin", grpc(TRACE, SPAN))],
        True,
        False,
        [(b"grpc-trace-bin", grpc(TRACE, OURS))],
    ),
    (
        "grpc, padded",
        [(b"grpc-trace-bin", grpc(TRACE, SPAN, padded=True))],
        True,
        False,
        [(b"grpc-trace-bin", grpc(TRACE, OURS, padded=True))],
    ),
    (
        "grpc, with a field of the future",
        [(b"grpc-trace-bin", grpc(TRACE, SPAN, b"\2\1\x09later"))],
        True,
        False,
        [(b"grpc-trace-bin", grpc(TRACE, OURS, b"\2\1\x09later"))],
    ),
]


@pytest.mark.parametrize(
    ("fields", "sampled", "debug", "expected"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_our_span_takes_the_callers_place_and_nothing_else_changes(
    fields: list[Field], sampled: bool | None, debug: bool, expected: list[Field]
) -> None:
    around: list[Field] = [(b"Host", b"a"), *fields, (b"baggage", b"k=v"), (b"x-b3-other", b"1")]
    found = extract(around)
    assert found is not None
    assert (found.context.span_id, found.context.sampled, found.context.debug) == (
        SPAN,
        sampled,
        debug,
    )
    assert found.context.trace_id in (TRACE, SHORT.rjust(32, b"0"))
    assert passed_on(around) == [
        (b"Host", b"a"),
        *expected,
        *around[len(fields) + 1 :],
    ] or passed_on(around)[1:] == [
        *expected[: len(fields)],
        *around[len(fields) + 1 :],
        *expected[len(fields) :],
    ]


@pytest.mark.parametrize(
    ("fields", "sampled"),
    [
        ([(b"b3", b"0")], False),
        ([(b"b3", b"1")], True),
        ([(b"b3", b"d")], True),
        ([(b"x-b3-sampled", b"0")], False),
        ([(b"X-B3-Sampled", b"False")], False),
        ([(b"x-b3-sampled", b"1")], True),
        ([(b"x-b3-flags", b"1")], True),
    ],
)
def test_a_decision_without_ids_is_a_decision(fields: list[Field], sampled: bool) -> None:
    found = extract(fields)
    assert found is not None
    assert (found.context.trace_id, found.context.sampled) == (b"", sampled)


@pytest.mark.parametrize(
    "fields", [[(b"b3", b"1")], [(b"x-b3-sampled", b"1")], [(b"x-b3-flags", b"1")]]
)
def test_a_trace_that_such_a_decision_begins_is_written_in_the_same_format(
    fields: list[Field],
) -> None:
    found = extract(fields)
    assert found is not None
    replace(fields, found, TraceContext(TRACE, OURS, sampled=True, debug=found.context.debug))
    again = extract(fields)
    assert again is not None
    assert (again.context.trace_id, again.context.span_id, again.context.sampled) == (
        TRACE,
        OURS,
        True,
    )
    assert {name for name, _ in fields} <= NAMES - {b"traceparent"}


@pytest.mark.parametrize(
    "fields",
    [
        [(b"b3", b"")], [(b"b3", b"2")], [(b"b3", b"%b" % TRACE)], [(b"b3", b"%b-%b-2" % (TRACE, SPAN))],
        [(b"b3", b"0" * 32 + b"-" + SPAN)],
        [(b"b3", b"%b-%b" % (TRACE, b"0" * 16))], [(b"b3", b"%b-%b-1-" % (TRACE, SPAN))], [(b"b3", b"%b-%b--%b" % (TRACE, SPAN, PARENT))],
        [(b"b3", b"%b-%b-1\n" % (TRACE, SPAN))], [(b"b3", (b"%b-%b-1" % (TRACE, SPAN)).upper())], [(b"b3", b"1"), (b"b3", b"1")],
        [(b"x-b3-traceid", TRACE)], [(b"x-b3-spanid", SPAN)], [(b"x-b3-traceid", TRACE[:-1]), (b"x-b3-spanid", SPAN)],
        [(b"x-b3-traceid", TRACE), (b"x-b3-traceid", TRACE), (b"x-b3-spanid", SPAN)], [(b"x-b3-traceid", TRACE), (b"x-b3-spanid", b"")],
        [(b"x-b3-sampled", b"maybe")], [(b"x-b3-flags", b"0")], [(b"x-b3-parentspanid", PARENT)], [(b"tracestate", b"a=1")],
        [(b"uber-trace-id", b"")], [(b"uber-trace-id", b"%b:%b:0" % (TRACE, SPAN))], [(b"uber-trace-id", b"%b:%b:0:" % (TRACE, SPAN))],
        [(b"uber-trace-id", b"0:%b:0:1" % SPAN)], [(b"uber-trace-id", b"%b:0:0:1" % TRACE)],
        [(b"uber-trace-id", b"%b0:%b:0:1" % (TRACE, SPAN))],
        [(b"uber-trace-id", b"%b:%b:0:100" % (TRACE, SPAN))], [(b"uber-trace-id", b"%b:%b:x:1" % (TRACE, SPAN))],
        [(b"uber-trace-id", b"%b:%b%%3A0:1" % (TRACE, SPAN))], [(b"uber-trace-id", b"%b:%b:0:1\n" % (TRACE, SPAN))],
        [(b"uber-trace-id", b"%b:%b:0:1" % (TRACE, SPAN))] * 2,
        [(b"grpc-trace-bin", b"")], [(b"grpc-trace-bin", b"AA")], [(b"grpc-trace-bin", grpc(TRACE, SPAN)[:-4])],
        [(b"grpc-trace-bin", b"!" + grpc(TRACE, SPAN)[1:])], [(b"grpc-trace-bin", b"AQ" + grpc(TRACE, SPAN)[2:])],
        [(b"grpc-trace-bin", grpc(b"0" * 32, SPAN))], [(b"grpc-trace-bin", grpc(TRACE, b"0" * 16))],
        [(b"grpc-trace-bin", grpc(TRACE, SPAN, b"\2\1" + b"\x09" * 600))],
        [(b"grpc-trace-bin", grpc(TRACE, SPAN) + b"," + grpc(TRACE, SPAN))],
    ],
)  # fmt: skip
def test_what_is_not_valid_is_not_a_context(fields: list[Field]) -> None:
    assert extract(fields) is None


def test_grpc_without_options_is_not_sampled_and_gets_them_when_it_is() -> None:
    fields = [(b"grpc-trace-bin", grpc(TRACE, SPAN, b""))]
    found = extract(fields)
    assert found is not None
    assert found.context.sampled is False
    assert passed_on(fields) == [(b"grpc-trace-bin", grpc(TRACE, OURS, b"\2\1"))]
    unknown = [(b"grpc-trace-bin", grpc(TRACE, SPAN, b"\2\x05"))]
    assert passed_on(unknown, sampled=False) == [(b"grpc-trace-bin", grpc(TRACE, OURS, b"\2\4"))]


@pytest.mark.parametrize(("value", "trace", "span"), [
    (b"1:2:0:1", b"1".rjust(32, b"0"), b"2".rjust(16, b"0")),
    (b"%b:%b:0:1" % (TRACE[:31], SPAN[1:]), TRACE[:31].rjust(32, b"0"), SPAN[1:].rjust(16, b"0")),
])  # fmt: skip
def test_the_ids_of_jaeger_may_lack_their_zeros(value: bytes, trace: bytes, span: bytes) -> None:
    fields = [(b"uber-trace-id", value)]
    found = extract(fields)
    assert found is not None
    assert (found.context.trace_id, found.context.span_id) == (trace, span)
    assert passed_on(fields) == [
        (b"uber-trace-id", value.split(b":")[0] + b":%b:%b:1" % (OURS, span))
    ]


@pytest.mark.parametrize(("flags", "sampled"), [
    (b"0", False), (b"00", False), (b"8", False), (b"1", True), (b"2", True), (b"03", True), (b"b", True),
])  # fmt: skip
def test_the_flags_of_jaeger(flags: bytes, sampled: bool) -> None:
    fields = [(b"uber-trace-id", b"%b:%b:0:%b" % (TRACE, SPAN, flags))]
    found = extract(fields)
    assert found is not None
    assert found.context.sampled is sampled
    refused = passed_on(fields, sampled=False)[0][1].split(b":")[3]
    assert len(refused) == len(flags)
    assert int(refused, 16) == int(flags, 16) & ~3


def test_all_formats_of_the_same_trace_are_given_our_span() -> None:

    def fields(span: bytes, parent: bytes) -> list[Field]:
        standard, jaeger = (
            (b"traceparent", b"00-%b-%b-01" % (TRACE, span)),
            (b"uber-trace-id", b"%b:%b:%b:1" % (TRACE, span, parent)),
        )
        return [
            standard,
            (b"b3", b"%b-%b-1" % (SHORT, span)),
            (b"grpc-trace-bin", grpc(TRACE, span)),
            jaeger,
        ]

    assert passed_on(fields(SPAN, b"0")) == fields(OURS, SPAN)


def test_the_standard_wins_and_headers_of_another_trace_stay_as_they_are() -> None:
    other = (b"b3", b"%b-%b-1" % (TRACE[::-1], SPAN))
    assert passed_on([other, (b"traceparent", b"00-%b-%b-01" % (TRACE, SPAN))]) == [
        other,
        (b"traceparent", b"00-%b-%b-01" % (TRACE, OURS)),
    ]


def test_an_invalid_header_does_not_hide_a_valid_one_of_another_format() -> None:
    broken = (b"traceparent", b"00-zz")
    assert passed_on([broken, (b"b3", b"%b-%b-1" % (TRACE, SPAN))]) == [
        broken,
        (b"b3", b"%b-%b-1" % (TRACE, OURS)),
    ]


def test_fields_that_others_have_added_in_between_do_not_mislead_us() -> None:
    fields = [(b"traceparent", b"00-%b-%b-01" % (TRACE, SPAN))]
    found = extract(fields)
    assert found is not None
    fields.insert(0, (b"isthmus-loop", b"x"))
    replace(fields, found, child(found.context))
    assert fields == [(b"isthmus-loop", b"x"), (b"traceparent", b"00-%b-%b-01" % (TRACE, OURS))]


def test_a_new_trace_replaces_an_invalid_one() -> None:
    fields = [
        (b"Traceparent", b"rubbish"),
        (b"Host", b"a"),
        (b"tracestate", b"a=1"),
        (b"tracestate", b"b=1"),
    ]
    begin(fields, TraceContext(TRACE, OURS, sampled=True, random=True))
    assert fields == [(b"Host", b"a"), (b"traceparent", b"00-%b-%b-03" % (TRACE, OURS))]


Writer = Callable[[bytes, bytes, bool], list[Field]]
WRITERS: list[Writer] = [
    lambda trace, span, sampled: [(b"traceparent", b"00-%b-%b-0%d" % (trace, span, sampled))],
    lambda trace, span, sampled: [(b"b3", b"%b-%b-%d" % (trace, span, sampled))],
    lambda trace, span, sampled: [(b"b3", b"%b-%b-%d-%b" % (trace, span, sampled, PARENT))],
    lambda trace, span, sampled: [
        (b"X-B3-TraceId", trace),
        (b"X-B3-SpanId", span),
        (b"X-B3-Sampled", b"%d" % sampled),
    ],
    lambda trace, span, sampled: [(b"grpc-trace-bin", grpc(trace, span, b"\2" + bytes([sampled])))],
    lambda trace, span, sampled: [(b"uber-trace-id", b"%b:%b:0:%d" % (trace, span, sampled))],
    lambda trace, span, sampled: [
        (b"uber-trace-id", b"%b:%b:0:0%d" % (trace.lstrip(b"0"), span.lstrip(b"0"), sampled))
    ],
]


@given(st.sampled_from(WRITERS), trace_ids, short_ids, short_ids, st.tuples(sampling, sampling))
def test_what_is_written_is_read_back(
    write: Writer, trace: bytes, span: bytes, ours: bytes, sampled: tuple[bool, bool]
) -> None:
    fields = write(trace, span, sampled[0])
    found = extract(fields)
    assert found is not None
    assert (found.context.trace_id, found.context.span_id, found.context.sampled) == (
        trace,
        span,
        sampled[0],
    )
    again = extract(passed_on(fields, ours, sampled=sampled[1]))
    assert again is not None
    assert (again.context.trace_id, again.context.span_id, again.context.sampled) == (
        trace,
        ours,
        sampled[1],
    )


values = st.one_of(
    st.binary(max_size=80),
    st.from_regex(rb"[0-9a-f-]{16,70}[01d]?"),
    st.from_regex(rb"[0-9a-f]{1,33}(:[0-9a-f]{1,17}){3}"),
)


@given(st.lists(st.tuples(st.sampled_from(sorted(NAMES)), values), max_size=8))
def test_any_headers_are_a_context_or_none_and_can_be_written_over(fields: list[Field]) -> None:
    found = extract(fields)
    if found is None:
        return
    before = list(fields)
    replace(
        fields,
        found,
        TraceContext(
            found.context.trace_id or TRACE, OURS, sampled=True, debug=found.context.debug
        ),
    )
    again = extract(fields)
    assert again is not None
    assert again.context.span_id == OURS
    assert again.context.sampled
    assert [name for name, _ in fields][: len(before)] == [name for name, _ in before]


def test_a_message_of_our_own_has_the_standards_header() -> None:
    assert header(TRACE, OURS) == (b"traceparent", b"00-%b-%b-03" % (TRACE, OURS))


def test_b3_without_a_decision_goes_on_without_one() -> None:
    fields = [(b"b3", b"%b-%b" % (TRACE, SPAN))]
    found = extract(fields)
    assert found is not None
    replace(fields, found, child(found.context, sampled=None))
    assert fields == [(b"b3", b"%b-%b" % (TRACE, OURS))]


def test_grpc_without_options_stays_without_them_when_it_is_not_sampled() -> None:
    fields = [(b"grpc-trace-bin", grpc(TRACE, SPAN, b""))]
    assert passed_on(fields, sampled=False) == [(b"grpc-trace-bin", grpc(TRACE, OURS, b""))]


def test_headers_that_have_become_ambiguous_or_invalid_since_are_left_alone() -> None:
    """Another part of the proxy may have changed the fields in between."""
    for name, value in (
        (b"b3", b"%b-%b-1" % (TRACE, SPAN)),
        (b"uber-trace-id", b"%b:%b:0:1" % (TRACE, SPAN)),
    ):
        found = extract([(name, value)])
        assert found is not None
        for fields in ([(name, value), (name, value)], [(name, b"?"), (name, b"?")]):
            before = list(fields)
            replace(fields, found, child(found.context))
            assert fields == before


def test_two_formats_with_trace_in_their_names_are_not_seen_at_a_glance() -> None:
    lines = b"Host: a\r\nGrpc-Trace-Bin: x\r\nX-B3-TraceId: %b\r\nX-B3-SpanId: %b\r\n" % (
        TRACE,
        SPAN,
    )
    assert recognise(lines, lines.lower(), lines.lower().count(b"trace")) is None
