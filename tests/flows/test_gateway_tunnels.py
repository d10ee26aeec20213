"""Tunnels of gateways. The CONNECT by which opaque bytes get into another cluster has the token of
the proxy that sent it, and one that comes back to a gateway is refused. A tunnel to an application
without a sidecar carries no HTTP, because no other proxy would inspect it.

A gateway of this mesh ends each CONNECT, so only one of another vendor forwards one. Here a TLS
server that reports what it got replaces it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from loopguard.l7 import HEADER
from proxy.app import App
from proxy.net.address import Address
from tests.kit.apps import HOST, Application, Fleet, application, outbound_port
from tests.kit.clusters import LISTEN, QUICK, Clusters, clusters, west_directory
from tests.kit.http import connect

DB = "192.0.2.7:5432"


def fields(head: bytes) -> list[bytes]:
    lines = [line.partition(b": ") for line in head.split(b"\r\n")]
    return [value for name, _, value in lines if name.lower() == HEADER]


async def test_a_tunnels_connect_has_the_token_of_its_sender(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    paths = fleet.material("gateway")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(paths["certificate"], paths["key"])
    context.set_alpn_protocols(["http/1.1"])
    heads: list[bytes] = []

    async def entry(raw: trio.SocketStream) -> None:
        """A gateway that responds with the bytes that it has got after the head."""
        with suppress(trio.BrokenResourceError):  # the peer may close at any time
            await converse(trio.SSLStream(raw, context, server_side=True, https_compatible=True))

    async def converse(stream: trio.SSLStream[trio.SocketStream]) -> None:
        async with stream:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = await stream.receive_some()
                if not piece:
                    return
                head += bytes(piece)
            tunnelled = head.startswith(b"CONNECT ")
            if tunnelled:
                heads.append(head)
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\n%b\r\n" % (b"" if tunnelled else b"Content-Length: 0\r\n")
            )
            async for piece in stream:
                await stream.send_all(piece)

    async with application(entry) as port:
        outbound = {**LISTEN, "fixed_destination": DB}
        async with fleet.running(
            "west", west_directory(port), outbound=outbound, clusters=QUICK
        ) as west:
            peer = await connect(Address(HOST, outbound_port(west)))
            await peer.send(b"\x00\x01\x02")
            assert await peer.exactly(3) == b"\x00\x01\x02"
            peer.close()
            ours = west.runtime.loops.hop_tokens("outbound")
    (head,) = heads
    tunnel = head.split(b" ")[1]
    assert fields(head) == [ours.with_name(ours.token(b"CONNECT", tunnel, tunnel))]
    assert fields(head)[0].startswith(b"o")
    assert fields(head)[0].endswith(b":local/west")


async def tunnel(all_: Clusters, field: bytes) -> bytes:
    """The gateway's response to a CONNECT with these tokens."""
    name = b"c.default.svc.cluster.local:5432"
    async with await all_.fleet.meet(all_.gateway, "west", "gateway") as stream:
        await stream.send_all(
            b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nIsthmus-Hops: %b\r\n\r\n" % (name, name, field)
        )
        return bytes(await stream.receive_some())


async def greet(stream: trio.SocketStream) -> None:
    await stream.send_all(b"220 ready\r\n")
    with suppress(trio.BrokenResourceError):  # the client closes after the gateway's response
        await stream.receive_some()


@pytest.mark.parametrize("came_back", [False, True])
async def test_a_connect_that_comes_back_to_a_gateway_is_cut_with_its_way(
    tmp_path: Path, came_back: bool
) -> None:
    async with clusters(tmp_path, greet) as all_:
        name = b"c.default.svc.cluster.local:5432"
        mine = all_.gateway.runtime.loops.hop_tokens("gateway")
        ours = mine.with_name(mine.token(b"CONNECT" if came_back else b"GET", name, name))
        answer = await tunnel(
            all_, b"o%b:local/west, %b, g%b:east/other" % (b"A" * 16, ours, b"B" * 16)
        )
        assert (b'isthmus_loops_total{kind="request"} 1.0' in all_.gateway.render()) == came_back
    if not came_back:
        assert answer.startswith(b"HTTP/1.1 200 ")
        return
    assert answer.startswith(b"HTTP/1.1 508 ")
    assert (
        b"the same request has been here already: local/gateway -> east/other -> local/gateway"
        in answer
    )


async def test_a_tunnel_that_has_been_through_too_many_proxies_is_cut(tmp_path: Path) -> None:
    async with clusters(tmp_path, greet) as all_:
        assert (await tunnel(all_, b", ".join([b"g" + b"A" * 16] * 63))).startswith(
            b"HTTP/1.1 200 "
        )
        assert (await tunnel(all_, b", ".join([b"g" + b"A" * 16] * 64))).startswith(
            b"HTTP/1.1 508 "
        )


async def test_the_time_that_a_policy_gives_a_request_does_not_end_a_tunnel(tmp_path: Path) -> None:
    async def late(stream: trio.SocketStream) -> None:
        await trio.sleep(0.6)
        await greet(stream)

    name = b"c.default.svc.cluster.local:5432"
    async with clusters(tmp_path, late, policy={"timeouts": {"request": "200ms"}}) as all_:
        async with await all_.fleet.meet(all_.gateway, "west", "gateway") as stream:
            await stream.send_all(b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (name, name))
            received = b""
            while not received.endswith(b"220 ready\r\n"):
                piece = bytes(await stream.receive_some())
                assert piece, received
                received += piece
        assert received.startswith(b"HTTP/1.1 200 ")


# Tunnels to endpoints without a sidecar...

