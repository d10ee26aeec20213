"""Unusual starts of connections, at all three listeners: an inbound side, a gateway, an outbound
side.

Rules: a ClientHello and a request may arrive in pieces of any size. A connection that sends
nothing, half of something, or something and closes, by FIN or by RST, ends. It does not affect any
other connection, and is not an internal error."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from proxy.app import App
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, inbound_port, mirror, outbound_port
from tests.kit.clusters import LISTEN
from tests.kit.http import connect, until
from tests.wire.hellos import python_hello

REQUEST = b"GET / HTTP/1.1\r\nHost: c.default\r\n\r\n"
SOON = "300ms"


class Bytewise(trio.abc.HalfCloseableStream):
    """A connection that sends each byte as a packet of its own."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        for at in range(len(data)):
            await self._stream.send_all(data[at : at + 1])

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def server(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):  # a client's reset is passed on to it
        await mirror(stream)


@asynccontextmanager
async def listener(
    folder: Path, kind: str, patience: str = SOON
) -> AsyncIterator[tuple[Fleet, App, int]]:
    """A proxy with one listener of this kind, in front of an application that echoes requests, and
    the listener's port. It waits for `patience` for an incomplete start."""
    fleet = Fleet(folder)
    async with application(server) as port:
        to = {**LISTEN, "fixed_destination": f"{HOST}:{port}", "detect_timeout": patience}
        settings: dict[str, Any] = {
            "tcp": {"handshake_timeout": patience},
            "http": {"head_timeout": patience, "plain_idle_timeout": "1s"},
        }
        directory = None
        if kind == "gateway":
            settings["gateway"] = {**LISTEN, "enabled": True, "detect_timeout": patience}
            ports = [{"port": 80, "protocol": "http1"}]
            endpoint = {"address": HOST, "ports": {"80": port}}
            directory = {
                "services": [{"name": "c", "ports": ports, "endpoints": [endpoint], "export": True}]
            }
        else:
            settings[kind] = to
        async with fleet.running("shop", directory, **settings) as proxy:
            yield fleet, proxy, outbound_port(proxy) if kind == "outbound" else inbound_port(proxy)


async def member_is_served(fleet: Fleet, proxy: App, kind: str) -> bool:
    """By mutual TLS, or by the application's own connection."""
    if kind == "outbound":
        client = await connect(Address(HOST, outbound_port(proxy)))
        try:
            return (await client.ask(REQUEST)).status == 200
        finally:
            client.close()
    stream = await fleet.meet(proxy, "web", "shop")
    await stream.send_all(REQUEST)
    answer = bytes(await stream.receive_some())
    await trio.aclose_forcefully(stream)
    return answer.startswith(b"HTTP/1.1 200 ")


def open_connections(proxy: App, kind: str) -> int:
    return (proxy.outbound if kind == "outbound" else proxy.inbound).open


KINDS = pytest.mark.parametrize("kind", ["inbound", "gateway", "outbound"])
OURS = python_hello("shop.default.sa.cluster.local", ["http/1.1"])
OPENINGS = {
    "nothing": b"",
    "one byte of a ClientHello": OURS[:1],
    "a half of a ClientHello": OURS[: len(OURS) // 2],
    "all but one byte of a ClientHello": OURS[:-1],
    "a whole ClientHello": OURS,
    "a ClientHello with garbage behind it": OURS + b"\xff" * 100,
    "a half of a request line": REQUEST[:8],
    "a half of a head": REQUEST[:-2],
    "half of the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "bytes of no protocol": b"\x05\x01\x00",
}


async def begin(port: int, said: bytes, end: str) -> trio.SocketStream:
    """A new connection that has sent this, and has ended like this."""
    client = await trio.open_tcp_stream(HOST, port)
    if said:
        await client.send_all(said)
    if end == "half-close":
        with suppress(trio.BrokenResourceError):  # it has been refused already
            await client.send_eof()
    elif end == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if end in ("close", "reset"):
        await client.aclose()
    return client


async def left(client: trio.SocketStream) -> bytes:
    """All bytes until the other side ends the connection in any way."""
    data = b""
    with suppress(trio.BrokenResourceError):
        while piece := await client.receive_some():
            data += piece
    return data


@KINDS
@pytest.mark.parametrize("end", ["close", "half-close", "reset", "silence"])
async def test_connections_with_a_bad_start_end_and_affect_no_other(
    tmp_path: Path, kind: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listener(tmp_path, kind) as (fleet, proxy, port):
        clients = {name: await begin(port, said, end) for name, said in OPENINGS.items()}
        assert await member_is_served(fleet, proxy, kind)
        with trio.fail_after(20):
            if end == "half-close":
                for name, client in clients.items():
                    assert not (await left(client)).startswith(b"HTTP/1.1 2"), name
            elif (
                end == "silence" and kind == "gateway"
            ):  # no client without an identity is connected to anything
                for client in clients.values():
                    await left(client)
            elif end == "silence":  # others may wait for the server to speak
                assert (await left(clients["a half of a head"])).startswith(b"HTTP/1.1 408 ")
        if end == "silence":
            for client in clients.values():
                await client.aclose()
        await until(lambda: open_connections(proxy, kind) == 0)
        for client in clients.values():
            await client.aclose()
        assert await member_is_served(fleet, proxy, kind)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@KINDS
async def test_requests_may_come_byte_by_byte(tmp_path: Path, kind: str) -> None:
    """With peers by mutual TLS, with the ClientHello too; with the application in clear text."""
    async with listener(tmp_path, kind, "20s") as (fleet, _, port):
        stream: trio.abc.HalfCloseableStream | trio.SSLStream[Bytewise] = Bytewise(
            await trio.open_tcp_stream(HOST, port)
        )
        if kind != "outbound":
            context, name = fleet.tls("web", "shop")
            stream = trio.SSLStream(
                cast("Bytewise", stream), context, server_hostname=name, https_compatible=True
            )
            await stream.do_handshake()
        for _ in range(2):
            await stream.send_all(REQUEST)
            assert bytes(await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        await trio.aclose_forcefully(stream)
