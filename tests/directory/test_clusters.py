"""Other clusters in the directory: remote services by their names, exports, splits and failovers,
and the mistakes of a document."""

from __future__ import annotations

import time

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.directory import (
    Backend,
    Directory,
    DirectoryError,
    Hint,
    Remote,
    Target,
    directory_schema,
    parse,
)
from proxy.net.address import Address
from tests.directory.splits import GATEWAY, SPLITS, TEXT, WRONG


def directory(text: str = TEXT) -> Directory:
    return parse(text, "test")


def test_a_remote_service_is_a_target_whose_endpoints_are_the_gateways_of_its_cluster() -> None:
    service = directory().find_service("c.east", "default")
    assert service is not None
    assert (service.qualified, service.cluster) == ("east/default/c", "east")
    target = service.targets[80]
    assert (target.service, target.protocol) == ("east/default/c", Hint.HTTP2)
    assert target.remote == Remote("east", "c.default.svc.east.example", 80)
    assert [(str(e.address), str(e.identity)) for e in target.endpoints] == [
        ("203.0.113.7:4143", GATEWAY)
    ]


def test_the_gateway_gets_the_name_in_its_own_cluster_with_a_port_where_it_needs_one() -> None:
    remote = Remote("east", "c.default.svc.east.example", 80)
    assert (remote.authority, remote.tunnel) == (
        b"c.default.svc.east.example",
        b"c.default.svc.east.example:80",
    )
    assert Remote("east", "c", 8080).authority == b"c:8080"


def test_one_gateway_is_the_same_endpoint_for_all_services_behind_it() -> None:
    """So that they share its connections."""
    found = directory()
    one, two = (
        found.find_service("c.east", "default"),
        found.find_service("db.data.east", "default"),
    )
    assert one is not None
    assert two is not None
    assert one.targets[5432].endpoints == two.targets[5432].endpoints


def test_a_gateway_with_a_name_is_known_but_no_endpoint_yet() -> None:
    east = directory().clusters["east"]
    assert [(gateway.host, gateway.port, gateway.literal) for gateway in east.gateways] == [
        ("203.0.113.7", 4143, True), ("gw.east.example", 14143, False),
    ]  # fmt: skip
    assert east.gateways[1].at("192.0.2.1").address == Address("192.0.2.1", 14143)


@pytest.mark.parametrize(
    ("authority", "service"),
    [
        (b"c.east", "east/default/c"), (b"C-EAST.default.svc.cluster.local:80", "east/default/c"), (b"c", "default/c"), (b"c:81", None),
        (b"db.data.east:5432", "east/data/db"), (b"db.data.east", None), (b"10.96.0.1", None), (b"example.com", None), (b"", None),
    ],
)  # fmt: skip
def test_an_authority_names_a_port_of_a_service_or_nothing(
    authority: bytes, service: str | None
) -> None:
    target = directory().authority(authority, "default", "10.0.0.1")
    assert (target and target.service) == service


@pytest.mark.parametrize(
    ("authority", "service"),
    [
        (b"c.default.svc.cluster.local", "default/c"), (b"c.default:5432", "default/c"), (b"c", None), (b"c.default:81", None),
        (b"new.default", None), (b"c.default.east", None), (b"c-east.default.svc.cluster.local", None), (b"c.east", None),
    ],
)  # fmt: skip
def test_a_gateway_exports_only_marked_services_of_its_own_cluster_by_their_full_name(
    authority: bytes, service: str | None
) -> None:
    target = directory().exported(authority)
    assert (target and target.service) == service


def seen(target: Target) -> tuple[str | None, list[str]]:
    assert target.plan is None
    return target.service, [endpoint.address.host for endpoint in target.endpoints]


def test_a_split_with_failover_is_a_plan_of_leaves() -> None:
    target = directory().resolve(Address("10.96.0.1", 80))
    assert target.plan is not None
    one, two, three = target.plan.backends
    assert (one.weight, two.weight, three.weight) == (90, 10, 0)
    assert seen(one.target) == ("default/c", ["10.1.0.1", "10.1.0.2"])
    assert [seen(other) for other in one.elsewhere] == [
        ("east/default/c", ["203.0.113.7"]),
        ("north/default/c", ["2001:db8::7"]),
    ]
    assert one.below == 2
    assert seen(two.target) == ("east/default/c", ["203.0.113.7"])
    assert two.elsewhere == ()
    assert seen(three.target) == ("default/new", ["10.1.0.9"])


def test_a_plan_keeps_to_the_address_family_that_was_dialled() -> None:
    target = directory().resolve(Address("fd00:96::1", 80))
    assert target.plan is not None
    assert [seen(backend.target)[1] for backend in target.plan.backends] == [
        ["fd00::3"],
        ["203.0.113.7"],
        ["10.1.0.9"],
    ]


def test_a_service_without_split_or_failover_has_no_plan() -> None:
    assert directory().resolve(Address("10.1.0.9", 80)).plan is None
    new = directory().find_service("new", "default")
    assert new is not None
    assert new.targets[80].plan is None


def test_a_pod_address_is_not_split() -> None:
    assert directory().resolve(Address("10.1.0.1", 80)).plan is None


def test_failover_alone_is_a_plan_with_one_backend() -> None:
    text = f"""
services: [{{name: c, ports: [{{port: 80}}], failover: {{clusters: [east]}}}}]
clusters: [{{name: east, gateways: [{{address: 203.0.113.7, identity: {GATEWAY}}}], services: [{{name: c, ports: [{{port: 80}}]}}]}}]
"""
    service = directory(text).find_service("c", "default")
    assert service is not None
    plan = service.targets[80].plan
    assert plan is not None
    east = directory(text).clusters["east"].services[0].targets[80]
    assert plan.backends == (Backend(1, Target("default/c", ()), (east,), 1),)


