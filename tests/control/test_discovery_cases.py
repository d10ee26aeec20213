"""What each kind of service becomes. Each case has the objects of a cluster, by the rules of
Kubernetes, and what proxies read.
"""

from __future__ import annotations

from typing import Any

import pytest

from control.contract import Hint
from control.discovery.entries import PodEntry
from control.discovery.usable_endpoints import Place, usable
from proxy.directory import Endpoint, Target
from proxy.net.address import Address
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

READY: Json = {"ready": True, "serving": True, "terminating": False}
UNREADY: Json = {"ready": False, "serving": False, "terminating": False}
DRAINING: Json = {"ready": False, "serving": True, "terminating": True}
GONE: Json = {"ready": False, "serving": False, "terminating": True}


def test_a_service_of_two_pods_one_of_which_is_meshed() -> None:
    cluster = Cluster().put(
        service("web", "10.96.0.1", port(80, targetPort=8080, appProtocol="http")),
        slice_of(
            "web",
            endpoint("10.1.0.1", "a", zone="west-1"),
            endpoint("10.1.0.2", "b", conditions=UNREADY),
        ),
        pod("a", "10.1.0.1"),
        pod("b", "10.1.0.2", meshed=False),
    )
    meshed = Endpoint(Address("10.1.0.1", 8080), identity("web"), Hint.HTTP1, zone="west-1")
    bare = Endpoint(Address("10.1.0.2", 8080), None, Hint.HTTP1, ready=False)
    directory = cluster.directory()
    assert directory.resolve(Address("10.96.0.1", 80)) == Target(
        "shop/web", (meshed, bare), Hint.HTTP1
    )
    assert directory.find_service("web.shop.svc.cluster.local", "") is not None
    assert cluster.catalog.problems == {}


def test_headless_has_no_address_and_is_found_by_its_pods() -> None:
    cluster = Cluster().put(
        service("web", "None"), slice_of("web", endpoint("10.1.0.1", "a")), pod("a", "10.1.0.1")
    )
    assert cluster.entry().addresses == ()
    directory = cluster.directory()
    assert directory.clustered == {}
    assert directory.resolve(Address("10.1.0.1", 8080)) == Target(
        "shop/web", (Endpoint(Address("10.1.0.1", 8080), identity("web")),), Hint.DETECT
    )


def test_headless_without_ports_is_known_by_its_pods_addresses() -> None:
    headless = service("web", "None")
    headless["spec"]["ports"] = None
    cluster = Cluster().put(
        headless, slice_of("web", endpoint("10.1.0.1", "a"), ports=[]), pod("a", "10.1.0.1")
    )
    assert cluster.entry().ports == ()
    assert cluster.directory().services == ()
    assert cluster.catalog.pods["10.1.0.1"].identity == identity("web")


def test_a_stateful_sets_pods_have_their_names() -> None:
    cluster = Cluster().put(
        service("db", "None"),
        slice_of(
            "db",
            endpoint("10.1.0.1", "db-0", hostname="db-0"),
            endpoint("10.1.0.2", "db-1", hostname="db-1"),
        ),
        pod("db-0", "10.1.0.1"),
        pod("db-1", "10.1.0.2"),
    )
    assert {found.hostname: found.address for found in cluster.entry("db").endpoints} == {
        "db-0": "10.1.0.1",
        "db-1": "10.1.0.2",
    }
    # The same name with another address, after a restart.
    new = pod("db-0", "10.1.0.9")
    new["metadata"]["uid"] = "uid-new"
    moved = endpoint("10.1.0.9", "db-0", hostname="db-0")
    moved["targetRef"]["uid"] = "uid-new"
    cluster.put(new, slice_of("db", moved, endpoint("10.1.0.2", "db-1", hostname="db-1")))
    assert {found.hostname: found.address for found in cluster.entry("db").endpoints} == {
        "db-0": "10.1.0.9",
        "db-1": "10.1.0.2",
    }


