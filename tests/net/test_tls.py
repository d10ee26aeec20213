"""TLSStream: what was agreed, who was refused and in which words, and ends that cannot be mistaken for one another."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import trio
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from trio.testing import wait_all_tasks_blocked

from proxy.net.errors import NetError
from proxy.net.streams import ConnectionLost, SocketStream, TLSFailed
from proxy.net.tls import TLSOffer, TLSStream, tls_client, tls_server
from tests.kit.certs import Authority, Credential, spiffe
from tests.net.conftest import Mesh, both, pair, read_all, send_until_it_fails

OFFER = TLSOffer("server.default.sa.test.local", (b"h2",))
DAY = timedelta(days=1)


class Refused(Exception):
    """What a caller's own verification raises."""


def name_of(certificate: x509.Certificate | None) -> str:
    assert certificate is not None
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)[0]


async def attempt(
    mesh: Mesh, *, server: SSL.Context | None = None, client: SSL.Context | None = None
) -> tuple[TLSStream | Exception, TLSStream | Exception]:
    """A handshake of which one side may fail; the client then reads, because in TLS 1.3 that is where it hears of a refusal."""
    dialled, accepted = pair()

    async def dial() -> TLSStream:
        stream = await tls_client(dialled, client or mesh.client_context, OFFER, verify=None, timeout=2)
        await stream.receive_some()
        return stream

    async def accept() -> TLSStream:
        stream = await tls_server(accepted, server or mesh.server_context, verify=None, timeout=2)
        await stream.send_all(b"welcome")
        return stream

    with trio.fail_after(5):
        results = await both(dial, accept)
    dialled.close()
    accepted.close()
    return results[0], results[1]


# What is agreed


async def test_both_ends_agree_on_post_quantum_tls_13_and_know_each_other(mesh: Mesh) -> None:
    client, server = await mesh.connect(verify=name_of)
    for end, peer in ((client, "server"), (server, "client")):
        assert end.info.version == "TLSv1.3"
        assert end.info.group == "X25519MLKEM768"
        assert end.info.cipher.startswith("TLS_")
        assert end.info.alpn == b"h2"
        assert end.info.sni == "server.default.sa.test.local"
        assert end.info.peer_identity == spiffe(peer)
        assert not end.info.resumed
    client.close()
    server.close()


async def test_a_session_is_resumed_and_its_peer_is_still_verified(mesh: Mesh) -> None:
    sessions: list[SSL.Session] = []
    client, server = await mesh.connect(offer=TLSOffer("a", on_session=sessions.append))
    assert sessions == []  # the ticket comes after the handshake
    await server.send_all(b"1")
    await client.receive_some()
    await server.send_all(b"2")
    await client.receive_some()
    assert len(sessions) == 1
    client.close()
    server.close()

    seen: list[str] = []

    def verify(certificate: x509.Certificate | None) -> str:
        seen.append(name_of(certificate))
        return seen[-1]

    client, server = await mesh.connect(offer=TLSOffer("a", session=sessions[0]), verify=verify)
    assert client.info.resumed
    assert server.info.resumed
    assert client.info.group == "X25519MLKEM768"
    assert sorted(seen) == [spiffe("client"), spiffe("server")]
    await client.send_all(b"works")
    assert await server.receive_some() == b"works"
    client.close()
    server.close()


async def test_a_session_of_another_context_is_not_offered(mesh: Mesh) -> None:
    sessions: list[SSL.Session] = []
    client, server = await mesh.connect(offer=TLSOffer("a", on_session=sessions.append))
    await server.send_all(b"1")
    await client.receive_some()
    client.close()
    server.close()
    renewed = Mesh(mesh.authority)
    client, server = await renewed.connect(offer=TLSOffer("a", session=sessions[0]))
    assert not client.info.resumed
    client.close()
    server.close()


