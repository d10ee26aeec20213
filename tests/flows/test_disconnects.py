"""A client that leaves is reported to the server at once, in every phase of an exchange, and a
half-closed client gets its response.

Rules: whole proxies on loopback: a server's sidecar by itself, a pair with mutual TLS between them,
and two clusters with a gateway; on the fast path and on the ordinary one. Clients leave in three
ways: by RST, by close(2), and by shutdown(2), which looks the same as close(2) until something is
sent to them. `AT_ONCE` is far below all timeouts, and above what a busy machine needs."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import h2.errors
import h2.events
import pytest
import trio

from proxy.app import App
from proxy.net.address import Address
from proxy.net.disconnects import Disconnects
from tests.kit.apps import HOST, Fleet, application, inbound_port, outbound_port
from tests.kit.clusters import LISTEN, clusters
from tests.kit.http import Peer, connect, origin, until
from tests.kit.http2_peers import GET as GET2
from tests.kit.http2_peers import OK, Peer2, speaking

AT_ONCE = 1.0
EVER = 30.0
LATER = 1.5  # longer than the fast path keeps an exchange that does not move

Shape = Literal["server", "pair", "gateway"]
Way = Literal["reset", "close", "shutdown"]
WAYS: tuple[Way, ...] = ("reset", "close", "shutdown")
BOTH_PATHS = [pytest.param(True, id="fast"), pytest.param(False, id="ordinary")]

PHASES = {
    "head": b"",
    "first piece": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
    "next chunk": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding:"
        b" chunked\r\n\r\n5\r\nhello\r\n"
    ),
}


@dataclass
class AppConnection:
    """A connection that the application got: its bytes, and how it ended."""

    stream: trio.SocketStream
    data: bytes = b""
    ended: str = ""
    go_on: trio.Event = field(default_factory=trio.Event)


@dataclass
class Application:
    """A server that sends `first` for each request, and `then` when the test says so. It notices
    the end of a connection while it is idle. `ends`: then it closes its connection, as many servers
    do."""

    first: bytes
    then: bytes = b""
    ends: bool = False
    connections: list[AppConnection] = field(default_factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        received = AppConnection(stream)
        self.connections.append(received)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer, received)
            try:
                while data := await stream.receive_some():
                    received.data += data
                received.ended = "end"
            except trio.BrokenResourceError:
                received.ended = "reset"
            if self.ends:
                nursery.cancel_scope.cancel()

    async def _answer(self, received: AppConnection) -> None:
        with suppress(trio.BrokenResourceError):
            await until(lambda: b"\r\n\r\n" in received.data or bool(received.ended), EVER)
            if self.first:
                await received.stream.send_all(self.first)
            await received.go_on.wait()
            await received.stream.send_all(self.then)

    async def asked(self, what: bytes = b"\r\n\r\n") -> AppConnection:
        await until(lambda: bool(self.connections) and what in self.connections[-1].data, EVER)
        return self.connections[-1]

    async def saw_end(self, received: AppConnection) -> None:
        """Wait until the client's end is known."""
        await until(lambda: bool(received.ended), AT_ONCE)


@dataclass
class Clients:
    """Connections to `address`, which are closed with the test."""

    address: Address
    open: list[Peer] = field(default_factory=list)

    async def __call__(self) -> Peer:
        self.open.append(await connect(self.address))
        return self.open[-1]


@asynccontextmanager
async def proxied(
    shape: Shape, folder: Path, serve: Application, *, fast: bool = True
) -> AsyncIterator[tuple[Clients, list[App]]]:
    """A function that connects a client, and the proxies on its path."""
    async with _proxied(shape, folder, serve, fast=fast) as (address, apps):
        clients = Clients(address)
        try:
            yield clients, apps
        finally:
            for client in clients.open:
                client.close()