def test_named_target_ports_may_have_another_number_in_each_slice() -> None:
    cluster = Cluster().put(
        service(
            "web",
            "10.96.0.1",
            port(80, "http", targetPort="http"),
            port(9090, "metrics", targetPort="metrics"),
        ),
        slice_of(
            "web",
            endpoint("10.1.0.1", "a"),
            name="web-1",
            ports=[port(8080, "http"), port(9090, "metrics")],
        ),
        slice_of(
            "web",
            endpoint("10.1.0.2", "b"),
            name="web-2",
            ports=[port(8081, "http"), port(9091, "metrics")],
        ),
        pod("a", "10.1.0.1"),
        pod("b", "10.1.0.2"),
    )
    directory = cluster.directory()
    for number, ports in ((80, {8080, 8081}), (9090, {9090, 9091})):
        assert {
            found.address.port
            for found in directory.resolve(Address("10.96.0.1", number)).endpoints
        } == ports


def test_a_slice_port_without_a_number_is_the_port_that_is_dialled() -> None:
    cluster = Cluster().put(
        service("web", "10.96.0.1", port(80)),
        slice_of(
            "web", endpoint("10.1.0.1", "a"), ports=[{"name": None, "port": None, "protocol": None}]
        ),
        pod("a", "10.1.0.1"),
    )
    assert cluster.endpoints()["10.1.0.1"].ports == ((80, 80),)


def test_an_endpoint_without_a_port_is_not_an_endpoint_of_that_port() -> None:
    cluster = Cluster().put(
        service("web", "10.96.0.1", port(80, "http"), port(9090, "metrics")),
        slice_of("web", endpoint("10.1.0.1", "a"), name="web-1", ports=[port(8080, "http")]),
        slice_of(
            "web",
            endpoint("10.1.0.2", "b"),
            name="web-2",
            ports=[port(8080, "http"), port(9090, "metrics")],
        ),
        slice_of(
            "web",
            endpoint("10.1.0.3", "c"),
            name="web-3",
            ports=[port(8080, "http", protocol="UDP"), port(7, "other")],
        ),
        *(pod(name, f"10.1.0.{n}") for n, name in enumerate("abc", 1)),
    )
    directory = cluster.directory()
    for number, hosts in ((80, ["10.1.0.1", "10.1.0.2"]), (9090, ["10.1.0.2"])):
        assert [
            found.address.host
            for found in directory.resolve(Address("10.96.0.1", number)).endpoints
        ] == hosts
    assert directory.resolve(Address("10.1.0.3", 1)).endpoints[0].identity == identity("web")


def test_only_tcp_is_carried() -> None:
    cluster = Cluster().put(
        service(
            "dns",
            "10.96.0.10",
            port(53, "dns", protocol="UDP"),
            port(53, "dns-tcp", targetPort=5353),
        ),
        slice_of(
            "dns",
            endpoint("10.1.0.1", "a"),
            ports=[port(5300, "dns", protocol="UDP"), port(5353, "dns-tcp")],
        ),
        pod("a", "10.1.0.1"),
    )
    assert [found.port for found in cluster.entry("dns").ports] == [53]
    assert cluster.endpoints("dns")["10.1.0.1"].ports == ((53, 5353),)


def test_dual_stack_has_two_addresses_and_endpoints_of_both_families() -> None:
    both = service("web", "10.96.0.1")
    both["spec"]["clusterIPs"] = ["10.96.0.1", "fd00:96:0::1"]
    cluster = Cluster().put(
        both,
        slice_of("web", endpoint("10.1.0.1", "a"), name="web-4"),
        slice_of("web", endpoint("FD00:1:0::1", "a"), name="web-6"),
        pod("a", "10.1.0.1", "fd00:1::1"),
    )
    directory = cluster.directory()
    for address, found in (("10.96.0.1", "10.1.0.1"), ("fd00:96::1", "fd00:1::1")):
        assert [
            str(one.address.host) for one in directory.resolve(Address(address, 80)).endpoints
        ] == [found]


