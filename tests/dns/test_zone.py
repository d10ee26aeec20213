"""Which names the proxy answers.

Rules: whatever form an application uses, the search of its resolver through the search domains ends
at the service that the name means. A name that works without the mesh keeps its meaning. A name of
another cluster that does not exist ends as "does not exist", and no upstream resolver gets it. musl
stops at an empty answer, so it gets none before the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.dns.virtual_addresses import RemoteName
from proxy.dns.zone import Verdict, Zone
from tests.dns.documents import EAST_C, EAST_DB, SEARCH, document


def zone(
    *local: tuple[str, str], namespace: str = "default", search: tuple[str, ...] = SEARCH
) -> Zone:
    return Zone(document(*local), namespace, search)


def walk(
    asked: Zone, said: str, upstream: frozenset[str] = frozenset(), search: tuple[str, ...] = SEARCH
) -> tuple[object, int]:
    """The search of a resolver library for a name: its result, and the number of queries. ndots:5,
    as Kubernetes sets it."""
    names = (
        [said.rstrip(".")]
        if said.endswith(".")
        else [*(f"{said}.{domain}" for domain in search), said]
    )
    if not said.endswith(".") and said.count(".") >= 5:
        names = [names[-1], *names[:-1]]
    end: object = None
    for count, name in enumerate(names, 1):
        verdict = asked.judge(name.split("."))
        if isinstance(verdict, RemoteName):
            return verdict, count
        if verdict is Verdict.FORWARD and name.lower() in upstream:
            return name, count
        if verdict is Verdict.NODATA:
            assert count == len(names), "musl would stop here"
        end = verdict
    return end, len(names)


@pytest.mark.parametrize("dot", ["", "."])
@pytest.mark.parametrize(
    "said", ["c.east", "c.default.east", "C.East", "c-east", "c-east.default", "c-east.default.svc"]
)
def test_every_form_of_a_name_is_found_at_the_first_question(said: str, dot: str) -> None:
    assert walk(zone(), said + dot) == (EAST_C, 1)


@pytest.mark.parametrize(
    "said", ["db.shop.east", "db-east.shop", "db-east.shop.svc", "db-east.shop.svc.cluster.local"]
)
def test_services_of_other_namespaces_are_found(said: str) -> None:
    assert walk(zone(), said) == (EAST_DB, 1)
    assert walk(zone(), said + ".") == (EAST_DB, 1)


def test_a_short_name_is_of_the_pods_own_namespace() -> None:
    search = ("shop.svc.cluster.local", *SEARCH[1:])
    asked = zone(namespace="shop", search=search)
    assert walk(asked, "db.east", search=search) == (EAST_DB, 1)
    assert walk(asked, "c.default.east", search=search) == (EAST_C, 1)
    assert walk(asked, "c.east", search=search)[0] is Verdict.NXDOMAIN


def test_a_local_service_of_exactly_that_name_wins() -> None:
    upstream = frozenset({"c.east.svc.cluster.local"})
    assert walk(zone(("c", "east")), "c.east", upstream) == ("c.east.svc.cluster.local", 2)
    assert (
        walk(
            zone(("c-east", "default")), "c-east", frozenset({"c-east.default.svc.cluster.local"})
        )[1]
        == 1
    )


def test_the_pods_of_a_local_service_keep_their_names() -> None:
    """`c.east.default.svc.cluster.local` is also how Kubernetes writes the pod `c` of a headless
    service `east`."""
    pod = "c.east.default.svc.cluster.local"
    assert walk(zone(("east", "default")), pod, frozenset({pod})) == (pod, 1)
    # The service of the other cluster is found all the same, where no other one can be meant.
    assert walk(zone(("east", "default")), "c.east") == (EAST_C, 3)


def test_a_namespace_of_the_name_of_a_cluster_can_be_written_in_full() -> None:
    name = "other.east.svc.cluster.local"
    assert walk(zone(), name, frozenset({name}))[0] == name
    assert zone().judge(["c", "east", "svc", "cluster", "local"]) is Verdict.FORWARD


@pytest.mark.parametrize(
    "said", ["gone.east", "gone.shop.east", "x.y.z.east", "_http._tcp.c.east", "c.north", "*.east"]
)
def test_names_that_another_cluster_does_not_have_do_not_exist(said: str) -> None:
    assert walk(zone(), said)[0] is Verdict.NXDOMAIN
    assert zone().judge(said.split(".")) is Verdict.NXDOMAIN


def test_names_that_others_lie_below_exist_without_an_address() -> None:
    for name in ("east", "shop.east", "north"):
        assert zone().judge(name.split(".")) is Verdict.NODATA
    assert zone().judge(["empty", "east"]) is Verdict.NXDOMAIN


@pytest.mark.parametrize(
    "name",
    [
        "example.com",
        "c",
        "c.default.svc.cluster.local",
        "gone-east.default.svc.cluster.local",
        "feast",
    ],
)
def test_all_other_names_are_passed_on(name: str) -> None:
    assert zone(("c", "default")).judge(name.split(".")) is Verdict.FORWARD
    assert zone().judge([]) is Verdict.FORWARD


def test_a_dot_within_a_label_does_not_make_a_name() -> None:
    assert zone().judge(["c.east"]) is Verdict.FORWARD
    assert zone().judge(["c.default", "east"]) is Verdict.NXDOMAIN


def test_clusters_with_another_domain_are_understood() -> None:
    search = ("default.svc.west.example", "svc.west.example", "west.example")
    asked = Zone(document(domain="west.example"), "default", search)
    assert walk(asked, "c.east", search=search) == (EAST_C, 1)
    assert walk(asked, "c-east.default.svc.west.example", search=search) == (EAST_C, 1)


labels = st.lists(
    st.sampled_from(
        ["c", "db", "east", "shop", "default", "svc", "cluster", "local", "c-east", "x.y", "é", ""]
    ),
    max_size=8,
)


@given(labels, st.sampled_from([(), (("c", "east"),), (("east", "default"), ("c-east", "shop"))]))
def test_any_labels_have_a_verdict_and_local_names_are_never_taken(
    chosen: list[str], local: tuple[tuple[str, str], ...]
) -> None:
    asked = zone(*local)
    verdict = asked.judge(chosen)
    assert isinstance(verdict, RemoteName | Verdict)
    for name, namespace in local:
        full = [name, namespace, "svc", "cluster", "local"]
        if chosen[-5:] == full:
            assert verdict is Verdict.FORWARD
