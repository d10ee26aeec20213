"""Bytes that are relayed before it is certain that they are not HTTP.

What turns out to be HTTP is served as HTTP: no client can pass a field that only a proxy may set,
by waiting, by sending slowly, or by a tunnel. Other protocols work as they do without a proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.flows.late_detection import detect_late
from proxy.net.exceptions import ConnectionLost
from proxy.net.relay import relay
from proxy.wire.sniff import Protocol
from tests.kit.apps import HOST, Fleet, application, inbound_port, mirror, outbound_port
from tests.net.conftest import pair

FORGED = b"Host: a\r\nIsthmus-Client-Id: spiffe://cluster.local/ns/default/sa/king\r\n\r\n"
SOON = "100ms"


async def all_of(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    with trio.fail_after(10), suppress(trio.BrokenResourceError):
        while piece := await stream.receive_some():
            data += piece
    return data


async def head_of(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    with trio.fail_after(10):
        while b"\r\n\r\n" not in data:
            piece = await stream.receive_some()
            assert piece, data
            data += piece
        if length := data.partition(b"Content-Length: ")[2]:
            size = int(length.partition(b"\r\n")[0])
            while len(data.partition(b"\r\n\r\n")[2]) < size:
                data += await stream.receive_some()
    return data


class App:
    """An application that answers HTTP, or echoes (`echo`). It records all received bytes, by
    connection."""

    def __init__(self, *, echo: bool = False) -> None:
        self.received: list[bytearray] = []
        self.connections = 0
        self._echo = echo

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        received = bytearray()
        self.received.append(received)
        with suppress(trio.BrokenResourceError):
            async for piece in stream:
                received += piece
                if self._echo:
                    await stream.send_all(piece)
                elif b"\r\n\r\n" in received:
                    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    received = bytearray()
                    self.received.append(received)

    @property
    def all(self) -> bytes:
        return b"|".join(self.received)


@asynccontextmanager
async def inbound(tmp_path: Path, app: App, **settings: Any) -> AsyncIterator[tuple[Fleet, Any]]:
    fleet = Fleet(tmp_path)
    async with application(app.serve) as port:
        section = {
            "listen": [f"{HOST}:0"],
            "fixed_destination": f"{HOST}:{port}",
            "detect_timeout": SOON,
            **settings,
        }
        for name in ("opaque_ports", "http_ports"):
            section[name] = [port] if section.get(name) else []
        async with fleet.running("shop", inbound=section) as proxy:
            yield fleet, proxy


async def dial(proxy: Any) -> trio.SocketStream:
    return await trio.open_tcp_stream(HOST, inbound_port(proxy))


@pytest.mark.parametrize("pieces", [
    (b"GET / HTTP/1.1\r\n" + FORGED,), (b"GE", b"T / HTTP/1.1\r\n" + FORGED), (b"FO", b"O / HTTP/1.1\r\n" + FORGED),
    (b"\r\n", b"GET / HTTP/1.1\r\n" + FORGED), (b"X" * 30, b" / HTTP/1.1\r\n" + FORGED),
])  # fmt: skip
async def test_a_client_that_waits_and_then_speaks_http_is_served_as_one(
    tmp_path: Path, pieces: tuple[bytes, ...]
) -> None:
    app = App()
    async with inbound(tmp_path, app) as (_, proxy), await dial(proxy) as client:
        for piece in pieces:
            await trio.sleep(
                0.3
                # Three times the time after which a client is taken for one that waits for the server
            )
            await client.send_all(piece)
        assert (await head_of(client)).startswith(b"HTTP/1.1 200 ")
    assert b"/ HTTP/1.1\r\nHost: a\r\n" in app.all
    assert b"king" not in app.all


@pytest.mark.parametrize(
    ("pieces", "connections"),
    [((b"GET / HTTP/1.1\r\n" + FORGED,), 1), ((b"X" * 30, b" / HTTP/1.1\r\n" + FORGED), 2)],
)
@pytest.mark.parametrize("how", ["plain", "tunnel"])
async def test_the_connection_to_the_application_is_used_for_late_http_if_it_is_as_new(
    tmp_path: Path, how: str, pieces: tuple[bytes, ...], connections: int
) -> None:
    """The application of a relay opens another connection for each that it gets, so an extra one
    would double a loop's."""
    app = App()
    async with inbound(tmp_path, app) as (fleet, proxy):
        client = (
            await fleet.meet(proxy, "web", "shop", alpn="isthmus-tcp")
            if how == "tunnel"
            else await dial(proxy)
        )
        for piece in pieces:
            await trio.sleep(0.3)
            await client.send_all(piece)
        for _ in range(2):
            assert (await head_of(client)).startswith(b"HTTP/1.1 200 ")
            assert app.connections == connections
            await client.send_all(b"GET / HTTP/1.1\r\n" + FORGED)
        await client.aclose()


