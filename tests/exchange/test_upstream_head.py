"""HTTP/2 heads that take a shortcut, against the general way: a repeated header block is not parsed
again, and a request that is forwarded by HTTP/2 becomes a header list in one pass."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.exchange.exchange import ConnectionInfo
from proxy.exchange.upstream_head import forwarded_request
from proxy.net.address import Address
from proxy.wire.h2.fields import (
    Block,
    NeverIndexedField,
    Pair,
    onward_pairs,
    request_head,
    request_pairs,
    response_head,
    response_pairs,
)
from proxy.wire.messages import (
    CALLER,
    CALLER_FIELDS,
    HOP_BY_HOP,
    OVERRIDES,
    ProtocolError,
    RequestHead,
    ResponseHead,
    strip_hop_by_hop,
)
from tests.kit.exchanges import unanswered

# As peers send them: fields that end at a hop, fields that mean something else in HTTP/1, and
# unknown fields.
KNOWN: list[Pair] = [
    (b"te", b"trailers"), (b"te", b"Trailers"), (b"host", b"a"), (b"host", b"A:80"), (b"cookie", b"a=b"), (b"cookie", b"c=d"),
    (b"content-length", b"1"), (b"content-type", b"application/grpc"), (b"x-a", b""), (b"isthmus-hops", b"1"), (b"trailer", b"a"),
    *[(name, b"spiffe://evil/ns/a/sa/b") for name in sorted(CALLER_FIELDS | OVERRIDES)],
]  # fmt: skip
ODD = st.tuples(
    st.sampled_from([name for name, _ in KNOWN]), st.sampled_from([b"", b"1", b"a", b"a, te"])
)
FIELD = st.one_of(st.sampled_from(KNOWN), st.sampled_from(KNOWN), ODD)
FIELDS = st.lists(
    FIELD.flatmap(lambda field: st.sampled_from([field, NeverIndexedField(field)])), max_size=6
)
PSEUDO = st.tuples(
    st.sampled_from([b"GET", b"POST", b"OPTIONS", b"HEAD"]),
    st.sampled_from([b"/", b"/a?b=c", b"//x", b"*"]),
    st.sampled_from([b"a", None, b"A:80"]),
    st.sampled_from([b"http", b"https"]),
)


PEER = Address("127.0.0.1", 1)


def asked(pseudo: tuple[bytes, bytes, bytes | None, bytes], fields: list[Pair]) -> list[Pair]:
    method, path, authority, scheme = pseudo
    named = [] if authority is None else [(b":authority", authority)]
    return [(b":method", method), (b":scheme", scheme), *named, (b":path", path), *fields]


def read(pairs: list[Pair]) -> RequestHead | None:
    try:
        return request_head(pairs)
    except ProtocolError:
        return None


def kinds(pairs: list[Pair]) -> list[tuple[type, Pair]]:
    return [(type(pair), pair) for pair in pairs]


@given(
    pseudo=PSEUDO,
    fields=FIELDS,
    caller=st.sampled_from([None, b"spiffe://cluster.local/ns/a/sa/b"]),
)
def test_the_short_way_onward_gives_the_header_list_of_the_long_one(
    pseudo: tuple[bytes, bytes, bytes | None, bytes], fields: list[Pair], caller: bytes | None
) -> None:
    head = read(asked(pseudo, fields))
    short = onward_pairs(head, caller) if head is not None else None
    if head is None or short is None:
        return
    assert head.target.startswith(b"/")
    exchange = unanswered(head, ConnectionInfo("inbound", PEER, PEER))
    exchange.caller = caller
    assert kinds(short) == kinds(request_pairs(forwarded_request(exchange)))
    assert [value for name, value in short if name == CALLER] == (
        [caller] if caller is not None else []
    )
    assert not {name for name, _ in short} & (HOP_BY_HOP - {b"te", CALLER})


def test_the_short_way_is_taken() -> None:
    pairs = asked((b"POST", b"/", b"a", b"http"), [(b"te", b"trailers"), (b"x", b"1")])
    assert onward_pairs(request_head(pairs), None) == [
        *pairs[:4],
        (b"x", b"1"),
        (b"te", b"trailers"),
    ]
    assert (
        onward_pairs(request_head([(b":method", b"CONNECT"), (b":authority", b"a:1")]), None)
        is None
    )


@given(pseudo=PSEUDO, fields=FIELDS)
def test_a_request_that_is_read_off_again_is_the_same_and_independent(
    pseudo: tuple[bytes, bytes, bytes | None, bytes], fields: list[Pair]
) -> None:
    pairs = asked(pseudo, fields)
    block, fresh = Block(pairs), read(pairs)
    for _ in range(3):
        again = read(block)
        assert again == fresh
        if again is None or fresh is None:
            continue
        assert kinds(again.headers.items) == kinds(fresh.headers.items)
        assert again.headers.clean == fresh.headers.clean
        # Changes of one do not affect the next.
        again.headers.items.append((b"x-more", b"1"))
        again.headers.remove(b"host", b"te")
        again.headers.clean = not fresh.headers.clean
        again.method, again.target = b"PUT", b"/other"
    assert list(block) == pairs


@given(status=st.sampled_from([b"200", b"103", b"101", b"99", b"500"]), fields=FIELDS)
def test_a_response_that_is_read_off_again_is_the_same_and_independent(
    status: bytes, fields: list[Pair]
) -> None:
    pairs = [(b":status", status), *fields]
    block = Block(pairs)

    def response(pairs: list[Pair]) -> ResponseHead | None:
        try:
            return response_head(pairs)
        except ProtocolError:
            return None

    fresh = response(pairs)
    for _ in range(3):
        again = response(block)
        assert again == fresh
        if again is None or fresh is None:
            continue
        assert kinds(response_pairs(again)) == kinds(response_pairs(fresh))
        strip_hop_by_hop(again.headers)
        again.headers.add(b"x-more", b"1")
        again.status = 502


@given(pseudo=PSEUDO, fields=FIELDS)
def test_a_block_may_be_read_as_one_thing_and_as_the_other(
    pseudo: tuple[bytes, bytes, bytes | None, bytes], fields: list[Pair]
) -> None:
    """Bytes that are right in a request may come, wrongly, in a response."""
    block = Block(asked(pseudo, fields))
    first = read(block)
    try:
        response_head(block)
    except ProtocolError:
        assert read(block) == first
    else:
        raise AssertionError("a response with the pseudo-fields of a request")