NAME = b"c.default.svc.cluster.local:80"
FORGED = b"Host: c\r\nIsthmus-Client-Id: spiffe://cluster.local/ns/default/sa/king\r\n\r\n"
GATEWAYS_OWN = pytest.mark.parametrize("own", [False, True], ids=["plain", "of the gateway's pod"])


class Echo:
    """An application that keeps what it gets, and sends it back unless it is `silent`; with a
    `greeting` first."""

    def __init__(self, greeting: bytes = b"", *, silent: bool = False) -> None:
        self.heard = bytearray()
        self.connections = 0
        self._greeting, self._silent = greeting, silent

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        with suppress(trio.BrokenResourceError):
            if self._greeting:
                await stream.send_all(self._greeting)
            async for piece in stream:
                self.heard += piece
                if not self._silent:
                    await stream.send_all(piece)


@asynccontextmanager
async def without_sidecar(
    folder: Path, serve: Application, protocol: str, *, own: bool = False
) -> AsyncIterator[tuple[App, trio.SSLStream[trio.SocketStream], bytes]]:
    """A gateway before an application without a sidecar: the gateway, a peer that has asked for a
    tunnel, and the head of the answer."""
    fleet = Fleet(folder)
    async with application(serve) as port:
        endpoint = {"address": HOST, **({"identity": fleet.identity("gateway")} if own else {})}
        service = {
            "name": "c",
            "ports": [{"port": 80, "target_port": port, "protocol": protocol}],
            "endpoints": [endpoint],
            "export": True,
        }
        entry = {**LISTEN, "enabled": True, "detect_timeout": "100ms"}
        async with fleet.running("gateway", {"services": [service]}, gateway=entry) as gate:
            stream = await fleet.meet(gate, "mallory", "gateway")
            await stream.send_all(b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (NAME, NAME))
            head = b""
            with trio.fail_after(20):
                while b"\r\n\r\n" not in head:
                    head += await stream.receive_some(1)
            yield gate, stream, head
            await trio.aclose_forcefully(stream)


def refusals(gate: App) -> float:
    labels = {"direction": "gateway", "reason": "bad_request"}
    return gate.metrics.registry.get_sample_value("isthmus_errors_total", labels) or 0.0


async def rest(stream: trio.SSLStream[trio.SocketStream]) -> bytes:
    """What comes until the end of the connection, in whatever way it ends."""
    data = b""
    with trio.fail_after(20), suppress(trio.BrokenResourceError):
        while piece := await stream.receive_some():
            data += piece
    return data


@GATEWAYS_OWN
@pytest.mark.parametrize("protocol", ["http1", "http2"])
async def test_a_port_for_http_gets_no_tunnel(tmp_path: Path, protocol: str, own: bool) -> None:
    app = Echo()
    async with without_sidecar(tmp_path, app.serve, protocol, own=own) as (gate, _, head):
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"this port of default/c accepts only HTTP" in head
        assert refusals(gate) == 1
    assert app.connections == 0


@GATEWAYS_OWN
@pytest.mark.parametrize(
    "pieces",
    [
        (b"GET / HTTP/1.1\r\n" + FORGED,),
        (b"\nGET / HTTP/1.1\r\n" + FORGED,),
        (b"GE", b"T / HTTP/1.1\r\n" + FORGED),
        (b"X" * 30, b" / HTTP/1.1\r\n" + FORGED),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",),
    ],
)
async def test_http_in_a_tunnel_does_not_reach_the_application(
    tmp_path: Path, pieces: tuple[bytes, ...], own: bool
) -> None:
    app = Echo(silent=True)
    async with without_sidecar(tmp_path, app.serve, "detect", own=own) as (gate, stream, head):
        assert head.startswith(b"HTTP/1.1 200 ")
        for number, piece in enumerate(pieces):
            if number:
                await trio.sleep(0.3)  # three times what the rest of a request line may take
            await stream.send_all(piece)
        await rest(stream)
        assert refusals(gate) == 1
    assert b"HTTP" not in app.heard
    assert b"king" not in app.heard


@pytest.mark.parametrize("first", [b"\x00\x00\x00\x08\x04\xd2\x16\x2f", b"PING\r\n", b"x" * 30])
async def test_other_bytes_in_a_tunnel_are_relayed(tmp_path: Path, first: bytes) -> None:
    app = Echo()
    async with without_sidecar(tmp_path, app.serve, "detect") as (gate, stream, head):
        assert head.startswith(b"HTTP/1.1 200 ")
        for piece in (first, b"GET / HTTP/1.1\r\n", bytes(100_000)):
            await stream.send_all(piece)
            answer = b""
            with trio.fail_after(20):
                while len(answer) < len(piece):
                    answer += await stream.receive_some()
            assert answer == piece
        assert refusals(gate) == 0


async def test_a_server_behind_a_tunnel_may_speak_first(tmp_path: Path) -> None:
    app = Echo(b"220 ready\r\n")
    async with without_sidecar(tmp_path, app.serve, "detect") as (_, stream, _):
        with trio.fail_after(20):
            assert await stream.receive_some() == b"220 ready\r\n"
            await stream.send_all(b"GET / HTTP/1.1 is what a mail may say\r\n")
            assert (await stream.receive_some()).startswith(b"GET / HTTP/1.1 is")


async def test_a_port_that_is_declared_opaque_gets_any_bytes(tmp_path: Path) -> None:
    app = Echo()
    async with without_sidecar(tmp_path, app.serve, "opaque") as (gate, stream, head):
        assert head.startswith(b"HTTP/1.1 200 ")
        await stream.send_all(b"GET / HTTP/1.1\r\n" + FORGED)
        with trio.fail_after(20):
            assert (await stream.receive_some()).startswith(b"GET / HTTP/1.1\r\n")
        assert refusals(gate) == 0
