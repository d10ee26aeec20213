"""Faults of one cluster do not affect another: what west's pods see while east, its gateway, or the
path to it fails.

Rules: requests to west's own service run all the time, and the outcome of each is recorded. The
faults are real (a process killed or stopped, packets dropped, a link down). Remote requests fail
with a status and a Proxy-Status that gives the reason, and work again without help. The
demonstration and perf/ measure how fast; here only a hang is a failure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from lab.clusters import Clusters
from lab.faults import paused
from lab.load import Load
from lab.pod import Pod
from lab.wide_area import Fault
from tests.e2e.clusters import HTTP, answers_again, clusters, member, resolved, web_server
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import WEB, counted, curl, eventually

pytestmark = [pytest.mark.lab, pytest.mark.real]

C_EAST = f"http://c.east:{WEB}/"
HANG = 12.0  # seconds in which a remote request must have a response of any kind
REASONS = {
    "connection_refused", "connection_terminated", "connection_timeout", "destination_ip_unroutable", "destination_unavailable",
    "http_response_timeout",
}  # fmt: skip


# Requests that must not be retried, in sequence, each on its own connection: the outcome of each,
# and its seconds.
POSTS = """
import http.client, json, sys, time
seen = []
for _ in range(int(sys.argv[2])):
    began, connection = time.monotonic(), http.client.HTTPConnection("c.east", int(sys.argv[1]), timeout=60)
    connection.request("POST", "/", b"once", {"Host": f"c.east:{sys.argv[1]}"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    seen.append((answer.status, time.monotonic() - began))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def made(laboratory: Laboratory) -> Clusters:
    async def build() -> Clusters:
        made = clusters(laboratory.lab, "west", "east")
        # A request in flight when the path breaks fails after this time. No proxy can know earlier
        # that no response will arrive.
        quick: dict[str, Any] = {
            "http": {"response_timeout": "3s"},
            "clusters": {"probe_timeout": "3s"},
        }
        member(made, "west", "web", **quick)
        patient = {
            "timeouts": {"response_head": "1m"}
        }  # the local service has no faults, and so no need for short timeouts
        for cluster, name in (("west", "home"), ("east", "c")):
            made.meshes[cluster].service(
                name, [member(made, cluster, name)], HTTP, export=True, policy=patient
            )
        made.legs["second"] = made.lab.wide_area().attach(made.meshes["east"].cluster.pod("second"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(web_server, made, "west", "home")
            nursery.start_soon(web_server, made, "east")
            nursery.start_soon(made.start)
        return made

    return laboratory.run(build)


def web(made: Clusters) -> Pod:
    return made.pod("west", "web")


def at_home(made: Clusters) -> Load:
    return Load(
        web(made), made.meshes["west"].services["home"].ipv4, WEB, clients=3, authority="home"
    )


@contextlib.asynccontextmanager
async def trouble(made: Clusters, kind: str) -> AsyncIterator[None]:
    """A fault of east's gateway, or of the path to it."""
    gateway = made.sidecar("east", "gateway")
    if kind == "killed":
        gateway.running().kill()
        await gateway.running().wait()
        yield
        await gateway.start()
    elif kind == "paused":
        with paused(gateway.running()):
            yield
    else:
        with made.legs["east"].fault(Fault[kind]):
            yield


TROUBLES = ["killed", "paused", *(fault.name for fault in Fault)]


@pytest.mark.parametrize("kind", TROUBLES)
async def test_local_requests_are_unaffected_and_remote_ones_fail_clearly_and_recover(
    made: Clusters, kind: str
) -> None:
    await answers_again(web(made), C_EAST, "c of east", timeout=40)
    async with at_home(made) as load:
        async with trouble(made, kind):
            answers = [await curl(web(made), C_EAST) for _ in range(4)]
            await load.more(200)
        for answer in answers:
            assert answer.status in (502, 503, 504), answer
            assert answer.error in REASONS, answer.headers
            assert answer.info["time_total"] < HANG, answer.info["time_total"]
        await load.more(50)
        await answers_again(web(made), C_EAST, "c of east", timeout=40)
        await load.more(50)
    assert not load.bad
    assert max(sample.seconds for sample in load.samples) < HANG


async def test_the_other_cluster_goes_away_under_load_and_comes_back(
    made: Clusters,
) -> None:
    """Clients that keep asking for unavailable services do not disturb those that ask for available
    ones."""
    await answers_again(web(made), C_EAST, "c of east", timeout=40)
    east = await resolved(web(made), "c.east")
    async with (
        at_home(made) as load,
        Load(web(made), east, WEB, clients=4, authority=f"c.east:{WEB}") as remote,
    ):
        with made.legs["east"].fault(Fault.SILENCE):
            await load.more(300)
        await remote.more(50, timeout=90)
        await load.more(50)
    assert not load.bad
    assert remote.answered["c of east"] == remote.succeeded
    for outcome in remote.bad:
        status, _, error = outcome.partition(" ")
        assert status in ("502", "503", "504"), remote.bad
        assert error in REASONS, remote.bad


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
async def test_requests_that_were_not_sent_to_one_gateway_go_to_the_other(
    made: Clusters, silent: bool
) -> None:
    await answers_again(web(made), C_EAST, "c of east", timeout=40)
    east, near, leg = made.meshes["east"], made.sidecar("west", "web"), made.legs["second"]
    with leg.fault(Fault.SILENCE) if silent else contextlib.nullcontext():
        opened = await counted(near, "isthmus_breaker_changes_total", state="open")
        east.announce(
            made.sidecar("east", "gateway"), address=leg.ipv4, port=4143
        )  # without a listener
        made.publish()
        try:
            seen: list[tuple[int, float]] = []

            async def tried() -> bool:
                seen.extend(
                    json.loads(
                        (await web(made).run_python(POSTS, str(WEB), "20", timeout=120)).text
                    )
                )
                return await counted(near, "isthmus_breaker_changes_total", state="open") > opened

            await eventually(tried, "one of them was tried without success", timeout=60)
        finally:
            east.gateways.pop()
            made.publish()
    assert {status for status, _ in seen} == {200}
    assert max(seconds for _, seconds in seen) < HANG


async def test_with_two_gateways_one_may_die(made: Clusters) -> None:
    east = made.meshes["east"]
    second = east.gateway(east.cluster.pods["second"], made.legs["second"])
    await made.start()
    made.publish()
    try:
        near = made.sidecar("west", "web")

        async def both() -> bool:
            await curl(web(made), C_EAST)
            return all(
                [
                    await counted(made.sidecar("east", name), "isthmus_requests_total") > 0
                    for name in ("gateway", "second")
                ]
            )

        await eventually(both, "both gateways are used")
        async with Load(
            web(made),
            await resolved(web(made), "c.east"),
            WEB,
            clients=3,
            authority=f"c.east:{WEB}",
        ) as remote:
            second.running().kill()
            await remote.more(200, timeout=60)
        # Requests in progress on the killed gateway may be lost; none after that.
        assert sum(remote.bad.values()) <= 3, remote.bad
        assert near.running().alive
    finally:
        east.gateways.pop()
        del east.sidecars["second"]
        made.publish()
