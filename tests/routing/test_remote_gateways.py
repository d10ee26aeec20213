"""Connections to other clusters: which gateways are used. They are found by DNS and by probes, with
real proxies."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.app import App
from proxy.config.schema_clusters import ClustersConfig
from proxy.directory import Endpoint, Target, parse
from proxy.exchange.client import Leases
from proxy.exchange.upstream import Carrier
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed, ConnectionLost
from proxy.net.socket_stream import SocketStream
from proxy.routing.remote_gateways import RemoteGateways
from tests.kit.apps import HOST, Fleet, application, inbound_port, mirror, outbound_port
from tests.kit.clusters import (
    LISTEN,
    NAMED,
    NOWHERE,
    Clusters,
    ask,
    clusters,
    east_directory,
    west_directory,
)
from tests.kit.http import BROKEN, Peer, connect, until

GATEWAY = "spiffe://cluster.local/ns/isthmus/sa/gateway"
PATIENCE = 30.0


def counted(all_: Clusters, line: str) -> bool:
    return f"isthmus_{line}".encode() in all_.west.render()


async def test_a_gateway_that_is_given_by_a_name_is_found(tmp_path: Path) -> None:
    async with clusters(tmp_path, way={"host": "localhost"}) as all_:
        await until(
            lambda: bool(all_.west.remote_gateways.through(remote(all_)).endpoints), PATIENCE
        )
        for _ in range(5):  # it may have another address, without a gateway
            assert (await all_.ask("c.east")).status == 200


def remote(all_: Clusters) -> Target:
    service = all_.west.runtime.directory.current.find_service("c.east", "default")
    assert service is not None
    return service.targets[80]


async def test_a_name_that_does_not_resolve_fails_requests_at_once_and_says_so(
    tmp_path: Path,
) -> None:
    async with clusters(tmp_path, way={"host": "gateway.invalid"}) as all_:
        await until(lambda: "resolve" in all_.west.remote_gateways.why("east"), PATIENCE)
        answer = await all_.ask("c.east")
    assert answer.status == 503
    assert b"no gateway of east is usable: " in answer.body
    assert b"(gateway.invalid)" in answer.body


async def test_a_gateway_that_does_not_answer_is_left_out_until_it_does(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        port = inbound_port(all_.gateway)
        assert (await all_.ask("c.east")).status == 200
        all_.gateway.inbound.drain(0)  # it listens no more, and its connections end
        await until(lambda: counted(all_, 'gateways_usable{cluster="east"} 0.0'), PATIENCE)
        answer = await all_.ask("c.east")
        assert answer.status == 503
        assert f"no gateway of east is usable: {HOST}:{port}: ".encode() in answer.body
        settings = {"enabled": True, "listen": [f"{HOST}:{port}"]}
        async with all_.fleet.running(
            "gateway", east_directory(inbound_port(all_.server)), gateway=settings
        ):
            await until(lambda: counted(all_, 'gateways_usable{cluster="east"} 1.0'), PATIENCE)
            assert (await all_.ask("c.east")).status == 200


async def test_a_gateway_that_is_shutting_down_gets_no_new_requests(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        assert (await all_.ask("c.east")).status == 200
        all_.gateway.drain.draining = True
        await until(
            lambda: "shutting down (503)" in all_.west.remote_gateways.why("east"), PATIENCE
        )
        await until(lambda: counted(all_, 'gateways_usable{cluster="east"} 0.0'), PATIENCE)


async def test_a_gateway_with_another_identity_is_not_used(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        directory = {
            "allow_identity_loss": True,  # `services` is empty
            "services": [],
            "clusters": [
                {
                    "name": "east",
                    "gateways": [
                        {
                            "address": HOST,
                            "port": inbound_port(all_.gateway),
                            "identity": Fleet.identity("other"),
                        }
                    ],
                    "services": [{"name": "c", "ports": [{"port": 80}]}],
                }
            ],
        }
        all_.fleet.direct(directory, "west")
        await until(lambda: not all_.west.runtime.directory.current.services, PATIENCE)
        answer = await all_.ask("c.east")
        assert answer.status in (502, 503)
        await until(
            lambda: counted(all_, 'gateway_probes_total{cluster="east",result="failed"}'), PATIENCE
        )


# The effect of a gateway that hangs on streams in progress...


@dataclass
class Stopped:
    """A gateway in its own process, so that it can be suspended, and the sidecar that uses it."""

    west: App
    process: trio.Process
    port: int

    async def client(self) -> Peer:
        return await connect(Address(HOST, outbound_port(self.west)))

    def stand_still(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


async def unmoved(stream: trio.SocketStream) -> None:
    """The application: a gateway that is killed at the end of a test ends its connections."""
    with suppress(trio.BrokenResourceError):
        await mirror(stream)


@asynccontextmanager
async def stoppable(
    folder: Path, *, to: str = NOWHERE, protocol: str = "http1"
) -> AsyncIterator[Stopped]:
    fleet = Fleet(folder)
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    async with application(unmoved) as back:
        trust = {"trusted_gateways": [fleet.identity("gateway")]}
        inside: dict[str, Any] = {**LISTEN, "fixed_destination": f"{HOST}:{back}", **trust}
        async with fleet.running("server", inbound=inside) as server:
            entry = {"enabled": True, "listen": [f"{HOST}:{port}"]}
            file = fleet.configure("gateway", east_directory(inbound_port(server)), gateway=entry)
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "proxy.cli", "run", "--config", str(file)]
            )
            try:
                directory = west_directory(port)
                directory["clusters"][0]["services"][0]["ports"][0]["protocol"] = protocol
                probes = {"probe_interval": "100ms", "probe_timeout": "1500ms"}
                async with fleet.running(
                    "west",
                    directory,
                    outbound={**LISTEN, **NAMED, "fixed_destination": to},
                    clusters=probes,
                ) as west:
                    yield Stopped(west, process, port)
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


async def answered(stopped: Stopped) -> None:
    """Repeat until there is a response: the gateway may be starting, or have been away."""
    with trio.fail_after(2 * PATIENCE):
        while (await ask(await stopped.client(), "c.east")).status != 200:  # noqa: ASYNC110  (it is asked, which is no event)
            await trio.sleep(0.1)


@pytest.mark.parametrize("protocol", ["http1", "http2"])
async def test_requests_in_progress_at_a_gateway_that_hangs_fail_within_the_probe_timeout(
    tmp_path: Path, protocol: str
) -> None:
    async with stoppable(tmp_path, protocol=protocol) as stopped:
        await answered(stopped)
        stopped.stand_still()
        with trio.fail_after(PATIENCE):  # a tenth of http.response_timeout
            answer = await ask(await stopped.client(), "c.east")
        assert answer.status == 502
        said = answer.get(b"proxy-status") or b""
        assert (
            f"the gateway {HOST}:{stopped.port} of east does not answer its probes (no answer"
            " within 1.5 s)".encode()
            in said
        )
        assert b"error=connection_terminated" in said
        assert (await ask(await stopped.client(), "c.east")).status == 503  # at once
        stopped.go_on()
        await answered(stopped)


async def test_a_quiet_tunnel_through_a_gateway_that_stands_still_is_cut_off(
    tmp_path: Path,
) -> None:
    async with stoppable(tmp_path, to="192.0.2.7:5432") as stopped:
        peer = None
        with trio.fail_after(2 * PATIENCE):
            while peer is None:
                peer = await stopped.client()
                try:
                    assert (await peer.ask()).status == 200
                except BROKEN:
                    peer.close()
                    peer = None
                    await trio.sleep(0.1)
        stopped.stand_still()
        with trio.fail_after(PATIENCE):
            assert await peer.ended()
        peer.close()


async def test_a_gateway_that_is_shutting_down_finishes_requests_in_progress(
    tmp_path: Path,
) -> None:
    asked, go = trio.Event(), trio.Event()

    async def slow(stream: trio.SocketStream) -> None:
        assert await stream.receive_some()
        asked.set()
        await go.wait()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    statuses = []
    async with clusters(tmp_path, slow) as all_:

        async def request() -> None:
            statuses.append((await all_.ask("c.east")).status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(request)
            await asked.wait()
            all_.gateway.drain.draining = True
            await until(
                lambda: failed_probes(all_) >= 6, PATIENCE
            )  # three times as many as it takes
            go.set()
    assert statuses == [200]


def failed_probes(all_: Clusters) -> float:
    name = b'isthmus_gateway_probes_total{cluster="east",result="failed"} '
    return sum(
        float(line.removeprefix(name))
        for line in all_.west.render().splitlines()
        if line.startswith(name)
    )


class Quiet:
    def count_gateway_probe(self, cluster: str, result: str) -> None:
        pass

    def set_usable_gateways(self, cluster: str, count: int) -> None:
        pass


class Known:
    def __init__(self, text: str) -> None:
        self.current = parse(text, "test")


class NoLeases:
    """Leases no connections: these tests must not need one."""

    def carrier(self, endpoint: Endpoint, *, fresh: bool) -> object:
        raise AssertionError("no connection should be needed")


class Silence:
    """Leases without success: all packets are lost."""

    @asynccontextmanager
    async def carrier(self, endpoint: Endpoint, *, fresh: bool) -> AsyncIterator[Carrier]:
        raise ConnectFailed(endpoint.address, "timeout", "timed out")
        yield


def still(text: str, lends: object = None) -> tuple[RemoteGateways, Known]:
    known = Known(text)
    leases: Leases[Endpoint] = lends or NoLeases()  # type: ignore[assignment]  # either has only what these tests call
    return RemoteGateways(known, ClustersConfig(), leases, Quiet(), random.Random(1)), known


TEXT = f"""
services: []
clusters:
  - name: east
    gateways: [{{address: 203.0.113.7, identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}]}}]
  - name: north
    gateways: [{{host: gw.invalid, identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}]}}]
