"""Names: every form that Kubernetes has, and the three forms of another cluster's service. A local
service with exactly that name has precedence."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.directory.service_names import LABEL, ServiceNames, split_authority

_LABELS = st.from_regex(LABEL, fullmatch=True).filter(lambda label: label != "svc")


def names() -> ServiceNames[str]:
    found: ServiceNames[str] = ServiceNames("cluster.local")
    found.add("c", "default", "west c")
    found.add("c", "shop", "west c of shop")
    found.add("d-east", "default", "west d-east")
    assert found.add_remote("c", "default", "east", "east c") is None
    assert found.add_remote("c", "shop", "east", "east c of shop") is None
    assert found.add_remote("d", "default", "east", "east d") == "west d-east"
    assert found.add_remote("only", "shop", "east", "east only") is None
    return found


@pytest.mark.parametrize(
    ("host", "namespace", "service"),
    [
        ("c", "default", "west c"),
        ("c", "shop", "west c of shop"),
        ("c", "other", None),
        ("c.shop", "default", "west c of shop"),
        ("c.shop.svc", "default", "west c of shop"),
        ("C.Shop.SVC.Cluster.Local.", "default", "west c of shop"),
        ("c.shop.svc.cluster.local", "", "west c of shop"),
        ("c.shop.svc.other.local", "default", None),
        ("c.svc", "default", None),
        ("c.svc.cluster.local", "default", None),
        ("c.east", "default", "east c"),
        ("c.east", "shop", "east c of shop"),
        ("c.shop.east", "default", "east c of shop"),
        ("c.shop.east.", "default", "east c of shop"),
        ("c-east", "default", "east c"),
        ("c-east.shop", "default", "east c of shop"),
        ("c-east.shop.svc", "default", "east c of shop"),
        ("c-east.shop.svc.cluster.local", "default", "east c of shop"),
        ("c.shop.east.svc", "default", None),
        ("d-east", "default", "west d-east"),
        ("d.east", "default", "east d"),
        ("only.east", "default", None),
        ("east", "default", None),
        ("", "default", None),
        (".", "default", None),
        ("c.", "default", "west c"),
        ("c..", "default", None),
        (".default", "default", None),
        ("c.default.svc.cluster.local.example.com", "default", None),
    ],
)
def test_a_name_means_one_service_or_none(host: str, namespace: str, service: str | None) -> None:
    assert names().find(host, namespace) == service


def test_a_service_in_a_namespace_called_like_a_cluster_wins() -> None:
    found = names()
    found.add("c", "east", "west c of the namespace east")
    assert found.find("c.east", "default") == "west c of the namespace east"
    assert found.find("c.default.east", "default") == "east c"


def test_two_clusters_whose_mirrors_have_one_name_are_noticed() -> None:
    found: ServiceNames[str] = ServiceNames()
    assert found.add_remote("c-a", "default", "b", "one") is None
    assert found.add_remote("c", "default", "a-b", "two") == "one"
    assert (found.find("c-a-b", "default"), found.find("c.a-b", "default")) == ("one", "two")


@given(_LABELS, _LABELS, _LABELS, st.randoms(use_true_random=False), st.booleans())
def test_every_way_to_write_a_service_leads_to_it(
    name: str, namespace: str, cluster: str, chance: random.Random, dot: bool
) -> None:
    def written(host: str) -> str:
        mixed = "".join(chance.choice((c, c.upper())) for c in host)
        return f"{mixed}." if dot else mixed

    found: ServiceNames[str] = ServiceNames("a.example")
    found.add_remote(name, namespace, cluster, "remote")
    mirror = f"{name}-{cluster}.{namespace}"
    for host in (
        mirror,
        f"{mirror}.svc",
        f"{mirror}.svc.a.example",
        f"{name}.{namespace}.{cluster}",
    ):
        assert found.find(written(host), "elsewhere") == "remote"
    for host in (f"{name}-{cluster}", f"{name}.{cluster}"):
        assert found.find(written(host), namespace) == "remote"
    found.add(name, namespace, "local")
    for host in (
        f"{name}.{namespace}",
        f"{name}.{namespace}.svc",
        f"{name}.{namespace}.svc.a.example",
    ):
        assert found.find(written(host), "elsewhere") == "local"
    assert found.find(written(name), namespace) == "local"


@given(st.text(max_size=300), st.text(max_size=70))
def test_any_text_is_a_name_or_none(host: str, namespace: str) -> None:
    assert isinstance(names().find(host, namespace), str | None)


@pytest.mark.parametrize(
    ("authority", "parts"),
    [
        (b"c", ("c", None)),
        (b"c.east:8080", ("c.east", 8080)),
        (b"c:", ("c", None)),
        (b"c:0", None),
        (b"c:99999", None),
        (b"c:80:80", None),
        (b"c:x", None),
        (b":80", None),
        (b"", None),
        (b"[::1]:80", None),
        (b"\xe9.east", None),
    ],
)
def test_an_authority_is_a_host_and_perhaps_a_port(
    authority: bytes, parts: tuple[str, int | None] | None
) -> None:
    assert split_authority(authority) == parts


@given(st.binary(max_size=60))
def test_any_bytes_are_an_authority_or_none(authority: bytes) -> None:
    parts = split_authority(authority)
    assert parts is None or (
        parts[0] and ":" not in parts[0] and (parts[1] is None or 1 <= parts[1] <= 65535)
    )
