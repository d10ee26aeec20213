"""SPIFFE IDs and patterns: a text is read as exactly one name, and every refusal says which part is
wrong.

A text is accepted only if it is the canonical form of an identity of this mesh. Parsing and
printing are inverse. Each accepted identity has a legal DNS form. A pattern matches exactly what it
describes."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.identity.identity import IdentityPattern, SpiffeId, SpiffeIdError

GOOD = "spiffe://mesh.test/ns/shop/sa/checkout"

labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
identities = st.builds(
    SpiffeId, st.lists(labels, min_size=1, max_size=3).map(".".join), labels, labels
)


def test_an_identity_is_read_and_printed_unchanged() -> None:
    identity = SpiffeId.parse(GOOD)
    assert (identity.trust_domain, identity.namespace, identity.service_account) == (
        "mesh.test",
        "shop",
        "checkout",
    )
    assert str(identity) == GOOD
    assert identity.sni == "checkout.shop.sa.mesh.test"
    assert {identity: 1}[SpiffeId("mesh.test", "shop", "checkout")] == 1


def test_a_service_account_may_have_dots_and_a_trust_domain_underscores() -> None:
    identity = SpiffeId.parse("spiffe://my_mesh/ns/shop/sa/check.out")
    assert identity.sni == "check.out.shop.sa.my_mesh"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "start with"),
        ("http://mesh.test/ns/shop/sa/a", "start with"),
        ("SPIFFE://mesh.test/ns/shop/sa/a", "start with"),
        (" " + GOOD, "start with"),
        ("spiffe:///ns/shop/sa/a", "trust domain is empty"),
        ("spiffe://Mesh.test/ns/shop/sa/a", "trust domain 'Mesh.test'"),
        ("spiffe://mesh.test:8443/ns/shop/sa/a", "port"),
        ("spiffe://user@mesh.test/ns/shop/sa/a", "user information"),
        ("spiffe://mesh.tést/ns/shop/sa/a", "trust domain"),
        ("spiffe://" + ".".join(["a" * 63] * 5) + "/ns/shop/sa/a", "longer than 255 bytes"),
        (GOOD + "?x=1", "query"),
        (GOOD + "#x", "fragment"),
        ("spiffe://mesh.test/ns/shop/sa/check%6fut", "percent-encoding"),
        ("spiffe://mesh.test", "path must be"),
        ("spiffe://mesh.test/", "empty segment"),
        (GOOD + "/", "empty segment"),
        ("spiffe://mesh.test//ns/shop/sa/a", "empty segment"),
        ("spiffe://mesh.test/ns/./sa/a", "'.' segment"),
        ("spiffe://mesh.test/ns/../sa/a", "'..' segment"),
        ("spiffe://mesh.test/ns/sh op/sa/a", "path segment 'sh op'"),
        ("spiffe://mesh.test/ns/shop/sa/a\n", "path segment"),
        ("spiffe://mesh.test/ns/shop/role/a", "path must be"),
        ("spiffe://mesh.test/sa/shop/ns/a", "path must be"),
        (GOOD + "/more", "path must be"),
        ("spiffe://mesh.test/ns/Shop/sa/a", "namespace 'Shop'"),
        ("spiffe://mesh.test/ns/sh.op/sa/a", "namespace 'sh.op'"),
        ("spiffe://mesh.test/ns/-shop/sa/a", "namespace '-shop'"),
        ("spiffe://mesh.test/ns/" + "a" * 64 + "/sa/a", "namespace is longer than 63"),
        ("spiffe://mesh.test/ns/shop/sa/check_out", "service account 'check_out'"),
        ("spiffe://mesh.test/ns/shop/sa/a..b", "service account 'a..b'"),
        ("spiffe://mesh..test/ns/shop/sa/a", "DNS form"),
        ("spiffe://-mesh/ns/shop/sa/a", "DNS form"),
        ("spiffe://" + ".".join(["a" * 60] * 4) + "/ns/shop/sa/checkout", "longer than 253"),
        ("spiffe://mesh.test/" + "a" * 2048, "longer than 2048 bytes"),
    ],
)
def test_every_refusal_says_which_part_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(SpiffeIdError, match=re.escape(complaint)):
        SpiffeId.parse(text)


def test_a_long_text_is_not_quoted_in_full() -> None:
    with pytest.raises(SpiffeIdError) as caught:
        SpiffeId.parse("x" * 100_000)
    assert len(str(caught.value)) < 400


def test_an_identity_cannot_be_built_from_bad_parts() -> None:
    with pytest.raises(SpiffeIdError, match="namespace"):
        SpiffeId("mesh.test", "shop/sa/admin", "a")


@given(identities)
def test_parsing_and_printing_are_inverse(identity: SpiffeId) -> None:
    assert SpiffeId.parse(str(identity)) == identity
    assert len(identity.sni) <= 253


@given(st.text(alphabet=string.printable + "é*%", max_size=20), st.integers(0, len(GOOD)))
def test_whatever_is_accepted_is_canonical(noise: str, at: int) -> None:
    text = GOOD[:at] + noise + GOOD[at:]
    try:
        identity = SpiffeId.parse(text)
    except SpiffeIdError:
        return
    assert str(identity) == text


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        (GOOD, GOOD, GOOD + "2"),
        ("spiffe://mesh.test/ns/shop/sa/*", GOOD, "spiffe://mesh.test/ns/shop2/sa/checkout"),
        ("spiffe://mesh.test/ns/shop/*", GOOD, "spiffe://mesh.test/ns/shop-evil/sa/checkout"),
        ("spiffe://mesh.test/ns/*", GOOD, "spiffe://mesh.test.attacker.test/ns/shop/sa/checkout"),
        ("spiffe://mesh.test/*", GOOD, "spiffe://mesh.test.attacker.test/ns/shop/sa/checkout"),
    ],
)
def test_a_pattern_matches_exactly_what_it_describes(
    pattern: str, matching: str, other: str
) -> None:
    parsed = IdentityPattern.parse(pattern)
    assert parsed.matches(SpiffeId.parse(matching))
    assert not parsed.matches(SpiffeId.parse(other))
    assert str(parsed) == pattern


@given(identities)
def test_a_bare_star_matches_every_identity(identity: SpiffeId) -> None:
    assert IdentityPattern.parse("*").matches(identity)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a SPIFFE ID"),
        ("**", "one '*'"),
        ("spiffe://mesh.test/ns/*/sa/a", "last character"),
        ("spiffe://mesh.test*", "inside the trust domain"),
        ("spiffe://mesh.*", "inside the trust domain"),
        ("spiffe://*", "trust domain is empty"),
        ("mesh.test/*", "start with"),
        ("spiffe://Mesh/*", "trust domain 'Mesh'"),
        ("spiffe://mesh.test/role/*", "'role' does not fit"),
        ("spiffe://mesh.test/ns/Shop/*", "'Shop' does not fit"),
        ("spiffe://mesh.test/ns//sa/*", "'' does not fit"),
        ("spiffe://mesh.test/ns/shop/sa/a/*", "so many"),
    ],
)
def test_a_pattern_that_can_never_match_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(SpiffeIdError, match=re.escape(complaint)):
        IdentityPattern.parse(text)


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        (
            "spiffe://mesh.test/ns/prod*",
            "write spiffe://mesh.test/ns/prod/* for the namespace prod",
        ),
        (
            "spiffe://mesh.test/ns/Prod*",
            "write spiffe://mesh.test/ns/Prod/* for the namespace Prod",
        ),
        ("spiffe://mesh.test/n*", "write spiffe://mesh.test/*"),
        ("spiffe://mesh.test/ns*", "write spiffe://mesh.test/*"),
        ("spiffe://mesh.test/ns/prod/sa*", "write spiffe://mesh.test/ns/prod/*"),
        (
            "spiffe://mesh.test/ns/prod/sa/web*",
            (
                "write spiffe://mesh.test/ns/prod/sa/web for the one service account, or"
                " spiffe://mesh.test/ns/prod/sa/* for all"
            ),
        ),
    ],
)
def test_a_star_inside_a_name_is_refused_with_what_to_write_instead(
    text: str, instead: str
) -> None:
    with pytest.raises(SpiffeIdError, match=re.escape("the '*' may only follow a '/'")) as refused:
        IdentityPattern.parse(text)
    assert instead in str(refused.value)


@given(identities, identities, st.data())
def test_a_prefix_matches_whole_segments_only(
    identity: SpiffeId, other: SpiffeId, data: st.DataObject
) -> None:
    """Whatever prefix of an identity is a pattern: what it matches shares all of its segments."""
    text = str(identity)
    end = data.draw(st.integers(text.index("/", len("spiffe://")) + 1, len(text)))
    if text[end - 1] != "/":
        with pytest.raises(SpiffeIdError):
            IdentityPattern.parse(text[:end] + "*")
        return
    pattern = IdentityPattern.parse(text[:end] + "*")
    segments = text[: end - 1].split("/")
    assert pattern.matches(identity)
    assert pattern.matches(other) is (str(other).split("/")[: len(segments)] == segments)
