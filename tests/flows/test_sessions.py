"""Between two proxies: TLS sessions are resumed as long as both sides allow it."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import trio

from proxy.app import App
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, inbound_port, outbound_port
from tests.kit.clusters import LISTEN
from tests.kit.http import connect

DB = "192.0.2.7:5432"


def directory(port: int) -> dict[str, object]:
    endpoint = {"address": HOST, "identity": Fleet.identity("server"), "ports": {"5432": port}}
    ports = [{"port": 5432, "protocol": "opaque"}]
    return {
        "cluster": "west",
        "services": [
            {"name": "db", "addresses": ["192.0.2.7"], "ports": ports, "endpoints": [endpoint]}
        ],
    }


async def echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):  # the peer may close at any time
        async for piece in stream:
            await stream.send_all(piece)


def handshakes(app: App, resumed: str) -> float:
    """The successful handshakes of its inbound side."""
    samples = (sample for family in app.metrics.registry.collect() for sample in family.samples)
    counted = [sample for sample in samples if sample.name == "isthmus_tls_handshakes_total"]
    wanted = {"direction": "inbound", "result": "ok", "resumed": resumed}
    return sum(sample.value for sample in counted if wanted.items() <= sample.labels.items())


@pytest.mark.parametrize(
    ("west", "server", "resumed"), [("1h", "1h", 2), ("0s", "1h", 0), ("1h", "0s", 0)]
)
async def test_a_session_is_resumed_unless_one_side_gives_it_no_lifetime(
    tmp_path: Path, west: str, server: str, resumed: int
) -> None:
    fleet = Fleet(tmp_path)
    async with application(echo) as port:
        inbound = {**LISTEN, "fixed_destination": f"{HOST}:{port}"}
        async with fleet.running(
            "server", inbound=inbound, identity={"session_lifetime": server}
        ) as far:
            outbound = {**LISTEN, "fixed_destination": DB}
            async with fleet.running(
                "west",
                directory(inbound_port(far)),
                outbound=outbound,
                identity={"session_lifetime": west},
            ) as near:
                for _ in range(3):
                    peer = await connect(Address(HOST, outbound_port(near)))
                    # Not the start of a request: it is forwarded at once
                    await peer.send(b"\0data")
                    assert await peer.exactly(5) == b"\0data"
                    peer.close()
                assert (handshakes(far, "true"), handshakes(far, "false")) == (resumed, 3 - resumed)


async def test_a_session_is_not_offered_after_the_end_of_our_own_certificate(
    tmp_path: Path,
) -> None:
    """The server would refuse it after the handshake, without an alert that says why."""
    fleet = Fleet(tmp_path, lifetimes={"west": timedelta(minutes=10)})
    async with application(echo) as port:
        inbound = {**LISTEN, "fixed_destination": f"{HOST}:{port}"}
        async with fleet.running("server", inbound=inbound) as far:
            outbound = {**LISTEN, "fixed_destination": DB}
            async with fleet.running(
                "west", directory(inbound_port(far)), outbound=outbound
            ) as near:
                peer = await connect(Address(HOST, outbound_port(near)))
                await peer.send(b"\0data")
                assert await peer.exactly(5) == b"\0data"
                peer.close()
                identity = near.identity
                assert identity is not None
                server, end = SpiffeId.parse(Fleet.identity("server")), identity.chain_end
                assert end < time.time() + 601
                assert identity.sessions.get(server, HOST, end - 1) is not None
                assert identity.sessions.get(server, HOST, end + 1) is None
