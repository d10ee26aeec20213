"""Which clients are admitted when there is no room for all: whole proxies in this process, on
loopback, with real sockets.

Rules: a refused peer is disconnected. A client that presented no identity keeps its connection for
seconds only, unless it sends a request. Whatever such clients do, a member of the mesh is admitted
within a second or two, at a sidecar and at a gateway, on both paths. Where there is room, a client
without an identity is served like any other."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.app import App
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, inbound_port, mirror
from tests.kit.clusters import LISTEN
from tests.kit.http import Peer, connect, until
from tests.kit.http2_peers import GET, GRPC, Gone, Peer2

REQUEST = b"GET / HTTP/1.1\r\nHost: c.default\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and SETTINGS
# seconds, on a busy machine; every wait under test would otherwise be longer than `SLOW`
PROMPTLY = 5.0
SLOW = "60s"
SILENT: dict[str, Any] = {"detect_timeout": SLOW, "max_pending": 64}
ATTACKERS = 100
BOTH_PATHS = pytest.mark.parametrize("fast", [True, False], ids=["fast path", "ordinary path"])
GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError)


class Secure(Peer):
    """A Peer over mutual TLS."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        super().__init__(stream.transport_stream.socket)
        self._socket = self.stream.socket
        self.stream = stream  # type: ignore[assignment]  # what is asked of it is what both have

    def close(self) -> None:
        self._socket.close()


@dataclass
class Stage:
    """A proxy under attack: the sidecar `shop`, or the gateway of a cluster that exports `c`."""

    fleet: Fleet
    app: App
    name: str

    def count(self, family: str, **labels: str) -> float:
        return self.app.metrics.registry.get_sample_value(f"isthmus_{family}", labels) or 0.0

    async def plain(self) -> Peer:
        return await connect(Address(HOST, inbound_port(self.app)))

    async def member(self, name: str = "west", alpn: str = "http/1.1") -> Peer:
        return Secure(await self.fleet.meet(self.app, name, self.name, alpn=alpn))

    async def comes_in(self) -> Peer:
        """A member's connection, which has been answered in time."""
        with trio.fail_after(PROMPTLY):
            peer = await self.member()
            await peer.send(REQUEST)
            assert (await peer.response()).status == (200 if self.name == "shop" else 503)
            return peer


@asynccontextmanager
async def sidecar(
    folder: Path, *, fast: bool = True, http: dict[str, Any] | None = None, **inbound: Any
) -> AsyncIterator[Stage]:
    fleet = Fleet(folder)

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # where the client was cut off
            await mirror(stream)

    async with application(serve) as port:
        rules = {**LISTEN, "fixed_destination": f"{HOST}:{port}", **inbound}
        async with whole(fleet, "shop", fast, inbound=rules, http=http or {}) as app:
            yield Stage(fleet, app, "shop")


@asynccontextmanager
async def gateway(
    folder: Path, *, fast: bool = True, http: dict[str, Any] | None = None, **rules: Any
) -> AsyncIterator[Stage]:
    """The gateway of a cluster that exports `c`, which has no endpoint: an admitted client gets
    503."""
    fleet = Fleet(folder)
    c = {"name": "c", "ports": [{"port": 80, "protocol": "http1"}], "endpoints": [], "export": True}
    settings = {"enabled": True, **LISTEN, **rules}
    async with whole(
        fleet,
        "gateway",
        fast,
        gateway=settings,
        http=http or {},
        directory={"cluster": "east", "services": [c]},
    ) as app:
        yield Stage(fleet, app, "gateway")


