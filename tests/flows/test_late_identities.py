"""The identity of an address becomes known while a client that has connected there is silent."""

from __future__ import annotations

import json
from pathlib import Path

import trio

from control.contract import SpiffeId
from control.discovery.catalog import Changes
from control.discovery.entries import PodEntry
from proxy.directory.channel.source import ControlSource
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, outbound_port
from tests.kit.channel import CONTROL, DOMAIN, LOOPBACK, Workshop, until
from tests.kit.clusters import LISTEN
from tests.kit.http import connect

SECRET = b"\x00secret"
CLIENT_HELLO = b"\x16"


async def test_the_bytes_of_a_silent_client_do_not_go_there_in_clear_text(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    workshop = Workshop(tmp_path, root=fleet.root)
    received: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        received.append(await stream.receive_some(100))

    async with application(serve) as port, workshop.control() as (channel, control):
        where = {"address": f"{LOOPBACK}:{control}", "identity": str(CONTROL)}
        settings = {**LISTEN, "fixed_destination": f"{HOST}:{port}", "detect_timeout": "60s"}
        file = fleet.configure("west", outbound=settings)
        document = json.loads(file.read_text())
        document["directory"] = {"control": where}
        file.write_text(json.dumps(document))
        async with fleet.running_from(file) as west:
            await until(lambda: channel.connections == 1, "the proxy is connected")
            client = await connect(Address(HOST, outbound_port(west)))
            source = west.source
            assert isinstance(source, ControlSource)
            await until(lambda: source.states()["known"] == 1, "the answer")
            entry = PodEntry(HOST, SpiffeId(DOMAIN, "shop", "db"), frozenset())
            workshop.catalog.pods[HOST] = entry
            channel.changed(Changes({}, {HOST: entry}))
            await until(lambda: source.current.pods, "the identity")
            await client.send(SECRET)
            await until(lambda: received, "a connection")
            await client.stream.aclose()
    assert received[0][:1] == CLIENT_HELLO