@pytest.mark.parametrize(
    ("conditions", "ready"),
    [
        ([READY, DRAINING, UNREADY], [True, False, False]),
        ([DRAINING, UNREADY, GONE], [True, False, False]),
        ([None, {}, {"ready": None}], [True, True, True]),
        ([GONE, UNREADY, UNREADY], [False, False, False]),
        # publishNotReadyAddresses: the controller says ready of all.
        (
            [
                {"ready": True, "serving": False},
                {"ready": True, "serving": True, "terminating": True},
                READY,
            ],
            [True, True, True],
        ),
    ],
)
def test_terminating_endpoints_serve_if_no_other_one_does(
    conditions: list[Any], ready: list[bool]
) -> None:
    cluster = Cluster().put(service())
    names = ["a", "b", "c"]
    cluster.put(
        slice_of(
            "web", *(endpoint(f"10.1.0.{n}", names[n], conditions=conditions[n]) for n in range(3))
        )
    )
    cluster.put(*(pod(names[n], f"10.1.0.{n}") for n in range(3)))
    target = cluster.directory().resolve(Address("10.96.0.1", 80))
    assert [found.ready for found in target.endpoints] == ready
    assert all(found.identity == identity("web") for found in target.endpoints)


def test_each_ip_family_is_ready_by_itself() -> None:
    cluster = Cluster().put(
        service(),
        slice_of("web", endpoint("10.1.0.1", "a", conditions=DRAINING), name="web-4"),
        slice_of("web", endpoint("fd00::1", "b"), name="web-6"),
        pod("a", "10.1.0.1"),
        pod("b", "fd00::1"),
    )
    assert usable(cluster.entry()) == {"10.1.0.1", "fd00::1"}


# Where a client is...


def hinted(*hints: Json | None, **more: Any) -> Cluster:
    """A service of pods 10.1.0.1, 10.1.0.2 and so on, on node-1, node-2 and so on, alternately in
    zones a and b, with these hints."""
    cluster = Cluster().put(service(**more))
    given = [{"hints": hint} if hint is not None else {} for hint in hints]
    places = [{"nodeName": f"node-{n + 1}", "zone": "ab"[n % 2]} for n in range(len(hints))]
    cluster.put(
        slice_of(
            "web",
            *(
                endpoint(f"10.1.0.{n + 1}", f"p{n}", **given[n], **places[n])
                for n in range(len(hints))
            ),
        )
    )
    return cluster.put(*(pod(f"p{n}", f"10.1.0.{n + 1}") for n in range(len(hints))))


def zones(*names: str) -> Json:
    return {"forZones": [{"name": name} for name in names]}


def nodes(*names: str) -> Json:
    return {"forNodes": [{"name": name} for name in names]}


def seen(cluster: Cluster, node: str = "", zone: str = "") -> set[int]:
    return {
        int(address.rpartition(".")[2]) for address in usable(cluster.entry(), Place(node, zone))
    }


def test_hints_for_zones_are_used_if_each_endpoint_has_one_and_one_is_for_us() -> None:
    cluster = hinted(zones("a"), zones("b"), zones("a"))
    assert seen(cluster, zone="a") == {1, 3}
    assert seen(cluster, zone="b") == {2}
    assert seen(cluster, zone="c") == seen(cluster) == {1, 2, 3}
    assert seen(hinted(zones("a"), None, zones("a")), zone="a") == {1, 2, 3}


def test_hints_for_nodes_come_before_hints_for_zones() -> None:
    cluster = hinted(
        zones("a") | nodes("node-1"), zones("a") | nodes("node-2"), zones("b") | nodes("node-3")
    )
    assert seen(cluster, "node-2", "a") == {2}
    assert seen(cluster, "node-9", "a") == {1, 2}
    assert seen(cluster, "node-9", "c") == {1, 2, 3}


def test_hints_of_endpoints_that_are_not_ready_do_not_count() -> None:
    cluster = Cluster().put(
        service(),
        slice_of(
            "web",
            endpoint("10.1.0.1", "a", hints=zones("a")),
            endpoint("10.1.0.2", "b", conditions=DRAINING),
        ),
        pod("a", "10.1.0.1"),
        pod("b", "10.1.0.2"),
    )
    assert seen(cluster, zone="a") == {1}


