"""W3C trace context: valid contexts are read, also of future versions; invalid ones are ignored;
generated ones are valid."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracing.context import TraceContext
from tracing.propagation import extract, replace
from tracing.w3c import MOST_CHARACTERS, MOST_MEMBERS, parse, parse_state, traceparent

TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
VALID = b"00-" + TRACE + b"-" + SPAN + b"-01"


def test_a_valid_header_is_understood() -> None:
    found = parse(VALID)
    assert found == TraceContext(TRACE, SPAN, sampled=True)
    assert traceparent(found) == VALID


@pytest.mark.parametrize(
    "value",
    [
        b"01-" + VALID[3:],
        b"cc-" + VALID[3:] + b"-what-the-future-will-be-like",
        b"fe-" + VALID[3:] + b"-",
        b" " + VALID + b"\t",
    ],
)
def test_a_higher_version_is_understood_as_far_as_we_know_it(value: bytes) -> None:
    found = parse(value)
    assert found is not None
    assert traceparent(found) == VALID


def test_unknown_flags_are_not_forwarded() -> None:
    found = parse(VALID[:-2] + b"ff")
    assert found is not None
    assert (found.sampled, traceparent(found)[-2:]) == (True, b"03")


@pytest.mark.parametrize(
    "value",
    [
        b"", b"00", VALID[:-1], VALID + b"-00", VALID + b".", b"ff-" + VALID[3:], b"cc-" + VALID[3:] + b".x", b"0-" + VALID[3:],
        b"00-" + b"0" * 32 + b"-" + SPAN + b"-01", b"00-" + TRACE + b"-" + b"0" * 16 + b"-01", VALID.upper(), VALID.replace(b"-", b"_"),
        VALID[:-2] + b"0x", VALID + b"\n", b"00-" + TRACE[:-1] + b"-" + SPAN + b"-01", VALID + b"," + VALID, VALID[:-2], VALID[:-3],
    ],
)  # fmt: skip
def test_what_is_wrong_in_any_detail_is_absent(value: bytes) -> None:
    assert parse(value) is None
    assert extract([(b"traceparent", value)]) is None


def test_no_header_and_two_headers_are_no_context() -> None:
    assert extract([]) is None
    assert extract([(b"Traceparent", VALID), (b"traceparent", VALID)]) is None


def test_the_tracestate_is_passed_on_byte_for_byte_also_where_it_makes_no_sense() -> None:
    fields = [(b"TraceState", b"a=1,"), (b"TraceParent", VALID), (b"tracestate", b"!!")]
    found = extract(fields)
    assert found is not None
    assert found.context.state == (b"a=1,", b"!!")
    replace(fields, found, TraceContext(TRACE, b"1" * 16, sampled=True))
    assert fields == [
        (b"TraceState", b"a=1,"),
        (b"TraceParent", b"00-%b-%b-01" % (TRACE, b"1" * 16)),
        (b"tracestate", b"!!"),
    ]


def test_several_tracestate_headers_are_one_list() -> None:
    assert parse_state([b"a=1, b=2", b"c@d=3 4,,"]) == (("a", "1"), ("b", "2"), ("c@d", "3 4"))


@pytest.mark.parametrize(
    "value",
    [
        b"a",
        b"A=1",
        b"a=1,a=2",
        b"=1",
        b"a=1=2",
        b"a=\x80",
        b"a@=1",
        b"@a=1",
        b"a=" + b"x" * 257,
        b"a b=1",
        b"a" * 257 + b"=1",
        b"a=",
    ],
)
def test_a_malformed_tracestate_is_dropped_whole(value: bytes) -> None:
    assert parse_state([b"ok=1", value]) == ()


def test_more_members_than_allowed_are_dropped_whole() -> None:
    members = [b"k%d=v" % number for number in range(MOST_MEMBERS + 1)]
    assert len(parse_state([b",".join(members[:-1])])) == MOST_MEMBERS
    assert parse_state([b",".join(members)]) == ()


def test_a_long_tracestate_loses_its_long_members_first_and_then_the_last() -> None:
    long, short = b"long=" + b"x" * 200, [b"k%d=%s" % (number, b"y" * 100) for number in range(6)]
    kept = parse_state([b",".join([short[0], long, *short[1:]])])
    assert [key for key, _ in kept] == ["k0", "k1", "k2", "k3"]


_KEY = st.from_regex(r"[a-z][a-z0-9_*/-]{0,30}(@[a-z]{1,5})?", fullmatch=True)
_VALUE = st.from_regex(r"[ !#-+.-<>-~]{0,40}[!#-+.-;>-~]", fullmatch=True).filter(
    lambda text: "=" not in text
)


@given(st.dictionaries(_KEY, _VALUE, max_size=MOST_MEMBERS))
def test_a_valid_tracestate_is_read_as_it_was_written(state: dict[str, str]) -> None:
    read = parse_state([",".join(f"{key}={value}" for key, value in state.items()).encode()])
    if sum(len(key) + len(value) + 2 for key, value in state.items()) <= MOST_CHARACTERS:
        assert dict(read) == state
    assert set(read) <= set(state.items())


@given(
    st.one_of(
        st.binary(max_size=80),
        st.from_regex(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"),
    ),
    st.lists(st.binary()),
)
def test_any_bytes_are_a_valid_context_or_none(value: bytes, state: list[bytes]) -> None:
    found = parse(value)
    if found is not None:
        assert re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", traceparent(found))
        assert parse(traceparent(found)) == found
    assert (
        sum(len(key) + len(content) + 2 for key, content in parse_state(state))
        <= MOST_CHARACTERS + 1
    )


def test_only_as_many_long_members_go_as_have_to() -> None:
    long = [b"l%d=" % number + b"x" * 200 for number in range(3)]
    kept = parse_state([b",".join([*long, b"k=y"])])
    assert [key for key, _ in kept] == ["l0", "l1", "k"]