async def test_a_server_whose_keys_are_new_makes_a_full_handshake_with_an_old_session(mesh: Mesh) -> None:
    sessions: list[SSL.Session] = []
    client, server = await mesh.connect(offer=TLSOffer("a", on_session=sessions.append))
    await server.send_all(b"1")
    await client.receive_some()
    client.close()
    server.close()
    dialled, accepted = pair()
    ends = await both(
        partial(tls_client, dialled, mesh.client_context, TLSOffer("a", session=sessions[0]), verify=None, timeout=2),
        partial(tls_server, accepted, mesh.accepting(mesh.server), verify=None, timeout=2),
    )
    for end in ends:
        assert isinstance(end, TLSStream)
        assert not end.info.resumed
        end.close()


# Who is refused


def _expired(mesh: Mesh) -> Credential:
    return mesh.authority.issue(spiffe("late"), since=-2 * DAY, until=-DAY)


def _early(mesh: Mesh) -> Credential:
    return mesh.authority.issue(spiffe("early"), since=DAY, until=2 * DAY)


def _stranger(mesh: Mesh) -> Credential:
    return Authority("another root").issue(spiffe("stranger"))


def _self_signed(mesh: Mesh) -> Credential:
    return Authority("nobody").root


REFUSALS = [
    (_expired, r"has expired \(not after 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC\)", "certificate expired"),
    (_early, r"is not valid yet \(not before 20", "bad certificate"),
    (_stranger, "is not signed by a trust root", "unknown ca"),
    (_self_signed, "is not signed by a trust root", "unknown ca"),
]


@pytest.mark.parametrize(("make", "words", "alert"), REFUSALS)
async def test_a_server_with_a_wrong_certificate_is_refused_in_words(
    mesh: Mesh, make: Callable[[Mesh], Credential], words: str, alert: str
) -> None:
    client, server = await attempt(mesh, server=mesh.accepting(make(mesh)))
    assert isinstance(client, TLSFailed)
    assert client.kind == "certificate"
    with pytest.raises(TLSFailed, match=words):
        raise client
    assert isinstance(server, TLSFailed)
    assert server.kind == "alert"
    assert alert in str(server)


@pytest.mark.parametrize(("make", "words", "alert"), REFUSALS)
async def test_a_client_with_a_wrong_certificate_is_refused_in_words_and_told_why(
    mesh: Mesh, make: Callable[[Mesh], Credential], words: str, alert: str
) -> None:
    client, server = await attempt(mesh, client=mesh.dialling(make(mesh)))
    assert isinstance(server, TLSFailed)
    assert server.kind == "certificate"
    with pytest.raises(TLSFailed, match=words):
        raise server
    assert isinstance(client, TLSFailed)
    assert client.kind == "alert"
    assert alert in str(client)


async def test_a_client_without_a_certificate_is_refused_and_told_why(mesh: Mesh) -> None:
    client, server = await attempt(mesh, client=mesh.dialling(None))
    assert isinstance(server, TLSFailed)
    assert server.kind == "certificate"
    assert "no certificate" in str(server)
    assert isinstance(client, TLSFailed)
    assert (client.kind, "certificate required" in str(client)) == ("alert", True)


