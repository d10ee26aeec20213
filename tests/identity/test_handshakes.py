"""Handshakes on real sockets between contexts of real identities: what is negotiated, what is
rejected, and what is resumed.

A ticket never outlives the trust under which it was issued."""

import time
from pathlib import Path

import pytest
from OpenSSL import SSL

from proxy.identity import issue
from proxy.identity.identity import (
    NoCommonProtocol,
    SessionCache,
    TLSSettings,
)
from proxy.identity.issue import Issued
from proxy.identity.tls_contexts import _MODE_NO_AUTO_CHAIN as NO_AUTO_CHAIN
from proxy.identity.tls_contexts import KeptSession
from tests.kit.library import AWS_LC
from tests.kit.workloads import (
    DOMAIN,
    Workload,
    authority,
    handshake,
    refusal,
    resumed,
    spiffe,
    workload,
)


def test_contexts_keep_idle_connections_small_and_chains_short(cart: Workload) -> None:
    identity = cart.identity()
    for context in (identity.server_context, identity.client_context):
        assert context.set_mode(0) & SSL.MODE_RELEASE_BUFFERS or AWS_LC, (
            "AWS-LC keeps no buffers, and has no name for it"
        )
        assert context.set_mode(0) & NO_AUTO_CHAIN
        assert context.get_verify_depth() == 3
        kept = (
            SSL.SESS_CACHE_OFF
            if context is identity.server_context
            else SSL.SESS_CACHE_CLIENT | SSL.SESS_CACHE_NO_INTERNAL
        )
        assert context.get_session_cache_mode() == kept, "nothing in the library's own store"


def test_a_chain_with_an_intermediate_is_sent_whole(
    cart: Workload, checkout: Workload, root: Issued
) -> None:
    middle = authority(root)
    cart.write(issue.issue(middle, cart.id), [root])
    assert "unable to get local issuer" in refusal(cart)[1]
    with cart.files.certificate.open("ab") as file:
        # Some issuers add the root as well. It is not sent, because each peer has it.
        file.write(middle.certificate_pem + root.certificate_pem)
    with handshake(checkout.identity().client_context, cart.identity().server_context) as (
        client,
        _server,
    ):
        assert len(client.get_peer_cert_chain() or ()) == 2


def test_a_handshake_is_tls_1_3_with_post_quantum_exchange_and_both_names(
    cart: Workload, checkout: Workload
) -> None:
    ours, theirs = cart.identity(), checkout.identity()
    with handshake(ours.client_context, theirs.server_context) as (client, server):
        assert client.get_protocol_version_name() == "TLSv1.3"
        assert client.get_group_name() == "X25519MLKEM768"
        assert client.get_cipher_name() == "TLS_AES_128_GCM_SHA256"
        assert len(client.get_peer_cert_chain() or ()) == 1
        assert ours.verify_peer(
            client.get_peer_certificate(as_cryptography=True), spiffe("checkout")
        ) == spiffe("checkout")
        assert theirs.verify_peer(server.get_peer_certificate(as_cryptography=True)) == spiffe(
            "cart"
        )


@pytest.mark.parametrize(
    ("offers", "chosen"),
    [
        ((b"h2",), b"h2"),
        ((b"isthmus-tcp", b"h2"), b"isthmus-tcp"),
        ((b"spdy/3", b"http/1.1"), b"http/1.1"),
        ((), b""),
    ],
)
def test_the_first_offer_that_the_server_knows_is_chosen(
    cart: Workload, checkout: Workload, offers: tuple[bytes, ...], chosen: bytes
) -> None:
    with handshake(
        cart.identity().client_context, checkout.identity().server_context, alpn=offers
    ) as (client, server):
        assert client.get_alpn_proto_negotiated() == server.get_alpn_proto_negotiated() == chosen


def test_unknown_offers_end_the_handshake(cart: Workload, checkout: Workload) -> None:
    with (
        pytest.raises(NoCommonProtocol, match="spdy/3"),
        handshake(
            cart.identity().client_context, checkout.identity().server_context, alpn=[b"spdy/3"]
        ),
    ):
        pass


def test_a_client_without_a_certificate_is_rejected(checkout: Workload) -> None:
    anonymous = SSL.Context(SSL.TLS_CLIENT_METHOD)
    with (
        pytest.raises(SSL.Error, match=r"(?i)peer.did.not.return.a.certificate"),
        handshake(anonymous, checkout.identity().server_context),
    ):
        pass


def test_tls_1_2_is_rejected(checkout: Workload) -> None:
    old = SSL.Context(SSL.TLS_CLIENT_METHOD)
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    with (
        pytest.raises(SSL.Error, match=r"(?i)unsupported.protocol"),
        handshake(old, checkout.identity().server_context),
    ):
        pass


