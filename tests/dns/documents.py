"""A directory for the tests of names."""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from proxy.directory import Directory, parse
from proxy.dns.virtual_addresses import RemoteName

SEARCH = ("default.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com")


EAST_C, EAST_DB = RemoteName("east", "default", "c"), RemoteName("east", "shop", "db")


def document(
    *local: tuple[str, str],
    remote: tuple[RemoteName, ...] = (EAST_C, EAST_DB),
    domain: str = "cluster.local",
) -> Directory:
    def services(names: Iterable[tuple[str, str]]) -> list[dict[str, object]]:
        return [
            {"name": name, "namespace": namespace, "ports": [{"port": 80}]}
            for name, namespace in names
        ]

    gateway = {"port": 4143, "identity": "spiffe://cluster.local/ns/isthmus/sa/gateway"}
    clusters = [
        {
            "name": cluster,
            "gateways": [{**gateway, "address": f"192.0.2.{number}"}],
            "services": services((n.name, n.namespace) for n in remote if n.cluster == cluster),
        }
        for number, cluster in enumerate(("east", "north"))
    ]
    return parse(
        yaml.safe_dump({"domain": domain, "services": services(local), "clusters": clusters}),
        "test",
    )
