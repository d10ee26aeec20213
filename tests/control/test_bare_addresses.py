"""What proxies get for the bare address of an endpoint.

A slice may be known before the pod that it names, and clients find the pod's address by DNS. Such
an address gets no clear text. But a tenant who lists an address in a slice changes nothing for
clients of other namespaces: not whether they reach it, not the identity, not the protocol.
"""

from __future__ import annotations

import pytest

from control.channel.views import Views
from control.contract import Hint
from control.discovery.usable_endpoints import Place
from proxy.directory.channel.messages import Frames, Update, from_control
from proxy.directory.channel.views import Content, PodView, UnknownView, decode
from tests.control.cluster import Cluster, Json, endpoint, identity, pod, port, service, slice_of

NEW, KNOWN, STRANGE, OUTSIDE = "10.1.0.9", "10.1.0.1", "10.77.0.1", "203.0.113.7"
PENDING, REFUSED = UnknownView(pending=True), UnknownView(pending=False)
IDENTITY = "isthmus.dev/endpoint-identity"
HEADLESS = service("db", "None")
OTHER = "other"  # a namespace


def content(cluster: Cluster, address: str, namespace: str = "shop") -> Content | None:
    """What a proxy of this namespace gets."""
    cluster.flush()
    return seen(Views(cluster.catalog), address, namespace)


def seen(views: Views, address: str, namespace: str) -> Content | None:
    topic = views.follow(f"a/{address}", Quiet())
    (data,) = Frames(1 << 20).feed(views.variant(topic, Place("node-1", "", namespace)).frame)
    message = from_control(data)
    assert isinstance(message, Update)
    return decode(message.content)


class Quiet:
    def stale(self, topic: object) -> None:
        pass


def external(name: str = "db", namespace: str = "shop", annotation: str = "", **more: str) -> Json:
    """A headless service whose endpoints are no pods."""
    metadata = {"annotations": {IDENTITY: annotation}} if annotation else {}
    ports = port(5432, appProtocol=more.get("protocol", ""))
    return service(name, "None", ports, namespace=namespace, metadata=metadata)


def external_slice(namespace: str = "shop", address: str = OUTSIDE) -> Json:
    return slice_of("db", endpoint(address), namespace=namespace, ports=[port(5432)])


# A pod that is not known yet


@pytest.mark.parametrize("networks", [(), ("10.1.0.0/16",)])
@pytest.mark.parametrize("with_service", [True, False])
def test_a_pod_that_is_not_known_yet_is_no_address_outside_of_the_mesh(
    networks: tuple[str, ...], with_service: bool
) -> None:
    cluster = Cluster(*networks).put(pod("a", KNOWN), slice_of("db", endpoint(NEW, "b")))
    if with_service:
        cluster.put(HEADLESS)
    assert content(cluster, NEW) == PENDING
    assert content(cluster, NEW, OTHER) == PENDING
    cluster.put(pod("b"))  # without an address yet
    assert content(cluster, NEW, OTHER) == PENDING
    cluster.put(pod("b", NEW))
    for namespace in ("shop", OTHER):
        found = content(cluster, NEW, namespace)
        assert isinstance(found, PodView)
        assert found.identity == str(identity("web"))
        assert found.pod
    cluster.put(pod("b", NEW, meshed=False))
    found = content(cluster, NEW, OTHER)
    assert found is None or (isinstance(found, PodView) and not found.identity and found.pod)


def test_a_pod_with_another_address_than_its_slice_says_is_not_known_yet() -> None:
    """Its watch is behind: the pod has got a new address."""
    cluster = Cluster().put(HEADLESS, pod("a", KNOWN), slice_of("db", endpoint(NEW, "a")))
    assert content(cluster, NEW, OTHER) == PENDING
    cluster.put(pod("a", NEW))
    assert isinstance(content(cluster, NEW, OTHER), PodView)


def test_proxies_are_told_when_the_pod_is_known_and_when_the_slice_is_gone() -> None:
    cluster = Cluster().put(HEADLESS, pod("a", KNOWN), slice_of("db", endpoint(NEW, "b")))
    cluster.flush()
    views = Views(cluster.catalog)
    assert seen(views, NEW, "shop") == PENDING
    cluster.put(pod("b", NEW))
    views.changed(cluster.flush())
    assert isinstance(seen(views, NEW, "shop"), PodView)
    cluster.remove(pod("b", NEW))
    views.changed(cluster.flush())
    assert seen(views, NEW, "shop") == PENDING
    cluster.put(slice_of("db", version="2"))
    views.changed(cluster.flush())
    assert seen(views, NEW, "shop") is None


@pytest.mark.parametrize("address", [STRANGE, "8.8.8.8", "2001:4860:4860::8888"])
@pytest.mark.parametrize("networks", [(), ("10.1.0.0/16", "fd00::/8")])
def test_a_tenant_cannot_block_an_address_by_a_pod_that_does_not_exist(
    networks: tuple[str, ...], address: str
) -> None:
    cluster = Cluster(*networks).put(HEADLESS, pod("a", KNOWN), pod("six", "fd00:1::1"))
    cluster.put(slice_of("db", endpoint(address, "nobody")))
    assert content(cluster, address, OTHER) is None
    assert content(cluster, address) == PENDING, "only its own namespace"


