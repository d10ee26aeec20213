"""Real TCP connections on loopback, raw and with TLS, for the tests of proxy/net."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from cryptography import x509
from OpenSSL import SSL
from trio.testing import wait_all_tasks_blocked

from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import Chain, TLSOffer, TLSStream, Verify, tls_client, tls_server
from tests.kit.certs import Authority, Credential, context, spiffe

T = TypeVar("T")

LOOPBACKS = ("127.0.0.1", "::1")


def listen(host: str = "127.0.0.1", buffers: int | None = None) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if buffers is not None:
        small(listener, buffers)
    listener.bind((host, 0))
    listener.listen()
    return listener


def small(sock: socket.socket, buffers: int) -> None:
    """Fixed kernel buffers, so that a connection clogs soon and for good."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)


def sockets(
    host: str = "127.0.0.1", buffers: int | None = None
) -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection, as blocking sockets."""
    with listen(host, buffers) as listener:
        ours = socket.socket(listener.family)
        if buffers is not None:
            small(ours, buffers)
        ours.connect(listener.getsockname()[:2])
        theirs, _ = listener.accept()
    return ours, theirs


def pair(host: str = "127.0.0.1", buffers: int | None = None) -> tuple[SocketStream, SocketStream]:
    ours, theirs = sockets(host, buffers)
    return SocketStream(ours), SocketStream(theirs)


async def clogged_pair() -> tuple[SocketStream, SocketStream]:
    """Neither direction takes another byte until the other end has read."""
    ends = pair(buffers=16384)
    await clog(*(stream.socket for stream in ends))
    return ends


async def clog(*clogging: socket.socket) -> None:
    """Send until nothing more is accepted, for longer than acknowledgements are delayed (40 ms),
    even if this task seldom runs."""
    quiet_since, quiet_rounds = trio.current_time(), 0
    while trio.current_time() < quiet_since + 0.06 or quiet_rounds < 10:
        quiet_rounds += 1
        for sock in clogging:
            for size in (65536, 1024, 1):
                try:
                    while sock.send(b"x" * size):
                        quiet_since, quiet_rounds = trio.current_time(), 0
                except BlockingIOError:
                    pass
        await trio.sleep(0.005)


@dataclass
class Mesh:
    """A trust root, a server and a client of it, and their TLS contexts."""

    authority: Authority = field(default_factory=Authority)
    alpn: tuple[bytes, ...] = (b"http/1.1", b"h2", b"isthmus-tcp")

    def __post_init__(self) -> None:
        self.server = self.authority.issue(spiffe("server"))
        self.client = self.authority.issue(spiffe("client"))
        self.server_context = self.accepting(self.server)
        self.client_context = self.dialling(self.client)

    def accepting(self, credential: Credential, *, root: Authority | None = None) -> SSL.Context:
        return context(
            SSL.TLS_SERVER_METHOD,
            credential,
            ((root or self.authority).root.certificate,),
            self.alpn,
        )

    def dialling(
        self, credential: Credential | None, *, root: Authority | None = None
    ) -> SSL.Context:
        return context(
            SSL.TLS_CLIENT_METHOD, credential, ((root or self.authority).root.certificate,)
        )

    async def connect(
        self,
        raw: tuple[SocketStream, SocketStream] | None = None,
        *,
        offer: TLSOffer | None = None,
        verify: Verify | None = None,
        timeout: float = 20,
    ) -> tuple[TLSStream, TLSStream]:
        """(client, server) over `raw`, both with the right certificates."""
        dialled, accepted = raw or pair()
        offer = offer or TLSOffer("server.default.sa.test.local", (b"h2",))
        client, server = await both(
            partial(
                tls_client, dialled, self.client_context, offer, verify=verify, timeout=timeout
            ),
            partial(tls_server, accepted, self.server_context, verify=verify, timeout=timeout),
        )
        assert isinstance(client, TLSStream), client
        assert isinstance(server, TLSStream), server
        return client, server


async def both(*operations: Callable[[], Awaitable[T]]) -> list[T | Exception]:
    """Run both at the same time; returns each one's result or exception."""
    results: list[T | Exception] = [RuntimeError("did not run")] * len(operations)

    async def run(index: int) -> None:
        try:
            results[index] = await operations[index]()
        except Exception as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        for index in range(len(operations)):
            nursery.start_soon(run, index)
    return results


OFFER = TLSOffer("server.default.sa.test.local", (b"h2",))
DAY = timedelta(days=1)


class Refused(Exception):
    """The exception of a caller's own verification."""


def name_of(chain: Chain) -> str:
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)[0]


async def attempt(
    mesh: Mesh, *, server: SSL.Context | None = None, client: SSL.Context | None = None
) -> tuple[TLSStream | Exception, TLSStream | Exception]:
    """A handshake of which one side may fail. Then the client reads, because in TLS 1.3 it gets a
    refusal there."""
    dialled, accepted = pair()

    async def dial() -> TLSStream:
        stream = await tls_client(
            dialled, client or mesh.client_context, OFFER, verify=None, timeout=20
        )
        await stream.receive_some()
        return stream

    async def accept() -> TLSStream:
        stream = await tls_server(accepted, server or mesh.server_context, verify=None, timeout=20)
        await stream.send_all(b"welcome")
        return stream

    with trio.fail_after(30):
        results = await both(dial, accept)
    dialled.close()
    accepted.close()
    return results[0], results[1]


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return Mesh()


async def read_all(stream: SocketStream | TLSStream) -> bytes:
    received = bytearray()
    while data := await stream.receive_some():
        received += data
    return bytes(received)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """During the block this process has no free file descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    taken: list[int] = []
    try:
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def send_until_it_fails(stream: SocketStream | TLSStream) -> None:
    """Send to a peer that has closed: the first sends still succeed."""
    while True:
        await stream.send_all(b"x" * 1000)
        await wait_all_tasks_blocked()
