"""When a replica says that an address is not part of the mesh, and how much work its answers are.

Clients send clear text then. So the answer needs current data about the address: not only a slice
of some tenant that lists it, and no fact that discovery has got but not used yet.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from control.channel.session import Session
from control.channel.views import Views
from control.discovery.usable_endpoints import Place
from proxy.directory.channel.messages import (
    Current,
    Frames,
    FromControl,
    Hello,
    Subscribe,
    Unavailable,
    Update,
    from_control,
    version_of,
)
from proxy.directory.channel.views import Content, PodView, ServiceView, UnknownView, decode
from tests.control.cluster import Cluster, Json, endpoint, identity, pod, port, service, slice_of

NEW, KNOWN, OUTSIDE, VIP = "10.1.0.9", "10.1.0.1", "203.0.113.7", "10.96.0.1"
HEADLESS = service("db", "None")


class Scene:
    """A cluster, and the answers that proxies get."""

    def __init__(self, *items: Json, networks: tuple[str, ...] = ()) -> None:
        self.cluster = Cluster(*networks).put(*items)
        self.cluster.flush()
        self.views = Views(self.cluster.catalog)
        self.views.is_current = lambda: self.current
        self.current = True

    def proxy(self, namespace: str = "shop", node: str = "node-1") -> Session:
        made = Session(self.views, 4096, 8 << 20)
        made.place = Place(node, "", namespace)
        made.received(Hello())
        return made

    def flush(self) -> None:
        self.views.changed(self.cluster.flush())
        self.views.answer_settled()


def said(session: Session) -> list[FromControl]:
    found: list[FromControl] = []
    while data := session.take(1 << 20):
        found += [from_control(part) for part in Frames(1 << 30).feed(data)]
    return found


def ask(session: Session, *keys: str, version: bytes = b"") -> list[FromControl]:
    session.received(Subscribe(tuple((key, version) for key in keys)))
    return said(session)


def contents(messages: list[FromControl]) -> list[Content | None]:
    return [decode(message.content) for message in messages if isinstance(message, Update)]


# A replica that is cut off from the API server


@pytest.mark.parametrize("target", [None, "nobody"])
def test_a_slice_of_a_tenant_does_not_make_an_address_known_to_a_replica_that_is_cut_off(
    target: str | None,
) -> None:
    scene = Scene(HEADLESS, slice_of("db", endpoint(OUTSIDE, target)))
    scene.current = False
    other = scene.proxy("other")
    assert ask(other, f"a/{OUTSIDE}") == [Unavailable((f"a/{OUTSIDE}",))]
    assert ask(scene.proxy(), f"a/{OUTSIDE}") != [Unavailable((f"a/{OUTSIDE}",))]
    scene.current = True
    scene.views.answer_withheld()
    assert contents(said(other)) == [None]


def test_a_replica_that_is_cut_off_knows_pods_without_a_sidecar_nodes_and_services() -> None:
    node, udp = "192.168.0.5", "10.96.0.7"
    only_udp = service("dns", udp)
    only_udp["spec"]["ports"][0]["protocol"] = "UDP"
    scene = Scene(pod("plain", KNOWN, meshed=False), pod("host", node, hostNetwork=True), only_udp)
    scene.current = False
    for key in (f"a/{KNOWN}", f"a/{node}", f"a/{udp}", "s/shop/dns"):
        assert len(contents(ask(scene.proxy(), key))) == 1, key
    assert contents(ask(scene.proxy(), f"a/{NEW}")) == []


# Facts that are not in the entries yet


@pytest.mark.parametrize("current", [True, False])
def test_a_pod_that_discovery_has_just_heard_of_is_not_answered_as_no_pod(current: bool) -> None:
    scene = Scene(pod("a", KNOWN))
    scene.current = current
    scene.cluster.put(pod("b", NEW))
    proxy = scene.proxy()
    assert ask(proxy, f"a/{NEW}") == [], "it is told after the flush"
    scene.flush()
    (found,) = contents(said(proxy))
    assert isinstance(found, PodView)
    assert found.identity == str(identity("web"))


def test_a_slice_that_discovery_has_just_heard_of_counts_too() -> None:
    scene = Scene(HEADLESS, pod("a", KNOWN))
    scene.cluster.put(slice_of("db", endpoint(NEW, "b")))
    proxy = scene.proxy("other")
    assert ask(proxy, f"a/{NEW}") == []
    scene.flush()
    assert contents(said(proxy)) == [UnknownView(pending=True)]


def test_an_address_that_moves_to_another_pod_is_not_answered_as_the_old_one() -> None:
    scene = Scene(pod("plain", NEW, meshed=False))
    scene.cluster.remove(pod("plain", NEW)).put(pod("b", NEW))
    proxy = scene.proxy()
    assert ask(proxy, f"a/{NEW}") == []
    scene.flush()
    (found,) = contents(said(proxy))
    assert isinstance(found, PodView)
    assert found.identity


def test_a_change_that_changes_nothing_is_answered_too() -> None:
    scene = Scene(pod("a", KNOWN))
    scene.cluster.put(pod("b", NEW)).remove(pod("b", NEW))
    proxy = scene.proxy()
    nothing = version_of(b"")
    assert ask(proxy, f"a/{NEW}", version=nothing) == []
    scene.flush()
    assert said(proxy) == [Current((f"a/{NEW}",))]


def test_a_service_that_discovery_has_just_heard_of_is_not_answered_as_none() -> None:
    scene = Scene(pod("a", KNOWN))
    scene.cluster.put(service())
    proxy = scene.proxy()
    assert ask(proxy, "s/shop/web", f"a/{VIP}") == []
    scene.flush()
    assert all(isinstance(found, ServiceView) for found in contents(said(proxy)))


def test_a_topic_that_is_followed_no_longer_is_not_answered() -> None:
    scene = Scene(pod("a", KNOWN))
    scene.cluster.put(pod("b", NEW))
    proxy = scene.proxy()
    assert ask(proxy, f"a/{NEW}") == []
    proxy.close()
    scene.flush()
    assert said(proxy) == []
    assert scene.views.topics == {}


# Pods without a sidecar


def test_a_pod_without_a_sidecar_and_without_a_service_is_a_pod() -> None:
    """So it releases an address that had an identity."""
    scene = Scene(pod("plain", KNOWN, meshed=False))
    for namespace in ("shop", "other"):
        (found,) = contents(ask(scene.proxy(namespace), f"a/{KNOWN}"))
        assert isinstance(found, PodView)
        assert (found.identity, found.pod, found.ports) == ("", True, ())
    assert scene.cluster.catalog.meshed == 0


def test_a_slice_names_the_next_pod_at_the_address_of_one_without_a_sidecar() -> None:
    old = pod("old", NEW, meshed=False)
    scene = Scene(HEADLESS, old, slice_of("db", endpoint(NEW, "new")))
    for namespace in ("shop", "other"):
        assert contents(ask(scene.proxy(namespace), f"a/{NEW}")) == [UnknownView(pending=True)]
    scene.cluster.put(slice_of("db", endpoint(NEW, "old"), version="2"))
    scene.flush()
    (found,) = contents(ask(scene.proxy("other"), f"a/{NEW}"))
    assert isinstance(found, PodView)
    # The same name, but another pod: its uid says so.
    renewed = endpoint(NEW, "old")
    renewed["targetRef"]["uid"] = "uid-of-the-next"
    scene.cluster.put(slice_of("db", renewed, version="3"))
    scene.flush()
    assert contents(ask(scene.proxy("other"), f"a/{NEW}")) == [UnknownView(pending=True)]


def test_a_tenant_cannot_block_the_pod_of_another_one() -> None:
    victim = pod("plain", KNOWN, meshed=False, namespace="victim")
    scene = Scene(HEADLESS, victim, slice_of("db", endpoint(KNOWN, "nobody")))
    for namespace in ("victim", "other"):
        (found,) = contents(ask(scene.proxy(namespace), f"a/{KNOWN}"))
        assert isinstance(found, PodView)
    assert contents(ask(scene.proxy(), f"a/{KNOWN}")) == [UnknownView(pending=True)]


# Work


def calls(work: Any) -> int:
    count = 0

    def profile(_frame: FrameType, event: str, _what: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def steps(work: Any) -> int:
    """The instructions that Python executes, also those of loops."""
    count = 0

    def trace(frame: FrameType, event: str, _what: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def pods(count: int) -> list[str]:
    return [f"10.1.{number // 250}.{number % 250 + 1}" for number in range(count)]


def workload(name: str, ip: str, count: int) -> list[Json]:
    ends = [endpoint(host, f"{name}-{n}") for n, host in enumerate(pods(count))]
    made = [pod(f"{name}-{n}", host) for n, host in enumerate(pods(count))]
    return [service(name, ip), slice_of(name, *ends), *made]


@pytest.mark.no_cover  # the tracer uses the same hook
def test_a_content_is_made_once_for_proxies_on_different_nodes_and_in_different_namespaces() -> (
    None
):
    scene = Scene(*workload("web", VIP, 100))
    key = f"a/{VIP}"
    one = calls(lambda: ask(scene.proxy(), key))
    for number in range(30):
        there = scene.proxy(f"namespace-{number}", f"node-{number}")
        assert calls(lambda there=there: ask(there, key)) < one / 5
    assert scene.views.computed == 1


@pytest.mark.no_cover
def test_the_work_for_a_change_of_a_headless_service_grows_with_its_endpoints() -> None:
    """All of its addresses are followed."""
    work = []
    for count in (40, 160):
        scene = Scene(*workload("db", "None", count))
        proxy = scene.proxy()
        ask(proxy, *(f"a/{host}" for host in pods(count)))
        scene.cluster.put(service("db", "None", port(81)))

        def change(scene: Scene = scene, proxy: Session = proxy) -> None:
            scene.flush()
            said(proxy)

        work.append(steps(change))
    assert work[1] < work[0] * 5


@pytest.mark.no_cover
@pytest.mark.parametrize("networks", [(), ("10.0.0.0/8",)])
def test_a_pod_in_a_new_network_concerns_the_unknown_addresses_of_it_only(
    networks: tuple[str, ...],
) -> None:
    work = []
    for count in (50, 500):
        ends = [endpoint(host, f"nobody-{n}") for n, host in enumerate(pods(count))]
        scene = Scene(HEADLESS, slice_of("db", *ends), networks=networks)
        assert len(scene.cluster.catalog.unknown) == count
        work.append(calls(lambda scene=scene: scene.cluster.put(pod("a", "10.9.9.9"))))
    assert work[1] <= work[0]
