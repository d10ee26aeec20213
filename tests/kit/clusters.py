"""Two clusters of whole proxies in this process: west's sidecar -> east's gateway -> the sidecar of
`c` in east -> an application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.app import App
from proxy.net.address import Address
from tests.kit.apps import (
    HOST,
    Application,
    Fleet,
    application,
    inbound_port,
    mirror,
    outbound_port,
)
from tests.kit.http import Message, Peer, connect
from tests.kit.links import Link

NOWHERE = "192.0.2.1:80"  # RFC 5737: an address that no directory has
NAMED = {"authority_networks": ["192.0.2.0/24"]}  # there the authority chooses
QUICK = {"probe_interval": "100ms", "probe_timeout": "20s", "resolve_interval": "200ms"}
LISTEN = {"listen": [f"{HOST}:0"]}


@dataclass
class Clusters:
    """All running parts. `west` is a sidecar, `server` the one of `c` in east."""

    fleet: Fleet
    west: App
    gateway: App
    server: App

    async def client(self) -> Peer:
        return await connect(Address(HOST, outbound_port(self.west)))

    async def ask(self, host: str, *fields: str, target: str = "/path?x=1") -> Message:
        return await ask(await self.client(), host, *fields, target=target)


async def ask(peer: Peer, host: str, *fields: str, target: str = "/") -> Message:
    try:
        await peer.send(
            "\r\n".join([f"GET {target} HTTP/1.1", f"Host: {host}", *fields, "", ""]).encode(
                "latin-1"
            )
        )
        return await peer.response()
    finally:
        peer.close()


def east_directory(port: int, **service: Any) -> dict[str, Any]:
    """The directory of east's gateway: `c`, which it exports, and `hidden`, which it does not."""
    endpoint = {
        "address": HOST,
        "identity": Fleet.identity("server"),
        "ports": {"80": port, "5432": port},
    }
    ports = [{"port": 80, "protocol": "http1"}, {"port": 5432, "protocol": "opaque"}]
    c = {"name": "c", "ports": ports, "endpoints": [endpoint], "export": True, **service}
    hidden = {"name": "hidden", "ports": ports, "endpoints": [endpoint]}
    north = {"name": "north", "services": [{"name": "c", "ports": ports}]}
    return {"cluster": "east", "services": [c, hidden], "clusters": [north]}


def west_directory(port: int, **way: Any) -> dict[str, Any]:
    """West's directory: the gateway of east, and `db`, a service of its own that has no endpoint,
    and is served by east's `c` therefore."""
    ports = [{"port": 80}, {"port": 5432, "protocol": "opaque"}]
    names = [{"name": name, "ports": ports} for name in ("c", "hidden", "missing", "db")]
    gateway = {**(way or {"address": HOST}), "port": port, "identity": Fleet.identity("gateway")}
    east = {"name": "east", "gateways": [gateway], "services": names}
    split = [{"service": "c", "cluster": "east", "weight": 1}]
    return {
        "cluster": "west",
        "services": [{"name": "db", "addresses": ["192.0.2.7"], "ports": ports, "split": split}],
        "clusters": [east],
    }


@asynccontextmanager
async def clusters(
    folder: Path,
    serve: Application = mirror,
    *,
    to: str = NOWHERE,
    trusted: bool = True,
    gateway: dict[str, Any] | None = None,
    way: dict[str, Any] | None = None,
    link: Link | None = None,
    everywhere: dict[str, Any] | None = None,
    **service: Any,
) -> AsyncIterator[Clusters]:
    """All parts, for connections from west to `to`. `way`: how west's directory names the gateway,
    if not by its address. `link`: what is between the two. `everywhere`: settings of all three.
    `service`: more of `c` in the directory of east."""
    fleet, common = Fleet(folder), everywhere or {}
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        port = await enter(application(serve))
        trust = {"trusted_gateways": [fleet.identity("gateway")] if trusted else []}
        server = await enter(
            fleet.running(
                "server",
                inbound={**LISTEN, "fixed_destination": f"{HOST}:{port}", **trust},
                **common,
            )
        )
        settings = {**LISTEN, "enabled": True, **(gateway or {})}
        entry = await enter(
            fleet.running(
                "gateway",
                east_directory(inbound_port(server), **service),
                gateway=settings,
                **common,
            )
        )
        gate = inbound_port(entry)
        if link is not None:
            link.to, gate = gate, link.port
        outbound = {**LISTEN, **NAMED, "fixed_destination": to}
        directory = west_directory(gate, **(way or {}))
        west = await enter(
            fleet.running("west", directory, outbound=outbound, clusters=QUICK, **common)
        )
        yield Clusters(fleet, west, entry, server)