def test_a_node_has_no_identity_so_a_slice_cannot_make_it_unknown() -> None:
    node = "192.168.0.5"
    cluster = Cluster("192.168.0.0/16").put(
        HEADLESS, pod("a", node, hostNetwork=True), slice_of("db", endpoint(node, "nobody"))
    )
    assert content(cluster, node) is None


def test_a_first_pod_makes_its_network_one_of_pods_if_none_is_configured() -> None:
    cluster = Cluster().put(HEADLESS, slice_of("db", endpoint(NEW, "b")))
    cluster.flush()
    views = Views(cluster.catalog)
    assert seen(views, NEW, OTHER) is None
    cluster.put(pod("a", KNOWN))
    views.changed(cluster.flush())
    assert seen(views, NEW, OTHER) == PENDING
    cluster.remove(pod("a", KNOWN))
    views.changed(cluster.flush())
    assert seen(views, NEW, OTHER) is None


def test_a_meshed_pod_that_cannot_have_an_identity_gets_no_clear_text() -> None:
    account = ".".join(["a" * 60] * 4)
    cluster = Cluster().put(HEADLESS, slice_of("db", endpoint(NEW, "b")))
    cluster.put(pod("b", NEW, account=account))
    assert content(cluster, NEW, OTHER) == REFUSED


# Addresses outside


def test_an_identity_that_cannot_be_read_fails_for_clients_of_its_namespace() -> None:
    cluster = Cluster().put(external(annotation="not an identity"), external_slice())
    assert content(cluster, OUTSIDE) == REFUSED
    assert content(cluster, OUTSIDE, OTHER) is None
    cluster.put(external(annotation=str(identity("db"))))
    found = content(cluster, OUTSIDE)
    assert isinstance(found, PodView)
    assert found.identity == str(identity("db"))
    assert not found.pod


def test_an_identity_at_a_nodes_address_fails_for_clients_of_its_namespace() -> None:
    node = "192.168.0.5"
    cluster = Cluster().put(
        external(annotation=str(identity("db"))), pod("a", node, hostNetwork=True)
    )
    cluster.put(external_slice(address=node))
    assert content(cluster, node) == REFUSED
    assert content(cluster, node, OTHER) is None


def test_too_many_endpoints_are_not_reached_in_clear_text_by_their_addresses() -> None:
    many = [port(number, f"p{number}") for number in range(1, 1001)]
    web = service("db", "None", *many, metadata={"annotations": {IDENTITY: str(identity("db"))}})
    cluster = Cluster().put(web, external_slice())
    assert isinstance(content(cluster, OUTSIDE), PodView)
    cluster.flush()
    views = Views(cluster.catalog)
    others = [endpoint(f"203.0.{a}.{b}") for a in range(2) for b in range(1, 110)]
    cluster.put(slice_of("db", *others, name="db-2"))
    views.changed(cluster.flush())
    assert cluster.entry("db").endpoints == ()
    assert seen(views, OUTSIDE, "shop") == REFUSED


@pytest.mark.parametrize("annotation", ["", str(identity("db"))])
def test_a_tenant_does_not_change_how_others_reach_an_address_outside(annotation: str) -> None:
    cluster = Cluster()
    assert content(cluster, OUTSIDE, OTHER) is None
    cluster.put(external(annotation=annotation, protocol="http2"), external_slice())
    assert content(cluster, OUTSIDE, OTHER) is None
    own = content(cluster, OUTSIDE)
    assert isinstance(own, PodView)
    assert own.identity == annotation
    assert [made.protocol for made in own.ports] == [Hint.HTTP2]
    # The other namespace says what its own clients get.
    cluster.put(external(namespace=OTHER, protocol="postgres"), external_slice(OTHER))
    theirs = content(cluster, OUTSIDE, OTHER)
    assert isinstance(theirs, PodView)
    assert theirs.identity == ""
    assert [made.protocol for made in theirs.ports] == [Hint.OPAQUE]
    assert content(cluster, OUTSIDE) == own


def test_a_client_without_a_namespace_gets_no_claim_of_a_tenant() -> None:
    cluster = Cluster().put(external(annotation=str(identity("db"))), external_slice())
    assert content(cluster, OUTSIDE, "") is None


def test_contents_of_pods_are_shared_by_all_namespaces() -> None:
    cluster = Cluster().put(HEADLESS, slice_of("db", endpoint(NEW, "b")), pod("b", NEW))
    cluster.flush()
    views = Views(cluster.catalog)
    assert seen(views, NEW, "shop") == seen(views, NEW, OTHER)
    assert views.computed == 1


def test_only_the_exact_label_exports_a_service() -> None:
    for value, exported in (("true", True), ("True", False), ("", False), ("yes", False)):
        made = Cluster().put(service(metadata={"labels": {"isthmus.dev/exported": value}}))
        assert made.entry().exported is exported
    assert not Cluster().put(service()).entry().exported
