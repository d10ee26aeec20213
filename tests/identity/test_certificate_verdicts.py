"""The same verdict on certificates with each TLS library: each deviation at each place of a chain,
in real handshakes.

Each case is a chain with one thing wrong (or allowed). A client presents it to a server, and a
server to a client, both with contexts and verification as a proxy has them. The verifying side
reports the reason, the other side gets the alert that fits, and a proxy whose own chain it is
refuses to start with it. The table holds for OpenSSL and for AWS-LC, with the same messages."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL

from proxy import files
from proxy.identity import issue
from proxy.identity.identity import Identity, MaterialError, MaterialFiles, PeerRefused, SpiffeId
from proxy.net.exceptions import TLSFailed
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSOffer, TLSStream, Verify, tls_client, tls_server
from tests.kit.chains import HOUR, URI, Made, Profile, as_openssl, authority, make
from tests.kit.library import AWS_LC
from tests.net.conftest import both, pair, sockets

PEER = SpiffeId.parse(URI)
DNS, URIS, MAIL = x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name


@dataclass(frozen=True)
class No:
    """A refusal: a part of its message, and the alert for the peer. `by_presenter`: with such a key
    the presenter cannot sign."""

    words: str
    alert: str = "bad certificate"
    by_presenter: bool = False


OK = None
BAD_CA = partial(No, alert="unknown ca")


@dataclass(frozen=True)
class Deviation:
    """What is different, and the verdict if it is so in the leaf, in the intermediate authority, or
    in the root."""

    name: str
    change: dict[str, Any]
    leaf: No | type | None = int  # int: this case does not exist
    middle: No | type | None = int
    root: No | type | None = int


def d(
    what: str,
    leaf: No | type | None,
    middle: No | type | None,
    root: No | type | None,
    /,
    **change: Any,
) -> Deviation:
    return Deviation(what, change, leaf, middle, root)


def usage(*names: str) -> frozenset[str]:
    return frozenset(names)


SERVER, CLIENT, ANY, CODE = (
    ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    ExtendedKeyUsageOID.CODE_SIGNING,
)  # fmt: skip
SIGNS, NO_SIGNATURE = (
    r"may sign certificates or revocation lists \(key usage\)",
    r"is not meant for this use \(key usage\)",
)
AUTHORITY_LEAF, NO_AUTHORITY = (
    r"is an authority's \(CA\)",
    "is not an authority's, and has signed one",
)
MAY_NOT, OUTSIDE = (
    "is not signed by a trust root",
    r"names what its authority may not \(name constraints\)",
)
CRITICAL, REFUSED_EXTENSION = (
    "has a critical extension that is not known here",
    "has an extension that is not accepted here",
)
ROLE = r"is not meant for TLS %s \(extended key usage\)"
WEAK_KEY, WEAK_SIGNATURE, CURVE = (
    "has a key that is too weak",
    r"is signed with an algorithm that is too weak.*\(sha1\)",
    "on the curve",
)
UNKNOWN_SIGNATURE = (
    r"is signed with an algorithm that is too weak, or not known here \(1.3.101.113\)|carries a"
    r" signature that is not"
)
UNNAMED = "does not name a workload of the mesh"
SHOWN = URIS(URI)
NULL = b"\x05\x00"

LEAVES = [
    d("as it should be", OK, OK, OK),
    d("an authority that signs", No(NO_SIGNATURE), int, int, ca=True, usage=usage("key_cert_sign", "crl_sign")),
    d("an authority by its flag", No(AUTHORITY_LEAF), int, int, ca=True),
    d("an authority with everything", No(AUTHORITY_LEAF), int, int, ca=True, usage=usage("digital_signature", "key_cert_sign")),
    d("keyCertSign beside digitalSignature", No(SIGNS), int, int, usage=usage("digital_signature", "key_cert_sign")),
    d("cRLSign beside digitalSignature", No(SIGNS), int, int, usage=usage("digital_signature", "crl_sign")),
    d("keyCertSign and no basic constraints", No(SIGNS), int, int, ca=None, usage=usage("digital_signature", "key_cert_sign")),
    d("no digitalSignature", No(NO_SIGNATURE), int, int, usage=usage("key_encipherment")),
    d("key agreement only", No(NO_SIGNATURE), int, int, usage=usage("key_agreement")),
    d("nonrepudiation only", No(NO_SIGNATURE), int, int, usage=usage("content_commitment")),
    d("keyEncipherment beside digitalSignature", OK, int, int, usage=usage("digital_signature", "key_encipherment")),
    d("keyAgreement beside digitalSignature", OK, int, int, usage=usage("digital_signature", "key_agreement")),
    d("a key usage that is not critical", No("has a key usage that is not critical"), int, int, usage_critical=False),
    d("no key usage", No("does not say what its key is for"), int, int, usage=None),
    d("no basic constraints", OK, int, int, ca=None),
    d("basic constraints that are not critical", OK, OK, OK, constraints_critical=False),
    d("no extended key usage", OK, OK, OK, extended=None),
    d("no name", No(UNNAMED), int, int, names=(), name="peer"),
    d("a common name beside the URI", OK, int, int, name="peer"),
    d("a DNS name only", No(UNNAMED), int, int, names=(DNS("peer.test"),)),
    d("a DNS name beside the URI", OK, int, int, names=(SHOWN, DNS("peer.test"))),
    d("an address beside the URI", OK, int, int, names=(SHOWN, x509.IPAddress(ipaddress.ip_address("10.0.0.1")))),
    d("a mail address beside the URI", OK, int, int, names=(SHOWN, MAIL("peer@mesh.test"))),
    d("two URIs", No(UNNAMED), int, int, names=(SHOWN, URIS(URI + "2"))),
    d("the same URI twice", No(UNNAMED), int, int, names=(SHOWN, SHOWN)),
    d("an https URI", No(UNNAMED), int, int, names=(URIS("https://mesh.test/ns/shop/sa/peer"),)),
    d("a trust domain alone", No(UNNAMED), int, int, names=(URIS("spiffe://mesh.test"),)),
    d("a URI without a host", No(UNNAMED), int, int, names=(URIS("spiffe:///ns/shop/sa/peer"),)),
    d("a URI of nothing", No(UNNAMED), int, int, names=(URIS("spiffe:"),)),
    d("a URI with a port", No(UNNAMED), int, int, names=(URIS("spiffe://mesh.test:1/ns/shop/sa/peer"),)),
    d("a URI with a user", No(UNNAMED), int, int, names=(URIS("spiffe://a@mesh.test/ns/shop/sa/peer"),)),
    d("a URI with a query", No(UNNAMED), int, int, names=(URIS(URI + "?a=b"),)),
    d("a URI with a fragment", No(UNNAMED), int, int, names=(URIS(URI + "#a"),)),
    d("a URI with percent-encoding", No(UNNAMED), int, int, names=(URIS("spiffe://mesh.test/ns/shop/sa/pe%65r"),)),
    d("a URI in upper case", No(UNNAMED), int, int, names=(URIS("spiffe://MESH.test/ns/shop/sa/peer"),)),
    d("a URI with a dot segment", No(UNNAMED), int, int, names=(URIS("spiffe://mesh.test/ns/shop/../sa/peer"),)),
    d("a trailing slash", No(UNNAMED), int, int, names=(URIS(URI + "/"),)),
    d("another trust domain", No("which is not of the trust domain", "certificate unknown"), int, int,
      names=(URIS("spiffe://evil.test/ns/shop/sa/peer"),)),
    d("a longer trust domain", No("which is not of the trust domain", "certificate unknown"), int, int,
      names=(URIS("spiffe://mesh.test.evil.test/ns/shop/sa/peer"),)),
    d("a NUL within the URI", No(UNNAMED), int, int, bad=b"/sa/peer", by=b"/sa/p\0er"),
]  # fmt: skip

ANYWHERE = [
    d("for servers only", No(ROLE % "clients"), BAD_CA(ROLE % "clients"), BAD_CA(ROLE % "clients"), extended=(SERVER,)),
    d("for clients only", No(ROLE % "servers"), BAD_CA(ROLE % "servers"), BAD_CA(ROLE % "servers"), extended=(CLIENT,)),
    d("for any use", No(ROLE % "servers and clients"), BAD_CA(ROLE % "servers and clients"), BAD_CA(ROLE % "servers and clients"),
      extended=(ANY,)),
    d("for code only", No(ROLE % "servers and clients"), BAD_CA(ROLE % "servers and clients"), BAD_CA(ROLE % "servers and clients"),
      extended=(CODE,)),
    d("for both and more", OK, OK, OK, extended=(SERVER, CLIENT, CODE)),
    d("expired", No(r"has expired \(not after 20", "certificate expired"), No(r"has expired \(not after 20", "certificate expired"),
      BAD_CA("."), since=-3 * HOUR, until=-HOUR),
    d("not valid yet", No(r"is not valid yet \(not before 20", "certificate expired"),
      No(r"is not valid yet \(not before 20", "certificate expired"), No(r"is not valid yet \(not before 20", "certificate expired"),
      since=HOUR, until=2 * HOUR),
    d("an unknown critical extension", No(CRITICAL), BAD_CA(CRITICAL), BAD_CA(CRITICAL), extra=(("1.3.6.1.4.1.99999.1", True, NULL),)),
    d("an unknown extension", OK, OK, OK, extra=(("1.3.6.1.4.1.99999.1", False, NULL),)),
    d("critical policies", No(CRITICAL), BAD_CA(CRITICAL), BAD_CA(CRITICAL),
      extra=(("2.5.29.32", True, bytes.fromhex("300630040602551d")),)),
    d("policies", OK, OK, OK, extra=(("2.5.29.32", False, bytes.fromhex("300630040602551d")),)),
    d("policy constraints", No(REFUSED_EXTENSION), BAD_CA(REFUSED_EXTENSION), BAD_CA(REFUSED_EXTENSION),
      extra=(("2.5.29.36", True, bytes.fromhex("3003800100")),)),
    d("inhibit anyPolicy", No(REFUSED_EXTENSION), BAD_CA(REFUSED_EXTENSION), BAD_CA(REFUSED_EXTENSION),
      extra=(("2.5.29.54", True, bytes.fromhex("020100")),)),
    d("a Netscape type", No(REFUSED_EXTENSION), BAD_CA(REFUSED_EXTENSION), BAD_CA(REFUSED_EXTENSION),
      extra=(("2.16.840.1.113730.1.1", False, bytes.fromhex("03020780")),)),
    d("P-384", OK, OK, OK, key="SECP384R1 x"),
    d("P-521", OK, OK, OK, key="SECP521R1 x"),
    d("RSA 2048", OK, OK, OK, key="RSA2048"),
    d("RSA 1024", No(WEAK_KEY), BAD_CA(WEAK_KEY), BAD_CA(WEAK_KEY), key="RSA1024"),
    d("Ed25519", OK, OK, OK, key="Ed25519"),
    d("Ed448", No("has a key of a kind", by_presenter=True), No(UNKNOWN_SIGNATURE), BAD_CA("has a key of a kind"), key="Ed448"),
    d("secp256k1", No(CURVE, by_presenter=True), BAD_CA(CURVE), BAD_CA(CURVE), key="SECP256K1"),
    d("P-224", No(CURVE, by_presenter=True), BAD_CA(CURVE), BAD_CA(CURVE), key="SECP224R1"),
    d("signed with SHA-1", No(WEAK_SIGNATURE), BAD_CA(WEAK_SIGNATURE), BAD_CA(WEAK_SIGNATURE), digest="SHA1"),
    d("signed with SHA-384", OK, OK, OK, digest="SHA384"),
    d("signed with SHA-512", OK, OK, OK, digest="SHA512"),
    d("forged", No("carries a signature that is not its issuer's"), No("carries a signature that is not its issuer's"), int, forged=True),
]  # fmt: skip

AUTHORITIES = [
    d("a workload's certificate", int, BAD_CA(MAY_NOT), int, ca=False, usage=usage("digital_signature")),
    d("a workload's that may sign", int, BAD_CA(NO_AUTHORITY), int, ca=False),
    d("no basic constraints above", int, BAD_CA(NO_AUTHORITY), int, ca=None),
    d("no keyCertSign", int, BAD_CA(MAY_NOT), BAD_CA(MAY_NOT), usage=usage("crl_sign")),
    d("digitalSignature instead of keyCertSign", int, BAD_CA(MAY_NOT), BAD_CA(MAY_NOT), usage=usage("digital_signature")),
    d("digitalSignature beside keyCertSign", int, OK, OK, usage=usage("digital_signature", "key_cert_sign")),
    d("no key usage above", int, OK, OK, usage=None),
    d("a key usage above that is not critical", int, OK, OK, usage_critical=False),
    d("path length 0", int, OK, BAD_CA("has a longer chain than its authority allows"), path_length=0),
    d("path length 1", int, OK, OK, path_length=1),
    d("its trust domain permitted", int, OK, OK, permitted=(URIS("mesh.test"),)),
    d("another trust domain permitted", int, No(OUTSIDE, "certificate unknown"), No(OUTSIDE, "certificate unknown"),
      permitted=(URIS("evil.test"),)),
    d("names below a trust domain permitted", int, No(OUTSIDE, "certificate unknown"), No(OUTSIDE, "certificate unknown"),
      permitted=(URIS(".mesh.test"),)),
    d("names below a domain permitted", int, OK, OK, permitted=(URIS(".test"),)),
    d("two trust domains permitted", int, OK, OK, permitted=(URIS("evil.test"), URIS("mesh.test"))),
    d("its trust domain excluded", int, No(OUTSIDE, "certificate unknown"), No(OUTSIDE, "certificate unknown"),
      excluded=(URIS("mesh.test"),)),
    d("another trust domain excluded", int, OK, OK, excluded=(URIS("evil.test"),)),
    d("permitted and excluded", int, No(OUTSIDE, "certificate unknown"), No(OUTSIDE, "certificate unknown"),
      permitted=(URIS("mesh.test"),), excluded=(URIS("mesh.test"),)),
    d("DNS names permitted", int, OK, OK, permitted=(DNS("evil.test"),)),
    d("mail addresses permitted", int, OK, OK, permitted=(MAIL("mesh.test"),)),
]  # fmt: skip

Case = tuple[str, list[Profile], No | None]


def cases() -> Iterator[Case]:
    """A chain for each deviation at each place: the leaf below a root, the leaf below an authority,
    the authority, the root."""
    root, middle, leaf = authority("root"), authority("middle"), Profile()
    for deviation in [*LEAVES, *ANYWHERE, *AUTHORITIES]:
        change = deviation.change
        if not isinstance(deviation.leaf, type):
            yield f"leaf: {deviation.name}", [root, replace(leaf, **change)], deviation.leaf
            yield (
                f"leaf below two: {deviation.name}",
                [root, middle, replace(leaf, **change)],
                deviation.leaf,
            )
        if not isinstance(deviation.middle, type):
            yield (
                f"middle: {deviation.name}",
                [root, replace(middle, **change), leaf],
                deviation.middle,
            )
        if not isinstance(deviation.root, type):
            short = OK if deviation.name == "path length 0" else deviation.root
            yield f"root: {deviation.name}", [replace(root, **change), leaf], short
            yield (
                f"root of three: {deviation.name}",
                [replace(root, **change), middle, leaf],
                deviation.root,
            )
    yield from lengths()
    yield from limited_names()


def lengths() -> Iterator[Case]:
    """Chains of one to five authorities, and a path length at each of them."""
    for count in range(1, 6):
        names = [f"level {number}" for number in range(count)]
        chain = [*map(authority, names), Profile()]
        long = BAD_CA("has too long a chain") if count > 4 else None
        yield f"{count} authorities", chain, long
        for limited in range(min(count, 4)):
            for most in range(3):
                limits = replace(chain[limited], path_length=most)
                below = count - limited - 1
                verdict = long or (
                    BAD_CA("has a longer chain than its authority allows") if below > most else None
                )
                yield (
                    f"{count} authorities, at {limited} path length {most}",
                    [*chain[:limited], limits, *chain[limited + 1 :]],
                    verdict,
                )


def limited_names() -> Iterator[Case]:
    """Names of other kinds beside the URI, and limits on them."""
    others = {
        "a DNS name": (DNS("peer.mesh.test"), DNS("mesh.test"), DNS("evil.test")),
        "a mail address": (MAIL("peer@mesh.test"), MAIL("mesh.test"), MAIL("evil.test")),
    }
    for what, (name, good, evil) in others.items():
        leaf = Profile(names=(SHOWN, name))
        unknown = isinstance(name, x509.RFC822Name)
        strange = No(
            r"has a name of a kind \(RFC822Name\) for which name constraints are not supported",
            "certificate unknown",
        )
        for limit, permit, verdict in (
            (good, True, strange if unknown else OK),
            (evil, True, strange if unknown else No(OUTSIDE, "certificate unknown")),
            (good, False, strange if unknown else No(OUTSIDE, "certificate unknown")),
            (evil, False, strange if unknown else OK),
        ):
            change: dict[str, Any] = {"permitted" if permit else "excluded": (limit,)}
            word = "permitted" if permit else "excluded"
            yield (
                f"root: {what} with {limit.value} {word}",
                [replace(authority("root"), **change), leaf],
                verdict,
            )
            yield (
                f"middle: {what} with {limit.value} {word}",
                [authority("root"), authority("middle", **change), leaf],
                verdict,
            )


def possible(case: Case) -> bool:
    """AWS-LC does not support keys of this kind."""
    return not (AWS_LC and any(profile.key == "Ed448" for profile in case[1]))


CASES = list(filter(possible, cases()))


class Judge:
    """A workload of the trust domain, with its own root and the case's among its roots."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = issue.make_root("mesh.test")
        self.issued = issue.issue(self.own, SpiffeId("mesh.test", "shop", "judge"))

    def identity(self, root: Made) -> Identity:
        found = MaterialFiles(
            self.folder / "certificate.pem", self.folder / "key.pem", (self.folder / "roots.pem",)
        )
        files.write_private(found.key, self.issued.key_pem)
        files.write_public(found.certificate, self.issued.certificate_pem)
        files.write_public(found.roots[0], self.own.certificate_pem + root.pem)
        return Identity(found)

    def own_material(self, chain: list[Made]) -> Identity:
        """The same for a workload whose own chain this is."""
        found = MaterialFiles(
            self.folder / "own.pem", self.folder / "own.key", (self.folder / "own-roots.pem",)
        )
        files.write_private(found.key, chain[-1].key_pem)
        files.write_public(found.certificate, b"".join(made.pem for made in reversed(chain[1:])))
        files.write_public(found.roots[0], chain[0].pem)
        return Identity(found)


