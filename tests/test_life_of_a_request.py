"""docs/life-of-a-request.md is true: real proxies call the functions that it names, in its
order."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
import trio
import trio.testing

from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, inbound_port, mirror, outbound_port
from tests.kit.build import COMPILED
from tests.kit.calls import recorded
from tests.kit.clusters import clusters
from tests.kit.http import Peer, connect
from tests.kit.http2_peers import Peer2, answering2, speaking

PAGE = Path(__file__).parent.parent / "docs" / "life-of-a-request.md"
REQUEST = b"GET / HTTP/1.1\r\nHost: c\r\n\r\n"

pytestmark = pytest.mark.skipif(COMPILED, reason="compiled functions cannot be traced")


def steps(walk: str) -> list[str]:
    text = PAGE.read_text("utf-8")
    inner = text.split(f"<!-- walk: {walk} -->")[1].split(f"<!-- /walk: {walk} -->")[0]
    return re.findall(r"\| `([^`]+\.py:[^`]+)` \|$", inner, re.MULTILINE)


def first_missing(expected: list[str], calls: list[str]) -> str | None:
    """The first of `expected` that is not called after all before it."""
    at = 0
    for step in expected:
        try:
            at = calls.index(step, at) + 1
        except ValueError:
            return step
    return None


async def answer_streams(stream: trio.SocketStream) -> None:
    """An HTTP/2 server that answers each request."""
    await speaking(answering2())(Peer(stream.socket))


async def echo(stream: trio.SocketStream) -> None:
    async for piece in stream:
        await stream.send_all(piece)


@asynccontextmanager
async def pair(
    folder: Path, kind: Literal["http", "http2", "opaque"], *, fast: bool = True
) -> AsyncIterator[Address]:
    """The address of a client's sidecar; the server's sidecar is in front of an application."""
    fleet, listen = Fleet(folder), {"listen": [f"{HOST}:0"]}
    opaque = kind == "opaque"
    serve = {"http": mirror, "http2": answer_streams, "opaque": echo}[kind]
    async with application(serve) as port:
        inbound = {
            **listen,
            "fixed_destination": f"{HOST}:{port}",
            "opaque_ports": [port] if opaque else [],
        }
        async with fleet.running("server", inbound=inbound, fast_path=fast) as server:
            service = {
                "name": "c",
                "addresses": ["10.96.0.1"],
                "ports": [
                    {"port": inbound_port(server), "protocol": "opaque" if opaque else "detect"}
                ],
                "endpoints": [{"address": HOST, "identity": fleet.identity("server")}],
            }
            outbound = {**listen, "fixed_destination": f"10.96.0.1:{inbound_port(server)}"}
            async with fleet.running(
                "client", {"services": [service]}, outbound=outbound, fast_path=fast
            ) as client:
                yield Address(HOST, outbound_port(client))


async def test_the_ordinary_path(tmp_path: Path) -> None:
    async with pair(tmp_path, "http", fast=False) as address:
        with recorded() as calls:
            client = await connect(address)
            assert (await client.ask(REQUEST)).status == 200
        client.close()
    assert len(steps("ordinary")) > 20
    assert first_missing(steps("ordinary"), calls) is None


async def test_the_fast_path(tmp_path: Path) -> None:
    async with pair(tmp_path, "http") as address:
        client = await connect(address)
        assert (await client.ask(REQUEST)).status == 200
        with recorded() as calls:
            assert (await client.ask(REQUEST)).status == 200
            await trio.testing.wait_all_tasks_blocked()
        client.close()
    assert len(steps("fast")) > 10
    assert first_missing(steps("fast"), calls) is None


async def test_an_http2_stream(tmp_path: Path) -> None:
    async with pair(tmp_path, "http2") as address:
        client = Peer2(await connect(address), client=True)
        await client.start()
        assert (await client.ask()).status == 200
        with recorded() as calls:
            assert (await client.ask()).status == 200
            await trio.testing.wait_all_tasks_blocked()
        client.peer.close()
    assert len(steps("stream")) > 10
    assert first_missing(steps("stream"), calls) is None


async def test_through_a_gateway(tmp_path: Path) -> None:
    async with clusters(tmp_path) as both:
        with recorded() as calls:
            assert (await both.ask("c.east")).status == 200
    assert len(steps("gateway")) > 10
    assert first_missing(steps("gateway"), calls) is None


async def test_an_opaque_connection(tmp_path: Path) -> None:
    async with pair(tmp_path, "opaque") as address:
        with recorded() as calls:
            client = await connect(address)
            await client.send(b"hello")
            await client.until(b"hello")
            await client.eof()
            assert not await client.rest()
            client.close()
    assert len(steps("opaque")) > 5
    assert first_missing(steps("opaque"), calls) is None


def test_a_step_out_of_order_is_noticed() -> None:
    assert first_missing(["a", "b"], ["b", "a", "c"]) == "b"
    assert first_missing(["a", "a"], ["a"]) == "a"
    assert first_missing(["a", "b"], ["a", "c", "b"]) is None
