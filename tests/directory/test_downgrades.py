"""What a new directory removes from the one in use: a change that only an accident makes is
refused, and removed identities are remembered.

If any prefix of a directory file were taken for the whole file, no address that had an identity
would be reachable in clear text."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.directory import Directory, DirectoryError, Former, compare, directory_schema, parse
from proxy.directory.former_identities import FormerIdentities
from proxy.net.address import Address

A, B, C = (f"spiffe://cluster.local/ns/default/sa/{name}" for name in "abc")
KEEP = 600.0


def service(
    name: str, *endpoints: dict[str, Any], address: str = "", **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "addresses": [address] if address else [],
        "ports": [{"port": 80}],
        "endpoints": list(endpoints),
        **more,
    }


def pod(last: int, identity: str | None = None, **more: Any) -> dict[str, Any]:
    return {"address": f"10.1.0.{last}", **({"identity": identity} if identity else {}), **more}


def made(*services: dict[str, Any], **top: Any) -> Directory:
    return parse(yaml.safe_dump({**top, "services": list(services)}), "test")


def four() -> list[dict[str, Any]]:
    """Three services with identities, and one outside of the mesh."""
    return [
        service("a", pod(1, A), pod(2, A), address="10.96.0.1"),
        service("b", pod(3, B), address="10.96.0.2"),
        service("c", pod(4, C), address="10.96.0.3"),
        service("plain", pod(9), address="10.96.0.9"),
    ]


def refused(services: list[dict[str, Any]], max_loss: float = 0.5, **top: Any) -> str:
    return "; ".join(compare(made(*four()), made(*services, **top), max_loss).refusals)


def change(index: int, new: dict[str, Any]) -> list[dict[str, Any]]:
    services = four()
    services[index] = new
    return services


A_AT = "10.96.0.1"
NORMAL = {
    "nothing": four(),
    "a pod leaves": change(0, service("a", pod(1, A), address=A_AT)),
    "all pods of a service leave": change(0, service("a", address=A_AT)),
    "pods are replaced": change(0, service("a", pod(11, A), pod(12, A), address=A_AT)),
    "pods with another identity": change(0, service("a", pod(11, C), address=A_AT)),
    "an address with another identity": change(0, service("a", pod(1, B), pod(2, A), address=A_AT)),
    "another port": change(0, service("a", pod(1, A), ports=[{"port": 81}], address=A_AT)),
    "fewer skipped ports": change(0, service("a", pod(1, A, skip_ports=[]), address=A_AT)),
    "one service of three leaves": four()[1:],
    "a plain service leaves": four()[:3],
    "a plain service grows": change(3, service("plain", pod(9), pod(10), address="10.96.0.9")),
    "a plain service joins": change(3, service("plain", pod(9, A), address="10.96.0.9")),
    "a new service without identities": [*four(), service("new", pod(20))],
}
SUSPICIOUS = {
    "an endpoint loses its identity": (
        change(0, service("a", pod(1, A), pod(2), address=A_AT)), f"10.1.0.2 had the identity {A} and has none"
    ),
    "and is in another service": (
        [*change(0, service("a", pod(1, A), address=A_AT)), service("d", pod(2))], f"10.1.0.2 had the identity {A} and has none"
    ),
    "all lose theirs": (change(1, service("b", pod(3), address="10.96.0.2")), f"10.1.0.3 had the identity {B} and has none"),
    "a new endpoint without one": (
        change(0, service("a", pod(1, A), pod(30), address=A_AT)), "all endpoints of default/a had identities, and 10.1.0.30 has none"
    ),
    "new endpoints only": (
        change(0, service("a", pod(30), address=A_AT)), "all endpoints of default/a had identities, and 10.1.0.30 has none"
    ),
    "a new endpoint that skips the port": (
        change(0, service("a", pod(30, A, skip_ports=[4191, 80]), address=A_AT)),
        "all endpoints of default/a had identities, and 10.1.0.30 has none",
    ),
    "a port that is skipped becomes the target": (
        change(0, service("a", pod(1, A), address=A_AT, ports=[{"port": 80, "target_port": 4191}])),
        "all endpoints of default/a had identities, and 10.1.0.1 has none",
    ),
    "a port is skipped": (
        change(0, service("a", pod(1, A, skip_ports=[4191, 80]), address=A_AT)),
        f"10.1.0.1 had the identity {A} at [80], now in skip_ports",
    ),
    "a cluster address without": (
        [*four()[1:], service("d", pod(30), address=A_AT)],
        "10.96.0.1:80 was default/a, whose endpoints had identities, and is default/d, where 10.1.0.30 has none",
    ),
    "two services of three leave": (four()[2:], "2 of 3 services with identities are missing (default/a, default/b)"),
    "all services leave": ([], "3 of 3 services with identities are missing (default/a, default/b, default/c)"),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMAL)
def test_ordinary_changes_are_accepted(name: str) -> None:
    assert refused(NORMAL[name]) == ""


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_changes_that_only_an_accident_makes_are_refused_with_a_reason(name: str) -> None:
    services, reason = SUSPICIOUS[name]
    assert reason in refused(services)


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_unless_the_document_allows_everything(name: str) -> None:
    assert refused(SUSPICIOUS[name][0], allow_identity_loss=True) == ""
    assert refused(SUSPICIOUS[name][0], allow_identity_loss=False) != ""


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("an endpoint loses its identity", ["10.1.0.2"]),
        ("an endpoint loses its identity", ["default/a"]),
        ("all lose theirs", ["default/b"]),
        ("a new endpoint without one", ["10.1.0.30"]),
        ("new endpoints only", ["default/a"]),
        ("a port is skipped", ["10.1.0.1"]),
        ("a cluster address without", ["10.96.0.1"]),
        ("two services of three leave", ["default/a"]),
        ("all services leave", ["default/a", "default/b", "default/c"]),
    ],
)
def test_a_lost_identity_is_allowed_only_by_its_name(name: str, names: list[str]) -> None:
    services = SUSPICIOUS[name][0]
    assert refused(services, allow_identity_loss=names) == ""
    assert refused(services, allow_identity_loss=["default/plain", "10.1.0.9"]) != ""


@pytest.mark.parametrize(
    ("max_loss", "gone", "taken"),
    [(0, 1, False), (0.3, 1, False), (0.34, 1, True), (0.67, 2, True), (1, 2, True), (1, 3, False)],
)
def test_the_part_that_may_leave_at_once_is_a_setting(
    max_loss: float, gone: int, taken: bool
) -> None:
    assert (refused(four()[gone:], max_loss) == "") is taken
    assert refused(four(), max_loss) == ""


def test_a_service_that_is_only_a_way_to_another_cluster_counts_too() -> None:
    gateway = {"address": "203.0.113.7", "identity": A}
    clusters = [
        {
            "name": "east",
            "gateways": [gateway],
            "services": [{"name": "m", "ports": [{"port": 80}]}],
        }
    ]
    mirror = service(
        "m", address="10.96.0.7", split=[{"service": "m", "cluster": "east", "weight": 1}]
    )
    old = made(mirror, clusters=clusters)
    assert compare(old, made(), 0.5).refusals == (
        "1 of 1 services with identities are missing (default/m)",
    )
    others = [service(f"s{number}", pod(number, A)) for number in range(1, 4)]
    lost = compare(made(mirror, *others, clusters=clusters), made(*others, clusters=clusters), 0.5)
    assert lost.former == {
        Address("10.96.0.7", 80): Former("a gateway of east", frozenset({"default/m"}))
    }


def test_removed_identities_are_remembered_by_host_and_by_cluster_address() -> None:
    lost = compare(made(*four()), made(*four()[1:]), 0.5)
    former, of = Former(A, frozenset({"default/a"}), frozenset({4191})), frozenset({"default/a"})
    assert lost.former == {
        "10.1.0.1": former,
        "10.1.0.2": former,
        Address("10.96.0.1", 80): Former(A, of),
    }
    assert (
        compare(made(*four()), made(*four()[1:], allow_identity_loss=["default/a"]), 0.5).former
        == {}
    )
    assert compare(made(*four()), made(*four()), 0.5).former == {}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("all", "expected a list"),
        ([1], "expected an IP address"),
        (["default/"], "namespace/name"),
        (["a/b/c"], "namespace/name"),
        (["web"], "expected an IP address"),
    ],
)
def test_an_allowance_that_cannot_be_meant_is_a_mistake(value: object, words: str) -> None:
    with pytest.raises(DirectoryError, match=f"allow_identity_loss.*{words}"):
        made(allow_identity_loss=value)


def test_the_schema_has_it() -> None:
    assert "allow_identity_loss" in directory_schema()["properties"]  # type: ignore[operator]


def test_the_cluster_address_of_a_service_without_endpoints_is_remembered() -> None:
    """It may leave next, and has no identity to lose then."""
    empty = made(service("a", address=A_AT), *four()[1:])
    memory = FormerIdentities(KEEP, 100)
    lost = compare(made(*four()), empty, 0.5)
    memory.take(empty, lost.former, 1000.0, lost.missing)
    assert memory.losses == {"service": 0, "endpoint": 2, "identity": 0}
    gone = made(*four()[1:])
    lost = compare(empty, gone, 0.5)
    memory.take(gone, lost.former, 1001.0, lost.missing)
    assert memory.find(Address("10.96.0.1", 80), 1001.0) == Former(A, frozenset({"default/a"}))


# The memory...


def test_a_former_address_is_found_at_the_ports_where_it_had_its_identity_until_the_time_is_over() -> (
    None
):
    memory = FormerIdentities(KEEP, 100)
    new = made(*four()[1:])
    memory.take(new, compare(made(*four()), new, 0.5).former, 1000.0)
    assert len(memory) == 3
    for address in ("10.1.0.1:80", "10.1.0.1:9999", "10.1.0.2:80", "10.96.0.1:80"):
        found = memory.find(Address.parse(address), 1000.0 + KEEP - 1)
        assert found is not None, address
        assert found.identity == A
        assert memory.find(Address.parse(address), 1000.0 + KEEP) is None
    for address in ("10.1.0.1:4191", "10.96.0.1:81", "10.1.0.3:80", "10.1.0.9:80", "192.0.2.1:80"):
        assert memory.find(Address.parse(address), 1000.0) is None, address
    memory.sweep(1000.0 + KEEP)
    assert len(memory) == 0


@pytest.mark.parametrize(
    ("services", "top", "left"),
    [
        (four(), {}, 0),  # all are back
        (change(0, service("a", pod(1, A), address=A_AT)), {}, 1),
        (four()[1:], {"allow_identity_loss": ["default/a"]}, 0),
        (four()[1:], {"allow_identity_loss": ["10.1.0.1"]}, 2),
        (four()[1:], {"allow_identity_loss": True}, 0),
        ([*four()[1:], service("new", pod(1))], {}, 3),  # the address is back, without an identity
    ],
)
def test_an_address_is_released_by_an_identity_or_by_an_allowance(
    services: list[dict[str, Any]], top: dict[str, Any], left: int
) -> None:
    memory = FormerIdentities(KEEP, 100)
    new, newer = made(*four()[1:]), made(*services, **top)
    memory.take(new, compare(made(*four()), new, 0.5).former, 1000.0)
    memory.take(newer, compare(new, newer, 0.5).former, 1001.0)
    assert len(memory) == left


def test_the_memory_is_bounded_and_forgets_nothing_for_want_of_room() -> None:
    memory = FormerIdentities(KEEP, 3)
    new = made(*four()[1:])
    former = compare(made(*four()), new, 0.5).former
    assert memory.fits(former, 1000.0)
    memory.take(new, former, 1000.0)
    assert not memory.fits({"10.1.0.50": Former(A, frozenset())}, 1001.0)
    assert memory.fits({"10.1.0.50": Former(A, frozenset())}, 1000.0 + KEEP), (
        "by then there is room"
    )


def test_what_is_lost_is_counted_and_services_are_named(caplog: pytest.LogCaptureFixture) -> None:
    services = [service(f"s{number:02}", pod(number, A)) for number in range(1, 21)]
    old, new = made(*services), made(*services[7:])
    memory, lost = FormerIdentities(KEEP, 100), compare(old, new, 0.5)
    with caplog.at_level(logging.WARNING, "isthmus.directory"):
        memory.take(new, lost.former, 1000.0, lost.missing)
    assert memory.losses == {"service": 7, "endpoint": 7, "identity": 0}
    (message,) = caplog.messages
    assert message == (
        "services with identities have left the directory, or some of their addresses or ports"
        " have: default/s01, default/s02, default/s03, default/s04, default/s05 and 2 more; the"
        " proxy sends no clear text to them for 600 s"
    )
    memory.take(new, {}, 1001.0)
    assert len(caplog.messages) == 1
    assert memory.losses["service"] == 7


def test_a_service_that_loses_a_port_is_named_and_one_that_may_leave_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def two(*ports: int) -> dict[str, Any]:
        return {**service("a", pod(1, A), address=A_AT), "ports": [{"port": n} for n in ports]}

    memory = FormerIdentities(KEEP, 100)
    for old, new, count in (
        (made(two(80, 81)), made(two(80)), 1),
        (made(*four()), made(*four()[1:], allow_identity_loss=["default/a"]), 1),
        (made(*four()), made(*four()), 1),
    ):
        lost = compare(old, new, 0.5)
        memory.take(new, lost.former, 1000.0, lost.missing)
        assert memory.losses["service"] == count
    (message,) = caplog.messages
    assert "ports have: default/a; " in message


def test_nothing_is_remembered_if_it_is_switched_off() -> None:
    memory, new = FormerIdentities(0, 1), made(*four()[1:])
    former = compare(made(*four()), new, 0.5).former
    assert memory.fits(former, 1000.0)
    memory.take(new, former, 1000.0)
    assert (len(memory), memory.find(Address("10.1.0.1", 80), 1000.0)) == (0, None)


# Prefixes...


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A directory of services with one to three pods each, most of them with identities, as a
    generator may write it."""
    hosts, addresses = draw(st.permutations(range(1, 30))), draw(st.permutations(range(1, 9)))
    services = []
    for index in range(draw(st.integers(1, 5))):
        meshed = draw(st.sampled_from([True, True, True, False]))
        pods = []
        for turn in range(draw(st.integers(1, 3))):
            more = (
                {"skip_ports": [4191, draw(st.sampled_from([80, 8080, 9000]))]}
                if draw(st.booleans())
                else {}
            )
            pods.append(
                pod(
                    hosts[index * 3 + turn],
                    f"spiffe://cluster.local/ns/default/sa/s{index}" if meshed else None,
                    **more,
                )
            )
        ports = [{"port": 80, "target_port": draw(st.sampled_from([80, 8080]))}, {"port": 8080}][
            : draw(st.integers(1, 2))
        ]
        services.append(
            service(f"s{index}", *pods, address=f"10.96.0.{addresses[index]}", ports=ports)
        )
    text: str = yaml.safe_dump(
        {"services": services},
        sort_keys=False,
        default_flow_style=draw(st.sampled_from([False, None])),
    )
    return text