def loading(load: Callable[[], Identity]) -> Identity | MaterialError:
    try:
        return load()
    except MaterialError as error:
        return error


def name_of(case: Case) -> str:
    return case[0]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("judge")
    files.make_private_directory(folder / "private")
    return Judge(folder / "private")


def presenting(method: int, chain: list[Made], trusted: x509.Certificate) -> SSL.Context:
    """A context that presents any chain."""
    made = SSL.Context(method)
    made.set_min_proto_version(SSL.TLS1_3_VERSION)
    if not AWS_LC:
        made.set_cipher_list(b"DEFAULT:@SECLEVEL=0")
    made.use_certificate(chain[-1].certificate)
    made.use_privatekey(chain[-1].key)
    for authority_ in reversed(chain[1:-1]):
        made.add_extra_chain_cert(authority_.certificate)
    store = made.get_cert_store()
    assert store is not None
    store.add_cert(as_openssl(trusted))
    made.set_verify(SSL.VERIFY_PEER, lambda *_: True)
    return made


async def shown_to(
    identity: Identity, context: SSL.Context, *, dialling: bool
) -> tuple[TLSStream | Exception, TLSStream | Exception]:
    """(the verifying end, the other end) of a handshake in which the other presents what `context`
    has. `dialling`: it is the client."""
    left, right = pair()
    verify: Verify = (
        identity.verify_chain if dialling else partial(identity.verify_chain, expected=PEER)
    )
    offer = TLSOffer(PEER.sni, (b"h2",))

    async def judges() -> TLSStream:
        if dialling:
            stream = await tls_server(right, identity.server_context, verify=verify, timeout=20)
            await stream.send_all(b"welcome")
        else:
            stream = await tls_client(
                right, identity.client_context, offer, verify=verify, timeout=20
            )
        return stream

    async def shows() -> TLSStream:
        if dialling:
            stream = await tls_client(left, context, offer, verify=None, timeout=20)
            await stream.receive_some()  # in TLS 1.3 a client gets a refusal only here
        else:
            stream = await tls_server(left, context, verify=None, timeout=20)
        return stream

    with trio.fail_after(30):
        results = await both(judges, shows)
    left.close()
    right.close()
    return results[0], results[1]