@pytest.mark.parametrize("pieces", [
    (b"\nGET / HTTP/1.1\r\n",), (b"GET / HTTP/1.10\r\n",), (b"\x05", b"GET / HTTP/1.1\r\n"), (b" ", b"GET / HTTP/1.1\r\n"),
    (b"FOO", b" / HTTP/1.1\r\r\n"), (b"FOO \x01", b"/ HTTP/1.1\r\n"), (b"FOO / http", b"/1.1\r\n"), (b"(GET / HTTP/1.1\r\n",),
    (b"(GET /" + b"a" * 5000, b"a" * 5000 + b" HTTP", b"/1.1 ", b" " * 100, b"\r\n"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["plain", "tunnel"])
async def test_malformed_http_is_refused_however_slowly_it_comes(
    tmp_path: Path, pieces: tuple[bytes, ...], how: str
) -> None:
    app = App()
    async with inbound(tmp_path, app) as (fleet, proxy):
        client = (
            await fleet.meet(proxy, "mallory", "shop", alpn="isthmus-tcp")
            if how == "tunnel"
            else await dial(proxy)
        )
        with suppress(trio.BrokenResourceError):
            for piece in pieces:
                await trio.sleep(0.2)
                await client.send_all(piece)
            await client.send_all(FORGED)
        answer = await all_of(client)
        assert b"HTTP/1.1 400 " in answer
        with suppress(trio.BrokenResourceError):
            await client.aclose()
    assert b"king" not in app.all
    assert b"Host" not in app.all


@pytest.mark.parametrize("trusted", [False, True])
async def test_http_in_a_tunnel_has_the_identity_of_the_tunnel_s_peer(
    tmp_path: Path, trusted: bool
) -> None:
    """A gateway that may name a caller for requests does not do so for tunnelled bytes."""
    app = App()
    gateways = [Fleet.identity("gateway")] if trusted else []
    async with inbound(tmp_path, app, trusted_gateways=gateways) as (fleet, proxy):
        client = await fleet.meet(proxy, "gateway", "shop", alpn="isthmus-tcp")
        await client.send_all(b"GET / HTTP/1.1\r\n" + FORGED)
        assert (await head_of(client)).startswith(b"HTTP/1.1 200 ")
        await client.aclose()
    assert b"king" not in app.all
    assert Fleet.identity("gateway").encode() in app.all


async def test_a_port_that_is_declared_opaque_is_relayed_as_it_is(tmp_path: Path) -> None:
    app = App()
    async with inbound(tmp_path, app, opaque_ports=True) as (fleet, proxy):
        client = await fleet.meet(proxy, "mallory", "shop", alpn="isthmus-tcp")
        await client.send_all(b"GET / HTTP/1.1\r\n" + FORGED)
        assert (await head_of(client)).startswith(b"HTTP/1.1 200 ")
        await client.aclose()
    assert b"king" in app.all


@pytest.mark.parametrize(
    "first",
    [
        b"\x05\x01\x00",
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
        b"PING\r\n",
        b"x" * 30,
        b"*1\r\n$4\r\nPING\r\n",
    ],
)
@pytest.mark.parametrize("how", ["plain", "tunnel"])
async def test_other_protocols_are_relayed_at_once(tmp_path: Path, first: bytes, how: str) -> None:
    app = App(echo=True)
    async with inbound(tmp_path, app, detect_timeout="60s") as (fleet, proxy):
        client = (
            await fleet.meet(proxy, "web", "shop", alpn="isthmus-tcp")
            if how == "tunnel"
            else await dial(proxy)
        )
        with trio.fail_after(30):
            for piece in (first, b"and more", bytes(100_000)):
                await client.send_all(piece)
                answer = b""
                while len(answer) < len(piece):
                    answer += await client.receive_some()
                assert answer == piece
        with suppress(trio.BrokenResourceError):
            await client.aclose()


@pytest.mark.parametrize("how", ["plain", "tunnel"])
async def test_a_server_that_sends_first_is_relayed_and_the_client_s_bytes_are_not_inspected(
    tmp_path: Path, how: str
) -> None:
    received = bytearray()

    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 ready\r\n")
        with suppress(trio.BrokenResourceError):
            async for piece in stream:
                received.extend(piece)
                await stream.send_all(b"250 ok\r\n")

    app = App()
    app.serve = greet  # type: ignore[method-assign]
    async with inbound(tmp_path, app) as (fleet, proxy):
        client = (
            await fleet.meet(proxy, "web", "shop", alpn="isthmus-tcp")
            if how == "tunnel"
            else await dial(proxy)
        )
        with trio.fail_after(30):
            assert await client.receive_some() == b"220 ready\r\n"
            await client.send_all(b"GET / HTTP/1.1 is what a mail may say\r\n")
            assert await client.receive_some() == b"250 ok\r\n"
        with suppress(trio.BrokenResourceError):
            await client.aclose()
    assert received.startswith(b"GET /")


async def test_a_port_for_http_only_waits_for_a_request_as_a_server_does(tmp_path: Path) -> None:
    app = App()
    async with inbound(tmp_path, app, http_ports=True) as (_, proxy), await dial(proxy) as client:
        await trio.sleep(0.5)
        await client.send_all(b"FO")
        await trio.sleep(0.5)
        await client.send_all(b"O / HTTP/1.1\r\n" + FORGED)
        assert (await head_of(client)).startswith(b"HTTP/1.1 200 ")
    assert len(app.received) == 2, "one connection to the application, and one request on it"
    assert b"king" not in app.all


@pytest.mark.parametrize("protocol", ["http1", "detect"])
async def test_the_first_request_may_come_late_on_the_way_out_too(
    tmp_path: Path, protocol: str
) -> None:
    fleet = Fleet(tmp_path)
    async with application(mirror) as port:
        ports = [{"port": 80, "target_port": port, "protocol": protocol}]
        service = {
            "name": "s",
            "namespace": "default",
            "addresses": ["10.1.2.3"],
            "ports": ports,
            "endpoints": [{"address": HOST}],
        }
        section = {
            "listen": [f"{HOST}:0"],
            "fixed_destination": "10.1.2.3:80",
            "detect_timeout": SOON,
        }
        async with fleet.running("web", {"services": [service]}, outbound=section) as proxy:
            client = await trio.open_tcp_stream(HOST, outbound_port(proxy))
            async with client:
                await trio.sleep(0.4)
                await client.send_all(b"GET /a HTTP/1.1\r\nHost: s\r\n\r\n")
                assert b"GET /a HTTP/1.1\r\n" in await head_of(client)
            assert b'isthmus_response_latency_seconds_count{direction="outbound"' in proxy.render()


# Its parts...


async def test_both_sides_may_speak_at_once_and_nothing_is_lost() -> None:
    client, accepted = pair()
    dialled, server = pair()
    await server.send_all(b"greeting")
    await client.send_all(b"\xffdata")
    with trio.fail_after(30):
        found = await detect_late(accepted, dialled, patience=60, idle=60)
        assert found.protocol is Protocol.OPAQUE
        async with trio.open_nursery() as nursery:  # what was not read by then is left to the relay
            nursery.start_soon(partial(relay, accepted, dialled, idle=60))
            assert await server.receive_some() == b"\xffdata"
            assert await client.receive_some() == b"greeting"
            nursery.cancel_scope.cancel()
    for stream in (client, accepted, dialled, server):
        stream.close()


async def test_a_lost_connection_is_reset_on_the_other_side() -> None:
    client, accepted = pair()
    dialled, server = pair()
    client.reset()
    with trio.fail_after(30), pytest.raises(ConnectionLost):
        await detect_late(accepted, dialled, patience=60, idle=60)
    with trio.fail_after(30), pytest.raises(ConnectionLost):
        await server.receive_some()
    for stream in (client, accepted, dialled, server):
        stream.close()


async def test_two_silent_sides_are_given_up(autojump_clock: trio.abc.Clock) -> None:
    client, accepted = pair()
    dialled, server = pair()
    found = await detect_late(accepted, dialled, patience=3, idle=60)
    assert found.silent
    with pytest.raises(ConnectionLost):
        await client.receive_some()
    for stream in (client, accepted, dialled, server):
        stream.close()


async def test_a_client_that_ends_its_side_is_relayed(autojump_clock: trio.abc.Clock) -> None:
    client, accepted = pair()
    dialled, server = pair()
    await client.send_all(b"FOO")
    await client.send_eof()
    found = await detect_late(accepted, dialled, patience=3, idle=60)
    assert found.protocol is Protocol.OPAQUE
    assert await server.receive_some() == b"FOO"
    assert await accepted.receive_some() == b""
    for stream in (client, accepted, dialled, server):
        stream.close()
