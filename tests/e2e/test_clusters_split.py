"""A service that is served in two clusters: its requests are split between them, and one takes over
when the other fails.

Rules: real requests all the time, each with a recorded outcome. The servers report where they are.
Shares may differ by five standard deviations, which chance exceeds once in a million runs."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
import trio

from lab.clusters import Clusters
from lab.load import Load
from tests.e2e.clusters import HTTP, clusters, member, shares, web_server
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import WEB, counted, curl, eventually

pytestmark = [pytest.mark.lab, pytest.mark.real]

HERE, THERE = "c of west", "c of east"
# Short retry times: the tests wait for them.
POLICY = {"breaker": {"min_penalty": "200ms", "max_penalty": "500ms"}}


@pytest.fixture(scope="module")
def made(laboratory: Laboratory) -> Clusters:
    async def build() -> Clusters:
        made = clusters(laboratory.lab, "west", "east")
        member(made, "west", "web")
        for name in ("west", "east"):
            made.meshes[name].service(
                "c", [member(made, name, "c")], HTTP, export=True, policy=POLICY
            )
        made.meshes["west"].service("empty", [], HTTP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(web_server, made, "west")
            nursery.start_soon(web_server, made, "east")
            nursery.start_soon(made.start)
        return made

    return laboratory.run(build)


def loaded(made: Clusters, clients: int = 4) -> Load:
    """Requests to west's own address of `c`."""
    return Load(
        made.pod("west", "web"),
        made.meshes["west"].services["c"].ipv4,
        WEB,
        clients=clients,
        authority="c",
    )


async def arrange(made: Clusters, **traits: Any) -> None:
    """Give west's `c` a split, a failover, or neither, and wait until the clients' sidecar has
    it."""
    near, service = made.sidecar("west", "web"), made.meshes["west"].services["c"]
    before = await taken(made)
    service.traits = {"export": True, "policy": POLICY, **traits}
    known = near.directory_file.read_bytes()
    made.meshes["west"].publish()
    if near.directory_file.read_bytes() != known:
        await eventually(lambda: _more(made, before), "the directory is loaded")


async def taken(made: Clusters, cluster: str = "west", pod: str = "web") -> float:
    """How many directories the proxy has loaded."""
    return await counted(made.sidecar(cluster, pod), "isthmus_directory_reloads_total", result="ok")


async def _more(made: Clusters, before: float, cluster: str = "west", pod: str = "web") -> bool:
    return await taken(made, cluster, pod) > before


async def kill(made: Clusters) -> None:
    """Kill the pod of west's `c`: its application and its sidecar, at once."""
    for process in (made.pod("west", "c").processes["web"], made.sidecar("west", "c").running()):
        process.kill()
        await process.wait()


async def revive(made: Clusters) -> None:
    """Start it again, with the same address."""
    await web_server(made, "west")
    await made.sidecar("west", "c").start(intercept=False)


def weights(here: int, there: int, empty: int | None = None) -> dict[str, Any]:
    split: list[dict[str, Any]] = [
        {"service": "c", "weight": here},
        {"service": "c", "cluster": "east", "weight": there},
    ]
    return {"split": split + ([{"service": "empty", "weight": empty}] if empty is not None else [])}


def fair(answered: Counter[str], share: float) -> bool:
    """Whether the other cluster's part is `share`, within the bounds of chance."""
    total = sum(answered.values())
    return abs(answered[THERE] - share * total) <= 5 * math.sqrt(total * share * (1 - share)) + 1


async def test_weights_decide_which_cluster_gets_a_request(made: Clusters) -> None:
    await arrange(made, **weights(90, 10))
    async with loaded(made) as load:
        answered = await shares(load, 1000)
    assert fair(answered, 0.1), answered
    assert not load.bad


async def test_weights_change_under_load_without_an_error(made: Clusters) -> None:
    await arrange(made, **weights(100, 0))
    async with loaded(made) as load:
        for here, there in ((100, 0), (50, 50), (0, 100), (75, 25)):
            await arrange(made, **weights(here, there))
            await load.settle()
            answered = await shares(load, 300)
            assert fair(answered, there / (here + there)), (here, there, answered)
            if 0 in (here, there):
                assert set(answered) == {HERE if there == 0 else THERE}
    assert not load.bad


