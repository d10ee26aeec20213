"""The manifests of the control plane on a real cluster: replicas, leadership, rights and metrics."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from control.kube.leader_election import LeaseRules
from control.kube.objects import ResourceAttributes, UserInfo
from control.kube.reviews import may
from lab.kube.cluster import Cluster
from tests.kube.installed import CONTROL, NAMESPACE, Installed, documents, joined, removed
from tests.kube.stage import RealStage

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{CONTROL}"
# Seconds in which a replica takes over from a leader that hangs: see leader_election.py.
TAKEOVER = LeaseRules().duration + 2 * LeaseRules().retry_interval


@pytest.fixture
async def installed(west: Cluster, tmp_path: Path) -> AsyncIterator[Installed]:
    async with removed(west):
        text = joined(await documents(tmp_path))
        done = await west.kubectl("apply", "--server-side", "-f", "-", stdin=text)
        assert b"Warning" not in done.stderr  # such as a violation of a Pod Security Standard
        found = Installed(west)
        await found.available()
        yield found


async def test_two_replicas_are_ready_and_one_leads(installed: Installed) -> None:
    pods = await installed.pods()
    assert len(pods) == 2
    leader = await installed.until_one_leads()
    assert leader in pods
    for pod in pods.values():
        (status,) = pod["status"]["containerStatuses"]
        assert (status["ready"], status["restartCount"]) == (True, 0)
    for name in pods:
        found = await installed.metrics(name)
        for kind in ("services", "endpointslices", "pods", "nodes"):
            assert found[f'isthmus_control_synced{{resource="{kind}"}}'] == 1
            assert found[f'isthmus_control_objects{{resource="{kind}"}}'] >= 1
            assert found[f'isthmus_control_watch_total{{resource="{kind}",what="failures"}}'] == 0
        # kubernetes, kube-dns and isthmus-control itself
        assert found["isthmus_control_services"] >= 3
        assert found["isthmus_control_api_refusals_total"] <= 2  # the Lease, before it existed
        assert "WARNING" not in await installed.log(name)
    # The Service has the replicas behind it.
    path = f"/api/v1/namespaces/{NAMESPACE}/services/{CONTROL}:admin/proxy/ready"
    assert await installed.kubectl("get", "--raw", path) == "ready\n"


async def test_a_drain_stops_one_replica_at_a_time(installed: Installed) -> None:
    await installed.until_one_leads()

    async def evict(pod: str) -> str:
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": NAMESPACE},
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
        done = await installed.west.kubectl(
            "create", "--raw", path, "-f", "-", stdin=json.dumps(body), check=False
        )
        return "" if done.ok else done.stderr.decode()

    first, second = await installed.pods()
    # The budget is known a moment after the pods are ready.
    with trio.fail_after(30):
        while True:
            if not await evict(first):
                break
            await trio.sleep(0.2)
    assert "disruption budget" in await evict(second)
    await installed.available()
    await installed.until_one_leads()
    assert second in await installed.pods()


async def test_a_leader_that_ends_gives_the_lease_to_the_other_replica(
    installed: Installed,
) -> None:
    leader = await installed.until_one_leads()
    began = trio.current_time()
    await installed.kubectl("delete", "pod", leader, "--wait=false")
    await installed.leader(but=leader)
    # It has not waited until the lease expired.
    assert trio.current_time() - began < LeaseRules().duration - LeaseRules().retry_interval
    await installed.available()
    assert await installed.until_one_leads() != leader


@pytest.mark.own_cluster
async def test_a_leader_that_hangs_is_replaced_and_stops_leading(
    installed: Installed,
) -> None:
    leader = await installed.until_one_leads()
    began = trio.current_time()
    await installed.signal(leader, "STOP")
    try:
        other = await installed.leader(but=leader, timeout=TAKEOVER + 15)
        # Not before the lease has expired: the last renewal was at most one interval ago.
        assert trio.current_time() - began > LeaseRules().duration - LeaseRules().retry_interval - 1
    finally:
        with trio.move_on_after(30, shield=True):
            await installed.signal(leader, "CONT")
    # It finds out before it does anything else as the leader.
    assert await installed.until_one_leads() == other
    await installed.available()
    assert "no longer the leader" in await installed.log(leader)


@pytest.mark.own_cluster
async def test_a_leader_that_is_killed_is_replaced(installed: Installed) -> None:
    leader = await installed.until_one_leads()
    await installed.signal(leader, "KILL")
    with trio.fail_after(60):
        while True:
            pod = (await installed.pods())[leader]
            (status,) = pod["status"]["containerStatuses"]
            if status["restartCount"] == 1 and status["ready"]:
                break
            await trio.sleep(0.2)
    await installed.until_one_leads(TAKEOVER + 15)
    await installed.available()
    assert len(await installed.pods()) == 2


# Rights

# Verb, API group, resource with subresource.
Right = tuple[str, str, str]
READ = {
    (verb, group, resource)
    for group, resource in (
        ("", "services"),
        ("", "pods"),
        ("", "nodes"),
        ("discovery.k8s.io", "endpointslices"),
    )
    for verb in ("list", "watch")
}
EVENTS = {(verb, "events.k8s.io", "events") for verb in ("create", "patch")}
REVIEWS = {("create", "authentication.k8s.io", "tokenreviews")}
CREATE_LEASE = {("create", "coordination.k8s.io", "leases")}
USE_LEASE = {(verb, "coordination.k8s.io", "leases") for verb in ("get", "patch")}


async def every_right(west: Cluster) -> set[Right]:
    """All rights that the API server can be asked for."""
    paths = ["/api/v1"] + [
        f"/apis/{group['preferredVersion']['groupVersion']}"
        for group in (await west.get("--raw", "/apis"))["groups"]
    ]

    def rights(path: str, found: dict[str, Any]) -> Iterator[Right]:
        group = path.split("/")[2] if path.startswith("/apis/") else ""
        for resource in found["resources"]:
            for verb in resource["verbs"]:
                yield verb, group, resource["name"]

    return {right for path in paths for right in rights(path, await west.get("--raw", path))}


async def granted(
    stage: RealStage, account: str, wanted: set[Right], namespace: str = "", name: str = ""
) -> set[Right]:
    """Which of these rights a service account of `isthmus` has, as the API server answers."""
    groups = (
        "system:serviceaccounts",
        f"system:serviceaccounts:{NAMESPACE}",
        "system:authenticated",
    )
    user = UserInfo(f"system:serviceaccount:{NAMESPACE}:{account}", groups=groups)
    found = set()

    async def ask(right: Right) -> None:
        verb, group, whole = right
        resource, _, subresource = whole.partition("/")
        attributes = ResourceAttributes(verb, resource, group, namespace, name, subresource)
        if await may(stage.client, user, attributes):
            found.add(right)

    waiting = sorted(wanted)

    async def worker() -> None:
        while waiting:
            await ask(waiting.pop())

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(worker)
    return found


async def test_the_service_account_has_exactly_the_needed_rights(
    west: Cluster, stage: RealStage, tmp_path: Path
) -> None:
    rights = [
        one
        for one in await documents(tmp_path)
        if one["kind"] not in ("Deployment", "PodDisruptionBudget")
    ]
    async with removed(west):
        await west.apply(joined(rights))
        everything = await every_right(west)
        assert len(everything) > 300
        assert everything >= READ | EVENTS | REVIEWS | CREATE_LEASE | USE_LEASE
        # What every service account may do, such as asking what it may do itself.
        ordinary = await granted(stage, "default", everything)
        assert not ordinary & (READ | EVENTS | REVIEWS | CREATE_LEASE | USE_LEASE)
        with trio.fail_after(30):  # the API server applies new roles a moment later
            while True:
                if await granted(stage, CONTROL, CREATE_LEASE, NAMESPACE):
                    break
                await trio.sleep(0.1)
        assert await granted(stage, CONTROL, everything) - ordinary == READ | EVENTS | REVIEWS
        assert (
            await granted(stage, CONTROL, everything, NAMESPACE) - ordinary
            == READ | EVENTS | REVIEWS | CREATE_LEASE
        )
        leases = {right for right in everything if right[1] == "coordination.k8s.io"}
        assert await granted(stage, CONTROL, leases, NAMESPACE, CONTROL) == CREATE_LEASE | USE_LEASE
        assert await granted(stage, CONTROL, leases, NAMESPACE, "other") == CREATE_LEASE
        assert await granted(stage, CONTROL, leases, "default", CONTROL) == set()
        for words, message in (
            (("get", "secrets"), 'cannot list resource "secrets"'),
            (("get", "pod", "a"), 'cannot get resource "pods"'),
            (("delete", "lease", CONTROL), 'cannot delete resource "leases"'),
        ):
            done = await west.kubectl(
                "--as", ACCOUNT, "--namespace", NAMESPACE, *words, check=False
            )
            assert not done.ok
            assert message in done.stderr.decode()


async def test_a_missing_right_is_named_and_nothing_has_to_be_restarted_when_it_is_there(
    west: Cluster, tmp_path: Path
) -> None:
    everything = await documents(tmp_path)
    without_leases = [one for one in everything if one["kind"] != "RoleBinding"]
    without_pods = json.loads(json.dumps(without_leases))
    for one in without_pods:
        if one["kind"] == "ClusterRole":
            one["rules"][0]["resources"].remove("pods")
    installed = Installed(west)

    async with removed(west):
        await west.apply(joined(without_pods))
        line = await installed.until_logged(r".*WARNING.*resource \"pods\".*")
        assert f'list and watch of pods: 403 Forbidden: pods is forbidden: User "{ACCOUNT}"' in line
        pods = await installed.pods()
        assert len(pods) == 2
        assert not any(
            status["ready"]
            for pod in pods.values()
            for status in pod["status"]["containerStatuses"]
        )
        await west.apply(joined(without_leases))
        await installed.until_logged(r"list and watch of pods: works again")
        line = await installed.until_logged(r".*WARNING.*resource \"leases\".*")
        assert f"the lease {NAMESPACE}/{CONTROL}: 403 Forbidden" in line
        # Discovery needs no lease.
        await installed.available()
        assert set((await installed.leading()).values()) == {0.0}
        await west.apply(joined(everything))
        await installed.until_one_leads()
        await installed.until_logged(r"the lease isthmus/isthmus-control: works again")
        for name, pod in (await installed.pods()).items():
            (status,) = pod["status"]["containerStatuses"]
            assert name in pods
            assert (status["ready"], status["restartCount"]) == (True, 0)
        for name in pods:
            # One warning for each fault, not one for each attempt.
            warnings = [
                line for line in (await installed.log(name)).splitlines() if "WARNING" in line
            ]
            assert len(warnings) <= 4, warnings
