"""Connections that end with certificates: real TLS connections, and a wall clock that the test
sets."""

from __future__ import annotations

import gc

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from proxy.net.exceptions import ConnectionLost
from proxy.net.tls.expiry import EARLY, Expiries
from proxy.net.tls.handshake import TLSOffer, TLSStream
from proxy.net.tls.verify import _chains
from tests.kit.certs import Authority
from tests.net.conftest import Mesh

GRACE = 10.0


class Watched:
    """Expiries with a clock that the test sets, and their reports."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.ends: list[str] = []
        self.all = Expiries(GRACE, self.ends.append, lambda: self.now)

    def at(self, now: float) -> list[str]:
        """What happens when the clock is set to this."""
        self.now = now
        self.ends.clear()
        self.all.close_expired()
        return list(self.ends)


def end_of(stream: TLSStream) -> float:
    return stream.info.peer_not_after


async def test_a_connection_is_retired_once_at_the_expiry_and_ended_after_the_grace_period(
    mesh: Mesh,
) -> None:
    client, server = await mesh.connect()
    end, retired = end_of(server), []
    watched = Watched(end - 1000)
    watched.all.watch(server, trust=0)
    assert server.expiry is not None
    server.expiry.retire = lambda: retired.append(True)
    assert watched.at(end - 1) == []
    assert watched.at(end) == ["retired"]
    assert watched.at(end + GRACE - 1) == []
    assert retired == [True]
    await server.send_all(b"it goes on")
    assert await client.receive_some() == b"it goes on"
    assert watched.at(end + GRACE) == ["cut"]
    for operation in (server.receive_some, lambda: server.send_all(b"x")):
        with pytest.raises(ConnectionLost, match="the peer's certificate has expired") as caught:
            await operation()
        assert caught.value.reason == "expired"
    with pytest.raises(ConnectionLost):
        await client.receive_some()
    assert watched.at(end + 1000) == []
    assert len(watched.all) == 0
    client.close()
    server.close()


async def test_one_that_waits_to_read_is_woken(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    watched = Watched(end_of(server))
    watched.all.watch(server, trust=0)

    async def read() -> None:
        with pytest.raises(ConnectionLost, match="has expired"):
            await server.receive_some()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            watched.at(end_of(server) + GRACE)
    client.close()
    server.close()


async def test_one_that_we_have_opened_is_retired_a_little_early_and_ends_with_our_own_certificate_too(
    mesh: Mesh,
) -> None:
    client, server = await mesh.connect()
    cases = (
        (end_of(client) - 500, "with which this connection was opened"),
        (end_of(client) + 500, "the peer's certificate has expired"),
    )
    for own_end, words in cases:
        end = min(own_end, end_of(client))
        watched = Watched(end - 1000)
        watched.all.watch(client, own_end, trust=0)
        assert client.expiry is not None
        client.expiry.retire = lambda: None
        assert watched.at(end - EARLY - 0.1) == []
        assert watched.at(end - EARLY) == ["retired"]
        assert watched.at(end + GRACE - 0.1) == []
        assert words in client.expiry.words
    assert watched.at(end + GRACE) == ["cut"]
    client.close()
    server.close()


async def test_one_that_has_ended_by_itself_is_forgotten(mesh: Mesh) -> None:
    watched = Watched(0)
    for _ in range(5):
        client, server = await mesh.connect()
        watched.all.watch(server, trust=0)
        client.close()
        server.close()
    assert watched.at(end_of(server) + GRACE) == [], "a closed one is not ended again"
    del client, server
    gc.collect()
    watched.all.close_expired()
    assert len(watched.all) == 0
    assert watched.all._minutes == {}


async def test_a_removed_root_ends_the_connections_that_depend_on_it(mesh: Mesh) -> None:
    client, server = await mesh.connect()
    root, other = mesh.authority.root.certificate, Authority("another").root.certificate
    watched = Watched(end_of(server) - 1000)
    watched.all.watch(server, trust=0)
    watched.all.untrust((root, other))
    assert watched.at(watched.now + GRACE + 1) == [], "it is still trusted"
    watched.all.untrust((other,))
    assert watched.at(watched.now) == []
    assert watched.at(watched.now + GRACE) == ["cut"]
    with pytest.raises(
        ConnectionLost, match="the trust root of the peer's certificate was removed"
    ):
        await server.receive_some()
    client.close()
    server.close()


async def test_a_root_that_is_removed_during_the_handshake_ends_the_connection(mesh: Mesh) -> None:
    root, other = mesh.authority.root.certificate, Authority("another").root.certificate
    for roots, ends in (((other,), ["cut"]), ((root, other), [])):
        watched = Watched(0)
        before = watched.all.trust
        client, server = await mesh.connect()
        watched.now = end_of(server) - 1000
        watched.all.untrust(roots)
        watched.all.watch(server, trust=before)
        watched.all.close_expired()
        assert watched.at(watched.now + GRACE) == ends
        client.close()
        server.close()


@pytest.mark.parametrize("known", [True, False], ids=["chain remembered", "chain forgotten"])
async def test_a_resumed_session_ends_no_later_than_the_certificate_that_it_was_made_with(
    mesh: Mesh, known: bool
) -> None:
    sessions: list[object] = []
    client, server = await mesh.connect(offer=TLSOffer("a", (b"h2",), on_session=sessions.append))
    first = end_of(server)
    await server.send_all(b"x")
    await client.receive_some()
    client.close()
    server.close()
    if not known:
        _chains.clear()
    client, server = await mesh.connect(offer=TLSOffer("a", (b"h2",), sessions[0]))  # type: ignore[arg-type]
    assert server.info.resumed
    assert end_of(server) == first
    assert (server.info.peer_root == mesh.authority.root.certificate) is known
    watched = Watched(first - 1000)
    watched.all.watch(server, trust=0)
    watched.all.untrust((mesh.authority.root.certificate,))
    assert watched.at(watched.now + GRACE) == ([] if known else ["cut"]), (
        "an unknown one is not trusted"
    )
    client.close()
    server.close()
