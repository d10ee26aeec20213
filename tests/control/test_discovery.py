"""From an API server to entries: nothing is reported before all lists are complete, faults remove
nothing, and the final state is correct.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.abc import Clock
from trio.testing import MockClock

from control.contract import SpiffeIdError
from control.discovery.catalog import Catalog, Changes
from control.discovery.discovery import Discovery, DiscoveryRules
from control.kube.client import Client
from control.kube.resources import Key
from lab.kube_api.server import ApiServer, refuse
from tests.control.cluster import (
    TRUST_DOMAIN,
    Cluster,
    Json,
    identity,
    pod,
)
from tests.control.conftest import AT
from tests.control.random_objects import ITEMS
from tests.control.records import KIND_OF, ONE, name_of, store
from tests.kit.channel import until


def remove(server: ApiServer, item: Json) -> None:
    of, key = name_of(item)
    if key in server.store.objects[of]:
        server.store.delete(of, key)


def truth(server: ApiServer) -> Cluster:
    """The state that a fresh list gives."""
    cluster = Cluster()
    for of in KIND_OF.values():
        for item in server.store.objects[of].values():
            cluster.put({"metadata": item["metadata"]} if of.plural == "nodes" else item)
    cluster.flush()
    return cluster


class Stage:
    """A discovery of a server's cluster, and the changes that it has reported."""

    def __init__(self, server: ApiServer, rules: DiscoveryRules | None = None) -> None:
        self.server = server
        self.reports: list[Changes] = []
        self.when: list[float] = []
        self.client = Client(AT, dial=server.dial, chance=random.Random(1))
        self.discovery = Discovery(self.client, Catalog(TRUST_DOMAIN), self._tell, rules)
        for number, reflector in enumerate(self.discovery.reflectors):
            reflector.chance = random.Random(number)

    def _tell(self, changes: Changes) -> None:
        self.reports.append(changes)
        self.when.append(trio.current_time())

    def assert_true(self) -> None:
        fresh, catalog = truth(self.server).catalog, self.discovery.catalog
        assert catalog.services == fresh.services
        assert catalog.pods == fresh.pods
        assert catalog.problems == fresh.problems
        services: dict[Key, Any] = {}
        for changes in self.reports:
            services |= changes.services
        assert {
            key: entry for key, entry in services.items() if entry is not None
        } == fresh.services