def mistakes(text: str) -> tuple[str, ...]:
    with pytest.raises(DirectoryError) as caught:
        parse(text, "dir.yaml")
    return caught.value.mistakes


def test_all_mistakes_are_reported_together_with_their_paths() -> None:
    found = mistakes(WRONG)
    paths = {mistake.split(": ")[0] for mistake in found}
    for path in (
        "domain", "services[0].export", "services[0].policy.unheard", "services[0].split[0].weight", "services[0].split[1]",
        "services[0].split[2].cluster", "services[0].split[3].service", "services[0].split[4]", "services[0].split[5]",
        "services[0].split[6]", "services[0].failover.clusters[1]", "services[0].failover.clusters[2]",
        "services[0].failover.clusters[3]", "services[0].failover.below", "services[0].failover.abvoe", "services[1].split",
        "services[2].failover.clusters", "clusters[0].name", "clusters[1].name", "clusters[2].gateways[0].identity",
        "clusters[2].gateways[1]", "clusters[2].gateways[2]", "clusters[2].gateways[3].host", "clusters[2].gateways[4].host",
        "clusters[2].gateways[5].identity", "clusters[2].gateways[7]", "clusters[2].services[0].ports[0].target_port",
        "clusters[2].services[1]", "clusters[2].services[2].ports", "clusters[2].services[2].endpoints", "clusters[3].name",
    ):  # fmt: skip
        assert path in paths, path
    assert "services[0].split[6]: east/default/c has no port 81" in found


def test_two_clusters_whose_mirrors_would_have_one_name_are_a_mistake() -> None:
    text = """
services: []
clusters:
  - {name: b, services: [{name: c-a, ports: [{port: 80}]}]}
  - {name: a-b, services: [{name: c, ports: [{port: 80}]}]}
"""
    assert mistakes(text) == (
        "clusters: c-a-b.default would mean both b/default/c-a and a-b/default/c: rename a cluster",
    )


MIRROR = """
cluster: west
services: [{name: c, ports: [{port: 80}], split: [{service: c-west, cluster: east, weight: 1}]}]
clusters: [{name: east, services: [{name: c-west, ports: [{port: 80}]}]}]
"""
BEHIND_ITSELF = f"""
services: []
clusters:
  - {{name: east, services: [{{name: c-north, ports: [{{port: 80}}]}}]}}
  - {{name: north, services: [{{name: c, ports: [{{port: 80}}]}}]}}
  - name: south
    gateways: [{{host: gw.default.south, identity: {GATEWAY}}}]
    services: [{{name: gw, ports: [{{port: 80}}]}}]
"""


@pytest.mark.parametrize(
    ("text", "cycle"),
    [
        (
            SPLITS,
            "services[0]: its requests would go in a cycle: default/a -> default/b -> default/a",
        ),
        (
            MIRROR,
            (
                "services[0]: its requests would go in a cycle: default/c -> east/default/c-west ->"
                " default/c"
            ),
        ),
        (
            BEHIND_ITSELF,
            "clusters: its requests would go in a cycle: south/default/gw -> south/default/gw",
        ),
    ],
)
def test_a_circle_is_a_mistake_that_spells_the_circle_out(text: str, cycle: str) -> None:
    assert mistakes(text) == (cycle,)


def test_clusters_that_split_and_fail_over_to_each_other_are_no_circle() -> None:
    """What a gateway received is not split again. So the same document in both clusters, with the
    names exchanged, is right."""
    other = (
        TEXT.replace("cluster: west", "cluster: x")
        .replace("cluster: east", "cluster: west")
        .replace("name: east", "name: west")
    )
    assert (
        parse(other.replace("[east, north]", "[west, north]"), "east.yaml")
        .clusters["west"]
        .services
    )


def test_the_schema_takes_the_document_and_refuses_the_wrong_one() -> None:
    schema = directory_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(yaml.safe_load(TEXT))
    for change in (
        "weight: 90",
        "port: 14143, ",
        "clusters: [east, north], ",
        "host: gw.east.example, ",
    ):
        assert not validator.is_valid(yaml.safe_load(TEXT.replace(change, f"wrong-{change}"))), (
            change
        )


_KEYS = [
    "name",
    "gateways",
    "host",
    "address",
    "identity",
    "services",
    "ports",
    "port",
    "clusters",
    "weight",
    "service",
]
_SCRAP = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["10.0.0.1", "c", "east", "http1", GATEWAY, ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(_SCRAP, _SCRAP, _SCRAP)
def test_any_document_is_a_directory_or_a_directory_error(
    clusters: object, split: object, failover: object
) -> None:
    service = {"name": "c", "ports": [{"port": 80}], "split": split, "failover": failover}
    try:
        parse(yaml.safe_dump({"services": [service], "clusters": clusters}), "f")
    except DirectoryError as error:
        assert error.mistakes  # noqa: PT017  (either is right)


def test_a_thousand_remote_services_are_read_quickly() -> None:
    services = "\n".join(
        f"    - {{name: s-{number}, ports: [{{port: 80}}]}}" for number in range(1000)
    )
    text = f"services: []\nclusters:\n  - name: east\n    services:\n{services}"
    started = time.perf_counter()
    found = parse(text, "large")
    assert time.perf_counter() - started < 20, "about 0.06 s on an idle machine"
    assert found.find_service("s-999.east", "default") is not None