def test_a_service_of_local_traffic_is_served_on_the_own_node_only() -> None:
    cluster = hinted(zones("b"), zones("b"), internalTrafficPolicy="Local")
    assert cluster.entry().local
    assert seen(cluster, "node-1", "b") == {1}
    assert seen(cluster, "node-9", "b") == set()
    assert seen(cluster) == {1, 2}


def test_local_traffic_falls_back_to_terminating_endpoints_on_the_own_node() -> None:
    cluster = Cluster().put(
        service(internalTrafficPolicy="Local"),
        slice_of(
            "web",
            endpoint("10.1.0.1", "a", nodeName="n1", conditions=DRAINING),
            endpoint("10.1.0.2", "b", nodeName="n2"),
        ),
        pod("a", "10.1.0.1"),
        pod("b", "10.1.0.2"),
    )
    assert seen(cluster, "n1") == {1}


def test_an_endpoint_that_is_not_for_us_keeps_its_identity() -> None:
    directory = hinted(zones("a"), zones("b")).directory(Place("", "a"))
    assert [found.ready for found in directory.resolve(Address("10.96.0.1", 80)).endpoints] == [
        True,
        False,
    ]
    assert directory.resolve(Address("10.1.0.2", 9999)).endpoints[0].identity == identity("web")


def test_a_zone_that_a_slice_does_not_say_is_that_of_the_node() -> None:
    cluster = Cluster().put(
        service(),
        slice_of("web", endpoint("10.1.0.1", "a", nodeName="node-1")),
        pod("a", "10.1.0.1"),
    )
    assert cluster.endpoints()["10.1.0.1"].zone == ""
    cluster.put(node("node-1", "west-1"))
    assert cluster.endpoints()["10.1.0.1"].zone == "west-1"
    assert cluster.catalog.pods["10.1.0.1"].zone == "west-1"
    cluster.remove(node("node-1", "west-1"))
    assert cluster.endpoints()["10.1.0.1"].zone == ""


# Services without pods...


def test_a_service_without_a_selector_gets_clear_text() -> None:
    cluster = Cluster().put(
        service("mail", "10.96.0.2", port(25, appProtocol="tcp"), selector=None),
        slice_of("mail", endpoint("192.168.7.20"), ports=[port(2525)]),
    )
    target = cluster.directory().resolve(Address("10.96.0.2", 25))
    assert target.endpoints == (Endpoint(Address("192.168.7.20", 2525), None, Hint.OPAQUE),)


def test_an_annotation_gives_endpoints_that_are_no_pods_an_identity() -> None:
    annotations = {"isthmus.dev/endpoint-identity": str(identity("gateway", "isthmus"))}
    cluster = Cluster().put(
        service("c-east", "10.96.0.3", metadata={"annotations": annotations}, selector=None),
        slice_of("c-east", endpoint("203.0.113.7")),
    )
    found = cluster.directory().resolve(Address("10.96.0.3", 80)).endpoints
    assert found == (Endpoint(Address("203.0.113.7", 8080), identity("gateway", "isthmus")),)


def test_an_identity_that_cannot_be_read_is_not_clear_text() -> None:
    annotations = {"isthmus.dev/endpoint-identity": "gateway"}
    cluster = Cluster().put(
        service("web", "10.96.0.3", metadata={"annotations": annotations}, selector=None),
        slice_of("web", endpoint("203.0.113.7")),
    )
    assert cluster.endpoints() == {}
    assert "cannot be parsed" in " ".join(cluster.problems())


def test_an_external_name_is_dialled_by_the_application() -> None:
    cluster = Cluster().put(
        service("ext", None, type="ExternalName", externalName="example.com"),
        slice_of("ext", endpoint("192.0.2.1")),
    )
    assert not cluster.flush().services
    assert cluster.directory().services == ()
    # One that becomes an ordinary service, and back.
    cluster.put(service("ext", "10.96.0.5"))
    assert list(cluster.endpoints("ext")) == ["192.0.2.1"]
    cluster.put(service("ext", None, type="ExternalName"))
    assert cluster.flush().services == {("shop", "ext"): None}


