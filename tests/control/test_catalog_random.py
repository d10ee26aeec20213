"""Random histories of services, slices, pods and nodes.

The order of the facts and of the flushes does not matter: the entries are those of a catalog that
gets only the last state. The sum of the reported changes gives the same entries. A proxy accepts
every state as a directory.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from control.discovery.catalog import Changes
from control.kube.resources import Key
from tests.control.cluster import (
    Cluster,
    Json,
    endpoint,
    identity,
    node,
    pod,
    port,
    service,
    slice_of,
)

SPACES = st.sampled_from(["shop", "evil"])
NAMES = st.sampled_from(["a", "b"])
HOSTS = st.sampled_from(["10.1.0.1", "10.1.0.2", "fd00::1", "10.96.0.1", "203.0.113.7"])
TIMES = st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"])
UIDS = st.sampled_from(["1", "2"])
NODES = st.sampled_from(["node-1", "node-2", ""])


@st.composite
def services(draw: st.DrawFn) -> Json:
    identities = st.sampled_from(
        [
            {},
            {"isthmus.dev/endpoint-identity": str(identity("x"))},
            {"isthmus.dev/endpoint-identity": "?"},
        ]
    )
    about = {"annotations": draw(identities), "creationTimestamp": draw(TIMES), "uid": draw(UIDS)}
    ports = draw(st.sampled_from([[port(80, "http")], [port(80, "http"), port(81, "more")], []]))
    made = service(
        draw(NAMES),
        draw(st.sampled_from(["10.96.0.1", "10.96.0.2", "None"])),
        namespace=draw(SPACES),
        metadata=about,
    )
    made["spec"]["ports"] = ports
    made["spec"]["type"] = draw(
        st.sampled_from(["ClusterIP", "ClusterIP", "ClusterIP", "ExternalName"])
    )
    return made


@st.composite
def endpoints(draw: st.DrawFn) -> Json:
    made = endpoint(draw(HOSTS), nodeName=draw(NODES), zone=draw(st.sampled_from(["", "z"])))
    if draw(st.booleans()):
        made["targetRef"] = {
            "kind": "Pod",
            "namespace": draw(SPACES),
            "name": draw(NAMES),
            "uid": draw(st.sampled_from(["", "1", "2"])),
        }
    made["conditions"]["ready"] = draw(st.booleans())
    return made


@st.composite
def slices(draw: st.DrawFn) -> Json:
    ports = [port(8080, "http"), port(8081, "more")][: draw(st.integers(0, 2))]
    found = draw(st.lists(endpoints(), max_size=3))
    name, space, version = (
        draw(st.sampled_from(["s1", "s2"])),
        draw(SPACES),
        str(draw(st.integers(1, 3))),
    )
    return slice_of(draw(NAMES), *found, name=name, namespace=space, ports=ports, version=version)


@st.composite
def pods(draw: st.DrawFn) -> Json:
    about = {"creationTimestamp": draw(TIMES), "uid": draw(UIDS)}
    made = pod(
        draw(NAMES), *draw(st.lists(HOSTS, max_size=2, unique=True)), namespace=draw(SPACES), meshed=draw(st.booleans()), metadata=about,
        nodeName=draw(NODES), hostNetwork=draw(st.integers(0, 4)) == 0,
    )  # fmt: skip
    made["status"]["phase"] = draw(st.sampled_from(["Running", "Running", "Failed"]))
    return made


ITEMS = st.one_of(
    services(),
    slices(),
    pods(),
    st.builds(node, st.sampled_from(["node-1", "node-2"]), st.sampled_from(["x", "y"])),
)
STEPS = st.lists(st.tuples(ITEMS, st.booleans(), st.booleans()), max_size=30)


class Listener:
    """What somebody knows who hears of changes only."""

    def __init__(self) -> None:
        self.services: dict[Key, Any] = {}
        self.pods: dict[str, Any] = {}

    def hear(self, changes: Changes) -> None:
        for known, changed in ((self.services, changes.services), (self.pods, changes.pods)):
            for key, entry in changed.items():
                assert known.get(key) != entry, "a change that is none"
                known[key] = entry  # type: ignore[index]
                if entry is None:
                    del known[key]  # type: ignore[arg-type]


def kind(item: Json) -> str:
    return next((name for name in ("addressType", "status", "spec") if name in item), "node")


@settings(max_examples=400)
@given(STEPS)
def test_the_order_of_events_does_not_matter(steps: list[tuple[Json, bool, bool]]) -> None:
    cluster, listener = Cluster(), Listener()
    state: dict[tuple[str, str, str], Json] = {}
    for item, gone, flushed in steps:
        key = (kind(item), item["metadata"].get("namespace", ""), item["metadata"]["name"])
        if gone:
            cluster.remove(item)
            state.pop(key, None)
        else:
            cluster.put(item)
            state[key] = item
        if flushed:
            listener.hear(cluster.flush())
    listener.hear(cluster.flush())
    fresh = Cluster().put(*state.values())
    fresh.flush()
    assert cluster.catalog.services == fresh.catalog.services == listener.services
    assert cluster.catalog.pods == fresh.catalog.pods == listener.pods
    assert cluster.catalog.problems == fresh.catalog.problems
    cluster.directory()
    no_clear_text(cluster, state)


def no_clear_text(cluster: Cluster, state: dict[tuple[str, str, str], Json]) -> None:
    """No endpoint of any service is spoken to in clear text, if a meshed pod has its address, or a
    service."""
    meshed = {
        address["ip"]
        for item in state.values()
        if kind(item) == "status"
        and item["metadata"]["labels"]
        and item["status"]["phase"] == "Running"
        for address in item["status"]["podIPs"]
        if not item["spec"]["hostNetwork"]
    }
    for entry in cluster.catalog.services.values():
        for found in entry.endpoints:
            if found.identity is None and found.address in meshed:
                holder = cluster.catalog.holder(found.address)
                assert holder is not None
                assert not holder[
                    1
                ].meshed  # the address has gone over to a newer pod, which is not
            assert not cluster.catalog.is_cluster_address(found.address)