"""


async def test_unused_clusters_are_not_probed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    remote_gateways, _ = still(TEXT)
    with trio.move_on_after(3600):
        await remote_gateways.watch()
    assert remote_gateways.why("north").endswith("(gw.invalid)")


async def test_where_nothing_has_happened_the_snapshot_is_the_truth(
    autojump_clock: trio.testing.MockClock,
) -> None:
    remote_gateways, known = still(TEXT)
    east = known.current.clusters["east"].services[0].targets[80]
    assert remote_gateways.through(east) is east
    north = known.current.clusters["north"].services[0].targets[80]
    assert remote_gateways.through(north).endpoints == ()
    assert remote_gateways.through(north) is remote_gateways.through(north)
    assert remote_gateways.why("nowhere") == "the directory has no gateway of nowhere"
    known.current = parse(TEXT.replace("203.0.113.7", "203.0.113.8"), "test")
    moved = known.current.clusters["east"].services[0].targets[80]
    assert remote_gateways.through(moved) is moved
    await trio.lowlevel.checkpoint()


def joined() -> tuple[SocketStream, socket.socket]:
    with socket.create_server((HOST, 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return SocketStream(ours), listener.accept()[0]


async def test_a_connection_that_moves_outlives_its_gateways_silence_and_a_quiet_one_does_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    remote_gateways, known = still(TEXT, Silence())
    east = known.current.clusters["east"].services[0].targets[80]
    remote_gateways.through(east)
    (quiet, its_peer), (moving, sender) = joined(), joined()
    remote_gateways.connected(east.endpoints[0], quiet)
    remote_gateways.connected(east.endpoints[0], moving)
    ended: list[str] = []

    async def listen() -> None:
        with pytest.raises(ConnectionLost) as caught:
            await quiet.receive_some()
        ended.append(caught.value.reason)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(remote_gateways.watch)
        nursery.start_soon(listen)
        for _ in range(30):
            sender.send(b".")
            assert await moving.receive_some() == b"."
            await trio.sleep(2)
        assert ended == ["timeout"]
        with pytest.raises(
            ConnectionLost,
            match=r"the gateway 203\.0\.113\.7:\d+ of east does not answer its probes",
        ):
            await quiet.send_all(b"?")
        with pytest.raises(
            ConnectionLost, match="does not answer its probes"
        ):  # as soon as it is idle too
            await moving.receive_some()
        nursery.cancel_scope.cancel()
    for each in (quiet, moving, its_peer, sender):
        each.close()
