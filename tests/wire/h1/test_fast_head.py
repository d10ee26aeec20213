"""The rule of the recogniser: what it accepts, h11 accepts with the same meaning, and so does the
strict parser of wire/h1/strict_head.py. The heads are those of real programs, and damaged ones. A
rule that is never tested holds trivially: so the number of accepted heads is asserted too."""

from __future__ import annotations

import contextlib
import faulthandler
import random
import time
from collections.abc import Callable, Iterator

import h11
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from proxy.wire.h1 import fast_head
from proxy.wire.h1.body import Framing, Length
from proxy.wire.h1.fast_head import (
    encode_request,
    encode_response,
    recognise_request,
    recognise_response,
)
from proxy.wire.h1.strict_head import decide_request, decide_response
from proxy.wire.messages import (
    CALLER_FIELDS,
    OVERRIDES,
    Headers,
    Limits,
    ProtocolError,
    RequestHead,
    ResponseHead,
    strip_hop_by_hop,
)
from tests.wire.corpus import REQUESTS, RESPONSES, head, spoil

LIMITS = Limits(head=4096, target=256, fields=24)
ANY = h11.Request(
    method="GET", target="/", headers=[("Host", "a"), ("Connection", "upgrade"), ("Upgrade", "any")]
)


def h11_length(connection: h11.Connection) -> Length | None:
    """The length that h11 has for the body that follows; None: until the end of the connection."""
    reader = connection._reader
    if reader is None:
        return 0
    if isinstance(reader, h11._readers.ChunkedReader):
        return Framing.CHUNKED
    return getattr(reader, "_length", None)


def strips_alike(
    found: tuple[RequestHead | ResponseHead, Length] | None, items: list[tuple[bytes, bytes]]
) -> None:
    """Assert that a block of lines loses the same fields as the list of them."""
    assert found is not None
    block, split = found[0].headers, Headers(items)
    assert all((name.lower() in block) == (name.lower() in split) for name, _ in items)
    strip_hop_by_hop(block)
    strip_hop_by_hop(split)
    assert block.encode() == split.encode()
    assert block.items == split.items


def request_holds(data: bytes) -> bool:
    """Assert the rule for one request head; True if it was tested."""
    found = recognise_request(data, LIMITS)
    if found is None:
        return False
    ours, length = found
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    theirs = connection.next_event()
    assert isinstance(theirs, h11.Request), data
    assert (theirs.method, theirs.target, theirs.http_version) == (
        ours.method,
        ours.target,
        ours.version,
    ), data
    assert theirs.headers.raw_items() == ours.headers.items, data
    assert h11_length(connection) == length, data
    assert connection.trailing_data == (b"", False), data
    decided = decide_request(data, LIMITS)
    assert decided == ours, data
    assert decided.headers.items == ours.headers.items, data
    assert encode_request(ours) == data
    strips_alike(recognise_request(data, LIMITS), theirs.headers.raw_items())
    return True


def response_holds(data: bytes) -> bool:
    found = recognise_response(data, LIMITS)
    if found is None:
        return False
    ours, length = found
    connection = h11.Connection(h11.CLIENT)
    connection.send(ANY)
    connection.receive_data(data)
    theirs = connection.next_event()
    assert isinstance(theirs, h11.Response), data
    assert (theirs.status_code, theirs.reason, theirs.http_version) == (
        ours.status,
        ours.reason,
        ours.version,
    ), data
    assert theirs.headers.raw_items() == ours.headers.items, data
    assert h11_length(connection) == (0 if ours.status in (204, 304) else length), data
    assert connection.trailing_data == (b"", False), data
    assert decide_response(data, LIMITS) == ours, data
    strips_alike(recognise_response(data, LIMITS), theirs.headers.raw_items())
    return True