async def test_a_client_that_only_sends_hears_of_its_refusal_too(mesh: Mesh) -> None:
    dialled, accepted = pair()
    results: list[object] = []

    async def serve() -> None:
        with pytest.raises(TLSFailed):
            await tls_server(accepted, mesh.server_context, verify=None, timeout=2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        client = await tls_client(dialled, mesh.dialling(None), OFFER, verify=None, timeout=2)
    with pytest.raises(TLSFailed, match="certificate required") as caught:
        await send_until_it_fails(client)
    results.append(caught.value)
    client.close()


@pytest.mark.parametrize("refusing", ["client", "server"])
async def test_a_refusal_by_the_caller_closes_with_no_byte_given_or_taken(mesh: Mesh, refusing: str) -> None:
    def refuse(_: x509.Certificate | None) -> None:
        raise Refused("not you")

    dialled, accepted = pair()
    results = await both(
        partial(tls_client, dialled, mesh.client_context, OFFER, verify=refuse if refusing == "client" else None, timeout=2),
        partial(tls_server, accepted, mesh.server_context, verify=refuse if refusing == "server" else None, timeout=2),
    )
    refused, other = results if refusing == "client" else results[::-1]
    assert isinstance(refused, Refused)
    assert (dialled if refusing == "client" else accepted).closed
    if isinstance(other, TLSStream):
        with pytest.raises(ConnectionLost):
            await read_all(other)
        other.close()
    else:  # the refusal came before its handshake was done
        assert isinstance(other, ConnectionLost)


async def test_a_session_does_not_save_anyone_from_the_callers_verification(mesh: Mesh) -> None:
    sessions: list[SSL.Session] = []
    client, server = await mesh.connect(offer=TLSOffer("a", on_session=sessions.append))
    await server.send_all(b"1")
    await client.receive_some()
    client.close()
    server.close()

    def refuse(certificate: x509.Certificate | None) -> None:
        raise Refused(name_of(certificate))

    dialled, accepted = pair()
    results = await both(
        partial(tls_client, dialled, mesh.client_context, TLSOffer("a", session=sessions[0]), verify=None, timeout=2),
        partial(tls_server, accepted, mesh.server_context, verify=refuse, timeout=2),
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
async def test_what_is_not_tls_is_called_by_its_name(mesh: Mesh, sent: bytes, words: str) -> None:
    dialled, accepted = pair()
    await dialled.send_all(sent)
    with pytest.raises(TLSFailed, match=words) as caught:
        await tls_server(accepted, mesh.server_context, verify=None, timeout=2)
    assert caught.value.kind == "protocol"
    assert accepted.closed
    dialled.close()


async def test_a_clear_text_server_is_called_by_its_name(mesh: Mesh) -> None:
    dialled, accepted = pair()
    await accepted.send_all(b"220 mail.example ESMTP\r\n")
    with pytest.raises(TLSFailed, match="does not speak TLS"):
        await tls_client(dialled, mesh.client_context, OFFER, verify=None, timeout=2)
    accepted.close()


async def test_no_common_inner_protocol_is_said_on_both_sides(mesh: Mesh) -> None:
    dialled, accepted = pair()
    client, server = await both(
        partial(tls_client, dialled, mesh.client_context, TLSOffer("a", (b"spdy/1",)), verify=None, timeout=2),
        partial(tls_server, accepted, mesh.server_context, verify=None, timeout=2),
    )
    # pyOpenSSL's NO_OVERLAPPING_PROTOCOLS lets the handshake go on without one; a context may refuse instead.
    for end in (client, server):
        assert isinstance(end, TLSStream)
        assert end.info.alpn == b""
        end.close()


async def test_what_a_callback_of_the_context_raises_is_said_in_its_own_words(mesh: Mesh) -> None:
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
def test_whatever_bytes_come_a_handshake_fails_as_a_net_error_only(mesh: Mesh, sent: bytes, as_record: bool) -> None:
    async def run() -> None:
        dialled, accepted = pair()
        await dialled.send_all(b"\x16\x03\x01" + len(sent).to_bytes(2, "big") + sent if as_record else sent)
        await dialled.send_eof()
        with pytest.raises(NetError):
            await tls_server(accepted, mesh.server_context, verify=None, timeout=1)
        assert accepted.closed
        dialled.close()

    trio.run(run)


async def test_an_older_version_is_refused_in_words(mesh: Mesh) -> None:
    old = SSL.Context(SSL.TLS_CLIENT_METHOD)
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    client, server = await attempt(mesh, client=old)
    assert isinstance(server, TLSFailed)
    assert "version" in str(server)
    assert isinstance(client, TLSFailed)
    assert (client.kind, "protocol version" in str(client)) == ("alert", True)


# Handshakes that do not come to an end


async def test_a_handshake_has_a_deadline(mesh: Mesh) -> None:
    for shake in (
        partial(tls_client, offer=OFFER, context=mesh.client_context),
        partial(tls_server, context=mesh.server_context),
    ):
        silent, ours = pair()
        with pytest.raises(TLSFailed, match="not done within") as caught:
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
async def test_a_peer_that_goes_away_in_the_handshake_is_a_lost_connection(mesh: Mesh, how: str) -> None:
    dialled, accepted = pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            with pytest.raises(ConnectionLost):
                await tls_server(accepted, mesh.server_context, verify=None, timeout=2)

        nursery.start_soon(serve)
        await wait_all_tasks_blocked()
        getattr(dialled, how)()


# Data


async def test_a_hello_that_was_peeked_at_is_still_there(mesh: Mesh) -> None:
    dialled, accepted = pair()

    async def serve() -> TLSStream:
        assert (await accepted.peek(1024, at_least=6))[:1] == b"\x16"
        return await tls_server(accepted, mesh.server_context, verify=None, timeout=2)

    results = await both(partial(tls_client, dialled, mesh.client_context, OFFER, verify=None, timeout=2), serve)
    for end in results:
        assert isinstance(end, TLSStream)
        end.close()


async def test_large_transfers_both_ways_at_once_do_not_lock_each_other(mesh: Mesh) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    data = bytes(range(256)) * 4096

    async def send(stream: TLSStream) -> None:
        await stream.send_all(memoryview(data))
        await stream.send_eof()

    with trio.fail_after(10):
        results = await both(
            partial(send, client), partial(send, server), partial(read_all, client), partial(read_all, server)
        )
    assert results == [None, None, data, data]
    assert client.bytes_written == client.bytes_read == len(data)
    client.close()
    server.close()


async def test_what_openssl_holds_already_is_read_without_waiting_for_the_socket(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"0123456789")
    with trio.fail_after(1):
        assert await client.receive_some(1) == b"0"
        for digit in b"123456789":
            assert await client.receive_some(1) == bytes([digit])
    client.close()
    server.close()


async def test_who_looks_at_a_connection_takes_nothing_from_the_one_who_reads_it(mesh: Mesh) -> None:
    """The look comes when the record is in the socket and its reader has not been woken yet."""
    client, server = await mesh.connect()
    heard: list[bytes] = []

    async def read() -> None:
        heard.append(await server.receive_some())

    for look in (server.is_idle, server.gone):
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await wait_all_tasks_blocked(0.01)
                await client.send_all(b"x")
                assert not look()
    assert heard == [b"x", b"x"]
    client.close()
    server.close()


async def test_unread_tickets_leave_a_connection_idle_and_data_does_not(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await wait_all_tasks_blocked(0.01)
    assert client.socket.recv(1, socket.MSG_PEEK)  # the premise: tickets lie in the socket
    assert client.is_idle()
    await server.send_all(b"x")
    await wait_all_tasks_blocked(0.01)
    assert not client.is_idle()
    assert await client.receive_some() == b"x"
    assert client.is_idle()
    await server.aclose()
    await wait_all_tasks_blocked(0.01)
    assert not client.is_idle()
    client.close()
    assert not client.is_idle()


# Ends


async def test_the_last_words_of_a_peer_can_be_read_after_a_send_has_failed(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"413 enough")
    await server.aclose()
    with pytest.raises(ConnectionLost) as caught:
        await send_until_it_fails(client)
    assert caught.value.reason in {"closed", "reset"}
    assert await read_all(client) == b"413 enough"
    client.close()


async def test_each_direction_ends_by_itself(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await client.send_all(b"question")
    await client.send_eof()
    await client.send_eof()
    with pytest.raises(trio.ClosedResourceError):
        await client.send_all(b"more")
    assert await read_all(server) == b"question"
    assert await server.receive_some() == b""
    await server.send_all(b"answer" * 10_000)
    await server.send_eof()
    assert await read_all(client) == b"answer" * 10_000
    client.close()
    server.close()


@pytest.mark.parametrize("said", [b"", b"half an ans"])
async def test_the_end_of_tcp_is_not_the_end_of_tls(mesh: Mesh, said: bytes) -> None:
    client, server = await mesh.connect()
    if said:
        await server.send_all(said)
    server.socket.shutdown(socket.SHUT_WR)
    if said:
        assert await client.receive_some() == said
    with pytest.raises(ConnectionLost, match="truncated") as caught:
        await client.receive_some()
    assert caught.value.reason == "truncated"
    with pytest.raises(NetError):  # and it stays so
        await client.receive_some()
    client.close()
    server.close()


async def test_an_altered_record_is_refused(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    server.socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(TLSFailed, match="altered") as caught:
        await client.receive_some()
    assert caught.value.kind == "protocol"
    client.close()
    server.close()


async def test_aclose_says_goodbye_and_does_not_wait_for_the_answer(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"last words")
    with trio.fail_after(0.5):
        await server.aclose()
    assert await read_all(client) == b"last words"
    await server.aclose()
    client.close()


async def test_aclose_in_a_cancelled_task_still_says_goodbye(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    with trio.CancelScope() as scope:
        scope.cancel()
        await server.aclose()
    assert await read_all(client) == b""
    client.close()


async def test_aclose_with_unread_tickets_does_not_reset(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await client.send_all(b"fire and forget")
    await client.aclose()
    await wait_all_tasks_blocked(0.01)
    assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0  # no RST has come, only FIN
    assert await read_all(server) == b"fire and forget"
    server.close()


async def test_aclose_gives_up_on_a_peer_that_takes_nothing(mesh: Mesh, autojump_clock: trio.abc.Clock) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    sender_done = trio.Event()
    while True:  # fill with whole records until not even the first byte of another is taken
        try:
            client._connection.send(b"x" * 1000)
        except SSL.WantWriteError:
            break
    started = time.monotonic()
    before = trio.current_time()
    await client.aclose()
    assert trio.current_time() - before <= 1.5
    assert time.monotonic() - started < 10
    sender_done.set()
    server.close()


async def test_a_send_cancelled_in_a_record_tears_the_stream_and_the_peer_hears_no_goodbye(mesh: Mesh) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    with trio.move_on_after(0.03) as scope:
        await client.send_all(bytes(1 << 20))
    assert scope.cancelled_caught
    for operation in (partial(client.send_all, b"x"), client.send_eof):
        with pytest.raises(ConnectionLost) as caught:
            await operation()
        assert caught.value.reason == "torn"
    await client.aclose()
    with pytest.raises(ConnectionLost):
        await read_all(server)
    server.close()


async def test_closing_wakes_both_halves_and_openssl_is_not_called_again(mesh: Mesh) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    woken = 0

    async def expect(operation: partial[object]) -> None:
        nonlocal woken
        with pytest.raises(trio.ClosedResourceError):
            await operation()
        woken += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, partial(client.receive_some))
        nursery.start_soon(expect, partial(client.send_all, bytes(1 << 20)))
        await wait_all_tasks_blocked()
        client.close()
    assert woken == 2
    with pytest.raises(trio.ClosedResourceError):
        await client.receive_some()
    server.close()


async def test_two_senders_or_two_readers_are_a_mistake(mesh: Mesh) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.receive_some)
        nursery.start_soon(client.send_all, bytes(1 << 20))
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await client.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await client.send_all(b"x")
        with pytest.raises(trio.BusyResourceError):
            await client.send_eof()
        nursery.cancel_scope.cancel()
    client.close()
    server.close()


async def test_a_stream_that_failed_in_the_handshake_is_closed(mesh: Mesh) -> None:
    dialled, accepted = pair()
    assert isinstance(dialled, SocketStream)
    await dialled.send_all(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(TLSFailed):
        await tls_server(accepted, mesh.server_context, verify=None, timeout=1)
    assert accepted.closed
    dialled.close()