async def test_a_cluster_is_discovered(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    store(server, *ONE)
    stage = Stage(server)
    nursery.start_soon(stage.discovery.run)
    await stage.discovery.ready.wait()
    assert len(stage.reports) == 1
    entry = stage.reports[0].services["shop", "web"]
    assert entry is not None
    assert [(found.address, found.identity, found.zone) for found in entry.endpoints] == [
        ("10.1.0.1", identity("web"), "west-1")
    ]
    stage.assert_true()
    assert {target.partition("?")[0].rpartition("/")[2] for _, target in server.log} == {
        "services",
        "endpointslices",
        "pods",
        "nodes",
    }
    assert len(server.log) == 4


@pytest.mark.parametrize("missing", ["pods", "nodes", "services", "endpointslices"])
async def test_nothing_is_reported_before_all_lists_are_complete(
    clock: Clock, server: ApiServer, nursery: trio.Nursery, missing: str
) -> None:
    store(server, *ONE)
    server.behaviour.forbidden.add(missing)
    stage = Stage(server)
    nursery.start_soon(stage.discovery.run)
    await trio.sleep(600)
    assert not stage.discovery.ready.is_set()
    assert stage.reports == []
    server.behaviour.forbidden.clear()
    await stage.discovery.ready.wait()
    stage.assert_true()


async def test_changes_are_reported_together_after_a_delay(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    store(server, *ONE)
    stage = Stage(server, DiscoveryRules(settle_time=0.05, max_delay=0.5))
    nursery.start_soon(stage.discovery.run)
    await stage.discovery.ready.wait()
    await trio.sleep(1)
    began = trio.current_time()
    for number in range(100):  # a rolling update, an event each 10 ms
        store(server, pod(f"p{number}", f"10.2.0.{number}"))
        await trio.sleep(0.01)
    await trio.sleep(1)
    assert len(stage.reports) - 1 in (2, 3)  # a second of events
    assert stage.when[1] - began == pytest.approx(0.5, abs=0.06)
    stage.assert_true()


async def test_while_a_watch_fails_nothing_is_claimed_not_to_exist(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    store(server, *ONE)
    stage = Stage(server, DiscoveryRules(max_outage=10.0))
    again: list[float] = []
    stage.discovery.on_current = lambda: again.append(trio.current_time())
    nursery.start_soon(stage.discovery.run)
    await stage.discovery.ready.wait()
    await trio.sleep(2)
    assert stage.discovery.is_current()
    server.behaviour.down = True
    server.cut()
    await trio.sleep(0.1)
    assert not stage.discovery.is_current()
    assert stage.discovery.outage() == ""
    await trio.sleep(10)
    assert "pods: " in stage.discovery.outage()
    store(server, pod("late", "10.2.0.1"))
    server.behaviour.down = False
    await until(stage.discovery.is_current, "all watches work", 100)
    assert stage.discovery.outage() == ""
    assert "10.2.0.1" in stage.discovery.catalog.pods, "what was missed is known before"
    await trio.sleep(1)
    (when,) = again
    assert when > 10
    stage.assert_true()


async def test_an_unreachable_api_server_removes_nothing(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    store(server, *ONE)
    stage = Stage(server)
    nursery.start_soon(stage.discovery.run)
    await stage.discovery.ready.wait()
    server.behaviour.down = True
    server.cut()
    await trio.sleep(600)
    assert len(stage.reports) == 1
    remove(server, ONE[2])
    server.behaviour.down = False
    server.store.compact()
    await trio.sleep(120)
    assert len(stage.reports) == 2
    stage.assert_true()


async def test_metadata_alone_makes_no_change(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    store(server, *ONE)
    stage = Stage(server)
    nursery.start_soon(stage.discovery.run)
    await stage.discovery.ready.wait()

    def annotated(item: Json) -> Json:
        return {**item, "metadata": {**item["metadata"], "annotations": {"some": "thing"}}}

    for of in KIND_OF.values():
        for key in list(server.store.objects[of]):
            server.store.update(of, key, annotated)
    await trio.sleep(10)
    assert sum(reflector.counts.events for reflector in stage.discovery.reflectors) == 4
    assert len(stage.reports) == 1


async def test_pods_that_have_ended_are_left_out_by_the_server(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    store(server, *ONE)
    stage = Stage(server)
    nursery.start_soon(stage.discovery.run)
    await stage.discovery.ready.wait()
    ended = pod("a", "10.1.0.1")
    ended["status"]["phase"] = "Succeeded"
    store(server, ended)
    await trio.sleep(10)
    assert stage.discovery.catalog.pods == {}
    assert stage.discovery.reflectors[1].known == {}
    stage.assert_true()


def test_an_invalid_trust_domain_is_refused_at_once() -> None:
    with pytest.raises(SpiffeIdError):
        Catalog("Not_A/Domain")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), ITEMS),
        st.tuples(st.just("remove"), ITEMS),
        st.tuples(st.just("wait"), st.sampled_from([0.01, 1.0, 100.0])),
        st.sampled_from(
            [
                ("cut", None),
                ("compact", None),
                ("down", True),
                ("down", False),
                ("refuse", 410),
                ("refuse", 429),
                ("refuse", 500),
            ]
        ),
    ),
    max_size=25,
)


async def play(steps: list[tuple[str, Any]]) -> None:
    async with trio.open_nursery() as nursery:
        server = ApiServer(nursery)
        stage = Stage(server)
        nursery.start_soon(stage.discovery.run)
        for what, value in steps:
            match what:
                case "put":
                    store(server, value)
                case "remove":
                    remove(server, value)
                case "wait":
                    await trio.sleep(value)
                case "cut":
                    server.cut()
                case "compact":
                    server.store.compact()
                case "down":
                    server.behaviour.down = value
                    server.cut()
                case "refuse":
                    server.faults.append(refuse(value, "Expired" if value == 410 else ""))
                    server.cut()
        server.behaviour.down = False
        server.faults.clear()
        await trio.sleep(400)
        stage.assert_true()
        nursery.cancel_scope.cancel()


@settings(max_examples=40)
@given(STEPS)
def test_the_final_state_is_that_of_a_fresh_list(
    steps: list[tuple[str, Any]],
) -> None:
    trio.run(play, steps, clock=MockClock(autojump_threshold=0))


async def test_an_outage_that_ends_between_two_checks_is_reported_too(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    """An answer may have been withheld in it."""
    store(server, *ONE)
    stage = Stage(server)
    again: list[bool] = []
    stage.discovery.on_current = lambda: again.append(True)
    nursery.start_soon(stage.discovery.run)
    await stage.discovery.ready.wait()
    await trio.sleep(2)
    assert stage.discovery.is_current()
    pods = stage.discovery.reflectors[1]
    pods.failing_since = trio.current_time()
    assert not stage.discovery.is_current()
    pods.failing_since = None
    await trio.sleep(1)
    assert again == [True]


async def test_each_flush_is_reported_also_without_changes(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    store(server, *ONE)
    stage = Stage(server)
    flushes: list[float] = []
    stage.discovery.on_flush = lambda: flushes.append(trio.current_time())
    nursery.start_soon(stage.discovery.run)
    await stage.discovery.ready.wait()
    assert len(flushes) == len(stage.reports) == 1
    await trio.sleep(1)
    late = pod("late", "10.2.0.1")
    store(server, late)
    remove(server, late)
    await trio.sleep(1)
    assert len(flushes) == 2
    assert len(stage.reports) == 1
