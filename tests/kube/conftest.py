"""Tests on real Kubernetes clusters: `make test-kube`.

`west` and `east` are started once for all tests, in namespaces of their own, or are those that run
already (`python -m lab.kube run --clusters west,east -- bash`). With KUBECONFIG set to any other
cluster, the tests with the mark `own_cluster` are skipped. Each test has its own namespace, which
is deleted afterwards.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from control.kube.access import kubeconfig_file
from control.kube.client import Client
from control.kube.objects import Meta
from lab.kube import cluster as kube
from lab.kube.cluster import ENV_RUNNING, Cluster
from lab.kube.guard import ENV_RUN
from lab.kube.network import NAMES
from tests.kube.stage import NAMESPACES, Namespace, RealStage

_OURS = bool(os.environ.get(ENV_RUN))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    foreign = os.environ.get("KUBECONFIG") and not _OURS
    for item in items:
        if foreign and item.get_closest_marker("own_cluster"):
            item.add_marker(
                pytest.mark.skip(
                    reason="needs the clusters of the laboratory, and KUBECONFIG names another one"
                )
            )
        elif not foreign and not _OURS:
            item.add_marker(
                pytest.mark.skip(reason="no cluster: run `make test-kube`, or set KUBECONFIG")
            )


@pytest.fixture(scope="session")
def clusters() -> Iterator[dict[str, Cluster]]:
    """Both clusters of the laboratory, joined. They do not depend on an event loop, so every test
    can use them."""
    if running := os.environ.get(ENV_RUNNING):
        yield {name: kube.attach(name) for name in running.split(",")}
        return
    found = trio.run(kube.start_all, NAMES)
    try:
        yield found
    finally:
        for cluster in found.values():
            trio.run(cluster.aclose)


@pytest.fixture(scope="session")
def west(request: pytest.FixtureRequest) -> Cluster:
    """A cluster: the laboratory's, or that of KUBECONFIG."""
    if _OURS:
        found: Cluster = request.getfixturevalue("clusters")["west"]
        return found
    return kube.foreign(Path(os.environ["KUBECONFIG"]))


@pytest.fixture(scope="session")
def east(clusters: dict[str, Cluster]) -> Cluster:
    """The other cluster of the laboratory."""
    return clusters["east"]


@pytest.fixture
async def namespace(west: Cluster) -> AsyncIterator[str]:
    """A namespace of `west` for one test."""
    name = f"test-{secrets.token_hex(4)}"
    await west.kubectl("create", "namespace", name)
    try:
        await west.until(
            "service accounts are there", "--namespace", name, "get", "serviceaccount", "default"
        )
        yield name
    finally:
        with trio.CancelScope(shield=True):
            await west.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def clock() -> None:
    """The machine's clock, not the one of pytest-trio."""


@pytest.fixture
async def stage(west: Cluster) -> AsyncIterator[RealStage]:
    """The client of the control plane, in a namespace of `west` for one test."""
    client = Client(kubeconfig_file(west.kubeconfig))
    name = f"rules-{secrets.token_hex(4)}"
    made = await client.create(NAMESPACES, Namespace(metadata=Meta(name=name)))
    stage = RealStage(client, name)
    await stage.account_is_there()
    yield stage
    with trio.move_on_after(30, shield=True):
        await client.delete(NAMESPACES, made)
        await client.aclose()
