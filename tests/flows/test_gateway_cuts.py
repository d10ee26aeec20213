"""The connection between a sidecar and the gateway of another cluster breaks, and servers behind a
gateway respond before they have read the request.

Rules: a response that has started ends for the client as broken, by the same signs as without
proxies: the connection ends within the response. One that has not started is 502. What was not
delivered, or may be repeated, is delivered on another connection. Early responses pass through a
gateway as through one proxy, and do not affect other clients. (A gateway that stops responding is
in test_remote_gateways.py.)"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.clusters import Clusters, clusters
from tests.kit.http import BROKEN, Peer, until
from tests.kit.links import Link

BOTH_PATHS = pytest.mark.parametrize("fast", [False, True], ids=["ordinary", "fast"])
MEGABYTE = 1 << 20
FULL = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig"


class App:
    """An HTTP/1.1 application that does what the path says."""

    def __init__(self) -> None:
        self.received: list[bytes] = []  # methods and paths
        self.release = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        peer = Peer(stream.socket)
        with contextlib.suppress(
            AssertionError, trio.BrokenResourceError
        ):  # its client has ended the connection
            while True:
                head = await peer.head()
                method, path = head.split(b" ")[:2]
                self.received.append(method + b" " + path)
                length = int(
                    head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or b"0"
                )
                if path == b"/upload":
                    await peer.send(FULL)
                await peer.exactly(length)
                if path == b"/half":
                    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
                    await self.release.wait()
                elif path == b"/wait":
                    await self.release.wait()
                if path != b"/upload":
                    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@dataclass
class World:
    """Two clusters, the application of the far one, and the link between them."""

    clusters: Clusters
    app: App
    link: Link
    clients: list[Peer] = field(default_factory=list)

    async def client(self) -> Peer:
        """A new client, closed at the end at the latest."""
        self.clients.append(await self.clusters.client())
        return self.clients[-1]

    async def works(self) -> bool:
        client = await self.client()
        return (await client.ask(request("POST", "/ok", 5) + b"hello", "POST")).status == 200


@asynccontextmanager
async def linked(folder: Path, *, fast: bool, **how: Any) -> AsyncIterator[World]:
    app = App()
    async with (
        Link.opened() as link,
        clusters(folder, app.serve, link=link, everywhere={"fast_path": fast}, **how) as all_,
    ):
        world = World(all_, app, link)
        yield world
        world.app.release.set()
        for client in world.clients:
            client.close()


def request(method: str, path: str, length: int | None = None) -> bytes:
    size = "" if length is None else f"Content-Length: {length}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: c.east\r\n{size}\r\n".encode()


@BOTH_PATHS
async def test_a_link_that_breaks_within_a_response_breaks_the_clients_response(
    tmp_path: Path, fast: bool
) -> None:
    async with linked(tmp_path, fast=fast) as world:
        assert await world.works()
        client = await world.client()
        await client.send(request("GET", "/half"))
        assert (await client.head()).startswith(b"HTTP/1.1 200 ")
        assert await client.exactly(5) == b"hello"
        world.link.reset()
        with trio.fail_after(20):
            assert await client.ended(), (
                "no more bytes may follow: they would be taken for the rest"
            )
        assert world.app.received.count(b"GET /half") == 1
        assert await world.works()


@BOTH_PATHS
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_link_that_breaks_before_the_response_is_a_502(
    tmp_path: Path, fast: bool, method: str
) -> None:
    """The request may have been processed. The connection was new, or only this request was on it:
    that does not forbid a retry, but a POST is not retried in any case."""
    async with linked(tmp_path, fast=fast) as world:
        assert await world.works()
        client = await world.client()
        await client.send(request(method, "/wait", 0))
        await until(lambda: f"{method} /wait".encode() in world.app.received)
        world.link.reset()
        if method == "GET":  # it is retried, once
            await until(lambda: world.app.received.count(b"GET /wait") == 2)
            world.app.release.set()
        with trio.fail_after(20):
            answer = await client.response(method)
        assert (answer.status, world.app.received.count(f"{method} /wait".encode())) == (
            (200, 2) if method == "GET" else (502, 1)
        )
        assert await world.works()


@BOTH_PATHS
async def test_a_link_that_breaks_within_an_upload_is_a_502_and_the_server_gets_no_whole_request(
    tmp_path: Path, fast: bool
) -> None:
    async with linked(tmp_path, fast=fast) as world:
        assert await world.works()
        client = await world.client()
        await client.send(request("POST", "/ok", MEGABYTE) + bytes(MEGABYTE // 2))
        await until(lambda: world.app.received.count(b"POST /ok") == 2)
        world.link.reset()
        with trio.fail_after(20):
            answer = await client.response("POST")
        assert (answer.status, answer.get(b"connection")) == (502, b"close")
        assert world.app.received.count(b"POST /ok") == 2, "half of it cannot be sent again"
        assert await world.works()


@BOTH_PATHS
@pytest.mark.parametrize(("left", "connection"), [(60_000, None), (3 * MEGABYTE, b"close")])
async def test_an_early_response_announces_at_once_whether_the_connection_stays(
    tmp_path: Path, fast: bool, left: int, connection: bytes | None
) -> None:
    async with linked(tmp_path, fast=fast) as world:
        client = await world.client()
        with trio.fail_after(40):
            await client.send(request("POST", "/upload", left))
            answer = await client.response("POST")
            assert (answer.status, answer.body, answer.get(b"connection")) == (
                413,
                b"big",
                connection,
            )
            if connection is None:
                await client.send(bytes(left) + request("GET", "/ok"))
                assert (await client.response()).status == 200
            else:
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.send(bytes(left))
                assert await client.ended()


@BOTH_PATHS
async def test_uploads_refused_early_behind_a_gateway_fail_no_request_of_another_client(
    tmp_path: Path, fast: bool
) -> None:
    statuses: list[int] = []
    async with linked(tmp_path, fast=fast) as world:

        async def uploads() -> None:
            for size in (100_000, 200_000, 400_000, MEGABYTE) * 3:
                client = await world.client()
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.send(request("POST", "/upload", size) + bytes(size))
                answer = await client.response("POST")
                assert (answer.status, answer.body) == (413, b"big")

        async def posts() -> None:
            client = await world.client()
            statuses.extend(
                [
                    (await client.ask(request("POST", "/ok", 5) + b"hello", "POST")).status
                    for _ in range(30)
                ]
            )

        with trio.fail_after(60):
            async with trio.open_nursery() as both:
                both.start_soon(uploads)
                for _ in range(4):
                    both.start_soon(posts)
    assert statuses == [200] * 120


async def test_a_tunnel_through_a_link_that_breaks_is_broken_too(tmp_path: Path) -> None:
    """Bytes that are not HTTP: the client sees a reset, not an end."""
    async with linked(tmp_path, fast=True, to="192.0.2.7:5432") as world:
        client = await world.client()
        await client.send(request("GET", "/half"))
        assert (await client.until(b"hello")).startswith(b"HTTP/1.1 200 ")
        world.link.reset()
        with trio.fail_after(20), pytest.raises(BROKEN):
            await client.rest()