@pytest.mark.parametrize(
    ("corpus", "holds", "least"), [(REQUESTS, request_holds, 10), (RESPONSES, response_holds, 8)]
)
def test_of_the_heads_of_real_programs_the_canonical_ones_are_accepted(
    corpus: tuple[bytes, ...], holds: Callable[[bytes], bool], least: int
) -> None:
    assert sum(map(holds, corpus)) >= least


@pytest.mark.no_cover  # random, as the property tests
@pytest.mark.parametrize(
    ("corpus", "holds"), [(REQUESTS, request_holds), (RESPONSES, response_holds)]
)
def test_the_law_holds_for_many_spoiled_heads(
    corpus: tuple[bytes, ...], holds: Callable[[bytes], bool]
) -> None:
    source = random.Random(20)
    rounds = 20_000
    accepted = sum(holds(spoil(source, source.choice(corpus))) for _ in range(rounds))
    assert rounds * 0.1 < accepted < rounds * 0.9


def spoiled(corpus: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    return st.builds(spoil, st.randoms(use_true_random=False), st.sampled_from(corpus))


@settings(max_examples=400, deadline=None)
@given(spoiled(REQUESTS))
def test_the_law_holds_for_any_request(data: bytes) -> None:
    event("accepted" if request_holds(data) else "declined")


@settings(max_examples=400, deadline=None)
@given(spoiled(RESPONSES))
def test_the_law_holds_for_any_response(data: bytes) -> None:
    event("accepted" if response_holds(data) else "declined")


TOKEN = st.text(st.sampled_from("!#$%&'*+-.^_`|~09AZaz:"), min_size=1, max_size=6).map(
    lambda t: t.encode()
)
LINE = st.one_of(
    st.tuples(TOKEN, st.sampled_from([b": ", b":", b" : ", b":\t"]), st.binary(max_size=6)).map(
        b"".join
    ),
    st.sampled_from(
        [
            b"Host: a",
            b"Host:",
            b"Content-Length: 5",
            b"Content-Length: 00",
            b"Transfer-Encoding: chunked",
            b"Connection: keep-alive",
        ]
    ),
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([b"GET / HTTP/1.1", b"A /\xff HTTP/1.1", b"HTTP/1.1 200 OK", b"HTTP/1.1 299"]),
    st.lists(LINE, max_size=5),
)
def test_the_law_holds_for_heads_of_arbitrary_lines(first: bytes, lines: list[bytes]) -> None:
    data = b"\r\n".join([first, b"Host: h", *lines, b"", b""])
    event("accepted" if request_holds(data) or response_holds(data) else "declined")


@pytest.mark.parametrize("data", [
    head("GET / HTTP/1.0", "Host: a"),
    head("GET / HTTP/1.1"),
    head("GET / HTTP/1.1", "Host: a", "Host: a"),
    head("GET / HTTP/1.1", "Host: a b"),
    head("GET / HTTP/1.1", "Host: user@a"),
    head("GET / HTTP/1.1", "Host: a/b"),
    head("GET / HTTP/1.1", "Host: [::1"),
    head("GET / HTTP/1.1", "Host: a:b"),
    head("GET http://a/ HTTP/1.1", "Host: a"),
    head("CONNECT /x HTTP/1.1", "Host: a"),
    head("get / HTTP/1.1", "Host: a"),
    head("GET / HTTP/1.1", "Host: a", "Content-Length: 5", "Content-Length: 5"),
    head("GET / HTTP/1.1", "Host: a", "Content-Length: 05"),
    head("GET / HTTP/1.1", "Host: a", "CONTENT-length: 5, 5"),
    head("GET / HTTP/1.1", "Host: a", "Content-Length: 1000000000000000000"),
    head("GET / HTTP/1.1", "Host: a", "TRANSFER-encoding: chunked"),
    head("GET / HTTP/1.1", "Host: a", "Connection: keep-alive, x"),
    head("GET / HTTP/1.1", "Host: a", "Expect: 100-continue"),
    head("GET / HTTP/1.1", "Host: a", "Upgrade: websocket"),
    head("GET / HTTP/1.1", "Host: a", "TE: trailers"),
    head("GET / HTTP/1.1", "Host: a", "X: \xe9"),
    head("GET / HTTP/1.1", "Host: a", "X: a", " b"),
    head("GET / HTTP/1.1", "Host: a", "X:a"),
    head("GET / HTTP/1.1", "Host: a", "X: "),
    head("GET / HTTP/1.1", "Host: a", "X : a"),
    head("GET / HTTP/1.1", "Host: a").replace(b"\r\n", b"\n"),
    head("GET / HTTP/1.1", "Host: a")[:-2],
    head("GET / HTTP/1.1", "Host: a") + b"\r\n",
    head("GET /" + "x" * LIMITS.target + " HTTP/1.1", "Host: a"),
    head("GET / HTTP/1.1", "Host: a", *["X: y"] * LIMITS.fields),
    head("GET / HTTP/1.1", "Host: a", "X: " + "y" * LIMITS.head),
])  # fmt: skip
def test_what_needs_judgement_is_declined(data: bytes) -> None:
    assert recognise_request(data, LIMITS) is None


def test_a_head_just_within_its_limits_is_accepted() -> None:
    assert request_holds(head("GET /" + "x" * (LIMITS.target - 1) + " HTTP/1.1", "Host: a"))
    assert request_holds(head("GET / HTTP/1.1", "Host: a", *["X: y"] * (LIMITS.fields - 1)))
    short = head("GET / HTTP/1.1", "Host: a", "X: y")
    assert request_holds(short.replace(b"y", b"y" * (LIMITS.head - len(short) + 1)))


def test_of_two_responses_without_a_length_only_the_one_that_can_have_no_body_is_accepted() -> None:
    assert recognise_response(head("HTTP/1.1 200 OK", "Server: x"), LIMITS) is None
    assert recognise_response(head("HTTP/1.1 304 Not Modified", "Server: x"), LIMITS) is not None


@pytest.mark.parametrize("name", sorted(CALLER_FIELDS | OVERRIDES))
@pytest.mark.parametrize("case", [bytes.lower, bytes.upper, bytes.title])
def test_what_is_said_to_this_proxy_alone_is_not_passed_on(
    name: bytes, case: Callable[[bytes], bytes]
) -> None:
    data = (
        b"GET / HTTP/1.1\r\nHost: a\r\n%b: spiffe://a/ns/b/sa/c\r\nA: b\r\nConnection:"
        b" Keep-Alive\r\n\r\n" % case(name)
    )
    assert request_holds(data)
    found = recognise_request(data, LIMITS)
    assert found is not None
    assert not found[0].headers.clean
    strip_hop_by_hop(found[0].headers)
    assert found[0].headers.items == [(b"Host", b"a"), (b"A", b"b")]


def test_heads_with_the_same_fields_are_heads_of_their_own() -> None:
    """The kept block of fields is shared by all heads that have it."""
    fields = "Host: a", "Connection: keep-alive", "Isthmus-Client-Id: x", "Content-Length: 5"
    for target in ("/a", "/b", "/a"):
        data = head(f"POST {target} HTTP/1.1", *fields)
        assert request_holds(data)
        found = recognise_request(data, LIMITS)
        assert found is not None
        assert (found[0].target, found[1]) == (target.encode(), 5)
        strip_hop_by_hop(found[0].headers)
        found[0].headers.append(b"B", b"c")
        found[0].headers.items.reverse()
    assert recognise_request(data, Limits(fields=len(fields) - 1)) is None, (
        "limits are the caller's own"
    )
    assert response_holds(head("HTTP/1.1 200 OK", *fields))
    for _ in range(2):
        assert recognise_request(head("GET / HTTP/1.1", "Host: a", "Expect: x"), LIMITS) is None


def test_what_is_kept_of_heads_is_bounded() -> None:
    fast_head._known.cache_clear()
    most = fast_head._known.cache_info().maxsize
    assert most is not None
    for number in range(most + 10):
        assert request_holds(head("GET / HTTP/1.1", "Host: a", f"X: {number}"))
    assert fast_head._known.cache_info().currsize == most
    before = fast_head._known.cache_info().misses
    assert request_holds(head("GET / HTTP/1.1", "Host: a", "X: " + "y" * fast_head._LONGEST))
    assert fast_head._known.cache_info().misses == before, "a long block is not kept"
    fast_head.forget()
    assert fast_head._known.cache_info().currsize == 0


def test_what_is_written_is_what_was_read() -> None:
    for data in RESPONSES:
        if (found := recognise_response(data, LIMITS)) and found[0].reason:
            assert encode_response(found[0]) == data
    assert encode_request(RequestHead(b"GET", b"/", Headers([(b"Host", b"a")]))) == head(
        "GET / HTTP/1.1", "Host: a"
    )
    assert encode_response(ResponseHead(200, Headers([(b"X", b"y")]), b"OK")) == head(
        "HTTP/1.1 200 OK", "X: y"
    )


@pytest.fixture
def no_hanging() -> Iterator[None]:
    """A regular expression that backtracks for ever cannot be interrupted: end the process and show
    where it was."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


ADVERSARIAL = {
    "blanks in a value": lambda n: b"GET / HTTP/1.1\r\nX: a" + b" " * n,
    "tabs and blanks": lambda n: b"GET / HTTP/1.1\r\nX: a" + b" \t" * (n // 2) + b"\x01\r\n\r\n",
    "words": lambda n: b"GET / HTTP/1.1\r\nX: " + b"a " * (n // 2) + b"\r\n\r\n",
    "a name without an end": lambda n: b"GET / HTTP/1.1\r\n" + b"a" * n + b"\r\n\r\n",
    "many fields, the last one bad": lambda n: (
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (n // 6) + b"\x00: b\r\n\r\n"
    ),
    "many lengths": lambda n: (
        b"GET / HTTP/1.1\r\n" + b"Content-Length: 5\r\n" * (n // 19) + b"\r\n"
    ),
    "a method without an end": lambda n: b"A" * n + b"\r\n\r\n",
    "a target without an end": lambda n: b"GET /" + b"a" * n + b"\r\n\r\n",
    "a reason without an end": lambda n: b"HTTP/1.1 200 " + b"a " * (n // 2) + b"\x01\r\n\r\n",
    "colons": lambda n: b"GET / HTTP/1.1\r\nX: " + b": " * (n // 2) + b"\r\n\r\n",
    "blanks before a colon that does not come": lambda n: (
        b"GET / HTTP/1.1\r\nX" + b" " * n + b"\r\n\r\n"
    ),
    "carriage returns": lambda n: b"GET / HTTP/1.1\r\nX: " + b"\r" * n + b"\r\n\r\n",
    "a host of dots": lambda n: b"GET / HTTP/1.1\r\nHost: " + b"." * n + b"@\r\n\r\n",
}


@pytest.mark.parametrize("make", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_no_head_takes_more_than_linear_time(
    make: Callable[[int], bytes], no_hanging: None
) -> None:
    limits = Limits(head=1 << 20, target=1 << 20, fields=1 << 20)

    def seconds(size: int) -> float:
        data = make(size)
        best = 1.0
        for _ in range(3):
            began = time.process_time()
            recognise_request(data, limits)
            recognise_response(data, limits)
            for decide in (decide_request, decide_response):
                with contextlib.suppress(ProtocolError):
                    decide(data, limits)
            best = min(best, time.process_time() - began)
        return best

    # Eight times the bytes: linear is 8, quadratic 64. A ratio of very short times has no meaning.
    small, large = seconds(1 << 13), seconds(1 << 16)
    assert large < max(24 * small, 0.02)