@asynccontextmanager
async def _proxied(
    shape: Shape, folder: Path, serve: Application, *, fast: bool
) -> AsyncIterator[tuple[Address, list[App]]]:
    if shape == "gateway":
        async with clusters(folder, serve.serve) as all_:
            yield Address(HOST, outbound_port(all_.west)), [all_.west, all_.gateway, all_.server]
        return
    fleet, listen = Fleet(folder), {"listen": [f"{HOST}:0"]}
    async with application(serve.serve) as port:
        inbound = {**listen, "fixed_destination": f"{HOST}:{port}"}
        async with fleet.running("server", inbound=inbound, fast_path=fast) as server:
            if shape == "server":
                yield Address(HOST, inbound_port(server)), [server]
                return
            endpoint = {"address": HOST, "identity": fleet.identity("server")}
            ports = [{"port": inbound_port(server), "protocol": "detect"}]
            services = [
                {"name": "c", "addresses": ["10.96.0.1"], "ports": ports, "endpoints": [endpoint]}
            ]
            outbound = {**listen, "fixed_destination": f"10.96.0.1:{inbound_port(server)}"}
            async with fleet.running(
                "client", {"services": services}, outbound=outbound, fast_path=fast
            ) as client:
                yield Address(HOST, outbound_port(client)), [client, server]


HOSTS = {"server": b"a", "pair": b"a", "gateway": b"c.east"}


def request(shape: Shape, method: bytes = b"GET", *fields: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([method + b" / HTTP/1.1", b"Host: " + HOSTS[shape], *fields, b"", body])


async def leave(client: Peer, way: Way) -> None:
    if way == "shutdown":
        await client.stream.send_eof()
        return
    if way == "reset":
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.stream.socket.close()


def counted(apps: list[App], reason: str) -> int:
    lines = [line for app in apps for line in app.render().decode().splitlines()]
    return int(
        sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith("isthmus_errors_total") and f'reason="{reason}"' in line
        )
    )


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("shape", "fast", "later"),
    [
        ("server", True, False), ("server", False, False), ("server", True, True),
        ("pair", True, False), ("pair", False, False), ("gateway", True, False),
    ],
)  # fmt: skip
async def test_the_server_sees_the_disconnect_while_it_is_idle(
    tmp_path: Path, shape: Shape, way: Way, phase: str, *, fast: bool, later: bool
) -> None:
    serve = Application(PHASES[phase])
    async with proxied(shape, tmp_path, serve, fast=fast) as (dial, apps):
        client = await dial()
        await client.send(request(shape))
        received = await serve.asked()
        if PHASES[phase]:
            await client.until(b"hello")
        if later:
            await trio.sleep(LATER)
        await leave(client, way)
        await serve.saw_end(received)
        assert len(serve.connections) == 1, "it was sent once"
        if way == "reset":
            await until(lambda: counted(apps, "client_gone") >= 1)


