"""Loops and tunnels: the CONNECT by which opaque bytes get into another cluster has the token of
the proxy that sent it, and one that comes back to a gateway is refused.

A gateway of ours ends each CONNECT, so only another make's passes one on. It is played here by a
TLS server that says what it was asked.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from loopguard.l7 import HEADER
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, way_out
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
        """A gateway that answers with the bytes that it has got behind the head."""
        with suppress(trio.BrokenResourceError):  # whoever connects may go at any time
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
            peer = await connect(Address(HOST, way_out(west)))
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
    """What the gateway answers to a CONNECT with these tokens."""
    name = b"c.default.svc.cluster.local:5432"
    async with await all_.fleet.meet(all_.gateway, "west", "gateway") as stream:
        await stream.send_all(
            b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nIsthmus-Hops: %b\r\n\r\n" % (name, name, field)
        )
        return bytes(await stream.receive_some())


async def greet(stream: trio.SocketStream) -> None:
    await stream.send_all(b"220 ready\r\n")
    with suppress(trio.BrokenResourceError):  # the client has seen the gateway's answer, and goes
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
            heard = b""
            while not heard.endswith(b"220 ready\r\n"):
                piece = bytes(await stream.receive_some())
                assert piece, heard
                heard += piece
        assert heard.startswith(b"HTTP/1.1 200 ")
