"""The proxy's credentials from a SPIFFE Workload API: each message replaces the set in use, failures
are tried again, and nothing that the agent does empties what is known.

The agent is a real gRPC server on a Unix socket, or a socket whose bytes the test writes. Time is a
mock clock that the test moves."""

from __future__ import annotations

import logging
import random
import socket
import stat
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from trio.abc import Clock
from trio.testing import MockClock

from proxy.config.schema_files import WorkloadApiConfig
from proxy.enrollment.workload_api import WorkloadApiFailed, WorkloadCredentials
from proxy.identity.identity import Identity, TLSSettings
from proxy.identity.issue import issue, make_root
from proxy.identity.spiffe import SpiffeId
from proxy.wire.h1.connection import Role
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.events import Http2Limits
from proxy.wire.messages import Headers, ResponseHead
from tests.kit.mock_time import elapse, settled
from tests.kit.workload_api import (
    BUNDLES,
    DOMAIN,
    SVIDS,
    WEB,
    WorkloadApi,
    bundles,
    der,
    field,
    svid,
    svids,
)

CART = SpiffeId(DOMAIN, "shop", "cart")
DENIED = grpc.StatusCode.PERMISSION_DENIED, "no identity issued"


@pytest.fixture
def clock() -> Clock:
    """Every test that moves the time requests it."""
    return MockClock()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[WorkloadApi]:
    agent = WorkloadApi(tmp_path)
    yield agent
    agent.stop()


class Proxy:
    """A proxy's identity, with its source."""

    def __init__(self, address: str, max_message: int = 1024 * 1024) -> None:
        settings = WorkloadApiConfig(socket=address, max_message=max_message)
        self.source = WorkloadCredentials(settings, random.Random(1))
        self.identity = Identity(None, TLSSettings(own_domain=DOMAIN))
        self.changes = 0
        self.failures: list[str] = []

    async def run(self) -> None:
        await self.source.run(self.identity, self._changed, self._failed)

    def _changed(self, identity: Identity) -> None:
        assert identity is self.identity
        self.changes += 1

    def _failed(self, error: Exception) -> None:
        self.failures.append(str(error))


def failed(proxy: Proxy, count: int) -> bool:
    """Whether the proxy has failed `count` times."""
    return len(proxy.failures) == count


async def test_the_first_svid_is_the_identity_and_nothing_is_written(
    agent: WorkloadApi, nursery: trio.Nursery
) -> None:
    agent.answer(svids(svid(agent.root), svid(agent.root, name=CART)))
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    assert proxy.identity.id == WEB
    assert isinstance(proxy.identity.certificate.public_key(), ec.EllipticCurvePublicKey)
    assert proxy.identity.roots == (agent.root.certificate,)
    assert (proxy.failures, proxy.identity.warnings) == ([], ())
    metadata = dict(agent.asked)[SVIDS]
    assert metadata["workload.spiffe.io"] == "true"
    files = [path for path in agent.path.parent.rglob("*") if stat.S_ISREG(path.stat().st_mode)]
    assert files == []
    nursery.cancel_scope.cancel()


async def test_each_message_replaces_certificate_key_and_roots(
    agent: WorkloadApi, nursery: trio.Nursery
) -> None:
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    root = make_root(DOMAIN)
    leaf = issue(root, WEB)
    agent.answer(svids(svid(root, leaf)))
    await settled(lambda: proxy.changes == 2)
    assert proxy.identity.certificate == leaf.certificate
    assert proxy.identity.roots == (root.certificate,)
    # The same set again changes nothing.
    agent.answer(svids(svid(root, leaf)))
    agent.answer(svids(svid(root, issue(root, WEB))))
    await settled(lambda: proxy.identity.certificate != leaf.certificate)
    assert proxy.changes == 3
    assert (proxy.failures, agent.count()) == ([], 1)
    nursery.cancel_scope.cancel()