@pytest.mark.parametrize(
    ("shape", "fast"),
    [("server", True), ("server", False), ("pair", True), ("pair", False), ("gateway", True)],
)
async def test_a_half_closed_client_gets_its_response_however_late(
    tmp_path: Path, shape: Shape, *, fast: bool
) -> None:
    """The server has seen its end, and has continued. Its connection is not used again."""
    serve = Application(b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    async with proxied(shape, tmp_path, serve, fast=fast) as (dial, apps):
        client = await dial()
        await client.send(request(shape))
        await leave(client, "shutdown")
        received = await serve.asked()
        await serve.saw_end(received)
        await trio.sleep(2 * LATER)
        received.go_on.set()
        answer = await client.response()
        assert (answer.status, answer.body) == (200, b"ok")
        assert await client.more() == b""
        assert counted(apps, "client_gone") == 0

        other = await dial()
        await other.send(request(shape))
        await until(lambda: len(serve.connections) == 2)
        serve.connections[1].go_on.set()
        assert (await other.response()).status == 200


@pytest.mark.parametrize("fast", BOTH_PATHS)
@pytest.mark.parametrize("way", ["close", "reset"])
async def test_a_write_to_a_client_that_has_closed_ends_the_exchange(
    tmp_path: Path, way: Way, *, fast: bool
) -> None:
    """A server that does not notice the end until it writes."""
    piece = b"5\r\nhello\r\n"
    serve = Application(PHASES["next chunk"], piece * 3)
    async with proxied("pair", tmp_path, serve, fast=fast) as (dial, apps):
        client = await dial()
        await client.send(request("pair"))
        received = await serve.asked()
        await client.until(b"hello")
        await leave(client, way)
        await serve.saw_end(received)
        received.go_on.set()
        for app in apps:
            await until(lambda app=app: app.outbound.open + app.inbound.open == 0, EVER)  # type: ignore[misc]
        assert counted(apps, "client_gone") >= 1


@pytest.mark.parametrize("fast", BOTH_PATHS)
@pytest.mark.parametrize("phase", PHASES)
async def test_a_server_that_then_ends_its_connection_is_not_retried_and_not_counted_as_failed(
    tmp_path: Path, phase: str, *, fast: bool
) -> None:
    serve = Application(PHASES[phase], ends=True)
    async with proxied("pair", tmp_path, serve, fast=fast) as (dial, apps):
        client = await dial()
        await client.send(request("pair"))
        await serve.asked()
        if PHASES[phase]:
            await client.until(b"hello")
        await leave(client, "shutdown")
        with suppress(trio.BrokenResourceError):
            while await client.more():
                pass
        for app in apps:
            await until(lambda app=app: app.outbound.open + app.inbound.open == 0, EVER)  # type: ignore[misc]
        assert len(serve.connections) == 1
        assert counted(apps, "upstream_closed") == 0
        assert counted(apps, "client_gone") == 2


@pytest.mark.parametrize("fast", BOTH_PATHS)
@pytest.mark.parametrize("shape", ["server", "pair"])
async def test_a_client_that_is_reset_within_its_upload(
    tmp_path: Path, shape: Shape, *, fast: bool
) -> None:
    serve = Application(b"")
    async with proxied(shape, tmp_path, serve, fast=fast) as (dial, apps):
        client = await dial()
        await client.send(request(shape, b"POST", b"Content-Length: 1000", body=b"beginning"))
        received = await serve.asked(b"beginning")
        await leave(client, "reset")
        await serve.saw_end(received)
        await until(lambda: counted(apps, "client_gone") >= 1)


@pytest.mark.parametrize("fast", BOTH_PATHS)
async def test_a_client_that_half_closes_after_its_upload(tmp_path: Path, *, fast: bool) -> None:
    serve = Application(b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    async with proxied("pair", tmp_path, serve, fast=fast) as (dial, _):
        client = await dial()
        await client.send(request("pair", b"POST", b"Content-Length: 200000", body=bytes(100_000)))
        await serve.asked()
        await client.send(bytes(99_996) + b"last")
        await leave(client, "shutdown")
        received = await serve.asked(b"last")
        await serve.saw_end(received)
        received.go_on.set()
        assert (await client.response()).body == b"ok"


@pytest.mark.parametrize("fast", BOTH_PATHS)
async def test_a_client_that_half_closes_after_several_requests(
    tmp_path: Path, *, fast: bool
) -> None:
    """The first is answered on a connection that stays open: there is more to come."""
    serve = Application(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    async with proxied("server", tmp_path, serve, fast=fast) as (dial, _):
        client = await dial()
        await client.send(request("server") * 2)
        await leave(client, "shutdown")
        assert (await client.response()).body == b"ok"
        received = serve.connections[0]
        await until(lambda: received.data.count(b"\r\n\r\n") == 2 or len(serve.connections) == 2)
        if len(serve.connections) == 1:
            await received.stream.send_all(serve.first)
        assert (await client.response()).body == b"ok"


@pytest.mark.parametrize("fast", BOTH_PATHS)
async def test_a_stream_that_its_client_resets_ends_at_an_http1_server(
    tmp_path: Path, *, fast: bool
) -> None:
    """HTTP/2 from the client to its sidecar, which translates."""
    serve = Application(PHASES["next chunk"])
    fleet, listen = Fleet(tmp_path), {"listen": [f"{HOST}:0"]}
    async with application(serve.serve) as port:
        inbound = {**listen, "fixed_destination": f"{HOST}:{port}"}
        async with fleet.running("server", inbound=inbound, fast_path=fast) as server:
            endpoint = {"address": HOST, "identity": fleet.identity("server")}
            ports = [{"port": inbound_port(server), "protocol": "http1"}]
            services = [
                {"name": "c", "addresses": ["10.96.0.1"], "ports": ports, "endpoints": [endpoint]}
            ]
            outbound = {**listen, "fixed_destination": f"10.96.0.1:{inbound_port(server)}"}
            async with fleet.running(
                "client", {"services": services}, outbound=outbound, fast_path=fast
            ) as app:
                peer = await connect(Address(HOST, outbound_port(app)))
                client = Peer2(peer, client=True)
                await client.start()
                number = await client.request(GET2)
                received = await serve.asked()
                await client.reset(number, h2.errors.ErrorCodes.CANCEL)
                await serve.saw_end(received)
                await until(lambda: counted([server], "client_gone") == 1)
                peer.close()


async def test_a_removed_watcher_is_not_called(tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []
    disconnects = Disconnects().open()

    def tell(name: str) -> Callable[[bool], None]:
        def note(lost: bool) -> None:
            told.append((name, lost))
            if name == "fails":
                raise RuntimeError("a bug")

        return note

    async with trio.open_nursery() as nursery:
        nursery.start_soon(disconnects.run)
        ends = {name: socket.socketpair() for name in ("fails", "closed", "forgotten", "open")}
        forgotten = tell("forgotten")
        for name, (ours, _) in ends.items():
            disconnects.watch(ours.fileno(), forgotten if name == "forgotten" else tell(name))
        disconnects.forget(
            ends["forgotten"][0].fileno(), tell("forgotten")
        )  # not the one that was passed
        ends["open"][1].send(b"data wakes no task")
        ends["fails"][1].close()
        await until(lambda: len(told) == 1)
        disconnects.forget(ends["forgotten"][0].fileno(), forgotten)
        ends["forgotten"][1].close()
        ends["closed"][1].shutdown(socket.SHUT_WR)
        await until(lambda: len(told) == 2)
        nursery.cancel_scope.cancel()
    assert [name for name, _ in told] == ["fails", "closed"]
    disconnects.watch(ends["open"][0].fileno(), tell("late"))  # it is closed: nothing happens
    for pair in ends.values():
        for end in pair:
            end.close()


@pytest.mark.parametrize("fast", BOTH_PATHS)
@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "behind the head"])
async def test_an_http1_client_that_resets_its_connection_cancels_the_stream_of_an_http2_server(
    tmp_path: Path, begun: bool, fast: bool
) -> None:
    servers: list[Peer2] = []

    async def script(peer: Peer2) -> None:
        servers.append(peer)
        await peer.next(h2.events.StreamEnded)
        if begun:
            peer.h2.send_headers(1, OK)
            peer.h2.send_data(1, b"half")
            await peer.flush()
        while True:
            await peer.read()

    async with origin(speaking(script)) as up:
        shop = {
            "name": "shop",
            "addresses": ["192.0.2.7"],
            "ports": [{"port": 80, "protocol": "http2"}],
            "endpoints": [{"address": HOST, "ports": {"80": up.address.port}}],
        }
        async with Fleet(tmp_path).running(
            "west",
            {"services": [shop]},
            outbound={**LISTEN, "fixed_destination": "192.0.2.7:80"},
            fast_path=fast,
        ) as proxy:
            client = await connect(Address(HOST, outbound_port(proxy)))
            await client.send(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
            await until(lambda: bool(servers and servers[0].ended), EVER)
            if begun:
                await client.until(b"half")
            client.reset()
            await until(lambda: servers[0].messages[1].reset is not None, AT_ONCE)
            assert servers[0].messages[1].reset == h2.errors.ErrorCodes.CANCEL
