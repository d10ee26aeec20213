"""The directory from the control plane: real proxies beside a real `isthmus control`, whose API
server is in memory."""

from __future__ import annotations

from typing import Any

import pytest

from lab.control_plane import ControlPlane
from lab.load import Load
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    WEB,
    Pair,
    counted,
    curl,
    echo_server,
    eventually,
    exchange_raw,
    prepare,
    web_server,
)

pytestmark = pytest.mark.lab

HELLO = b"hello from the shop"


class World:
    def __init__(self, pair: Pair, control: ControlPlane) -> None:
        self.pair = pair
        self.control = control

    async def connected(self, sidecar: Sidecar, value: float = 1.0) -> None:
        async def seen() -> bool:
            return await counted(sidecar, "isthmus_directory_connected") == value

        await eventually(seen, f"isthmus_directory_connected is {value}")


@pytest.fixture(scope="module")
def world(laboratory: Laboratory) -> World:
    async def build() -> World:
        pair = prepare(laboratory.lab, {WEB: "detect", ECHO: "opaque"})
        control = ControlPlane(pair.mesh, pair.cluster.pod("control"))
        settings = control.settings(first_use_timeout="1s")
        for sidecar in pair.both:
            sidecar.settings |= settings
        other = pair.cluster.pod("other")
        pair.mesh.join(other, "shop").settings |= settings
        pair.mesh.service("db", [other], {WEB: "detect"}, headless=True)
        pair.cluster.name_host("other-0.db", other.ipv4)
        for pod in (pair.shop, other):
            await web_server(pod)
            await echo_server(pod)
        await control.start()
        await pair.mesh.start()
        return World(pair, control)

    return laboratory.run(build)


@pytest.mark.parametrize("host", ["shop", "other-0.db", "other"])
async def test_calls_by_service_by_headless_name_and_by_pod_address(
    world: World, host: str
) -> None:
    found = await curl(world.pair.web, f"http://{host}:{WEB}/")
    assert found.status == 200
    opened = {
        tls: await counted(world.pair.near, "isthmus_connections_opened_total", peer="dst", tls=tls)
        for tls in ("mutual", "none")
    }
    assert opened["mutual"] > 0
    assert opened["none"] == 0


async def test_opaque_connections_find_their_service(world: World) -> None:
    assert (
        await exchange_raw(
            world.pair.web, world.pair.service.ipv4, ECHO, b"SSH-2.0-x\r\n", end=True
        )
        == b"SSH-2.0-x\r\n"
    )


async def test_a_load_does_not_notice_that_the_control_plane_is_killed_and_started_again(
    world: World,
) -> None:
    near = world.pair.near
    assert (await curl(world.pair.web, f"http://shop:{WEB}/")).status == 200
    async with Load(world.pair.web, world.pair.service.ipv4, WEB) as load:
        await load.more(50)
        await world.control.stop()
        await world.connected(near, 0.0)
        await load.more(200)
        await world.control.start()
        await world.connected(near)
        await load.more(50)
    assert load.bad == {}


async def test_without_the_control_plane_only_a_first_use_fails(world: World) -> None:
    near, web = world.pair.near, world.pair.web
    extra = world.pair.mesh.service("late", [world.pair.shop], {WEB: "detect", ECHO: "opaque"})
    world.control.publish()
    assert (await curl(web, f"http://shop:{WEB}/")).status == 200
    await world.control.stop()
    await world.connected(near, 0.0)
    found = await curl(web, f"http://late:{WEB}/")
    assert found.status == 503
    status = found.headers["proxy-status"][0]
    assert "error=destination_unavailable" in status
    assert "the directory is unavailable" in status
    assert await exchange_raw(web, extra.ipv4, ECHO, b"SSH-2.0-x\r\n", end=True) == b""
    failed: dict[str, Any] = {"direction": "outbound", "reason": "directory_unavailable"}
    assert await counted(near, "isthmus_errors_total", **failed) >= 2
    assert (await curl(web, f"http://shop:{WEB}/")).status == 200
    await world.control.start()
    await world.connected(near)
    assert (await curl(web, f"http://{extra.ipv4}:{WEB}/")).status == 200
