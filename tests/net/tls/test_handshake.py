"""TLSStream: what was negotiated, and data both ways."""

from __future__ import annotations

import socket
from functools import partial

import trio
from OpenSSL import SSL
from trio.testing import wait_all_tasks_blocked

from proxy.net.tls.handshake import Chain, TLSOffer, TLSStream, tls_client, tls_server
from tests.kit.certs import spiffe
from tests.kit.library import send_tickets
from tests.net.conftest import OFFER, Mesh, both, name_of, pair, read_all

# Negotiation


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

    def verify(chain: Chain) -> str:
        seen.append(name_of(chain))
        assert chain[1:] == (mesh.authority.root.certificate,), (
            "what was verified with that leaf before"
        )
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


async def test_a_server_whose_keys_are_new_makes_a_full_handshake_with_an_old_session(
    mesh: Mesh,
) -> None:
    sessions: list[SSL.Session] = []
    client, server = await mesh.connect(offer=TLSOffer("a", on_session=sessions.append))
    await server.send_all(b"1")
    await client.receive_some()
    client.close()
    server.close()
    dialled, accepted = pair()
    ends = await both(
        partial(
            tls_client,
            dialled,
            mesh.client_context,
            TLSOffer("a", session=sessions[0]),
            verify=None,
            timeout=20,
        ),
        partial(tls_server, accepted, mesh.accepting(mesh.server), verify=None, timeout=20),
    )
    for end in ends:
        assert isinstance(end, TLSStream)
        assert not end.info.resumed
        end.close()


# Data


async def test_a_hello_that_was_peeked_at_is_still_there(mesh: Mesh) -> None:
    dialled, accepted = pair()

    async def serve() -> TLSStream:
        assert (await accepted.peek(1024, at_least=6))[:1] == b"\x16"
        return await tls_server(accepted, mesh.server_context, verify=None, timeout=20)

    results = await both(
        partial(tls_client, dialled, mesh.client_context, OFFER, verify=None, timeout=20), serve
    )
    for end in results:
        assert isinstance(end, TLSStream)
        end.close()


async def test_large_transfers_both_ways_at_once_do_not_lock_each_other(mesh: Mesh) -> None:
    client, server = await mesh.connect(pair(buffers=8192))
    data = bytes(range(256)) * 4096

    async def send(stream: TLSStream) -> None:
        await stream.send_all(memoryview(data))
        await stream.send_eof()

    with trio.fail_after(30):
        results = await both(
            partial(send, client),
            partial(send, server),
            partial(read_all, client),
            partial(read_all, server),
        )
    assert results == [None, None, data, data]
    assert client.bytes_written == client.bytes_read == len(data)
    client.close()
    server.close()


async def test_data_in_openssl_s_buffer_is_read_without_waiting_for_the_socket(
    mesh: Mesh,
) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"0123456789")
    with trio.fail_after(30):
        assert await client.receive_some(1) == b"0"
        for digit in b"123456789":
            assert await client.receive_some(1) == bytes([digit])
    client.close()
    server.close()


async def test_what_follows_a_record_stays_in_the_socket_which_is_readable(
    mesh: Mesh,
) -> None:
    client, server = await mesh.connect()
    await server.send_all(b"0")
    assert await client.receive_some() == b"0"
    await server.send_all(b"one")
    await server.send_all(b"another")
    await wait_all_tasks_blocked(0.01)
    assert client.receive_nowait() == b"one"
    assert not client._connection.pending()
    assert (
        len(client.socket.recv(1000, socket.MSG_PEEK)) == 5 + len(b"another") + 1 + 16
    )  # header, data, type, authentication
    assert client.receive_nowait() == b"another"
    client.close()
    server.close()


async def test_peeking_at_a_connection_takes_nothing_from_its_reader(
    mesh: Mesh,
) -> None:
    """The check comes when the record is in the socket and its reader has not been woken yet."""
    client, server = await mesh.connect()
    received: list[bytes] = []

    async def read() -> None:
        received.append(await server.receive_some())

    for look, nothing in ((server.is_idle, False), (server.ended, "open")):
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await wait_all_tasks_blocked(0.01)
                await client.send_all(b"x")
                assert look() == nothing
    assert received == [b"x", b"x"]
    client.close()
    server.close()


async def test_unread_tickets_leave_a_connection_idle_and_data_does_not(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    send_tickets(server)
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


async def test_a_connection_whose_end_came_with_the_last_data_is_not_idle(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    await server.send_all(bytes(16384))
    await server.send_eof()
    assert (
        len(await client.receive_some(65536)) == 16384
    )  # a whole record: what follows it is read with it
    assert client.end_met
    assert not client.is_idle()
    client.close()
    server.close()
