"""A client that leaves is reported to the server at once, in every phase of an exchange, and a
half-closed client gets its response.

Rules: whole proxies on loopback: a server's sidecar by itself, a pair with mutual TLS between them,
and two clusters with a gateway; on the fast path and on the ordinary one. Clients leave in three
ways: by RST, by close(2), and by shutdown(2), which looks the same as close(2) until something is
sent to them. `AT_ONCE` is far below all timeouts, and above what a busy machine needs.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import h2.errors
import pytest
import trio

from proxy.app import App
from proxy.net.address import Address
from proxy.net.disconnects import Disconnects
from tests.kit.apps import HOST, Fleet, application, way_in, way_out
from tests.kit.clusters import clusters
from tests.kit.http import Peer, connect, until
from tests.kit.http2_peers import GET as GET2
from tests.kit.http2_peers import Peer2

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
class Heard:
    """A connection that the application got: what came on it, and how it ended."""

    stream: trio.SocketStream
    data: bytes = b""
    ended: str = ""
    go_on: trio.Event = field(default_factory=trio.Event)


@dataclass
class Application:
    """A server that says `first` to each request, and `then` when it is told to; it notices the end
    of a connection while it is quiet. `ends`: it closes its connection then, as many servers do."""

    first: bytes
    then: bytes = b""
    ends: bool = False
    connections: list[Heard] = field(default_factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        heard = Heard(stream)
        self.connections.append(heard)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer, heard)
            try:
                while data := await stream.receive_some():
                    heard.data += data
                heard.ended = "end"
            except trio.BrokenResourceError:
                heard.ended = "reset"
            if self.ends:
                nursery.cancel_scope.cancel()

    async def _answer(self, heard: Heard) -> None:
        with suppress(trio.BrokenResourceError):
            await until(lambda: b"\r\n\r\n" in heard.data or bool(heard.ended), EVER)
            if self.first:
                await heard.stream.send_all(self.first)
            await heard.go_on.wait()
            await heard.stream.send_all(self.then)

    async def asked(self, what: bytes = b"\r\n\r\n") -> Heard:
        await until(lambda: bool(self.connections) and what in self.connections[-1].data, EVER)
        return self.connections[-1]

    async def told(self, heard: Heard) -> None:
        """The end of the client is known."""
        await until(lambda: bool(heard.ended), AT_ONCE)


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
    """How a client connects, and the proxies on its way."""
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
            yield Address(HOST, way_out(all_.west)), [all_.west, all_.gateway, all_.server]
        return
    fleet, listen = Fleet(folder), {"listen": [f"{HOST}:0"]}
    async with application(serve.serve) as port:
        inbound = {**listen, "fixed_destination": f"{HOST}:{port}"}
        async with fleet.running("server", inbound=inbound, fast_path=fast) as server:
            if shape == "server":
                yield Address(HOST, way_in(server)), [server]
                return
            endpoint = {"address": HOST, "identity": fleet.identity("server")}
            ports = [{"port": way_in(server), "protocol": "detect"}]
            services = [
                {"name": "c", "addresses": ["10.96.0.1"], "ports": ports, "endpoints": [endpoint]}
            ]
            outbound = {**listen, "fixed_destination": f"10.96.0.1:{way_in(server)}"}
            async with fleet.running(
                "client", {"services": services}, outbound=outbound, fast_path=fast
            ) as client:
                yield Address(HOST, way_out(client)), [client, server]


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
async def test_the_server_hears_of_it_while_it_is_quiet(
    tmp_path: Path, shape: Shape, way: Way, phase: str, *, fast: bool, later: bool
) -> None:
    serve = Application(PHASES[phase])
    async with proxied(shape, tmp_path, serve, fast=fast) as (dial, apps):
        client = await dial()
        await client.send(request(shape))
        heard = await serve.asked()
        if PHASES[phase]:
            await client.until(b"hello")
        if later:
            await trio.sleep(LATER)
        await leave(client, way)
        await serve.told(heard)
        assert len(serve.connections) == 1, "it was asked once"
        if way == "reset":
            await until(lambda: counted(apps, "client_gone") >= 1)


@pytest.mark.parametrize(
    ("shape", "fast"),
    [("server", True), ("server", False), ("pair", True), ("pair", False), ("gateway", True)],
)
async def test_a_half_closed_client_gets_its_response_however_late(
    tmp_path: Path, shape: Shape, *, fast: bool
) -> None:
    """The server has heard of its end, and has gone on. Its connection is not used again."""
    serve = Application(b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    async with proxied(shape, tmp_path, serve, fast=fast) as (dial, apps):
        client = await dial()
        await client.send(request(shape))
        await leave(client, "shutdown")
        heard = await serve.asked()
        await serve.told(heard)
        await trio.sleep(2 * LATER)
        heard.go_on.set()
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
async def test_what_is_written_to_a_client_that_has_closed_ends_the_exchange(
    tmp_path: Path, way: Way, *, fast: bool
) -> None:
    """A server that takes no notice of the end, until it writes."""
    piece = b"5\r\nhello\r\n"
    serve = Application(PHASES["next chunk"], piece * 3)
    async with proxied("pair", tmp_path, serve, fast=fast) as (dial, apps):
        client = await dial()
        await client.send(request("pair"))
        heard = await serve.asked()
        await client.until(b"hello")
        await leave(client, way)
        await serve.told(heard)
        heard.go_on.set()
        for app in apps:
            await until(lambda app=app: app.outbound.open + app.inbound.open == 0, EVER)  # type: ignore[misc]
        assert counted(apps, "client_gone") >= 1


@pytest.mark.parametrize("fast", BOTH_PATHS)
@pytest.mark.parametrize("phase", PHASES)
async def test_a_server_that_ends_its_connection_then_is_not_asked_again_and_not_blamed(
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
        heard = await serve.asked(b"beginning")
        await leave(client, "reset")
        await serve.told(heard)
        await until(lambda: counted(apps, "client_gone") >= 1)


@pytest.mark.parametrize("fast", BOTH_PATHS)
async def test_a_client_that_half_closes_behind_its_upload(tmp_path: Path, *, fast: bool) -> None:
    serve = Application(b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    async with proxied("pair", tmp_path, serve, fast=fast) as (dial, _):
        client = await dial()
        await client.send(request("pair", b"POST", b"Content-Length: 200000", body=bytes(100_000)))
        await serve.asked()
        await client.send(bytes(99_996) + b"last")
        await leave(client, "shutdown")
        heard = await serve.asked(b"last")
        await serve.told(heard)
        heard.go_on.set()
        assert (await client.response()).body == b"ok"


@pytest.mark.parametrize("fast", BOTH_PATHS)
async def test_a_client_that_half_closes_behind_several_requests(
    tmp_path: Path, *, fast: bool
) -> None:
    """The first is answered on a connection that stays open: there is more to come."""
    serve = Application(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    async with proxied("server", tmp_path, serve, fast=fast) as (dial, _):
        client = await dial()
        await client.send(request("server") * 2)
        await leave(client, "shutdown")
        assert (await client.response()).body == b"ok"
        heard = serve.connections[0]
        await until(lambda: heard.data.count(b"\r\n\r\n") == 2 or len(serve.connections) == 2)
        if len(serve.connections) == 1:
            await heard.stream.send_all(serve.first)
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
            ports = [{"port": way_in(server), "protocol": "http1"}]
            services = [
                {"name": "c", "addresses": ["10.96.0.1"], "ports": ports, "endpoints": [endpoint]}
            ]
            outbound = {**listen, "fixed_destination": f"10.96.0.1:{way_in(server)}"}
            async with fleet.running(
                "client", {"services": services}, outbound=outbound, fast_path=fast
            ) as app:
                peer = await connect(Address(HOST, way_out(app)))
                client = Peer2(peer, client=True)
                await client.start()
                number = await client.request(GET2)
                heard = await serve.asked()
                await client.reset(number, h2.errors.ErrorCodes.CANCEL)
                await serve.told(heard)
                await until(lambda: counted([server], "client_gone") == 1)
                peer.close()


async def test_whoever_is_forgotten_is_not_told(tmp_path: Path) -> None:
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
        )  # not the one that was given
        ends["open"][1].send(b"data wakes nobody")
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
