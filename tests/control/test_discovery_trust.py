"""Tenants write slices with addresses that are not theirs (CVE-2021-25740).

No traffic of the mesh goes to these addresses, neither in clear text nor with mTLS. No identity is
derived from such a slice. Services of other tenants do not change. The attacker's namespace is
`evil`, the victim's is `shop`.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.directory import Directory, Endpoint, Target
from proxy.net.address import Address
from tests.control.cluster import Cluster, Json, endpoint, identity, pod, service, slice_of

TRAP = Address("10.96.6.6", 80)  # the cluster address of the tenant's service
VICTIM = "10.1.0.1"


def evil(*endpoints: Json) -> list[Json]:
    return [
        service("trap", TRAP.host, namespace="evil"),
        slice_of("trap", *endpoints, namespace="evil"),
    ]


def referring(address: str, name: str, namespace: str = "evil", uid: str = "") -> Json:
    found = endpoint(address)
    found["targetRef"] = {
        "kind": "Pod",
        "namespace": namespace,
        "name": name,
        "uid": uid or f"uid-{name}",
    }
    return found


def mesh(*, meshed: bool = True) -> Cluster:
    """A victim, and a pod of the tenant's."""
    return Cluster().put(
        service(),
        slice_of("web", endpoint(VICTIM, "a")),
        pod("a", VICTIM, meshed=meshed),
        pod("mine", "10.1.6.6", account="mallory", namespace="evil"),
    )


POINTERS = {
    "no pod": endpoint(VICTIM),
    "the tenant's own pod": referring(VICTIM, "mine"),
    "the victim's pod": referring(VICTIM, "a", "shop"),
    "the victim's pod as one of the tenant's": referring(VICTIM, "a"),
    "a pod that is not there": referring(VICTIM, "nobody"),
    "the victim's uid": referring(VICTIM, "mine", uid="uid-a"),
    "another kind": endpoint(VICTIM, targetRef={"kind": "Node", "name": "node-1"}),
    "another spelling": endpoint(f"::ffff:{VICTIM}"),
    "the victim's cluster address": endpoint("10.96.0.1"),
    "the victim's cluster address, with the tenant's pod": referring("10.96.0.1", "mine"),
    "its own cluster address": endpoint(TRAP.host),
}


@pytest.mark.parametrize("meshed", [True, False])
@pytest.mark.parametrize("what", POINTERS)
def test_a_slice_that_refers_to_a_foreign_pod_has_no_endpoint(what: str, meshed: bool) -> None:
    cluster = mesh(meshed=meshed)
    before = cluster.directory()
    cluster.put(*evil(POINTERS[what]))
    after = cluster.directory()
    assert after.resolve(TRAP) == Target("evil/trap", ())
    same_for_others(before, after)


def same_for_others(before: Directory, after: Directory) -> None:
    """Everything that the tenant does not own is unchanged."""
    for address in (
        Address("10.96.0.1", 80),
        *(Address(VICTIM, number) for number in (8080, 9999, 4191)),
    ):
        assert after.resolve(address) == before.resolve(address)


def test_the_reason_is_reported() -> None:
    cluster = mesh().put(*evil(endpoint(VICTIM)))
    assert cluster.problems(("evil", "trap")) == (
        f"{VICTIM} is the address of a pod of another namespace, shop",
    )


def test_a_tenants_own_pods_are_its_own() -> None:
    cluster = mesh().put(*evil(endpoint("10.1.6.6"), referring("10.1.6.7", "other")))
    cluster.put(pod("other", "10.1.6.7", account="mallory", namespace="evil"))
    found = cluster.directory().resolve(TRAP).endpoints
    assert [(one.address.host, one.identity) for one in found] == [
        ("10.1.6.6", identity("mallory", "evil")),
        ("10.1.6.7", identity("mallory", "evil")),
    ]


def test_the_identity_is_that_of_the_service_account_whatever_else_a_pod_says() -> None:
    liar = pod("mine", "10.1.6.6", account="mallory", namespace="evil")
    liar["metadata"]["annotations"] = {
        "isthmus.dev/identity": str(identity("web")),
        "isthmus.dev/endpoint-identity": str(identity("web")),
        "isthmus.dev/service-account": "web",
    }
    cluster = Cluster().put(liar, *evil(endpoint("10.1.6.6")))
    assert cluster.directory().resolve(TRAP).endpoints[0].identity == identity("mallory", "evil")


