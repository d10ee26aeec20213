"""WebSockets through whole proxies, with mutual TLS between them: sidecar to sidecar, and by the
gateway of another cluster.

The client is the package websockets (HTTP/1.1), or an HTTP/2 client with extended CONNECT. The
server is Hypercorn, which accepts WebSockets by either version and reports which one it got, or one
that accepts only HTTP/1.1. The directory has the protocol of the service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
import websockets.sync.client
import websockets.sync.server
import wsproto
import wsproto.events
from wsproto.connection import Connection as WebSocket
from wsproto.connection import ConnectionType

from proxy.app import App
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, inbound_port, outbound_port
from tests.kit.http import connect
from tests.kit.http2_peers import WEBSOCKET, Answer, Peer2
from tests.kit.websocket_servers import first_only, hypercorn, listening

Protocol = Literal["http1", "http2"]


@pytest.fixture(name="hypercorn")
def hypercorn_port() -> Iterator[int]:
    with hypercorn() as address:
        yield address.port


@pytest.fixture(name="first_only")
def first_only_port() -> Iterator[int]:
    """A server of HTTP/1.1, whatever the directory says."""
    with first_only() as address:
        yield address.port


@asynccontextmanager
async def pair(
    folder: Path, port: int, protocol: Protocol | None, *, by_gateway: bool = False
) -> AsyncIterator[App]:
    """The sidecar of a client of a service with an endpoint at `port`, behind its own sidecar,
    optionally with a gateway between them."""
    fleet, listen = Fleet(folder), {"listen": [f"{HOST}:0"]}
    await listening(Address(HOST, port))
    said: dict[str, Any] = {} if protocol is None else {"protocol": protocol}
    async with fleet.running(
        "server", inbound={**listen, "fixed_destination": f"{HOST}:{port}"}
    ) as server:
        endpoint = {
            "address": HOST,
            "identity": fleet.identity("server"),
            "ports": {"80": inbound_port(server)},
        }
        service = {
            "name": "chat",
            "addresses": ["10.96.0.1"],
            "ports": [{"port": 80, **said}],
            "endpoints": [endpoint],
        }
        outbound = {**listen, "fixed_destination": "10.96.0.1:80"}
        if not by_gateway:
            async with fleet.running(
                "client", {"services": [service]}, outbound=outbound
            ) as client:
                yield client
            return
        east = {"cluster": "east", "services": [{**service, "export": True}]}
        async with fleet.running("gateway", east, gateway={**listen, "enabled": True}) as gateway:
            way = {
                "address": HOST,
                "port": inbound_port(gateway),
                "identity": fleet.identity("gateway"),
            }
            east = {
                "name": "east",
                "gateways": [way],
                "services": [{"name": "chat", "ports": [{"port": 80, **said}]}],
            }
            mine = {
                "name": "chat",
                "addresses": ["10.96.0.1"],
                "ports": [{"port": 80}],
                "split": [{**SPLIT}],
            }
            west = {"cluster": "west", "services": [mine], "clusters": [east]}
            async with fleet.running(
                "client", west, outbound=outbound, clusters={"probe_interval": "100ms"}
            ) as client:
                yield client


SPLIT = {"service": "chat", "cluster": "east", "weight": 1}


def _talk1(address: Address) -> str | None:
    """A few messages. Returns the version that the server got."""
    with websockets.sync.client.connect(
        f"ws://{address}/chat", open_timeout=30, proxy=None
    ) as connection:
        for text in ("hello", "x" * 200_000):
            connection.send(text)
            assert connection.recv(timeout=30) == text
        assert connection.response is not None
        return connection.response.headers.get("x-version")


async def _talk2(address: Address) -> str | None:
    peer = await connect(address)
    client = Peer2(peer, client=True)
    await client.start()
    number = await client.request([*WEBSOCKET, (b"sec-websocket-version", b"13")], end=False)
    while not client.messages.get(number, Answer()).headers and number not in client.ended:
        await client.read()
    answer = client.messages[number]
    assert answer.status == 200, answer
    frames, received = WebSocket(ConnectionType.CLIENT), ""
    await client.send(number, frames.send(wsproto.events.TextMessage("hello")))
    while received != "hello":
        frames.receive_data(answer.body)
        answer.body = b""
        received += "".join(
            event.data for event in frames.events() if isinstance(event, wsproto.events.TextMessage)
        )
        if received != "hello":
            client.credit(await client.read())
    peer.close()
    version = answer.get(b"x-version")
    return version.decode() if version is not None else None


async def _talk(app: App, version: int) -> str | None:
    address = Address(HOST, outbound_port(app))
    return await trio.to_thread.run_sync(_talk1, address) if version == 1 else await _talk2(address)


@pytest.mark.parametrize("by_gateway", [False, True], ids=["sidecars", "gateway"])
@pytest.mark.parametrize("protocol", ["http1", "http2"])
@pytest.mark.parametrize("version", [1, 2])
async def test_between_both_versions(
    version: int, protocol: Protocol, by_gateway: bool, hypercorn: int, tmp_path: Path
) -> None:
    async with pair(tmp_path, hypercorn, protocol, by_gateway=by_gateway) as app:
        assert await _talk(app, version) == {"http1": "1.1", "http2": "2"}[protocol]


@pytest.mark.parametrize("version", [1, 2])
async def test_a_service_without_a_protocol_in_the_directory_gets_the_client_s_version(
    version: int, hypercorn: int, tmp_path: Path
) -> None:
    async with pair(tmp_path, hypercorn, None) as app:
        assert await _talk(app, version) == ("1.1" if version == 1 else "2")


@pytest.mark.parametrize("version", [1, 2])
async def test_a_server_that_supports_it_only_in_http1_gets_it_so_behind_two_proxies(
    version: int, first_only: int, tmp_path: Path
) -> None:
    """The sidecar of the server gets it by HTTP/2, and finds out that the application does not
    support that."""
    async with pair(tmp_path, first_only, "http2") as app:
        assert await _talk(app, version) is None


async def test_an_offer_of_tls_to_a_service_of_http2_is_not_a_fault_of_its_endpoint(
    hypercorn: int, tmp_path: Path
) -> None:
    """Apache HttpClient 5.4 sends it with every GET."""
    request = (
        b"GET / HTTP/1.1\r\nHost: chat\r\nConnection: keep-alive, Upgrade\r\nUpgrade:"
        b" TLS/1.2\r\n\r\n"
    )
    async with pair(tmp_path, hypercorn, "http2") as app:
        client = await connect(Address(HOST, outbound_port(app)))
        for _ in range(20):
            answer = await client.ask(request)
            assert (answer.status, answer.body) == (200, b"2  ")
        assert not app.metrics.registry.get_sample_value(
            "isthmus_breaker_changes_total", {"state": "open"}
        )
        assert not any(b"isthmus_errors_total{" in line for line in app.render().splitlines())
        client.close()