def meshed_addresses(directory: Directory) -> list[Address]:
    """The addresses that are dialled with mutual TLS: cluster addresses, and pods at a few
    ports."""
    asked = [
        Address(host, port) for host in directory.pods for port in (80, 8080, 9000, 4191, 7)
    ] + list(directory.clustered)
    found = [
        address
        for address in asked
        if all(endpoint.identity for endpoint in directory.resolve(address).endpoints)
    ]
    return [address for address in found if directory.resolve(address).endpoints]


def leaks(current: Directory, memory: FormerIdentities, meshed: list[Address]) -> list[Address]:
    """Those of `meshed` to which a connection would go in clear text."""
    return [
        address
        for address in meshed
        for endpoint in current.resolve(address).endpoints
        if endpoint.identity is None and memory.find(endpoint.address, 1000.0) is None
    ]


def taken(old: Directory, text: str) -> tuple[Directory, FormerIdentities] | None:
    """The directory after the directory `old` when a file has this text, as if it were complete.
    None: it is invalid, or refused."""
    try:
        new = parse(text, "new")
    except DirectoryError:
        return None
    lost = compare(old, new, 0.5)
    if lost.refusals:
        return None
    memory = FormerIdentities(KEEP, 10_000)
    memory.take(new, lost.former, 1000.0)
    return new, memory