def test_a_service_without_endpoints_has_none() -> None:
    assert Cluster().put(service()).directory().resolve(Address("10.96.0.1", 80)) == Target(
        "shop/web", ()
    )


def test_a_port_that_is_not_defined_is_not_known() -> None:
    """The proxy lets the connection through as it is, and the kernel refuses it, as it does without
    a proxy."""
    cluster = Cluster().put(
        service(), slice_of("web", endpoint("10.1.0.1", "a")), pod("a", "10.1.0.1")
    )
    assert cluster.directory().find_address(Address("10.96.0.1", 81)) is None


def test_names_addresses_are_no_endpoints() -> None:
    named = slice_of("web", endpoint("example.com"))
    named["addressType"] = "FQDN"
    assert Cluster().put(service(), named).endpoints() == {}


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "169.254.169.254",
        "fe80::1",
        "::1",
        "0.0.0.0",
        "224.0.0.1",
        "",
        "localhost",
        "::ffff:127.0.0.1",
    ],
)
def test_an_address_that_is_not_unicast_is_not_an_endpoint(address: str) -> None:
    cluster = Cluster().put(service(), slice_of("web", endpoint(address), endpoint("192.0.2.1")))
    assert list(cluster.endpoints()) == ["192.0.2.1"]
    assert "is not a usable unicast address" in cluster.problems()[0]


# Protocols...


@pytest.mark.parametrize(
    ("app_protocol", "hint"),
    [
        (None, Hint.DETECT),
        ("http", Hint.HTTP1),
        ("HTTP", Hint.HTTP1),
        ("kubernetes.io/ws", Hint.HTTP1),
        ("kubernetes.io/h2c", Hint.HTTP2),
        ("grpc", Hint.HTTP2),
        ("https", Hint.OPAQUE),
        ("kubernetes.io/wss", Hint.OPAQUE),
        ("postgresql", Hint.OPAQUE),
        ("example.com/own", Hint.DETECT),
    ],
)
def test_app_protocol_is_a_hint(app_protocol: str | None, hint: Hint) -> None:
    assert (
        Cluster()
        .put(service("web", "10.96.0.1", port(80, appProtocol=app_protocol)))
        .entry()
        .ports[0]
        .protocol
        is hint
    )


def test_opaque_ports_are_those_that_clients_connect_to() -> None:
    annotations = {"isthmus.dev/opaque-ports": "80, 3000-3002"}
    ports = [port(80, "a", appProtocol="http"), port(3001, "b"), port(8080, "c")]
    entry = (
        Cluster()
        .put(service("web", "10.96.0.1", *ports, metadata={"annotations": annotations}))
        .entry()
    )
    assert [found.protocol for found in entry.ports] == [Hint.OPAQUE, Hint.OPAQUE, Hint.DETECT]


def test_opaque_ports_that_cannot_be_parsed_are_reported_and_ignored() -> None:
    cluster = Cluster().put(
        service(metadata={"annotations": {"isthmus.dev/opaque-ports": "80-70"}})
    )
    assert cluster.entry().ports[0].protocol is Hint.DETECT
    assert cluster.problems() == (
        "isthmus.dev/opaque-ports: '80-70' is a range whose end is below its start",
    )


# Slices that overlap...


def test_an_endpoint_in_two_slices_is_one_and_the_newer_one_is_right() -> None:
    old = slice_of("web", endpoint("10.1.0.1", "a", conditions=UNREADY), name="web-b", version="9")
    new = slice_of("web", endpoint("10.1.0.1", "a"), name="web-a", version="10", ports=[port(8081)])
    for order in ((old, new), (new, old)):
        found = Cluster().put(service(), pod("a", "10.1.0.1"), *order).endpoints()["10.1.0.1"]
        assert (found.state, found.ports) == ("ready", ((80, 8081),))