def test_strangers_do_not_get_in_and_are_not_called(cart: Workload, tmp_path: Path) -> None:
    stranger = workload(tmp_path, "checkout", issue.make_root(DOMAIN)).identity()
    ours = cart.identity()
    with (
        pytest.raises(SSL.Error, match=r"(?i)certificate.verify.failed"),
        handshake(stranger.client_context, ours.server_context),
    ):
        pass
    with (
        pytest.raises(SSL.Error, match=r"(?i)certificate.verify.failed"),
        handshake(ours.client_context, stranger.server_context),
    ):
        pass


def test_a_session_is_resumed_and_the_peer_still_has_a_name(
    cart: Workload, checkout: Workload
) -> None:
    ours, theirs = cart.identity(), checkout.identity()
    with handshake(ours.client_context, theirs.server_context) as (client, _server):
        assert not resumed(client)
        ours.sessions.put(theirs.id, "10.0.0.1", client.get_session())
    with handshake(
        ours.client_context, theirs.server_context, session=ours.sessions.get(theirs.id, "10.0.0.1")
    ) as (client, server):
        assert resumed(client)
        assert resumed(server)
        assert ours.verify_peer(client.get_peer_certificate(as_cryptography=True)) == theirs.id
        assert theirs.verify_peer(server.get_peer_certificate(as_cryptography=True)) == ours.id


def test_a_ticket_ends_with_the_credentials_and_open_connections_continue(
    cart: Workload, checkout: Workload, root: Issued
) -> None:
    ours, theirs = cart.identity(), checkout.identity()
    with handshake(ours.client_context, theirs.server_context) as (client, server):
        session = client.get_session()
        checkout.write_roots(root, issue.make_root(DOMAIN))
        assert theirs.reload()
        with handshake(ours.client_context, theirs.server_context, session=session) as (
            again,
            _server,
        ):
            assert not resumed(again)
        client.send(b"still here")
        assert server.recv(100) == b"still here"


def test_the_lifetime_of_sessions_is_set_and_one_hour_by_default(
    cart: Workload, checkout: Workload
) -> None:
    ours, theirs = cart.identity(), checkout.identity(TLSSettings(session_lifetime=1))
    assert theirs.server_context.get_timeout() == 1
    assert ours.server_context.get_timeout() == 3600


def test_a_session_is_not_resumed_for_longer_than_its_lifetime(
    cart: Workload, checkout: Workload
) -> None:
    """By the library's own clock, which is the machine's."""
    ours, theirs = cart.identity(), checkout.identity(TLSSettings(session_lifetime=4))
    with handshake(ours.client_context, theirs.server_context) as (client, _server):
        session = client.get_session()
    began, times = time.monotonic(), 0
    while True:
        with handshake(ours.client_context, theirs.server_context, session=session) as (
            client,
            _server,
        ):
            if not resumed(client):
                break
        times += 1
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    assert times


def test_sessions_can_be_switched_off(cart: Workload, checkout: Workload) -> None:
    ours, theirs = cart.identity(), checkout.identity(TLSSettings(session_lifetime=0))
    with handshake(ours.client_context, theirs.server_context) as (client, _server):
        session = client.get_session()
    with handshake(ours.client_context, theirs.server_context, session=session) as (
        client,
        _server,
    ):
        assert not resumed(client)
    assert ours.resumes
    assert not theirs.resumes, "and as a client it does not try"


def test_the_session_cache_is_bounded_and_forgets_the_longest_unused(
    cart: Workload, checkout: Workload
) -> None:
    cache = SessionCache(2)
    with handshake(cart.identity().client_context, checkout.identity().server_context) as (
        client,
        _server,
    ):
        session = client.get_session()
    cache.put(spiffe("a"), "10.0.0.1", session)
    cache.put(spiffe("a"), "10.0.0.2", session)
    assert cache.get(spiffe("a"), "10.0.0.1") is session
    cache.put(spiffe("b"), "10.0.0.1", session)
    assert cache.get(spiffe("a"), "10.0.0.2") is None
    assert cache.get(spiffe("a"), "10.0.0.1") is session
    assert len(cache) == 2
    cache.put(spiffe("c"), "10.0.0.1", None)
    assert cache.get(spiffe("c"), "10.0.0.1") is None


def test_a_session_cache_holds_something() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SessionCache(0)


def test_a_session_is_not_offered_when_its_peers_certificate_has_ended(
    cart: Workload, checkout: Workload
) -> None:
    cache = SessionCache(2)
    with handshake(cart.identity().client_context, checkout.identity().server_context) as (
        client,
        _server,
    ):
        session = client.get_session()
    assert session is not None
    kept = KeptSession(cache, spiffe("a"), "10.0.0.1")
    kept.end = 100.0
    kept(session)
    assert cache.get(spiffe("a"), "10.0.0.1", 99.0) is session
    assert cache.get(spiffe("a"), "10.0.0.1", 100.0) is None
    assert len(cache) == 0