@settings(max_examples=25, deadline=None)
@given(documents(), st.data())
def test_no_prefix_of_a_file_moves_a_meshed_address_to_clear_text(
    old_text: str, data: st.DataObject
) -> None:
    """The writer has stopped, so that the file is not even known to be incomplete. It writes the
    same document again, or another one."""
    new_text = data.draw(st.one_of(st.just(old_text), documents()))
    old = parse(old_text, "old")
    meshed = meshed_addresses(old)
    lines = [index + 1 for index, character in enumerate(new_text) if character == "\n"][:-1]
    ends = data.draw(st.lists(st.integers(0, len(new_text) - 1), min_size=15, max_size=15))
    for end in {*lines, *ends}:
        if (found := taken(old, new_text[:end])) is not None:
            assert leaks(*found, meshed) == [], new_text[:end]


TWO = f"""
services:
- name: a
  addresses: [10.96.0.1]
  ports:
  - port: 80
    target_port: 8080
  endpoints:
  - address: 10.1.0.1
    identity: {A}
  - address: 10.1.0.12
    identity: {A}
- name: b
  addresses: [10.96.0.2]
  ports:
  - port: 80
  endpoints:
  - address: 10.1.0.3
    identity: {B}
"""


def test_every_prefix_of_a_file_with_two_services() -> None:
    """Most of the prefixes that are valid documents would allow clear text. None of those that are
    accepted does."""
    old = parse(TWO, "old")
    meshed = meshed_addresses(old)
    valid = [text for end in range(len(TWO)) if (text := TWO[:end]) and parses(text)]
    harmful = [text for text in valid if leaks(parse(text, "new"), FormerIdentities(0, 0), meshed)]
    assert len(valid) > 50
    assert len(harmful) > 50, "otherwise this test proves nothing"
    found = [made for text in valid if (made := taken(old, text)) is not None]
    assert [leaks(*each, meshed) for each in found if leaks(*each, meshed)] == []


def parses(text: str) -> bool:
    try:
        parse(text, "test")
    except DirectoryError:
        return False
    return True