async def test_new_roots_of_the_own_trust_domain_are_used_with_the_certificate_at_hand(
    agent: WorkloadApi, nursery: trio.Nursery
) -> None:
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    leaf = proxy.identity.certificate
    new, foreign = make_root(DOMAIN), make_root("other.test")
    both = der(agent.root.certificate) + der(new.certificate)
    other = {"spiffe://other.test": der(foreign.certificate)}
    agent.answer(bundles({f"spiffe://{DOMAIN}": both, **other}), BUNDLES)
    await settled(lambda: proxy.changes == 2)
    assert proxy.identity.certificate == leaf
    assert set(proxy.identity.roots) == {agent.root.certificate, new.certificate}
    assert proxy.failures == []
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("found", [{}, {f"spiffe://{DOMAIN}": b""}])
async def test_empty_bundles_change_nothing(
    agent: WorkloadApi, nursery: trio.Nursery, found: dict[str, bytes]
) -> None:
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    agent.answer(bundles(found), BUNDLES)
    new = make_root(DOMAIN)
    both = der(agent.root.certificate) + der(new.certificate)
    agent.answer(bundles({f"spiffe://{DOMAIN}": both}), BUNDLES)
    await settled(lambda: len(proxy.identity.roots) == 2)
    assert (proxy.changes, proxy.failures) == (2, [])
    nursery.cancel_scope.cancel()


async def test_roots_of_other_trust_domains_are_not_used_and_the_log_says_so(
    agent: WorkloadApi, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = der(make_root("other.test").certificate)
    found = svids(
        svid(agent.root, hint="internal"),
        svid(agent.root, name=CART),
        federated={"spiffe://other.test": foreign},
    )
    agent.answer(found)
    agent.start()
    proxy = Proxy(agent.address)
    with caplog.at_level(logging.INFO, logger="isthmus"):
        proxy.identity.use(await proxy.source.fetch())
    assert proxy.identity.roots == (agent.root.certificate,)
    assert "trust roots of other trust domains, which are not used: other.test" in caplog.text
    assert f"1 more identities for this process; the first is used: {WEB} (hint: internal)" in (
        caplog.text
    )


async def test_an_agent_without_the_call_for_bundles_is_used(
    agent: WorkloadApi, nursery: trio.Nursery
) -> None:
    agent.answer((grpc.StatusCode.UNIMPLEMENTED, "unknown method"), BUNDLES)
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known and agent.count(BUNDLES) == 1)
    agent.answer(svids(svid(agent.root)))
    await settled(lambda: proxy.changes == 2)
    assert (proxy.failures, agent.count()) == ([], 1)
    nursery.cancel_scope.cancel()


async def test_a_denied_process_asks_again_until_it_is_registered(
    agent: WorkloadApi, nursery: trio.Nursery, clock: Clock
) -> None:
    agent.answer(DENIED)
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    for count in range(1, 6):
        await settled(partial(failed, proxy, count))
        if count < 5:
            # The pauses double from 0.5 s, and are shortened by up to a half.
            await elapse(clock, 0.24 * 2 ** (count - 1), step=0.24 * 2 ** (count - 1))
            assert len(proxy.failures) == count
            await elapse(clock, 0.27 * 2 ** (count - 1), step=0.27 * 2 ** (count - 1))
    assert (
        "has no identity for this process (PermissionDenied: no identity issued): is it"
        in (proxy.failures[0])
    )
    assert not proxy.identity.known
    agent.answer(svids(svid(agent.root)))
    await elapse(clock, 10.0, step=1.0)
    await settled(lambda: proxy.identity.known)
    nursery.cancel_scope.cancel()


