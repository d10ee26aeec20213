"""Random histories of services, slices, pods and nodes.

The order of the facts and of the flushes does not matter: the entries are those of a catalog that
gets only the last state. The sum of the reported changes gives the same entries. A proxy accepts
every state as a directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from control.discovery.catalog import Changes
from control.kube.resources import Key
from tests.control.cluster import (
    Cluster,
    Json,
)
from tests.control.random_objects import ITEMS, kind

STEPS = st.lists(st.tuples(ITEMS, st.booleans(), st.booleans()), max_size=30)


class Listener:
    """The state of a listener that only gets changes."""

    def __init__(self) -> None:
        self.services: dict[Key, Any] = {}
        self.pods: dict[str, Any] = {}
        self.unknown: dict[str, Any] = {}

    def apply(self, changes: Changes) -> None:
        both: list[tuple[dict[Any, Any], Mapping[Any, Any]]] = [
            (self.services, changes.services),
            (self.pods, changes.pods),
            (self.unknown, changes.unknown),
        ]
        for known, changed in both:
            for key, entry in changed.items():
                assert known.get(key) != entry, "a change that changes nothing"
                known[key] = entry
                if entry is None:
                    del known[key]


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
            listener.apply(cluster.flush())
    listener.apply(cluster.flush())
    fresh = Cluster().put(*state.values())
    fresh.flush()
    assert cluster.catalog.services == fresh.catalog.services == listener.services
    assert cluster.catalog.pods == fresh.catalog.pods == listener.pods
    assert cluster.catalog.unknown == fresh.catalog.unknown == listener.unknown
    assert cluster.catalog.problems == fresh.catalog.problems
    cluster.directory()
    no_clear_text(cluster, state)


def no_clear_text(cluster: Cluster, state: dict[tuple[str, str, str], Json]) -> None:
    """If a meshed pod has an address, or a service of one, no endpoint of any service has it in
    clear text."""
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
                ].meshed  # the address now belongs to a newer pod, which is not meshed
            assert not cluster.catalog.is_cluster_address(found.address)
