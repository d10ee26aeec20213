"""The messages of the Workload API: the first SVID in PEM, the bundles by trust domain, and a named
mistake for everything else."""

from __future__ import annotations

from contextlib import suppress

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from proxy.enrollment import svid_messages
from proxy.enrollment.svid_messages import InvalidSvid, read_bundle, read_bundles, read_svid
from proxy.identity.issue import issue, make_root
from proxy.identity.spiffe import SpiffeId
from tests.kit.workload_api import DOMAIN, WEB, bundles, der, field, svid, svids

ROOT = make_root(DOMAIN)
OTHER = make_root("other.test")
LEAF = issue(ROOT, WEB)
ONE = svid(ROOT, LEAF)


def test_the_first_svid_is_read() -> None:
    second = svid(ROOT, name=SpiffeId(DOMAIN, "shop", "cart"))
    message = svids(svid(ROOT, LEAF, hint="internal"), second, federated={"spiffe://x.test": b"x"})
    found = read_svid(message)
    assert (found.id, found.trust_domain) == (str(WEB), DOMAIN)
    assert (found.hint, found.others, found.federated) == ("internal", 1, ("x.test",))
    assert (found.chain, found.key) == (LEAF.certificate_pem, LEAF.key_pem)
    assert found.roots == ROOT.certificate_pem
    assert "PRIVATE KEY" not in repr(found)


def test_unknown_fields_are_skipped() -> None:
    known = read_svid(svids(ONE))
    one = ONE + field(6, 7) + field(99, b"later")
    assert read_svid(field(99, 1) + field(2, b"a CRL") + field(1, one)) == known


def test_bundles_are_by_trust_domain() -> None:
    both = der(ROOT.certificate) + der(OTHER.certificate)
    found = read_bundles(bundles({f"spiffe://{DOMAIN}": both, "other.test": b""}))
    assert found == {DOMAIN: both, "other.test": b""}
    certificates = x509.load_pem_x509_certificates(read_bundle(found[DOMAIN]))
    assert certificates == [ROOT.certificate, OTHER.certificate]
    assert read_bundle(found["other.test"]) == b""
    assert read_bundles(b"") == {}


def changed(number: int, value: bytes) -> bytes:
    """A message whose SVID has another value of one field: the last one counts."""
    return svids(ONE + field(number, value))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "it has no SVID"),
        (bundles({}), "it has no SVID"),
        (b"\xff", "not the expected protobuf message"),
        (field(1, 5), "field 1 has a number instead of bytes"),
        (svids(b""), "its first SVID has no SPIFFE ID"),
        (changed(1, b""), "its first SVID has no SPIFFE ID"),
        (changed(2, b""), "its first SVID has no certificate"),
        (changed(3, b""), "its first SVID has no key"),
        (changed(4, b""), "its first SVID has no trust root"),
        (changed(2, b"garbage"), "the certificate chain is not a sequence of DER"),
        (changed(2, b"\x30\x05abc"), "the certificate chain is not a sequence of DER"),
        (changed(2, b"\x30\x80\x00\x00"), "the certificate chain is not a sequence of DER"),
        (changed(2, b"\x30\x85" + bytes(5)), "the certificate chain is not a sequence of DER"),
        (changed(3, b"\x30\x00\x30\x00"), "the key is not one DER structure"),
        (changed(4, der(ROOT.certificate)[:-1]), "the bundle is not a sequence of DER"),
        (changed(4, b"\x30\x00" * 1025), "the bundle has more than 1024 certificates"),
        (changed(1, b"\xff"), "the text of field 1 is not UTF-8"),
        (svids(*[b""] * 257), "it has more than 256 SVIDs"),
        (field(3, b"") * 1025, "more than 1024 bundles of other trust domains"),
    ],
)
def test_a_mistake_is_named(message: bytes, words: str) -> None:
    with pytest.raises(InvalidSvid, match=words):
        read_svid(message)


def test_a_mistake_in_bundles_is_named() -> None:
    with pytest.raises(InvalidSvid, match="not the expected protobuf message"):
        read_bundles(field(2, b"\xff"))
    many = bundles({f"{n}.test": b"" for n in range(svid_messages.MAX_BUNDLES + 1)})
    with pytest.raises(InvalidSvid, match="it has more than 1024 bundles"):
        read_bundles(many)


@pytest.mark.no_cover
@given(st.binary(max_size=400))
def test_any_message_is_an_svid_or_a_mistake(data: bytes) -> None:
    for read in (read_svid, read_bundles, read_bundle):
        with suppress(InvalidSvid):
            read(data)


@pytest.mark.no_cover
@given(st.integers(0, len(svids(ONE)) - 1), st.integers(0, 255))
def test_a_changed_byte_never_raises_anything_else(place: int, octet: int) -> None:
    data = bytearray(svids(ONE))
    data[place] = octet
    try:
        found = read_svid(bytes(data))
    except InvalidSvid:
        return
    assert found.chain.startswith(b"-----BEGIN CERTIFICATE-----\n")
    assert found.key.startswith(b"-----BEGIN PRIVATE KEY-----\n")
