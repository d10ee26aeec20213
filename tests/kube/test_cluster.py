"""The test cluster is a regular Kubernetes: nodes, names, Services, and two clusters that see only
each other's nodes."""

from __future__ import annotations

import json
import os

import pytest
import trio

from lab.kube.cluster import Cluster
from lab.kube.network import DNS
from lab.kube.places import ENV_VERSION
from lab.process import LabError
from tests.kube.kit import ask, deploy, eventually, inside


async def conditions(cluster: Cluster) -> dict[str, str]:
    nodes = (await cluster.get("nodes"))["items"]
    return {
        node["metadata"]["name"]: one["status"]
        for node in nodes
        for one in node["status"]["conditions"]
        if one["type"] == "Ready"
    }


async def test_every_node_is_ready(west: Cluster) -> None:
    found = await conditions(west)
    assert found
    assert set(found.values()) == {"True"}


@pytest.mark.own_cluster
async def test_both_clusters_have_their_node_and_the_version_that_was_asked_for(
    west: Cluster, east: Cluster
) -> None:
    for cluster in (west, east):
        assert await conditions(cluster) == {cluster.name: "True"}
        version = (await cluster.get("--raw", "/version"))["gitVersion"]
        assert version.startswith(f"v{os.environ[ENV_VERSION]}.")
        node = (await cluster.get("node", cluster.name))["status"]
        assert node["nodeInfo"]["kubeletVersion"] == version


async def test_a_service_is_served_by_its_name_by_all_its_pods(
    west: Cluster, namespace: str
) -> None:
    await deploy(west, namespace, replicas=2)
    pods = {
        pod["metadata"]["name"]
        for pod in (await west.get("--namespace", namespace, "pods"))["items"]
    }
    assert len(pods) == 2
    await eventually(west, namespace, "deployment/web", "http://web/")
    # Each new connection goes to a random pod: all 64 to the same one has a chance of one in 2^63.
    urls = [f"http://web.{namespace}.svc.cluster.local/{number}" for number in range(64)]
    lines = await inside(
        west,
        namespace,
        "deployment/web",
        "curl",
        "--silent",
        "--fail",
        "-H",
        "Connection: close",
        "-w",
        "\\n",
        *urls,
    )
    assert {json.loads(line)["pod"] for line in lines.split("\n") if line} == pods


async def test_names_are_resolved(west: Cluster, namespace: str) -> None:
    await deploy(west, namespace)
    address = (await west.get("--namespace", namespace, "service", "web"))["spec"]["clusterIP"]
    assert (
        await inside(
            west, namespace, "deployment/web", "dig", "+short", f"web.{namespace}.svc.cluster.local"
        )
    ).split() == [address]
    unknown = await inside(west, namespace, "deployment/web", "dig", "nothing.svc.cluster.local")
    assert "status: NXDOMAIN" in unknown
    if west.name == "west":
        assert f"nameserver {DNS}" in await inside(
            west, namespace, "deployment/web", "cat", "/etc/resolv.conf"
        )


async def test_pods_have_both_families(west: Cluster, namespace: str) -> None:
    await deploy(west, namespace)
    pod = (await west.get("--namespace", namespace, "pods"))["items"][0]
    for address in (one["ip"] for one in pod["status"]["podIPs"]):
        host = f"[{address}]" if ":" in address else address
        assert (await ask(west, namespace, "deployment/web", f"http://{host}:8080/"))["pod"] == pod[
            "metadata"
        ]["name"]
    if west.name == "west":
        assert len(pod["status"]["podIPs"]) == 2


@pytest.mark.own_cluster
async def test_a_pod_reaches_the_other_clusters_node_and_nothing_behind_it(
    west: Cluster, east: Cluster, namespace: str
) -> None:
    await deploy(west, namespace)

    async def ask_api(address: str) -> str:
        command = [
            "curl",
            "--silent",
            "--insecure",
            "--max-time",
            "5",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            f"https://{address}:6443/version",
        ]
        return await inside(west, namespace, "deployment/web", *command, check=False)

    assert await ask_api(east.addresses.wan) == "200"
    # The link to the test does not connect the clusters.
    assert (await ask_api(east.addresses.node)).startswith("000")


@pytest.mark.own_cluster
async def test_nodes_reach_each_other(west: Cluster, east: Cluster) -> None:
    for one, other in ((west, east), (east, west)):
        for address in (other.addresses.wan, *other.addresses.balanced):
            await one.enter("bash", "-c", f"exec 3<>/dev/tcp/{address}/6443", timeout=10)


async def complaint(cluster: Cluster) -> str:
    """The error of kubectl when the API server does not answer any more."""
    with trio.fail_after(30):
        while True:
            done = await cluster.kubectl("get", "--raw", "/readyz", check=False)
            if not done.ok:
                return done.stderr.decode()
            await trio.sleep(0.1)


@pytest.mark.own_cluster
async def test_a_component_that_is_stopped_stays_away_until_it_is_started(east: Cluster) -> None:
    await east.stop("kube-apiserver")
    try:
        assert "refused" in await complaint(east)
        assert await east.pid("kube-apiserver") == 0
    finally:
        with trio.move_on_after(30, shield=True):
            await east.start("kube-apiserver")
    await east.until("the API is ready", "get", "--raw", "/readyz")
    assert (await east.get("--namespace", "kube-system", "deployment", "coredns"))["metadata"][
        "name"
    ] == "coredns"


@pytest.mark.own_cluster
async def test_a_component_that_ends_is_started_again(east: Cluster) -> None:
    before = await east.pid("kube-scheduler")
    await east.enter("kill", "-KILL", str(before))
    with trio.fail_after(30):
        while True:
            if await east.pid("kube-scheduler") not in (0, before):
                break
            await trio.sleep(0.1)
    with pytest.raises(LabError, match="no component"):
        await east.pid("kube-nothing")
