"""Answers of the control plane between two flushes of discovery, and at the edges of a proxy's
connection: nothing is lost, and nothing grows without a limit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from control.channel.session import Session
from control.channel.views import Views
from control.discovery.usable_endpoints import Place
from proxy.directory.channel.messages import (
    ChannelError,
    Frames,
    FromControl,
    Hello,
    Subscribe,
    Unsubscribe,
    Update,
    Welcome,
    frame,
    from_control,
)
from proxy.directory.channel.subscriptions import Subscriptions
from proxy.directory.channel.views import Content, decode
from proxy.net.address import Address
from proxy.net.tls.handshake import TLSStream
from tests.control.cluster import Cluster, Json, endpoint, identity, pod, service, slice_of
from tests.kit.channel import DOMAIN, Workshop, until

VIP = "a/10.96.0.1"
EXTERNAL = "203.0.113.7"
IDENTITY = "isthmus.dev/endpoint-identity"


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    made = Workshop(tmp_path)
    yield made
    made.close()


def session(views: Views, most: int = 4096, place: Place | None = None) -> Session:
    """The session of a proxy that has sent its Hello."""
    made = Session(views, most, 8 << 20)
    made.place = place or Place()
    made.received(Hello())
    return made


def messages(session: Session) -> list[FromControl]:
    """What the session has to send."""
    found: list[FromControl] = []
    while data := session.take(1 << 20):
        found += [from_control(part) for part in Frames(1 << 30).feed(data)]
    return found


def answers(session: Session) -> list[Content | None]:
    """The contents that the session has to send."""
    return [decode(one.content) for one in messages(session) if isinstance(one, Update)]


def web() -> Cluster:
    """The service `web` with one pod."""
    cluster = Cluster().put(
        service(), slice_of("web", endpoint("10.1.0.1", "a")), pod("a", "10.1.0.1")
    )
    cluster.flush()
    return cluster


# Discovery: several events before a flush


def test_a_service_that_changes_and_changes_back_before_a_flush_is_never_answered_as_unknown() -> (
    None
):
    cluster = web()
    views = Views(cluster.catalog)
    other: Json = service()
    other["spec"]["type"] = "ExternalName"
    cluster.put(other)
    early = session(views)
    early.received(Subscribe(((VIP, b""),)))
    (first,) = answers(early)
    assert first is not None
    cluster.put(service())
    views.changed(cluster.flush())
    assert all(answer is not None for answer in answers(early))
    late = session(views)
    late.received(Subscribe(((VIP, b""),)))
    assert answers(late) == [first]


def test_an_external_endpoint_that_moves_between_slices_keeps_its_identity() -> None:
    annotations = {"annotations": {IDENTITY: str(identity("db"))}}
    cluster = Cluster().put(
        service("db", "None", metadata=annotations),
        slice_of("db", endpoint(EXTERNAL), name="db-1"),
        slice_of("db", name="db-2"),
    )
    cluster.flush()
    views = Views(cluster.catalog)
    cluster.put(slice_of("db", name="db-1", version="2"))
    early = session(views, place=Place(namespace="shop"))
    early.received(Subscribe(((f"a/{EXTERNAL}", b""),)))
    (first,) = answers(early)
    assert first is not None
    cluster.put(slice_of("db", endpoint(EXTERNAL), name="db-2", version="3"))
    views.changed(cluster.flush())
    assert all(answer is not None for answer in answers(early))
    late = session(views, place=Place(namespace="shop"))
    late.received(Subscribe(((f"a/{EXTERNAL}", b""),)))
    assert answers(late) == [first]


@pytest.mark.parametrize(
    ("before", "after"), [(None, "not an identity"), ("not an identity", None)]
)
def test_an_annotation_that_becomes_unreadable_concerns_the_other_services_with_the_address(
    before: str | None, after: str | None
) -> None:
    def older(value: str | None) -> Json:
        annotations = {} if value is None else {IDENTITY: value}
        return service("a", "10.96.0.1", metadata={"annotations": annotations})

    younger = service(
        "b",
        "10.96.0.2",
        metadata={
            "creationTimestamp": "2026-06-06T00:00:00Z",
            "annotations": {IDENTITY: str(identity("x"))},
        },
    )
    slices = [
        slice_of("a", endpoint("10.9.0.5")),
        slice_of("b", endpoint("10.9.0.5")),
    ]
    changed = Cluster().put(older(before), younger, *slices)
    changed.flush()
    changed.put(older(after))
    changed.flush()
    fresh = Cluster().put(older(after), younger, *slices)
    fresh.flush()
    assert changed.catalog.services == fresh.catalog.services


# Limits


def test_refusals_that_are_not_read_end_the_session() -> None:
    asked = session(Views(Cluster().catalog), most=16)
    asked.received(Subscribe(tuple((f"s/{number}/x", b"") for number in range(16))))
    asked.received(Subscribe(tuple((f"s/{number}/y", b"") for number in range(16))))
    with pytest.raises(ChannelError, match="more than 16 refusals wait"):
        asked.received(Subscribe((("s/one/more", b""),)))


def test_places_of_proxies_that_are_gone_do_not_fill_a_topic() -> None:
    views = Views(web().catalog)
    kept = session(views)
    kept.received(Subscribe(((VIP, b""),)))
    for number in range(3000):
        gone = session(views, place=Place("node-1", f"zone-{number}"))
        gone.received(Subscribe(((VIP, b""),)))
        assert len(answers(gone)) == 1
        gone.close()
    assert len(views.topics[VIP].variants) <= 1025
    assert len(answers(kept)) == 1


def test_a_service_with_too_many_endpoints_times_ports_is_not_used_and_says_so() -> None:
    ports: list[Json] = [
        {"port": number, "name": f"p{number}", "protocol": "TCP"} for number in range(1, 502)
    ]
    endpoints = [{"addresses": [f"10.200.{n // 250}.{n % 250 + 1}"]} for n in range(400)]
    cluster = Cluster().put(
        service("big", "10.96.0.9", *ports, namespace="evil"),
        slice_of("big", *endpoints, namespace="evil", ports=ports),
    )
    cluster.flush()
    assert cluster.catalog.services["evil", "big"].endpoints == ()
    problems = cluster.catalog.problems["evil", "big"]
    assert any("endpoints times ports" in problem for problem in problems)


# The proxy's end


def welcomed() -> Subscriptions:
    made = Subscriptions(16)
    made.received(Welcome("replica", DOMAIN, (), 16, 1.0))
    return made


def deliver(proxy: Subscriptions, control: Session) -> None:
    for message in messages(control):
        proxy.received(message)


def test_a_late_answer_to_a_subscription_that_was_dropped_since_is_ignored() -> None:
    views = Views(web().catalog)
    proxy, control = welcomed(), session(views)
    entry = proxy.want(VIP)
    for message in proxy.take():
        control.received(message)
    deliver(proxy, control)
    assert entry.state == "known"
    proxy.release(entry, 0.0)
    proxy.lost()
    control.close()
    proxy.received(Welcome("replica", DOMAIN, (), 16, 1.0))
    control = session(views)
    for message in proxy.take():
        control.received(message)
    late = messages(control)  # a slow replica: it is on its way
    proxy.expire(1000.0)
    entry = proxy.want(VIP)
    for message in proxy.take():
        control.received(message)
    for answer in late:
        proxy.received(answer)
    states = [entry.state]
    deliver(proxy, control)
    states.append(entry.state)
    assert states == ["waiting", "known"]


def test_an_entry_that_is_dropped_used_and_dropped_again_is_unsubscribed() -> None:
    proxy, control = welcomed(), session(Views(web().catalog))
    entry = proxy.want(VIP)
    for message in proxy.take():
        control.received(message)
    proxy.release(entry, 0.0)
    proxy.expire(1.0)  # the writer is blocked: nothing is sent
    proxy.release(proxy.want(VIP), 2.0)
    proxy.expire(3.0)
    sent = proxy.take()
    assert any(isinstance(message, Unsubscribe) for message in sent)
    for message in sent:
        control.received(message)
    assert (len(proxy.entries), len(control)) == (0, 0)


async def test_a_heartbeat_that_is_no_number_is_the_shortest_one(workshop: Workshop) -> None:
    async def serve(stream: TLSStream) -> None:
        await stream.receive_some()
        await stream.send_all(frame(Welcome("replica", DOMAIN, (), 100, float("nan"))))
        await trio.sleep_forever()

    async with workshop.impostor(serve) as port:
        source = workshop.source(port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.run, lambda _: None)
            await until(lambda: source.not_ready() is None, "the source is ready")
            nursery.cancel_scope.cancel()


async def test_a_goodbye_before_the_welcome_gives_its_reason(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with workshop.control(max_connections_per_identity=0) as (_, port):
        source = workshop.source(port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.run, lambda _: None)
            name = "max_connections_per_identity"
            await until(lambda: name in (source.not_ready() or ""), "the reason is known")
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("::1.2.3.4", "::102:304"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("64:ff9b::1.2.3.4", "64:ff9b::102:304"),
        ("fd00::1", "fd00::1"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_an_address_has_one_form_whatever_the_c_library_writes(written: str, host: str) -> None:
    """An entry for another form is refused by the control plane, which ends the connection."""
    assert Address.of((written, 80)).host == host