def test_an_endpoint_whose_ports_are_in_two_slices_has_them_all() -> None:
    cluster = Cluster().put(
        service("web", "10.96.0.1", port(80, "http"), port(443, "https")),
        slice_of("web", endpoint("10.1.0.1", "a"), name="web-1", ports=[port(8080, "http")]),
        slice_of("web", endpoint("10.1.0.1", "a"), name="web-2", ports=[port(8443, "https")]),
        pod("a", "10.1.0.1"),
    )
    assert cluster.endpoints()["10.1.0.1"].ports == ((80, 8080), (443, 8443))


def test_a_slice_of_a_service_that_is_deleted_is_nothing_and_comes_back_with_it() -> None:
    cluster = Cluster().put(slice_of("web", endpoint("10.1.0.1", "a")), pod("a", "10.1.0.1"))
    assert cluster.flush().services == {}
    assert cluster.put(service()).endpoints().keys() == {"10.1.0.1"}
    assert cluster.remove(service()).flush().services == {("shop", "web"): None}
    assert cluster.put(service()).endpoints().keys() == {"10.1.0.1"}


def test_a_slice_that_changes_to_another_service() -> None:
    cluster = Cluster().put(
        service("web", "10.96.0.1"), service("api", "10.96.0.2"), pod("a", "10.1.0.1")
    )
    cluster.put(slice_of("web", endpoint("10.1.0.1", "a"), name="s"))
    assert cluster.endpoints("web").keys() == {"10.1.0.1"}
    cluster.put(slice_of("api", endpoint("10.1.0.1", "a"), name="s"))
    assert cluster.endpoints("web") == {}
    assert cluster.endpoints("api").keys() == {"10.1.0.1"}


# Addresses that are used again...


def test_a_cluster_address_that_is_used_again_at_once_is_the_new_services() -> None:
    old = service("old", "10.96.0.9")
    new = service("new", "10.96.0.9", metadata={"creationTimestamp": "2026-01-01T00:00:01Z"})
    for order in ((old, new), (new, old)):
        cluster = Cluster().put(*order)
        assert cluster.entry("new").addresses == ("10.96.0.9",)
        assert cluster.entry("old").addresses == ()
        assert cluster.directory().resolve(Address("10.96.0.9", 80)).service == "shop/new"
        assert cluster.remove(new).entry("old").addresses == ("10.96.0.9",)


def test_a_service_of_the_same_name_is_another_one() -> None:
    cluster = Cluster().put(service())
    before = cluster.entry()
    cluster.put(service(metadata={"uid": "another"}))
    assert cluster.flush().services[before.key] != before


def test_a_pods_address_that_is_used_again_is_the_new_pods() -> None:
    cluster = Cluster().put(
        service(), slice_of("web", endpoint("10.1.0.1", "old")), pod("old", "10.1.0.1")
    )
    assert cluster.endpoints()["10.1.0.1"].identity == identity("web")
    new = pod(
        "new", "10.1.0.1", account="other", metadata={"creationTimestamp": "2026-01-01T00:00:05Z"}
    )
    cluster.put(new)  # while the old one is being deleted, and its slice is not updated yet
    assert cluster.endpoints() == {}
    assert cluster.catalog.pods["10.1.0.1"].identity == identity("other")
    cluster.remove(pod("old", "10.1.0.1"))
    assert cluster.endpoints() == {}
    cluster.put(slice_of("web", endpoint("10.1.0.1", "new")))
    assert cluster.endpoints()["10.1.0.1"].identity == identity("other")


def test_a_pod_that_has_ended_has_no_address() -> None:
    ended = pod("job", "10.1.0.1")
    ended["status"]["phase"] = "Succeeded"
    cluster = Cluster().put(
        service(), slice_of("web", endpoint("10.1.0.1", "a")), pod("a", "10.1.0.1"), ended
    )
    assert cluster.endpoints()["10.1.0.1"].identity == identity("web")


# Order, and differences...


def test_an_endpoint_waits_for_its_pod() -> None:
    cluster = Cluster().put(service(), slice_of("web", endpoint("10.1.0.1", "a")))
    assert cluster.endpoints() == {}
    assert cluster.problems() == ()  # that is not worth a report
    starting = pod("a")
    assert cluster.put(starting).endpoints() == {}
    assert cluster.put(pod("a", "10.1.0.1")).endpoints()["10.1.0.1"].identity == identity("web")


