"""The directory from the control plane: real proxies beside a real `isthmus control`, whose API
server is in memory."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from lab.control_plane import NODE, ControlPlane
from lab.kube_api.store import KINDS
from lab.load import Load
from lab.mesh import Service
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
    async def opened(tls: str) -> float:
        return await counted(
            world.pair.near, "isthmus_connections_opened_total", peer="dst", tls=tls
        )

    before = await opened("none")
    found = await curl(world.pair.web, f"http://{host}:{WEB}/")
    assert found.status == 200
    assert await opened("mutual") > 0
    assert await opened("none") == before


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


async def test_a_pod_that_only_a_slice_knows_gets_no_clear_text(world: World) -> None:
    """Its identity is not known yet. When its pod is known, it has none, and is reached."""
    near, web, control = world.pair.near, world.pair.web, world.control
    new = world.pair.cluster.pod("new")
    await web_server(new)
    of = Service("fresh", "", "", {WEB: "detect"}, (new,), {})
    control.put_slices(of)

    async def answered(status: int) -> bool:
        return (await curl(web, f"http://{new.ipv4}:{WEB}/")).status == status

    # Until control knows the slice, the address is as any other outside of the mesh.
    await eventually(lambda: answered(503), "the slice is known")
    begun = trio.current_time()
    found = await curl(web, f"http://{new.ipv4}:{WEB}/")
    assert found.status == 503
    assert trio.current_time() - begun > 0.9, "the first use waits"
    status = found.headers["proxy-status"][0]
    assert "error=destination_unavailable" in status
    assert "does not know which identity" in status
    assert await exchange_raw(web, new.ipv4, ECHO, b"SSH-2.0-x\r\n", end=True) == b""
    failed: dict[str, Any] = {"direction": "outbound", "reason": "identity_unknown"}
    assert await counted(near, "isthmus_errors_total", **failed) >= 2
    control.put(
        KINDS["v1", "pods"],
        {
            "metadata": {"name": "new"},
            "spec": {"nodeName": NODE},
            "status": {"phase": "Running", "podIPs": [{"ip": new.ipv4}, {"ip": new.ipv6}]},
        },
    )
    await eventually(lambda: answered(200), "the pod is reached")