@asynccontextmanager
async def whole(
    fleet: Fleet, name: str, fast: bool, directory: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[App]:
    async with AsyncExitStack() as stack:
        if fast:
            yield await stack.enter_async_context(fleet.running(name, directory, **settings))
        else:
            file = fleet.configure(name, directory, **settings)
            file.write_text(file.read_text().replace("{", '{"fast_path": false, ', 1))
            yield await stack.enter_async_context(fleet.running_from(file))


BOTH_SIDES = pytest.mark.parametrize("side", [sidecar, gateway])
Side = Callable[..., Any]


async def end_of(peer: Peer) -> bytes:
    """All bytes until the other side ends the connection."""
    with trio.fail_after(PROMPTLY):
        try:
            return await peer.rest()
        except GONE:
            return b""


async def read_to_the_end(client: Peer2) -> None:
    """Read, and send what HTTP/2 sends by itself, until the other side ends the connection."""
    try:
        while True:
            await client.read()
            await client.flush()
    except (Gone, *GONE):
        return


# After a refusal...


@BOTH_PATHS
@pytest.mark.parametrize(
    "side", ["sidecar", "gateway", "gateway, not on the list", "sidecar, not on the list"]
)
async def test_a_refused_peer_over_http_1_is_disconnected(
    tmp_path: Path, side: str, fast: bool
) -> None:
    listed = Fleet.identity("king")
    rules: dict[str, Any] = {"sidecar": {"require_identity": True}, "gateway": {}}.get(
        side, {"allow": [listed]}
    )
    if side.startswith("sidecar, not"):
        rules = {}
    make = gateway if side.startswith("gateway") else sidecar
    async with make(tmp_path, fast=fast, **rules) as stage:
        if side.startswith("sidecar, not"):
            inbound = stage.app.config.inbound
            assert inbound.fixed_destination is not None
            inbound.allow[inbound.fixed_destination.port] = ()
        peer = await (stage.member() if "not" in side else stage.plain())
        await peer.send(REQUEST)
        answer = await end_of(peer)
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert b"\r\nConnection: close\r\n" in answer
        peer.close()


@BOTH_PATHS
@BOTH_SIDES
@pytest.mark.parametrize("head", [GET, GRPC], ids=["http", "grpc"])
async def test_a_refused_peer_over_http_2_is_disconnected(
    tmp_path: Path, side: Side, fast: bool, head: Any
) -> None:
    rules = {"require_identity": True} if side is sidecar else {}
    async with side(tmp_path, fast=fast, **rules) as stage:
        client = Peer2(await stage.plain(), client=True)
        await client.start()
        first = await client.request(head, end=True)
        with trio.fail_after(PROMPTLY):
            answer = await client.message(first)
            assert answer.get(b"grpc-status") == b"7" if head is GRPC else answer.status == 403
            await read_to_the_end(client)
        assert client.goaway is not None
        assert client.goaway.last_stream_id == first
        client.peer.close()


async def test_a_request_for_an_unexported_service_does_not_disconnect_a_member(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as stage:
        peer = await stage.member()
        for _ in range(2):
            await peer.send(b"GET / HTTP/1.1\r\nHost: missing.default\r\n\r\n")
            answer = await peer.response()
            assert answer.status == 404
        peer.close()


# Idle clients...


@BOTH_PATHS
@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_an_idle_connection_without_an_identity_is_kept_for_seconds_and_a_member_s_for_longer(
    tmp_path: Path, version: str, fast: bool
) -> None:
    async with sidecar(
        tmp_path, fast=fast, http={"plain_idle_timeout": "1s", "idle_timeout": SLOW}
    ) as stage:
        member = await stage.comes_in()
        plain = await stage.plain()
        began = trio.current_time()
        if version == "1.1":
            for _ in range(3):
                await plain.send(REQUEST)
                assert (await plain.response()).status == 200
            await end_of(plain)
        else:
            await plain.send(PREFACE)  # and no response
            assert b"goodbye" in await end_of(plain)
        assert trio.current_time() - began >= 1.0
        plain.close()
        await member.send(REQUEST)
        with trio.fail_after(PROMPTLY):
            assert (await member.response()).status == 200
        member.close()


# Floods...


@asynccontextmanager
async def flood(
    attack: Callable[[trio.SocketStream], Awaitable[None]], port: int, number: int
) -> AsyncIterator[None]:
    """That many clients, each of which connects again when it is disconnected."""

    async def forever() -> None:
        while True:
            try:
                async with await trio.open_tcp_stream(HOST, port) as stream:
                    await attack(stream)
                    while await stream.receive_some():
                        pass
            except GONE:
                pass
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for _ in range(number):
            nursery.start_soon(forever)
        await trio.sleep(0.3)  # all slots are taken by now, most of them several times
        yield
        nursery.cancel_scope.cancel()


async def silent(_: trio.SocketStream) -> None:
    """Sends nothing."""


async def hello(stream: trio.SocketStream) -> None:
    """The start of a TLS handshake, which does not show yet for whom it is."""
    await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40))


def stalled(name: str) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """A ClientHello for this workload, and nothing after it."""
    outgoing, context = ssl.MemoryBIO(), ssl.create_default_context()
    try:
        context.wrap_bio(
            ssl.MemoryBIO(), outgoing, server_hostname=SpiffeId.parse(Fleet.identity(name)).sni
        ).do_handshake()
    except ssl.SSLWantReadError:
        greeting = outgoing.read()

    async def attack(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting)

    return attack


async def request(stream: trio.SocketStream) -> None:
    await stream.send_all(REQUEST)


async def part(stream: trio.SocketStream) -> None:
    """A head that does not end."""
    await stream.send_all(REQUEST[:-2])


