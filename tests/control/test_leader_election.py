"""Leader election under faults: there are never two leaders, and in the end there is one again."""

from __future__ import annotations

import random

import pytest
import trio
from trio.abc import Clock

from control.kube.access import Access
from control.kube.client import Client
from control.kube.leader_election import Election
from control.kube.resources import LEASES
from lab.kube_api.server import ApiServer, Fault, refuse
from lab.kube_api.store import KINDS
from tests.control.conftest import AT

KIND = KINDS["coordination.k8s.io/v1", "leases"]
KEY = ("isthmus", "control")


class Replicas:
    """Replicas that take part, each with its own connection to the server, and who was the leader
    when."""

    def __init__(self, server: ApiServer, nursery: trio.Nursery) -> None:
        self.server, self.nursery = server, nursery
        self.cut_off: set[str] = set()
        self.log: list[tuple[float, str, str]] = []
        self.leading: set[str] = set()

    def start(self, name: str) -> trio.CancelScope:
        async def dial(access: Access) -> trio.abc.Stream:
            if name in self.cut_off:
                raise ConnectionRefusedError
            return await self.server.dial(access)

        async def lead() -> None:
            self.leading.add(name)
            assert self.leading == {name}
            self.log.append((trio.current_time(), name, "leads"))
            try:
                await trio.sleep_forever()
            finally:
                self.leading.remove(name)
                self.log.append((trio.current_time(), name, "stops"))

        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await Election(Client(AT, dial=dial, chance=random.Random(1)), KEY, name).run(lead)

        self.nursery.start_soon(run)
        return scope


@pytest.fixture
async def replicas(server: ApiServer, nursery: trio.Nursery) -> Replicas:
    return Replicas(server, nursery)


async def test_a_leader_that_is_cut_off_stops_before_the_next_one_begins(
    clock: Clock, replicas: Replicas
) -> None:
    replicas.start("a")
    await trio.sleep(10)
    replicas.start("b")
    await trio.sleep(60)
    assert replicas.leading == {"a"}
    replicas.cut_off.add("a")
    replicas.server.cut()
    began = trio.current_time()
    await trio.sleep(30)
    assert replicas.leading == {"b"}
    (stopped, _, _), (taken, _, _) = replicas.log[-2:]
    assert stopped - began <= 10
    assert 2 < taken - stopped < 12
    replicas.cut_off.clear()
    await trio.sleep(60)
    assert replicas.leading == {"b"}


async def test_there_is_no_leader_while_the_server_is_away_and_one_when_it_is_back(
    clock: Clock, replicas: Replicas
) -> None:
    for name in ("a", "b"):
        replicas.start(name)
    await trio.sleep(10)
    replicas.server.behaviour.down = True
    replicas.server.cut()
    await trio.sleep(10)
    assert replicas.leading == set()
    await trio.sleep(600)
    replicas.server.behaviour.down = False
    await trio.sleep(40)
    assert len(replicas.leading) == 1
    assert len(replicas.log) == 3


async def test_a_short_outage_does_not_change_the_leader(clock: Clock, replicas: Replicas) -> None:
    replicas.start("a")
    await trio.sleep(10)
    replicas.server.behaviour.down = True
    replicas.server.cut()
    await trio.sleep(5)
    replicas.server.behaviour.down = False
    await trio.sleep(60)
    assert [what for _, _, what in replicas.log] == ["leads"]


async def test_a_request_that_hangs_is_not_waited_for(clock: Clock, replicas: Replicas) -> None:
    replicas.start("a")
    await trio.sleep(10)
    replicas.server.faults.append(Fault(hang=True))
    await trio.sleep(60)
    assert [what for _, _, what in replicas.log] == ["leads"]


async def test_a_leader_that_is_cancelled_gives_the_lease_back(
    clock: Clock, replicas: Replicas
) -> None:
    scope = replicas.start("a")
    await trio.sleep(10)
    replicas.start("b")
    await trio.sleep(10)
    scope.cancel()
    began = trio.current_time()
    await trio.sleep(5)
    assert replicas.leading == {"b"}
    assert replicas.log[-1][0] - began <= 2
    lease = await Client(AT, dial=replicas.server.dial).get(LEASES, *KEY)
    assert (lease.spec.holder_identity, lease.spec.lease_transitions) == ("b", 1)


async def test_a_lease_that_another_replica_takes_is_lost(clock: Clock, replicas: Replicas) -> None:
    replicas.start("a")
    await trio.sleep(10)
    replicas.server.store.update(
        KIND, KEY, lambda item: {**item, "spec": {**item["spec"], "holderIdentity": "thief"}}
    )
    await trio.sleep(3)
    assert replicas.leading == set()
    await trio.sleep(30)
    assert replicas.leading == {"a"}  # the thief did not renew it


async def test_a_lease_that_is_deleted_is_made_again(clock: Clock, replicas: Replicas) -> None:
    replicas.start("a")
    await trio.sleep(10)
    replicas.server.store.delete(KIND, KEY)
    await trio.sleep(30)
    assert replicas.leading == {"a"}
    assert KEY in replicas.server.store.objects[KIND]


@pytest.mark.parametrize("code", [403, 429, 500])
async def test_a_server_that_refuses_is_asked_again_at_a_low_rate(
    clock: Clock, replicas: Replicas, code: int
) -> None:
    replicas.server.faults.extend(refuse(code) for _ in range(10_000))
    replicas.start("a")
    await trio.sleep(600)
    assert replicas.leading == set()
    assert len(replicas.server.log) < 310
    replicas.server.faults.clear()
    await trio.sleep(60)
    assert replicas.leading == {"a"}


async def test_a_replica_with_the_same_name_continues_at_once(
    clock: Clock, replicas: Replicas
) -> None:
    """A container that was restarted in the same pod."""
    replicas.start("a")
    await trio.sleep(10)
    replicas.server.store.update(KIND, KEY, lambda item: item)
    other = Replicas(replicas.server, replicas.nursery)
    other.start("a")
    await trio.sleep(1)
    assert other.leading == {"a"}