def test_an_annotation_of_a_service_says_nothing_of_pods() -> None:
    trap, part = evil(endpoint("10.1.6.6"), endpoint(VICTIM))
    trap["metadata"]["annotations"] = {"isthmus.dev/endpoint-identity": str(identity("web"))}
    found = mesh().put(trap, part).directory().resolve(TRAP).endpoints
    assert [(one.address.host, one.identity) for one in found] == [
        ("10.1.6.6", identity("mallory", "evil"))
    ]


def test_a_slice_of_another_namespace_adds_nothing_to_a_service() -> None:
    cluster = mesh().put(slice_of("web", endpoint("10.1.6.6"), namespace="evil"))
    assert cluster.endpoints().keys() == {VICTIM}


def test_an_address_that_becomes_a_pods_is_the_pods() -> None:
    cluster = Cluster().put(*evil(endpoint(VICTIM)))
    assert cluster.directory().resolve(TRAP).endpoints == (
        Endpoint(Address(VICTIM, 8080)),
    )  # no owner so far
    cluster.put(pod("a", VICTIM))
    assert cluster.directory().resolve(TRAP).endpoints == ()
    assert (
        cluster.directory().find_address(Address(VICTIM, 8080)) is None
    )  # the document has only endpoints,
    assert cluster.catalog.pods[VICTIM].identity == identity("web")  # and the channel all pods


def test_services_of_other_namespaces_do_not_matter_for_an_address_outside() -> None:
    """In both directions: no clear text where a service has an identity, and no identity where it
    has none. Each service is as its own namespace says."""
    gateway: Json = {
        "annotations": {"isthmus.dev/endpoint-identity": str(identity("gateway", "isthmus"))}
    }
    early = {"creationTimestamp": "2020-01-01T00:00:00Z"}
    for first, second in ((gateway, {}), ({}, gateway)):
        cluster = Cluster().put(
            service("ours", "10.96.0.7", metadata=first), slice_of("ours", endpoint("203.0.113.7"))
        )
        before = cluster.entry("ours")
        trap = service("trap", TRAP.host, namespace="evil", metadata={**early, **second})
        cluster.put(trap, slice_of("trap", endpoint("203.0.113.7"), namespace="evil"))
        assert cluster.entry("ours") == before
        (trapped,) = cluster.entry("trap", "evil").endpoints
        assert (trapped.identity is None) != (before.endpoints[0].identity is None)
        assert trapped.outside
        # A directory file has one identity for each address.
        assert cluster.directory().resolve(Address("10.96.0.7", 80)).endpoints == ()


def test_in_one_namespace_the_oldest_service_decides_about_an_address_outside() -> None:
    gateway: Json = {
        "annotations": {"isthmus.dev/endpoint-identity": str(identity("gateway", "isthmus"))}
    }
    late = {"creationTimestamp": "2026-06-06T00:00:00Z"}
    for first, second in ((gateway, {}), ({}, gateway)):
        cluster = Cluster().put(
            service("ours", "10.96.0.7", metadata=first), slice_of("ours", endpoint("203.0.113.7"))
        )
        before = cluster.directory()
        cluster.put(
            service("trap", TRAP.host, metadata={**late, **second}),
            slice_of("trap", endpoint("203.0.113.7")),
        )
        after = cluster.directory()
        assert after.resolve(TRAP) == Target("shop/trap", ())
        for address in (Address("10.96.0.7", 80), Address("203.0.113.7", 8080)):
            assert after.resolve(address) == before.resolve(address)
        cluster.remove(service("ours", "10.96.0.7"))
        cluster.remove(slice_of("ours", endpoint("203.0.113.7")))
        assert len(cluster.directory().resolve(TRAP).endpoints) == 1


