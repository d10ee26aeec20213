"""Objects of a cluster as JSON, as in a manifest, and a catalog of them."""

from __future__ import annotations

from typing import Any

import msgspec

from control.contract import SpiffeId
from control.discovery.catalog import Catalog, Changes
from control.discovery.directory_document import document
from control.discovery.entries import EndpointEntry, ServiceEntry
from control.discovery.facts import node_zone, pod_fact, service_fact, slice_fact
from control.discovery.usable_endpoints import NOWHERE, Place
from control.kube.objects import EndpointSlice, PartialObjectMetadata, Pod, Service
from control.kube.resources import Key
from proxy.directory import Directory, parse

Json = dict[str, Any]
TRUST_DOMAIN = "test.local"


def identity(account: str, namespace: str = "shop") -> SpiffeId:
    return SpiffeId(TRUST_DOMAIN, namespace, account)


def meta(name: str, namespace: str, **more: Any) -> Json:
    return {
        "name": name,
        "namespace": namespace,
        "uid": f"uid-{name}",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        **more,
    }


def port(number: int, name: str = "", **more: Any) -> Json:
    return {"port": number, "name": name, "protocol": "TCP", **more}


def service(
    name: str = "web",
    ip: str | None = "10.96.0.1",
    *ports: Json,
    namespace: str = "shop",
    **more: Any,
) -> Json:
    """With `spec` and `metadata` for what is omitted here."""
    spec: Json = {
        "type": "ClusterIP",
        "ports": list(ports or (port(80, targetPort=8080),)),
        "selector": {"app": name},
    }
    if ip is not None:
        spec |= {"clusterIP": ip, "clusterIPs": [ip]}
    return {"metadata": meta(name, namespace, **more.pop("metadata", {})), "spec": {**spec, **more}}


def endpoint(address: str, pod: str | None = None, **more: Any) -> Json:
    """`pod`: the pod that it names."""
    found: Json = {
        "addresses": [address],
        "conditions": {"ready": True, "serving": True, "terminating": False},
    }
    if pod is not None:
        found["targetRef"] = {"kind": "Pod", "name": pod, "namespace": "shop", "uid": f"uid-{pod}"}
    return found | more


def slice_of(
    of: str,
    *endpoints: Json,
    name: str = "",
    namespace: str = "shop",
    ports: list[Json] | None = None,
    version: str = "1",
) -> Json:
    six = bool(endpoints) and ":" in endpoints[0]["addresses"][0]
    return {
        "metadata": meta(
            name or f"{of}-1",
            namespace,
            resourceVersion=version,
            labels={"kubernetes.io/service-name": of},
        ),
        "addressType": "IPv6" if six else "IPv4",
        "endpoints": list(endpoints) or None,
        "ports": [{"port": 8080, "protocol": "TCP", "name": ""}] if ports is None else ports,
    }


def pod(
    name: str,
    *ips: str,
    account: str = "web",
    namespace: str = "shop",
    meshed: bool = True,
    **more: Any,
) -> Json:
    labels = {"isthmus.dev/meshed": "true"} if meshed else {}
    made = meta(name, namespace, labels=labels, **more.pop("metadata", {}))
    return {
        "metadata": made,
        "spec": {"serviceAccountName": account, "nodeName": "node-1", **more},
        "status": {"phase": "Running", "podIPs": [{"ip": ip} for ip in ips]},
    }


def node(name: str, zone: str) -> Json:
    made = meta(name, "", labels={"topology.kubernetes.io/zone": zone})
    return {"kind": "PartialObjectMetadata", "metadata": made}


class Cluster:
    """A catalog that is fed with manifests."""

    def __init__(self, *networks: str) -> None:
        self.catalog = Catalog(TRUST_DOMAIN, networks)

    def put(self, *items: Json) -> Cluster:
        for item in items:
            self._put(item, gone=False)
        return self

    def remove(self, *items: Json) -> Cluster:
        for item in items:
            self._put(item, gone=True)
        return self

    def _put(self, item: Json, *, gone: bool) -> None:
        key = (item["metadata"].get("namespace", ""), item["metadata"]["name"])
        if "addressType" in item:
            self.catalog.slice(
                key, None if gone else slice_fact(msgspec.convert(item, EndpointSlice))
            )
        elif "status" in item:
            self.catalog.pod(key, None if gone else pod_fact(msgspec.convert(item, Pod)))
        elif "spec" in item:
            self.catalog.service(
                key, None if gone else service_fact(msgspec.convert(item, Service))
            )
        else:
            self.catalog.node(
                key[1], None if gone else node_zone(msgspec.convert(item, PartialObjectMetadata))
            )

    def flush(self) -> Changes:
        return self.catalog.flush()

    def entry(self, name: str = "web", namespace: str = "shop") -> ServiceEntry:
        self.flush()
        return self.catalog.services[namespace, name]

    def endpoints(self, name: str = "web", namespace: str = "shop") -> dict[str, EndpointEntry]:
        return {found.address: found for found in self.entry(name, namespace).endpoints}

    def directory(self, place: Place = NOWHERE) -> Directory:
        """What a proxy reads of it."""
        self.flush()
        text = msgspec.json.encode(
            document(self.catalog.services.values(), place)
        ).decode()  # JSON is YAML
        return parse(text, "discovered")

    def problems(self, key: Key = ("shop", "web")) -> tuple[str, ...]:
        self.flush()
        return self.catalog.problems.get(key, ())
