"""Objects of Kubernetes, and a store that holds them."""

from __future__ import annotations

from control.kube.resources import Key
from lab.kube_api.server import ApiServer
from lab.kube_api.store import KINDS, Kind, Problem
from tests.control.cluster import (
    Json,
    endpoint,
    node,
    pod,
    service,
    slice_of,
)
from tests.control.random_objects import kind

KIND_OF = {
    "addressType": KINDS["discovery.k8s.io/v1", "endpointslices"],
    "status": KINDS["v1", "pods"],
    "spec": KINDS["v1", "services"],
    "node": KINDS["v1", "nodes"],
}


def name_of(item: Json) -> tuple[Kind, Key]:
    return KIND_OF[kind(item)], (item["metadata"].get("namespace", ""), item["metadata"]["name"])


def store(server: ApiServer, *items: Json) -> None:
    """Stores objects as the API server does: it sets its own versions and uids, and references to
    pods have these uids."""
    for item in items:
        of, key = name_of(item)
        data = {name: value for name, value in item.items() if name != "metadata"}
        meta = {
            name: value
            for name, value in item["metadata"].items()
            if name in ("name", "namespace", "labels", "annotations")
        }
        for found in data.get("endpoints") or ():
            if "targetRef" in found:
                found["targetRef"] = {**found["targetRef"], "uid": ""}
        made = {"metadata": {**meta, "namespace": key[0]}, **data}
        try:
            current = server.store.get(of, key)
        except Problem:
            server.store.create(of, key[0], made)
            continue
        kept = {
            **current["metadata"],
            "labels": meta.get("labels") or {},
            "annotations": meta.get("annotations") or {},
        }
        server.store.objects[of][key] = current  # unchanged, so that it accepts the status too
        server.store._store(of, key, {**made, "metadata": kept})


ONE = [
    service(),
    slice_of("web", endpoint("10.1.0.1", "a", nodeName="node-1")),
    pod("a", "10.1.0.1"),
    node("node-1", "west-1"),
]