async def test_an_agent_that_is_away_changes_nothing_and_its_return_is_noticed(
    agent: WorkloadApi, nursery: trio.Nursery, clock: Clock
) -> None:
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.failures)
    assert f"at {agent.path} cannot be used: No such file or directory" in proxy.failures[0]
    agent.start()
    await elapse(clock, 1.0, step=1.0)
    await settled(lambda: proxy.identity.known)
    proxy.failures.clear()
    agent.stop()
    await settled(lambda: proxy.failures)
    before = proxy.identity.certificate
    await elapse(clock, 60.0, step=1.0)
    # The pauses double from 0.5 s to 10 s.
    assert 6 <= len(proxy.failures) <= 20
    assert (proxy.changes, proxy.identity.certificate) == (1, before)
    assert proxy.identity.time_left > timedelta(hours=1)
    agent.answer(svids(svid(agent.root)))
    agent.start()
    await elapse(clock, 11.0, step=1.0)
    await settled(lambda: proxy.changes == 2)
    nursery.cancel_scope.cancel()


async def test_a_process_that_is_denied_later_keeps_its_certificate(
    agent: WorkloadApi, nursery: trio.Nursery
) -> None:
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    before = proxy.identity.certificate
    agent.answer(DENIED)
    await settled(lambda: proxy.failures)
    assert (proxy.changes, proxy.identity.certificate) == (1, before)
    assert proxy.identity.validity_problem() is None
    nursery.cancel_scope.cancel()


async def test_an_invalid_argument_ends_the_attempts(
    agent: WorkloadApi, nursery: trio.Nursery, clock: Clock
) -> None:
    agent.answer((grpc.StatusCode.INVALID_ARGUMENT, "security header missing"))
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.failures)
    await elapse(clock, 100.0, step=10.0)
    (words,) = proxy.failures
    assert "refuses the request (InvalidArgument: security header missing)" in words
    assert "the proxy does not ask again" in words
    assert agent.count() == 1
    nursery.cancel_scope.cancel()


OTHER = make_root("other.test")
UNUSABLE = [
    (svids(), "sent an unusable message: it has no SVID"),
    (b"\xff\xff", "sent an unusable message: it is not the expected protobuf message"),
    (bytes(16 * 1024 + 1), "a message has 16385 bytes, and the limit is 16384"),
    (svids(svid(OTHER, name=SpiffeId("other.test", "shop", "web"))), "trust domain other.test"),
    (svids(svid(make_root(DOMAIN)) + field(4, b"")), "its first SVID has no trust root"),
]


@pytest.mark.parametrize(("message", "words"), UNUSABLE)
async def test_an_unusable_message_is_explained_and_empties_nothing(
    agent: WorkloadApi, nursery: trio.Nursery, clock: Clock, message: bytes, words: str
) -> None:
    agent.start()
    proxy = Proxy(agent.address, max_message=16 * 1024)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    before = proxy.identity.certificate
    agent.answer(message)
    await settled(lambda: proxy.failures)
    assert words in proxy.failures[0]
    assert (proxy.changes, proxy.identity.certificate) == (1, before)
    assert proxy.identity.roots == (agent.root.certificate,)
    agent.answer(svids(svid(agent.root)))
    await elapse(clock, 11.0, step=1.0)
    await settled(lambda: proxy.changes == 2)
    nursery.cancel_scope.cancel()


async def test_roots_that_do_not_verify_the_certificate_are_not_used(
    agent: WorkloadApi, nursery: trio.Nursery, clock: Clock
) -> None:
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    agent.answer(bundles({DOMAIN: der(make_root(DOMAIN).certificate)}), BUNDLES)
    await settled(lambda: proxy.failures)
    assert "is not signed by the trust roots in the trust roots from the Work" in proxy.failures[0]
    assert (proxy.changes, proxy.identity.roots) == (1, (agent.root.certificate,))
    nursery.cancel_scope.cancel()


