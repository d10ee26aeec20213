"""Handshakes that fail: which peers are refused and with which messages, what is not TLS, and what
does not end."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from trio.testing import wait_all_tasks_blocked

from proxy.net.exceptions import NetError
from proxy.net.socket_stream import ConnectionLost, TLSFailed
from proxy.net.tls.handshake import Chain, TLSOffer, TLSStream, tls_client, tls_server
from tests.kit.certs import Authority, Credential, self_signed, signed_with_sha1, spiffe
from tests.net.conftest import (
    DAY,
    OFFER,
    Mesh,
    Refused,
    attempt,
    both,
    name_of,
    pair,
    read_all,
    send_until_it_fails,
)

# Refused peers


def _expired(mesh: Mesh) -> Credential:
    return mesh.authority.issue(spiffe("late"), since=-2 * DAY, until=-DAY)


def _early(mesh: Mesh) -> Credential:
    return mesh.authority.issue(spiffe("early"), since=DAY, until=2 * DAY)


def _stranger(mesh: Mesh) -> Credential:
    return Authority("another root").issue(spiffe("stranger"))


def _self_signed(mesh: Mesh) -> Credential:
    return self_signed(spiffe("nobody"))


def _forgeable(mesh: Mesh) -> Credential:
    issued = mesh.authority.issue(spiffe("forged"))
    return Credential(signed_with_sha1(issued.certificate, mesh.authority.root.key), issued.key)


def refuses(
    judge: TLSStream | Exception, judged: TLSStream | Exception, words: str, alert: str
) -> None:
    """One side reports `words`, the other one got an `alert`."""
    assert isinstance(judge, TLSFailed)
    assert judge.kind == "certificate"
    assert re.search(words, str(judge))
    assert isinstance(judged, TLSFailed)
    assert judged.kind == "alert"
    assert alert in str(judged)


REFUSALS = [
    (
        _expired,
        r"has expired \(not after 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC\)",
        "certificate expired",
    ),
    (_early, r"is not valid yet \(not before 20", "certificate expired"),
    (_stranger, "is not signed by a trust root", "unknown ca"),
    (_self_signed, r"is not signed by a trust root \(it is self-signed\)", "unknown ca"),
    (_forgeable, r"is signed with an algorithm that is too weak.* \(sha1\)", "bad certificate"),
]


@pytest.mark.parametrize(("make", "words", "alert"), REFUSALS)
async def test_a_server_with_a_wrong_certificate_is_refused_with_a_message(
    mesh: Mesh, make: Callable[[Mesh], Credential], words: str, alert: str
) -> None:
    client, server = await attempt(mesh, server=mesh.accepting(make(mesh)))
    refuses(client, server, words, alert)


@pytest.mark.parametrize(("make", "words", "alert"), REFUSALS)
async def test_a_client_with_a_wrong_certificate_is_refused_with_a_message_and_gets_an_alert(
    mesh: Mesh, make: Callable[[Mesh], Credential], words: str, alert: str
) -> None:
    client, server = await attempt(mesh, client=mesh.dialling(make(mesh)))
    refuses(server, client, words, alert)


async def test_a_client_without_a_certificate_is_refused_and_gets_an_alert(mesh: Mesh) -> None:
    client, server = await attempt(mesh, client=mesh.dialling(None))
    assert isinstance(server, TLSFailed)
    assert server.kind == "certificate"
    assert "no certificate" in str(server)
    assert isinstance(client, TLSFailed)
    assert (client.kind, "certificate required" in str(client)) == ("alert", True)


async def test_a_client_that_only_sends_gets_its_refusal_too(mesh: Mesh) -> None:
    dialled, accepted = pair()
    results: list[object] = []

    async def serve() -> None:
        with pytest.raises(TLSFailed):
            await tls_server(accepted, mesh.server_context, verify=None, timeout=20)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        client = await tls_client(dialled, mesh.dialling(None), OFFER, verify=None, timeout=20)
    with pytest.raises(TLSFailed, match="certificate required") as caught:
        await send_until_it_fails(client)
    results.append(caught.value)
    client.close()


@pytest.mark.parametrize("refusing", ["client", "server"])
async def test_a_refusal_by_the_caller_sends_an_alert_and_closes_before_any_byte(
    mesh: Mesh, refusing: str
) -> None:
    def refuse(_: Chain) -> None:
        raise Refused("not you")

    dialled, accepted = pair()
    results = await both(
        partial(
            tls_client,
            dialled,
            mesh.client_context,
            OFFER,
            verify=refuse if refusing == "client" else None,
            timeout=20,
        ),
        partial(
            tls_server,
            accepted,
            mesh.server_context,
            verify=refuse if refusing == "server" else None,
            timeout=20,
        ),
    )
    refused, other = results if refusing == "client" else results[::-1]
    assert isinstance(refused, Refused)
    assert (dialled if refusing == "client" else accepted).closed
    if isinstance(other, TLSStream):
        with pytest.raises(TLSFailed, match="certificate unknown") as caught:
            await read_all(other)
        other.close()
        error: object = caught.value
    else:  # the refusal came before its handshake was done
        error = other
    assert isinstance(error, TLSFailed)
    assert (error.kind, "certificate unknown" in str(error)) == ("alert", True)


async def test_a_session_does_not_save_anyone_from_the_callers_verification(mesh: Mesh) -> None:
    sessions: list[SSL.Session] = []
    client, server = await mesh.connect(offer=TLSOffer("a", on_session=sessions.append))
    await server.send_all(b"1")
    await client.receive_some()
    client.close()
    server.close()

    def refuse(chain: Chain) -> None:
        raise Refused(name_of(chain))

    dialled, accepted = pair()
    results = await both(
        partial(
            tls_client,
            dialled,
            mesh.client_context,
            TLSOffer("a", session=sessions[0]),
            verify=None,
            timeout=20,
        ),
        partial(tls_server, accepted, mesh.server_context, verify=refuse, timeout=20),
    )
    assert isinstance(results[0], TLSStream)
    assert results[0].info.resumed
    assert str(results[1]) == spiffe("client")
    results[0].close()


# What is not TLS


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "speaks HTTP in clear text"),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", "speaks HTTP in clear text"),
        (b"EHLO example\r\n", "does not speak TLS"),
        (bytes(100), "TLS"),
        (b"\x16\x03\x01\xff\xff" + bytes(100), "TLS"),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00" + bytes(100), "TLS"),
    ],
)
async def test_a_peer_without_tls_is_reported_as_such(mesh: Mesh, sent: bytes, words: str) -> None:
    dialled, accepted = pair()
    await dialled.send_all(sent)
    with pytest.raises(TLSFailed, match=words) as caught:
        await tls_server(accepted, mesh.server_context, verify=None, timeout=20)
    assert caught.value.kind == "protocol"
    assert accepted.closed
    dialled.close()


async def test_a_clear_text_server_is_called_by_its_name(mesh: Mesh) -> None:
    dialled, accepted = pair()
    await accepted.send_all(b"220 mail.example ESMTP\r\n")
    with pytest.raises(TLSFailed, match="does not speak TLS"):
        await tls_client(dialled, mesh.client_context, OFFER, verify=None, timeout=20)
    accepted.close()


async def test_no_common_inner_protocol_is_said_on_both_sides(mesh: Mesh) -> None:
    dialled, accepted = pair()
    client, server = await both(
        partial(
            tls_client,
            dialled,
            mesh.client_context,
            TLSOffer("a", (b"spdy/1",)),
            verify=None,
            timeout=20,
        ),
        partial(tls_server, accepted, mesh.server_context, verify=None, timeout=20),
    )
    # pyOpenSSL's NO_OVERLAPPING_PROTOCOLS lets the handshake continue without one; a context may
    # refuse instead.
    for end in (client, server):
        assert isinstance(end, TLSStream)
        assert end.info.alpn == b""
        end.close()


async def test_an_error_in_a_callback_of_the_context_keeps_its_message(mesh: Mesh) -> None:
    """Such as the choice of the inner protocol, which may refuse."""

    def select(_: SSL.Connection, offered: list[bytes]) -> bytes:
        raise SSL.Error(f"none of {offered} is spoken here")

    choosy = mesh.accepting(mesh.server)
    choosy.set_alpn_select_callback(select)
    client, server = await attempt(mesh, server=choosy)
    assert isinstance(server, TLSFailed)
    assert "none of [b'h2'] is spoken here" in str(server)
    assert isinstance(client, TLSFailed)
    assert client.kind == "alert"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_whatever_bytes_come_a_handshake_fails_as_a_net_error_only(
    mesh: Mesh, sent: bytes, as_record: bool
) -> None:
    async def run() -> None:
        dialled, accepted = pair()
        await dialled.send_all(
            b"\x16\x03\x01" + len(sent).to_bytes(2, "big") + sent if as_record else sent
        )
        await dialled.send_eof()
        with pytest.raises(NetError):
            await tls_server(accepted, mesh.server_context, verify=None, timeout=20)
        assert accepted.closed
        dialled.close()

    trio.run(run)


async def test_an_older_version_is_refused_with_a_message(mesh: Mesh) -> None:
    old = SSL.Context(SSL.TLS_CLIENT_METHOD)
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    client, server = await attempt(mesh, client=old)
    assert isinstance(server, TLSFailed)
    assert "version" in str(server)
    assert isinstance(client, TLSFailed)
    assert (client.kind, "protocol version" in str(client)) == ("alert", True)


# Handshakes that do not end


async def test_a_handshake_has_a_deadline(mesh: Mesh) -> None:
    for shake in (
        partial(tls_client, offer=OFFER, context=mesh.client_context),
        partial(tls_server, context=mesh.server_context),
    ):
        silent, ours = pair()
        with pytest.raises(TLSFailed, match="timed out after") as caught:
            await shake(ours, verify=None, timeout=0.02)
        assert caught.value.kind == "timeout"
        assert ours.closed
        silent.close()


async def test_a_cancelled_handshake_closes_its_stream(mesh: Mesh) -> None:
    silent, ours = pair()
    with trio.move_on_after(0.02) as scope:
        await tls_server(ours, mesh.server_context, verify=None, timeout=60)
    assert scope.cancelled_caught
    assert ours.closed
    silent.close()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_peer_that_goes_away_in_the_handshake_is_a_lost_connection(
    mesh: Mesh, how: str
) -> None:
    dialled, accepted = pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            with pytest.raises(ConnectionLost):
                await tls_server(accepted, mesh.server_context, verify=None, timeout=20)

        nursery.start_soon(serve)
        await wait_all_tasks_blocked()
        getattr(dialled, how)()