async def test_the_share_of_a_backend_without_endpoints_goes_to_the_others(made: Clusters) -> None:
    await arrange(made, **weights(45, 45, 10))
    async with loaded(made) as load:
        answered = await shares(load, 600)
    assert fair(answered, 0.5), answered
    assert not load.bad


async def test_a_request_is_split_only_once_if_both_clusters_split(made: Clusters) -> None:
    """East splits `c` too. What west has sent there stays in east, and is not sent back."""
    east = made.meshes["east"].services["c"]
    east.traits["split"] = [
        {"service": "c", "weight": 50},
        {"service": "c", "cluster": "west", "weight": 50},
    ]
    try:
        before = await taken(made, "east", "gateway")
        made.meshes["east"].publish()
        await eventually(lambda: _more(made, before, "east", "gateway"), "the directory is loaded")
        await arrange(made, **weights(50, 50))
        async with loaded(made) as load:
            answered = await shares(load, 600)
        assert fair(answered, 0.5), answered
        assert not load.bad
        seen = [
            await counted(
                made.sidecar(name, "gateway"), "isthmus_requests_total", direction="gateway"
            )
            for name in ("west", "east")
        ]
        assert seen[0] == 0 < seen[1]
    finally:
        del east.traits["split"]
        made.meshes["east"].publish()


async def test_the_other_cluster_takes_over_when_the_service_dies_and_gives_back_when_it_lives(
    made: Clusters,
) -> None:
    await arrange(made, failover={"clusters": ["east"]})
    async with loaded(made) as load:
        assert set(await shares(load, 100)) == {HERE}
        await kill(made)
        goal = load.answered[THERE] + 100
        await eventually(lambda: load.answered[THERE] >= goal, "east answers", timeout=30)
        await load.settle()
        assert set(await shares(load, 100)) == {THERE}
        assert await counted(made.sidecar("west", "web"), "isthmus_failover_active") == 1
        bad = dict(load.bad)
        await revive(made)
        goal = load.answered[HERE] + 100
        await eventually(lambda: load.answered[HERE] >= goal, "west answers again", timeout=30)
        await load.settle()
        assert set(await shares(load, 100)) == {HERE}
        assert load.bad == bad  # the return fails no request
    # A request in progress when the server was killed may be lost, if it may have been processed.
    assert sum(bad.values()) <= 8, bad


async def test_readiness_alone_moves_requests_and_without_an_error(made: Clusters) -> None:
    """As when pods are drained: the directory changes before a failure."""
    await arrange(made, failover={"clusters": ["east"]})
    service = made.meshes["west"].services["c"]
    pods, service.pods = service.pods, ()
    async with loaded(made) as load:
        await arrange(made, failover={"clusters": ["east"]})
        await load.settle()
        assert set(await shares(load, 100)) == {THERE}
        service.pods = pods
        await arrange(made, failover={"clusters": ["east"]})
        goal = load.answered[HERE] + 100
        await eventually(lambda: load.answered[HERE] >= goal, "west answers again", timeout=30)
    assert not load.bad


async def test_a_service_that_dies_again_and_again_does_not_take_its_clients_along(
    made: Clusters,
) -> None:
    """While it is unstable, requests stay with the other cluster: only the first ones are
    affected."""
    await arrange(made, failover={"clusters": ["east"]})
    async with loaded(made) as load:
        await load.more(50)
        for _ in range(3):
            await kill(made)
            goal = load.answered[THERE] + 50
            answered = partial(lambda least: load.answered[THERE] >= least, goal)
            await eventually(answered, "east answers", timeout=30)
            await revive(made)
        goal = load.answered[HERE] + 300
        await eventually(lambda: load.answered[HERE] >= goal, "west answers again")
        assert await counted(made.sidecar("west", "web"), "isthmus_failover_active") == 0
    assert sum(load.bad.values()) <= 24, load.bad


async def test_without_endpoints_the_response_is_quick_and_gives_the_reason(made: Clusters) -> None:
    await arrange(made, split=[{"service": "empty", "weight": 1}])
    answer = await curl(made.pod("west", "web"), f"http://c:{WEB}/")
    assert (answer.status, answer.error) == (503, "destination_unavailable")
    assert answer.info["time_total"] < 5
    await arrange(made)
