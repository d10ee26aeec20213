"""Events under load: `record` never waits, memory and writes are limited, and dropped events are
counted.
"""

from __future__ import annotations

import trio
from trio.abc import Clock

from control.kube.client import Client
from control.kube.event_recorder import EventContent, EventRecorder, RecorderRules
from control.kube.objects import ObjectReference
from lab.kube_api.server import ApiServer
from lab.kube_api.store import KINDS, Json

KIND = KINDS["events.k8s.io/v1", "events"]


def content(name: str = "web", reason: str = "Refused", note: str = "not used") -> EventContent:
    return EventContent(
        ObjectReference("Service", "shop", name, f"uid-{name}", "v1"),
        reason,
        note,
        "Discover",
        warning=True,
    )


def events(server: ApiServer) -> list[Json]:
    return list(server.store.objects[KIND].values())


async def test_writes_are_paced(
    clock: Clock, server: ApiServer, client: Client, nursery: trio.Nursery
) -> None:
    recorder = EventRecorder(client, "isthmus.dev/control", "c-1", RecorderRules(interval=0.2))
    nursery.start_soon(recorder.run)
    for number in range(100):
        recorder.record(content(f"s{number}"))
    await trio.sleep(5.05)
    assert len(events(server)) == 26
    await trio.sleep(60)
    assert len(events(server)) == 100
    assert (recorder.written, recorder.dropped) == (100, 0)


async def test_more_than_may_wait_is_dropped_and_counted(
    clock: Clock, server: ApiServer, client: Client, nursery: trio.Nursery
) -> None:
    recorder = EventRecorder(
        client, "isthmus.dev/control", "c-1", RecorderRules(max_queued=10, max_remembered=5)
    )
    for number in range(1000):
        recorder.record(content(f"s{number}"))
    nursery.start_soon(recorder.run)
    await trio.sleep(60)
    assert len(events(server)) == recorder.written == 5
    assert recorder.dropped == 995
    assert {event["regarding"]["name"] for event in events(server)} == {
        f"s{number}" for number in range(995, 1000)
    }


async def test_the_same_again_is_a_count_once_in_a_while(
    clock: Clock, server: ApiServer, client: Client, nursery: trio.Nursery
) -> None:
    recorder = EventRecorder(client, "isthmus.dev/control", "c-1")
    nursery.start_soon(recorder.run)
    for _ in range(600):  # ten minutes
        recorder.record(content())
        await trio.sleep(1)
    assert len(events(server)) == 1
    assert len(server.log) <= 13
    assert events(server)[0]["series"]["count"] > 500


async def test_the_same_after_a_long_time_is_another_event(
    clock: Clock, server: ApiServer, client: Client, nursery: trio.Nursery
) -> None:
    recorder = EventRecorder(client, "isthmus.dev/control", "c-1")
    nursery.start_soon(recorder.run)
    recorder.record(content())
    await trio.sleep(1000)
    recorder.record(content())
    await trio.sleep(1)
    assert len(events(server)) == 2


async def test_a_server_that_refuses_events_does_no_harm(
    clock: Clock, server: ApiServer, client: Client, nursery: trio.Nursery
) -> None:
    server.behaviour.forbidden.add("events")
    recorder = EventRecorder(client, "isthmus.dev/control", "c-1")
    nursery.start_soon(recorder.run)
    for _ in range(100):
        recorder.record(content())
        await trio.sleep(1)
    assert recorder.dropped > 0
    assert len(server.log) < 5
    server.behaviour.forbidden.clear()
    recorder.record(content(note="another"))
    await trio.sleep(1)
    assert len(events(server)) == 1


async def test_an_event_that_was_deleted_is_written_again(
    clock: Clock, server: ApiServer, client: Client, nursery: trio.Nursery
) -> None:
    recorder = EventRecorder(
        client, "isthmus.dev/control", "c-1", RecorderRules(repeat_interval=1.0)
    )
    nursery.start_soon(recorder.run)
    recorder.record(content())
    await trio.sleep(2)
    for key in list(server.store.objects[KIND]):
        server.store.delete(KIND, key)
    for _ in range(3):
        recorder.record(content())
        await trio.sleep(2)
    assert len(events(server)) == 1


async def test_messages_are_cut_to_the_limit_of_the_server(
    clock: Clock, server: ApiServer, client: Client, nursery: trio.Nursery
) -> None:
    recorder = EventRecorder(client, "isthmus.dev/control", "i" * 300)
    nursery.start_soon(recorder.run)
    recorder.record(content("n" * 253, "R" * 300, "ä" * 2000))
    await trio.sleep(1)
    (event,) = events(server)
    assert len(event["metadata"]["name"]) <= 253
    assert len(event["note"].encode()) <= 1024
    assert (len(event["reason"]), len(event["reportingInstance"])) == (128, 128)
