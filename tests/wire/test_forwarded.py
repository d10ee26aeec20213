"""Forwarded (RFC 7239): the examples of the RFC, everything that quoting can hide, and the effect
of a line on the next line."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.wire.forwarded import MOST_ELEMENTS, Node, encode, node, obfuscated, parse
from proxy.wire.messages import ProtocolError


def well_formed(line: bytes) -> bool:
    try:
        parse([line])
    except ProtocolError:
        return False
    return True


@pytest.mark.parametrize(
    ("lines", "elements"),
    [
        # RFC 7239 §4 and §7.1
        ([b'for="_gazonk"'], [{"for": b"_gazonk"}]),
        ([b'For="[2001:db8:cafe::17]:4711"'], [{"for": b"[2001:db8:cafe::17]:4711"}]),
        ([b"for=192.0.2.60;proto=http;by=203.0.113.43"], [{"for": b"192.0.2.60", "proto": b"http", "by": b"203.0.113.43"}]),
        ([b"for=192.0.2.43, for=198.51.100.17"], [{"for": b"192.0.2.43"}, {"for": b"198.51.100.17"}]),
        ([b'for=192.0.2.43,\tFOR="[2001:db8:cafe::17]"'], [{"for": b"192.0.2.43"}, {"for": b"[2001:db8:cafe::17]"}]),
        ([b"for=a", b"for=b;by=c"], [{"for": b"a"}, {"for": b"b", "by": b"c"}]),
        # commas, semicolons, quotes and backslashes within quotes belong to the value
        ([rb'for="a,b;c=\"d\"\\";by=e'], [{"for": rb'a,b;c="d"' + b"\\", "by": b"e"}]),
        ([b'for="",by=x'], [{"for": b""}, {"by": b"x"}]),
        ([b"  for=a ; by=b  ,  for=c  "], [{"for": b"a", "by": b"b"}, {"for": b"c"}]),
        ([b"for=a;;by=b;"], [{"for": b"a", "by": b"b"}]),
        ([b",, for=a,,"], [{"for": b"a"}]),
        ([b";"], [{}]),
        ([b""], []),
        ([], []),
    ],
)  # fmt: skip
def test_elements_are_read(lines: list[bytes], elements: list[dict[str, bytes]]) -> None:
    assert parse(lines) == elements


@pytest.mark.parametrize(
    "line",
    [
        b'for="open', b'for="a" b', b"for=a b", b"for", b"for=", b"=a", b"for =a", b"for= a", b"for=a;For=b", b'for="a\\', b'for=a"b"',
        b"for=[::1]", b"for=a:80", b"by=a;for\x00=b", b'for="\x07"', b"a=b c=d",
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_and_would_be_dropped(line: bytes) -> None:
    assert not well_formed(line)
    with pytest.raises(ProtocolError):
        parse([b"for=good", line])


def test_there_is_a_bound() -> None:
    assert len(parse([b",".join([b"for=a"] * MOST_ELEMENTS)])) == MOST_ELEMENTS
    with pytest.raises(ProtocolError):
        parse([b",".join([b"for=a"] * (MOST_ELEMENTS + 2))])


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"192.0.2.43:47011", Node("192.0.2.43", "47011")),
        (b"[2001:db8::17]", Node("2001:db8::17")),
        (b"[2001:db8::17]:_p", Node("2001:db8::17", "_p")),
        (b"Unknown", Node("unknown")),
        (b"_SEVKISEK:80", Node("_SEVKISEK", "80")),
        (b"_web.default.sa.cluster.local", Node("_web.default.sa.cluster.local")),
    ],
)
def test_nodes(value: bytes, found: Node) -> None:
    assert node(value) == found


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"256.1.1.1",
        b"2001:db8::17",
        b"[::1",
        b"[1.2.3.4]",
        b"[no]",
        b"[::1]x",
        b"host",
        b"_",
        b"_a:",
        b"_a:x",
        b"1.1.1.1:999999",
    ],
)
def test_what_is_not_a_node(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        node(value)


def test_an_identity_in_its_dns_form_is_an_obfuscated_node() -> None:
    assert (
        node(obfuscated("gateway.isthmus.sa.cluster.local")).name
        == "_gateway.isthmus.sa.cluster.local"
    )
    with pytest.raises(ValueError, match="cannot be a node"):
        obfuscated("spiffe://cluster.local")


def test_a_value_that_is_no_token_is_quoted() -> None:
    element = {"for": b"_a", "by": b"a b", "host": b'a"\\'}
    assert encode(element) == b'for=_a;by="a b";host="a\\"\\\\"'
    assert parse([encode(element)]) == [element]
    with pytest.raises(ValueError, match="by has bytes that no field may have"):
        encode({"by": b"\x00"})


_VALUES = st.text(
    st.characters(
        max_codepoint=255, exclude_characters=[chr(c) for c in (*range(9), *range(10, 32), 127)]
    ),
    max_size=20,
)
_NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
_ELEMENTS = st.dictionaries(
    _NAMES, _VALUES.map(lambda text: text.encode("latin-1")), min_size=1, max_size=4
)


@given(st.lists(_ELEMENTS, max_size=5))
@example([{"for": b'\\",by="x'}])
def test_what_is_written_is_read_again_alone_and_joined(elements: list[dict[str, bytes]]) -> None:
    lines = [encode(element) for element in elements]
    assert parse(lines) == elements
    assert parse([b", ".join(lines)]) == elements
    assert all(well_formed(line) for line in lines)


@given(st.binary(max_size=40), _ELEMENTS)
@example(b'for="', {"by": b"x"})
def test_behind_a_well_formed_line_the_next_one_always_means_the_same(
    line: bytes, element: dict[str, bytes]
) -> None:
    """That is why only well-formed lines stay."""
    if well_formed(line):
        assert parse([line + b", " + encode(element)])[-1] == element


@given(st.binary(max_size=60))
def test_any_bytes_are_elements_or_a_protocol_error(line: bytes) -> None:
    try:
        parse([line])
    except ProtocolError:
        assert not well_formed(line)