@pytest.mark.parametrize("shows", ["client", "server"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
async def test_a_chain_is_judged_in_the_handshake(judge: Judge, case: Case, shows: str) -> None:
    name, profiles, verdict = case
    dialling = shows == "client"
    chain = make(profiles)
    if name.startswith("root") and isinstance(
        refused := loading(partial(judge.identity, chain[0])), MaterialError
    ):
        assert verdict is not None  # a root that cannot be loaded
        assert re.search(f"{verdict.words}|weak trust root", str(refused))
        return
    identity = judge.identity(chain[0])
    method = SSL.TLS_CLIENT_METHOD if dialling else SSL.TLS_SERVER_METHOD
    try:
        context = presenting(method, chain, judge.own.certificate)
    except SSL.Error:  # AWS-LC does not even present it; the next test covers that
        assert verdict is not None
        assert verdict.by_presenter or verdict.words == NO_SIGNATURE
        return
    ours, theirs = await shown_to(identity, context, dialling=dialling)
    if verdict is None:
        assert isinstance(ours, TLSStream), ours
        assert isinstance(theirs, TLSStream), theirs
        assert ours.info.peer_identity == URI
        return
    if (
        verdict.by_presenter
    ):  # we offer no signature that its key can make: it reports that itself, or presents nothing
        assert isinstance(ours, TLSFailed), ours
        assert isinstance(theirs, TLSFailed), theirs
        assert ours.kind != "certificate" or re.search(
            f"(has shown|presented) no certificate|{verdict.words}", str(ours)
        ), ours
        return
    assert isinstance(ours, TLSFailed | PeerRefused), ours
    assert not isinstance(ours, TLSFailed) or ours.kind == "certificate", ours
    assert re.search(verdict.words, str(ours)), ours
    assert isinstance(theirs, TLSFailed), theirs
    assert (theirs.kind, theirs.kind and verdict.alert in str(theirs)) == ("alert", True), (
        str(theirs),
        str(ours),
    )


UNSIGNING = [case for case in CASES if case[2] is not None and case[2].words == NO_SIGNATURE]


@pytest.mark.parametrize("shows", ["client", "server"])
@pytest.mark.parametrize("case", UNSIGNING, ids=name_of)
async def test_a_key_that_may_not_sign_proves_nothing(
    judge: Judge, tmp_path: Path, case: Case, shows: str
) -> None:
    """Presented by a peer that shares no library with us."""
    chain = make(case[1])
    assert case[2] is not None
    identity = judge.identity(chain[0])
    shown = tmp_path / "shown.pem"
    shown.write_bytes(chain[-1].key_pem + b"".join(made.pem for made in reversed(chain[1:])))
    context = ssl.SSLContext(
        ssl.PROTOCOL_TLS_CLIENT if shows == "client" else ssl.PROTOCOL_TLS_SERVER
    )
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(shown)
    if shows == "server":
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=judge.own.certificate_pem.decode())
    near, far = sockets()

    def show() -> None:
        with (
            far,
            contextlib.suppress(ssl.SSLError, OSError),
            context.wrap_socket(far, server_side=shows == "server") as tls,
        ):
            tls.recv(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, show)
        judging = {
            "client": partial(tls_server, context=identity.server_context),
            "server": partial(tls_client, context=identity.client_context, offer=TLSOffer("a.b")),
        }[shows]
        with pytest.raises((TLSFailed, PeerRefused), match=case[2].words):
            await judging(SocketStream(near), verify=identity.verify_chain, timeout=20)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_proxy_does_not_start_with_a_chain_that_its_peers_refuse(
    judge: Judge, case: Case
) -> None:
    name, profiles, verdict = case
    if verdict is not None and verdict.words.startswith("which is not of the trust domain"):
        return  # the configuration decides which one is ours
    loaded = loading(partial(judge.own_material, make(profiles)))
    assert isinstance(loaded, Identity if verdict is None else MaterialError), (name, loaded)