def test_an_irrelevant_update_is_not_a_change() -> None:
    cluster = Cluster().put(
        service(),
        slice_of("web", endpoint("10.1.0.1", "a")),
        pod("a", "10.1.0.1"),
        node("node-1", "a"),
    )
    assert cluster.flush()
    cluster.put(
        service(metadata={"annotations": {"some": "thing"}}),
        slice_of("web", endpoint("10.1.0.1", "a"), version="77"),
        pod("a", "10.1.0.1", metadata={"annotations": {"some": "thing"}}),
    )
    assert not cluster.flush()


# Pods...


def test_a_pods_address_is_known_without_any_service() -> None:
    cluster = Cluster().put(pod("a", "10.1.0.1", "fd00::1"), pod("b", "10.1.0.2", meshed=False))
    assert cluster.flush().pods == {
        address: PodEntry(address, identity("web"), frozenset({4191}), "", "node-1")
        for address in ("10.1.0.1", "fd00::1")
    } | {"10.1.0.2": PodEntry("10.1.0.2", None, frozenset(), "", "node-1")}
    assert cluster.catalog.meshed == 2
    assert cluster.remove(pod("a", "10.1.0.1", "fd00::1")).flush().pods == {
        "10.1.0.1": None,
        "fd00::1": None,
    }
    assert cluster.catalog.meshed == 0


def test_no_identity_is_expected_on_ports_that_are_not_redirected() -> None:
    annotations = {
        "isthmus.dev/skip-inbound-ports": "4567,5000-5002",
        "isthmus.dev/admin-port": "4999",
    }
    cluster = Cluster().put(
        service("web", "10.96.0.1", port(80, "http", targetPort=8080), port(4567, "galera")),
        slice_of(
            "web", endpoint("10.1.0.1", "a"), ports=[port(8080, "http"), port(4567, "galera")]
        ),
        pod("a", "10.1.0.1", metadata={"annotations": annotations}),
    )
    directory = cluster.directory()
    expected = {80: identity("web"), 4567: None}
    assert {
        n: directory.resolve(Address("10.96.0.1", n)).endpoints[0].identity for n in expected
    } == expected
    for number in (4567, 4999, 5000, 5001, 5002):
        assert directory.resolve(Address("10.1.0.1", number)).endpoints[0].identity is None
    for number in (4191, 5003, 8080, 1):
        assert directory.resolve(Address("10.1.0.1", number)).endpoints[0].identity == identity(
            "web"
        )


@pytest.mark.parametrize("text", ["abc", "80-", "0", "70000", "1-65535", "80;81", "-5", "80-79"])
def test_a_list_of_ports_that_cannot_be_read_skips_none(text: str) -> None:
    cluster = Cluster().put(
        pod("a", "10.1.0.1", metadata={"annotations": {"isthmus.dev/skip-inbound-ports": text}})
    )
    assert cluster.flush().pods["10.1.0.1"] == PodEntry(
        "10.1.0.1", identity("web"), frozenset({4191}), "", "node-1"
    )


@pytest.mark.parametrize(
    ("mark", "meshed"), [("true", True), ("yes", True), ("", True), ("false", False)]
)
def test_an_unknown_mark_does_not_mean_clear_text(mark: str, meshed: bool) -> None:
    marked = pod("a", "10.1.0.1")
    marked["metadata"]["labels"] = {"isthmus.dev/meshed": mark}
    entry = Cluster().put(marked).flush().pods["10.1.0.1"]
    assert entry is not None
    assert (entry.identity is not None) is meshed


def test_a_pod_of_the_host_network_is_not_meshed_whatever_it_says() -> None:
    cluster = Cluster().put(
        service(),
        slice_of("web", endpoint("192.168.0.5", "a")),
        pod("a", "192.168.0.5", hostNetwork=True),
        pod("b", "192.168.0.5", hostNetwork=True),
    )
    assert cluster.endpoints()["192.168.0.5"].identity is None
    assert cluster.catalog.pods == {}
