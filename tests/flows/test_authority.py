"""A foreign authority does not choose the service: a request goes where the application dialled,
whatever its authority is.

Whole proxies on loopback. `shop` is a service of the directory behind a meshed sidecar. The
application dials another server, which the directory does not have, as a reverse proxy does that
keeps the Host of its client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, inbound_port, mirror, outbound_port
from tests.kit.clusters import LISTEN
from tests.kit.http import Message, connect

OUTSIDE = "127.0.0.2"  # an address that the directory does not have
FAST = pytest.mark.parametrize("fast_path", [True, False], ids=["fast", "ordinary"])


@dataclass
class Scene:
    near: Address  # the outbound listener
    reached: list[str]  # the servers that have got a connection from a proxy

    async def ask(self, request: bytes) -> Message:
        peer = await connect(self.near)
        await peer.send(request)
        answer = await peer.response()
        peer.close()
        return answer


@asynccontextmanager
async def scene(folder: Path, fast_path: bool, **outbound: Any) -> AsyncIterator[Scene]:
    """The application's connections go to a server that the directory does not have."""
    fleet, reached = Fleet(folder), list[str]()

    async def shop(stream: trio.SocketStream) -> None:
        reached.append("shop")
        await mirror(stream)

    async def outside(stream: trio.SocketStream) -> None:
        reached.append("outside")
        await mirror(stream)

    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        inner, outer = await enter(application(shop)), await enter(application(outside, OUTSIDE))
        far = await enter(
            fleet.running("shop", inbound={**LISTEN, "fixed_destination": f"{HOST}:{inner}"})
        )
        endpoint = {
            "address": HOST,
            "identity": Fleet.identity("shop"),
            "ports": {"80": inbound_port(far)},
        }
        directory = {
            "services": [
                {
                    "name": "shop",
                    "addresses": ["10.96.0.1"],
                    "ports": [{"port": 80}],
                    "endpoints": [endpoint],
                }
            ]
        }
        to = {**LISTEN, "fixed_destination": f"{OUTSIDE}:{outer}", **outbound}
        near = await enter(fleet.running("web", directory, outbound=to, fast_path=fast_path))
        yield Scene(Address(HOST, outbound_port(near)), reached)


@FAST
@pytest.mark.parametrize(
    "authority", ["shop", "shop:80", "shop.default.svc.cluster.local", "SHOP.default."]
)
async def test_a_host_field_does_not_lead_to_an_internal_service(
    tmp_path: Path, authority: str, fast_path: bool
) -> None:
    async with scene(tmp_path, fast_path) as made:
        for _ in range(2):  # the second one finds a kept connection
            answer = await made.ask(f"GET /a HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
            assert answer.status == 200
            assert answer.body.startswith(f"GET /a HTTP/1.1\r\nHost: {authority}\r\n".encode())
        assert set(made.reached) == {"outside"}


@FAST
async def test_a_request_to_a_forward_proxy_goes_there_in_absolute_form(
    tmp_path: Path, fast_path: bool
) -> None:
    async with scene(tmp_path, fast_path) as made:
        for _ in range(2):
            answer = await made.ask(b"GET http://shop/a?b HTTP/1.1\r\nHost: elsewhere\r\n\r\n")
            assert answer.body.startswith(b"GET http://shop/a?b HTTP/1.1\r\n")
            assert b"\r\nHost: shop\r\n" in answer.body + b"\r\n"  # RFC 9112 §3.2.2
        assert set(made.reached) == {"outside"}


@FAST
@pytest.mark.parametrize(
    "request_",
    [b"GET /a HTTP/1.1\r\nHost: shop\r\n\r\n", b"GET http://shop/a HTTP/1.1\r\nHost: shop\r\n\r\n"],
    ids=["path", "absolute"],
)
async def test_it_does_where_the_operator_lets_it(
    tmp_path: Path, request_: bytes, fast_path: bool
) -> None:
    async with scene(tmp_path, fast_path, authority_networks=[f"{OUTSIDE}/32"]) as made:
        for _ in range(2):
            assert (await made.ask(request_)).status == 200
        assert set(made.reached) == {"shop"}


@FAST
async def test_the_operators_fixed_destination_decides_like_any_address_of_the_directory(
    tmp_path: Path, fast_path: bool
) -> None:
    async with scene(tmp_path, fast_path, fixed_destination="10.96.0.1:80") as made:
        assert (await made.ask(b"GET /a HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n")).status == 200
        assert set(made.reached) == {"shop"}