def test_a_nodes_address_has_no_identity_that_a_service_could_say() -> None:
    cluster = Cluster().put(
        service(),
        slice_of("web", endpoint("192.168.0.5", "a")),
        pod("a", "192.168.0.5", hostNetwork=True),
    )
    trap, part = evil(endpoint("192.168.0.5"))
    trap["metadata"]["annotations"] = {"isthmus.dev/endpoint-identity": str(identity("web"))}
    trap["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    before = cluster.directory()
    after = cluster.put(trap, part).directory()
    assert after.resolve(TRAP) == Target("evil/trap", ())
    assert after.resolve(Address("10.96.0.1", 80)) == before.resolve(Address("10.96.0.1", 80))
    del trap["metadata"]["annotations"]
    assert cluster.put(trap).directory().resolve(TRAP).endpoints[0].identity is None


def test_a_service_account_whose_name_is_too_long_for_an_identity_is_not_clear_text() -> None:
    account = ".".join(["a" * 60] * 4)
    cluster = Cluster().put(
        service(), slice_of("web", endpoint(VICTIM, "a")), pod("a", VICTIM, account=account)
    )
    assert cluster.endpoints() == {}
    assert "too long" in cluster.problems()[0]


HOSTS = ["10.1.0.1", "10.1.0.2", "10.1.6.6", "10.96.0.1", TRAP.host, "203.0.113.7", "fd00::1"]
ENDPOINTS = st.builds(
    lambda host, reference: {**endpoint(host), **reference},
    st.sampled_from(HOSTS),
    st.one_of(
        st.just({}),
        st.builds(
            lambda kind, space, name, uid: {
                "targetRef": {"kind": kind, "namespace": space, "name": name, "uid": uid}
            },
            st.sampled_from(["Pod", "Node", ""]),
            st.sampled_from(["shop", "evil", ""]),
            st.sampled_from(["a", "b", "mine"]),
            st.sampled_from(["", "uid-a", "uid-b", "uid-mine"]),
        ),
    ),
)
ANNOTATIONS = st.sampled_from(
    [
        {},
        {"isthmus.dev/endpoint-identity": str(identity("web"))},
        {"isthmus.dev/endpoint-identity": "junk"},
    ]
)


@given(st.lists(ENDPOINTS, max_size=6), ANNOTATIONS)
def test_whatever_a_tenant_writes_into_slices_the_victims_pods_are_out_of_reach(
    endpoints: list[Json], annotations: Json
) -> None:
    cluster = mesh().put(pod("b", "10.1.0.2", "fd00::1", account="api"))
    before = cluster.directory()
    trap, part = evil(*endpoints)
    trap["metadata"]["annotations"] = annotations
    cluster.put(trap, part)
    after = cluster.directory()  # is a directory: no contradiction makes it invalid for all
    for found in after.resolve(TRAP).endpoints:
        assert found.address.host in ("10.1.6.6", "203.0.113.7")
        if found.address.host == "10.1.6.6":
            assert found.identity == identity("mallory", "evil")
    same_for_others(before, after)


def test_every_order_of_pod_slice_and_service_gives_the_same() -> None:
    items = [
        *evil(endpoint(VICTIM), endpoint("10.1.6.6")),
        pod("a", VICTIM),
        pod("mine", "10.1.6.6", account="m", namespace="evil"),
    ]
    found = set()
    for order in itertools.permutations(items):
        cluster = Cluster()
        for item in order:
            cluster.put(item)
            cluster.flush()
        found.add(tuple(one.address for one in cluster.entry("trap", "evil").endpoints))
    assert found == {("10.1.6.6",)}


def test_a_problem_follows_the_pod_that_an_endpoint_names() -> None:
    """The endpoint's address is not the pod's, so only the name leads from the pod to it."""
    cluster = Cluster().put(*evil(referring("10.1.6.1", "mine", uid="")))
    trap = ("evil", "trap")
    assert cluster.problems(trap) == ()  # the pod is not known yet
    mine = pod("mine", "10.1.6.6", namespace="evil")
    cluster.put(mine)
    assert cluster.problems(trap) == ("10.1.6.1 is not an address of the pod mine",)
    cluster.remove(mine)
    assert cluster.problems(trap) == ()
    cluster.put(pod("mine", "10.1.6.1", namespace="evil"))
    assert cluster.problems(trap) == ()
    assert set(cluster.endpoints("trap", "evil")) == {"10.1.6.1"}
    cluster.remove(evil()[0])
    cluster.flush()
    assert cluster.catalog._misnames == {}
