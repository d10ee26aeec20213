"""What the laboratory writes for its proxies is what the product documents.

Rules: the product's own reader reads the documents. They are those of laboratories that other tests
build in the same way."""

from typing import Any

import jsonschema
import pytest
import yaml

from lab.cluster import Lab
from lab.mesh import Mesh
from lab.sidecar import merge
from proxy.directory import Directory, directory_schema, parse
from proxy.net.address import Address

pytestmark = pytest.mark.lab


def read(mesh: Mesh) -> Directory:
    document = mesh.document()
    jsonschema.validate(document, directory_schema())
    return parse(yaml.safe_dump(document), mesh.cluster.name)


async def test_linked_meshes_know_each_others_gateways_and_exports_and_nothing_else(
    lab: Lab,
) -> None:
    area = lab.wide_area()
    west = Mesh(lab.cluster("west"))
    east, south = (Mesh(lab.cluster(name), west.authority) for name in ("east", "south"))
    gateway, server, hidden = (east.cluster.pod(name) for name in ("gateway", "server", "hidden"))
    leg = area.attach(gateway)
    east.gateway(gateway, leg)
    east.join(server, "c")
    east.service("c", [server], {80: "http1", 5432: "opaque"}, export=True)
    east.service("secret", [hidden], {80: "http1"})
    border = area.border(south.cluster)
    border.publish(14143, south.cluster.pod("gateway"), 4143)
    south.gateway(south.cluster.pods["gateway"], border.leg, port=14143)
    south.service("c", [south.cluster.pod("server")], {80: "http1", 5432: "opaque"}, export=True)
    west.link(east, south)
    split = [{"service": "c", "weight": 90}, {"service": "c", "cluster": "east", "weight": 10}]
    local = west.service(
        "c",
        [west.cluster.pod("c")],
        {80: "http1", 5432: "opaque"},
        split=split,
        failover={"clusters": ["east", "south"]},
    )

    found = read(west)
    assert found.name == "west"
    remote = found.find_service("c.east", "default")
    assert remote is not None
    (way,) = remote.targets[80].endpoints
    assert (way.address, str(way.identity)) == (
        Address(leg.ipv4, 4143),
        "spiffe://cluster.local/ns/isthmus/sa/gateway",
    )
    assert found.find_service("secret.east", "default") is None
    other = found.find_service("c.south", "default")
    assert other is not None
    assert other.targets[80].endpoints[0].address == Address(border.leg.ipv4, 14143)
    plan = found.resolve(Address(local.ipv4, 80)).plan
    assert plan is not None
    assert [(backend.weight, backend.target.service) for backend in plan.backends] == [
        (90, "default/c"),
        (10, "east/default/c"),
    ]
    assert [each.service for each in plan.backends[0].elsewhere] == [
        "east/default/c",
        "south/default/c",
    ]
    text = yaml.safe_dump(west.document())
    assert not any(
        address in text for pod in east.cluster.pods.values() for address in (pod.ipv4, pod.ipv6)
    )

    own = read(east)
    assert own.exported(b"c.default.svc.cluster.local") is not None
    assert own.exported(b"secret.default.svc.cluster.local") is None


def test_settings_laid_over_settings_leave_them_as_they_were() -> None:
    """The settings that all members share must not change with the settings of one."""
    shared: dict[str, Any] = {"inbound": {"trusted_gateways": ["a"]}}
    merged: dict[str, Any] = {}
    merge(merged, shared)
    merge(merged, {"inbound": {"allow": {"8080": ["b"]}}})
    merged["inbound"]["trusted_gateways"].append("c")
    assert merged == {"inbound": {"trusted_gateways": ["a", "c"], "allow": {"8080": ["b"]}}}
    assert shared == {"inbound": {"trusted_gateways": ["a"]}}