class RawAgent:
    """A Unix socket whose bytes the test writes: the proxy's HTTP/2 engine as a server."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "raw.sock"
        self.accepted = 0

    async def serve(self, body: list[bytes]) -> None:
        """In each connection, answer the first call by the pieces of `body`, and then wait."""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            await sock.bind(str(self.path))
            sock.listen(8)
            while True:
                peer, _ = await sock.accept()
                self.accepted += 1
                async with trio.SocketStream(peer) as stream:
                    await self._answer(stream, body)

    async def _answer(self, stream: trio.SocketStream, body: list[bytes]) -> None:
        http2 = Http2Connection(Role.SERVER, Http2Limits())
        http2.receive_data(await stream.receive_some(), 0.0)
        head = ResponseHead(200, Headers([(b"content-type", b"application/grpc")]))
        http2.send_response(1, head, end=False)
        for piece in body:
            http2.send_data(1, piece, end=False)
        await stream.send_all(http2.data_to_send())
        while await stream.receive_some():
            pass


@pytest.mark.parametrize("body", [[], [b"\0\0\0"], [b"\0\0\0\x01\0", bytes(100)]])
async def test_an_agent_that_sends_no_complete_message_is_left_in_time(
    tmp_path: Path, nursery: trio.Nursery, clock: Clock, body: list[bytes]
) -> None:
    agent = RawAgent(tmp_path)
    nursery.start_soon(agent.serve, body)
    await settled(agent.path.exists)
    proxy = Proxy(f"unix:{agent.path}")
    nursery.start_soon(proxy.run)
    await settled(lambda: agent.accepted == 1)
    await elapse(clock, 9.0, step=1.0)
    assert proxy.failures == []
    await elapse(clock, 1.5, step=0.5)
    await settled(lambda: proxy.failures)
    assert proxy.failures[0].endswith("sent no complete message within 10 s")
    await elapse(clock, 1.0, step=1.0)
    await settled(lambda: agent.accepted == 2)
    nursery.cancel_scope.cancel()


async def test_a_later_message_that_does_not_end_is_left_in_time(
    tmp_path: Path, nursery: trio.Nursery, clock: Clock
) -> None:
    root = make_root(DOMAIN)
    first = svids(svid(root))
    agent = RawAgent(tmp_path)
    nursery.start_soon(agent.serve, [b"\0" + len(first).to_bytes(4, "big") + first, b"\0\0\0"])
    await settled(agent.path.exists)
    proxy = Proxy(f"unix://{agent.path}")
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    await elapse(clock, 12.0, step=1.0)
    await settled(lambda: proxy.failures)
    assert proxy.failures[0].endswith("sent no complete message within 10 s")
    assert proxy.identity.certificate.issuer == root.certificate.subject
    nursery.cancel_scope.cancel()


async def test_a_message_larger_than_the_windows_of_http2_is_read(
    agent: WorkloadApi, nursery: trio.Nursery
) -> None:
    """The unknown field is longer than what a server may send without an acknowledgement."""
    agent.answer(svids(svid(agent.root)) + field(99, bytes(3 * 1024 * 1024)))
    agent.start()
    proxy = Proxy(agent.address, max_message=4 * 1024 * 1024)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    assert proxy.failures == []
    nursery.cancel_scope.cancel()


async def test_a_stream_without_news_is_kept(
    agent: WorkloadApi, nursery: trio.Nursery, clock: Clock
) -> None:
    agent.start()
    proxy = Proxy(agent.address)
    nursery.start_soon(proxy.run)
    await settled(lambda: proxy.identity.known)
    await elapse(clock, 3600.0, step=60.0)
    assert (proxy.failures, agent.count()) == ([], 1)
    nursery.cancel_scope.cancel()


async def test_a_server_that_is_no_workload_api_is_named(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(1)

    async def answer() -> None:
        peer, _ = await sock.accept()
        await peer.recv(1000)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        peer.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        with pytest.raises(WorkloadApiFailed, match="the server speaks HTTP/1, not HTTP/2"):
            await Proxy(f"unix://{path}").source.fetch()
    sock.close()