async def preface(stream: trio.SocketStream) -> None:
    """HTTP/2 without a request."""
    await stream.send_all(PREFACE)


async def upload(stream: trio.SocketStream) -> None:
    """A body that does not end."""
    await stream.send_all(b"POST / HTTP/1.1\r\nHost: c.default\r\nContent-Length: 1000000\r\n\r\nx")


ATTACKS = [silent, hello, stalled, request, part, preface, upload]


@BOTH_PATHS
@BOTH_SIDES
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_a_member_comes_in_whatever_others_do(
    tmp_path: Path, side: Side, fast: bool, attack: Any
) -> None:
    rules = {"max_connections": 20, "member_reserve": 0.25, **SILENT}
    async with side(
        tmp_path, fast=fast, http={"head_timeout": SLOW, "plain_idle_timeout": SLOW}, **rules
    ) as stage:
        if attack is stalled:
            attack = stalled(stage.name)
        async with AsyncExitStack() as stack, flood(attack, inbound_port(stage.app), ATTACKERS):
            for _ in range(10):
                peer = await stage.comes_in()
                stack.callback(peer.close)
            slots = (stage.app.inbound).slots
            assert slots.count("member") == 10, "and all of them are there"
            assert slots.open <= 20 + 3 * 64


async def test_members_that_connect_during_a_flood_stay_connected(tmp_path: Path) -> None:
    async with sidecar(tmp_path, max_connections=20, member_reserve=0.25, **SILENT) as stage:
        peers = [await stage.comes_in() for _ in range(5)]
        async with flood(request, inbound_port(stage.app), ATTACKERS):
            for _ in range(5):
                for peer in peers:
                    await peer.send(REQUEST)
                    with trio.fail_after(PROMPTLY):
                        assert (await peer.response()).status == 200
        assert stage.app.inbound.slots.count("member") == 5
        for peer in peers:
            peer.close()


@BOTH_PATHS
async def test_clients_without_an_identity_are_served_while_there_is_room_and_take_turns_then(
    tmp_path: Path, fast: bool
) -> None:
    async with sidecar(tmp_path, fast=fast, max_connections=10, member_reserve=0.2) as stage:
        peers = [await stage.plain() for _ in range(8)]
        for peer in peers:
            await peer.send(REQUEST)
            assert (await peer.response()).status == 200
        assert stage.count("connections_evicted_total", listener="inbound", reason="idle") == 0
        for peer in peers[1:]:  # all but the first have been used since
            await peer.send(REQUEST)
            assert (await peer.response()).status == 200
        late = await stage.plain()
        await late.send(REQUEST)
        assert (await late.response()).status == 200
        assert await end_of(peers[0]) == b"", "it had waited longest"
        assert stage.count("connections_evicted_total", listener="inbound", reason="idle") == 1
        for peer in peers[1:]:
            await peer.send(REQUEST)
            assert (await peer.response()).status == 200
        for peer in (*peers, late):
            peer.close()


async def test_a_request_of_a_client_without_an_identity_is_not_ended_for_another_client(
    tmp_path: Path,
) -> None:
    async with sidecar(tmp_path, max_connections=10, member_reserve=0.2) as stage:
        peers = [await stage.plain() for _ in range(8)]
        for peer in peers:
            await peer.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nx")
        await until(lambda: stage.app.inbound.slots.count("plain") == 8)
        late = await stage.plain()
        await late.send(REQUEST)
        assert await end_of(late) == b""
        assert stage.count("connections_refused_total", listener="inbound", reason="reserved") == 1
        assert stage.count("errors_total", direction="inbound", reason="listener_full") == 1
        for peer in peers:
            await peer.send(b"x")
            assert (await peer.response()).status == 200
        for peer in (*peers, late):
            peer.close()


async def test_closed_connections_are_logged_with_the_reason_once_a_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "isthmus")
    async with (
        sidecar(tmp_path, max_connections=20, **SILENT) as stage,
        flood(silent, inbound_port(stage.app), ATTACKERS),
    ):
        await until(
            lambda: (
                stage.count("connections_evicted_total", listener="inbound", reason="pending") > 20
            )
        )
    lines = [record.getMessage() for record in caplog.records if "make room" in record.getMessage()]
    assert 1 <= len(lines) <= 5
    assert lines[0].startswith(
        f"inbound: a connection from {HOST} was closed to make room for others: "
    )
    ends = [
        line
        for record in caplog.records
        if (line := getattr(record, "line", None)) is not None and line.reason == "evicted"
    ]
    assert ends, "and its own line has the reason"
    assert stage.count("errors_total", direction="inbound", reason="connection_lost") == 0
