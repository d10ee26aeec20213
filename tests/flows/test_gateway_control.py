"""A gateway whose directory comes from the control plane: it serves what is exported there, and
nothing else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from control.channel.server import Channel
from control.contract import Hint, SpiffeId
from control.discovery.entries import EndpointEntry, PortEntry, ServiceEntry
from proxy.app import App
from tests.kit.apps import HOST, Fleet, application, inbound_port, mirror
from tests.kit.channel import CONTROL, LOOPBACK, Workshop, until
from tests.kit.clusters import LISTEN

HIDDEN, SHOWN = "hidden", "c"


def service(name: str, port: int, *, exported: bool) -> ServiceEntry:
    server = SpiffeId.parse(Fleet.identity("server"))
    endpoint = EndpointEntry(HOST, server, frozenset(), ((80, port),), "ready")
    ports = (PortEntry(80, port, Hint.HTTP1),)
    return ServiceEntry(("default", name), f"uid-{name}", (), ports, (endpoint,), exported=exported)


@dataclass
class Stage:
    """`port`: of the endpoint's sidecar."""

    fleet: Fleet
    gateway: App
    workshop: Workshop
    channel: Channel
    port: int

    async def ask(self, host: str) -> bytes:
        async with await self.fleet.meet(self.gateway, "caller", "gateway") as stream:
            await stream.send_all(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return bytes(await stream.receive_some())

    def put(self, name: str, *, exported: bool) -> None:
        entry = service(name, self.port, exported=exported)
        self.channel.changed(self.workshop.catalog.put(entry))


@asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[Stage]:
    fleet = Fleet(folder)
    workshop = Workshop(folder, root=fleet.root)
    async with (
        application(mirror) as port,
        fleet.running(
            "server",
            inbound={
                **LISTEN,
                "fixed_destination": f"{HOST}:{port}",
                "trusted_gateways": [fleet.identity("gateway")],
            },
        ) as server,
        workshop.control() as (channel, control),
    ):
        where = {"address": f"{LOOPBACK}:{control}", "identity": str(CONTROL)}
        file = fleet.configure("gateway", gateway={**LISTEN, "enabled": True})
        document = json.loads(file.read_text())
        document["directory"] = {"control": {**where, "first_use_timeout": "300ms"}}
        file.write_text(json.dumps(document))
        async with fleet.running_from(file) as gateway:
            made = Stage(fleet, gateway, workshop, channel, inbound_port(server))
            made.put(SHOWN, exported=True)
            made.put(HIDDEN, exported=False)
            await until(lambda: channel.connections == 1, "the gateway is connected")
            yield made


async def test_it_serves_exported_services_and_no_others(tmp_path: Path) -> None:
    async with stage(tmp_path) as made:
        for host in ("c.default", "c.default.svc.cluster.local"):
            answer = await made.ask(host)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert Fleet.identity("caller").encode() in answer
        answers = [await made.ask(host) for host in ("hidden.default", "missing.default", "c")]
        for answer in answers:
            assert answer.startswith(b"HTTP/1.1 404 ")
            assert b"destination_not_found" in answer


async def test_a_change_of_the_export_is_followed(tmp_path: Path) -> None:
    async with stage(tmp_path) as made:
        assert (await made.ask("hidden.default")).startswith(b"HTTP/1.1 404 ")
        made.put(HIDDEN, exported=True)
        await until(
            lambda: made.gateway.source.current.exported(b"hidden.default") is not None,
            "the change is known",
        )
        assert (await made.ask("hidden.default")).startswith(b"HTTP/1.1 200 ")
        made.put(SHOWN, exported=False)
        assert (await made.ask("c.default")).startswith(b"HTTP/1.1 404 ")


async def test_a_name_that_the_control_plane_cannot_tell_is_unavailable(tmp_path: Path) -> None:
    async with stage(tmp_path) as made:
        made.channel.views.is_current = lambda: False
        assert (await made.ask("c.default")).startswith(b"HTTP/1.1 200 ")
        answer = await made.ask("late.default")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"destination_unavailable" in answer
