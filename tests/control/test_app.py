"""The process: readiness, metrics, leadership and shutdown."""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.abc import Clock

from control.admin import Admin, AdminLimits
from control.app import Control, ControlConfig
from control.command import raise_descriptor_limit
from control.config import Settings
from control.discovery.discovery import DiscoveryRules
from control.kube.client import Client
from lab.kube_api.server import ApiServer
from lab.kube_api.store import KINDS
from proxy.cli import main
from tests.control.cluster import endpoint, pod, service, slice_of
from tests.control.conftest import AT
from tests.control.records import ONE, store

EVENTS = KINDS["events.k8s.io/v1", "events"]
LEASES = KINDS["coordination.k8s.io/v1", "leases"]
PAGE = Path(__file__).parent.parent.parent / "docs" / "control-plane.md"


class Replica:
    """A replica with a listener on loopback."""

    def __init__(
        self,
        server: ApiServer,
        name: str,
        listeners: list[trio.SocketListener],
        **discovery: float,
    ) -> None:
        settings = Settings(discovery=DiscoveryRules(**discovery))
        self.control = Control(
            ControlConfig("test.local", "isthmus", name, None, settings=settings),
            Client(AT, dial=server.dial),
        )
        self.listeners = listeners
        self.ended = trio.Event()

    async def run(self) -> None:
        await self.control.run(self.listeners)
        self.ended.set()

    async def ask(self, request: str = "GET /ready") -> tuple[int, str]:
        async with await trio.testing.open_stream_to_socket_listener(self.listeners[0]) as stream:
            await stream.send_all(f"{request} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = b""
            while piece := await stream.receive_some():
                answer += piece
        head, _, body = answer.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body

    async def until(self, code: int, path: str = "/ready") -> str:
        with trio.fail_after(20):
            while True:
                found, body = await self.ask(f"GET {path}")
                if found == code:
                    return body
                await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.fixture
async def replica(server: ApiServer, nursery: trio.Nursery) -> AsyncIterator[Replica]:
    store(server, *ONE)
    made = Replica(server, "a", await trio.open_tcp_listeners(0, host="127.0.0.1"))
    server.behaviour.forbidden.add("pods")
    nursery.start_soon(made.run)
    yield made
    for listener in made.listeners:
        await listener.aclose()


async def test_it_is_ready_when_all_is_known_and_live_before(
    replica: Replica, server: ApiServer
) -> None:
    body = await replica.until(503)
    assert "pods" in body
    assert await replica.ask("GET /live") == (200, "live\n")
    server.behaviour.forbidden.clear()
    assert await replica.until(200) == "ready\n"
    # A short outage of the API server does not matter.
    server.behaviour.down = True
    server.cut()
    assert await replica.ask() == (200, "ready\n")


async def test_a_replica_that_is_cut_off_from_the_api_server_is_not_ready(
    server: ApiServer, nursery: trio.Nursery
) -> None:
    store(server, *ONE)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    replica = Replica(server, "a", listeners, max_outage=0.2)
    nursery.start_soon(replica.run)
    assert await replica.until(200) == "ready\n"
    server.behaviour.down = True
    server.cut()
    kinds = {"nodes", "pods", "services", "endpointslices"}
    with trio.fail_after(20):  # each watch notices the end of its own connection
        body = await replica.until(503)
        while not all(f"{kind}: " in body for kind in kinds):
            body = await replica.until(503)
    assert await replica.ask("GET /live") == (200, "live\n")
    server.behaviour.down = False
    assert await replica.until(200) == "ready\n"
    await listeners[0].aclose()


async def test_other_questions(replica: Replica) -> None:
    assert (await replica.ask("GET /else"))[0] == 404
    assert (await replica.ask("POST /ready"))[0] == 405
    assert await replica.ask("HEAD /live") == (200, "")


async def test_a_client_that_sends_nothing_delays_no_other(
    replica: Replica, nursery: trio.Nursery
) -> None:
    streams = [
        await trio.testing.open_stream_to_socket_listener(replica.listeners[0]) for _ in range(3)
    ]
    await streams[0].send_all(b"\x16\x03\x01hello\r\n\r\n")
    await streams[1].send_all(b"GET /" + b"x" * 20_000)
    assert await replica.ask("GET /live") == (200, "live\n")
    for stream in streams:
        await stream.aclose()


async def test_connections_above_the_limit_are_closed(nursery: trio.Nursery) -> None:
    admin = Admin(lambda: "", lambda: b"", AdminLimits(max_connections=1))
    first, first_server = trio.testing.memory_stream_pair()
    second, second_server = trio.testing.memory_stream_pair()
    nursery.start_soon(admin.answer, first_server)
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(admin.answer, second_server)
    assert await second.receive_some() == b""
    await first.send_all(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await first.receive_some()).startswith(b"HTTP/1.1 200 ")


async def test_the_page_of_the_control_plane_has_every_metric(
    replica: Replica, server: ApiServer
) -> None:
    server.behaviour.forbidden.clear()
    await replica.until(200)
    _, text = await replica.ask("GET /metrics")
    rendered = set(re.findall(r"^# TYPE (isthmus_control_\w+) ", text, re.MULTILINE))
    assert rendered == set(
        re.findall(r"^\| `(isthmus_control_\w+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    )
    assert 'isthmus_control_objects{resource="pods"} 1.0' in text
    assert 'isthmus_control_watch_total{resource="services",what="lists"} 1.0' in text
    assert "isthmus_control_services 1.0" in text


async def test_a_signal_ends_it_and_gives_the_lease_back(
    replica: Replica, server: ApiServer
) -> None:
    server.behaviour.forbidden.clear()
    await replica.until(200)
    with trio.fail_after(20):
        while not replica.control.election.leading:
            await trio.testing.wait_all_tasks_blocked(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await replica.ended.wait()
    assert (
        server.store.objects[LEASES]["isthmus", "isthmus-control"]["spec"]["holderIdentity"] == ""
    )
    assert replica.control.client._idle == []
    assert all(listener.socket.fileno() == -1 for listener in replica.listeners)


async def test_only_the_leader_reports_problems(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    trap = (
        service("trap", "10.96.6.6", namespace="evil"),
        slice_of("trap", endpoint("10.1.0.1"), namespace="evil"),
    )
    store(server, *ONE, *trap)
    replicas = [Replica(server, name, []) for name in ("a", "b")]
    for one in replicas:
        nursery.start_soon(one.control.discovery.run)
        nursery.start_soon(one.control._take_part)
    await trio.sleep(60)
    assert [one.control.election.leading for one in replicas].count(True) == 1
    (event,) = server.store.objects[EVENTS].values()
    assert (event["metadata"]["namespace"], event["regarding"]["name"], event["reason"]) == (
        "evil",
        "trap",
        "EndpointNotUsed",
    )
    assert "10.1.0.1 is the address of a pod of another namespace, shop" in event["note"]
    # It is reported once, and again when it changes.
    store(
        server,
        pod("b", "10.1.0.2"),
        slice_of("trap", endpoint("10.1.0.1"), endpoint("10.1.0.2"), namespace="evil"),
    )
    await trio.sleep(60)
    assert len(server.store.objects[EVENTS]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kubeconfig", "/nowhere/config"], "No such file"),
        ([], "not in a cluster"),
        (["--admin", "x"], "not in a cluster"),
        (["--config", "/nowhere/control.yaml"], "No such file"),
    ],
)
def test_settings_that_cannot_be_used_are_reported_in_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["control", *words]) == 64
    assert message in capsys.readouterr().err


def test_the_limit_of_descriptors_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, soft), hard))
    try:
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
