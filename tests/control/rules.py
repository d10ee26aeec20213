"""How the API behaves, and what the client makes of it.

The same tests run against the in-memory server (tests/control/test_rules.py) and against a real API
server (tests/kube). So a wrong in-memory server is noticed. Each test requests the fixture `clock`,
because a test must name a clock itself: MockClock for the in-memory server, real time for the real
one.
"""

from __future__ import annotations

from typing import Any, Self

import pytest
import trio

from control.kube.api_errors import Refused
from control.kube.client import Selection
from control.kube.event_recorder import EventContent, EventRecorder, RecorderRules
from control.kube.leader_election import Election, LeaseRules
from control.kube.objects import Lease, Meta, ObjectReference, Pod, ResourceAttributes, UserInfo
from control.kube.reflector import Reflector
from control.kube.resources import EVENTS, LEASES, PODS, SERVICES
from control.kube.reviews import may, review_token, service_account
from control.kube.watching import Bookmark, Lines, ObjectChange, event_of
from tests.control.stage import CONFIG_MAPS, METADATA, ConfigMap, Reports, Stage, follow

# A real API server has config maps of its own in every namespace.
OWN = "kube-root-ca.crt"


class Watching:
    """A watch, event by event."""

    def __init__(self, stage: Stage, selection: Selection, **query: str) -> None:
        self._stage, self._selection, self._query = (
            stage,
            selection,
            {"timeoutSeconds": "60", **query},
        )
        self._events: list[ObjectChange[ConfigMap] | Bookmark] = []
        self._lines = Lines(2**20)

    async def __aenter__(self) -> Self:
        self._answer = await self._stage.client.watch(CONFIG_MAPS, self._selection, self._query)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._answer.aclose()

    async def next(self) -> ObjectChange[ConfigMap] | Bookmark:
        with trio.fail_after(30):
            while not self._events:
                piece = await self._answer.read()
                assert piece, "the watch has ended"
                self._events += [event_of(line, CONFIG_MAPS) for line in self._lines.feed(piece)]
        return self._events.pop(0)

    async def named(self) -> tuple[str, str]:
        """The events, as (what happened, name of the object)."""
        event = await self.next()
        assert isinstance(event, ObjectChange)
        return (
            "gone" if event.gone else "added" if event.added else "changed"
        ), event.item.metadata.name


async def version(stage: Stage) -> str:
    return (await stage.client.page(CONFIG_MAPS, stage.here, {})).metadata.resource_version


# Objects...


async def test_what_is_created_can_be_read(clock: object, stage: Stage) -> None:
    made = await stage.config_map("one", {"app": "web"}, key="value")
    found = await stage.client.get(CONFIG_MAPS, stage.namespace, "one")
    assert found == made
    assert (found.kind, found.api_version, found.data) == ("ConfigMap", "v1", {"key": "value"})
    assert found.metadata.labels == {"app": "web"}
    assert found.metadata.uid
    assert found.metadata.creation_timestamp
    assert int(found.metadata.resource_version) > 0


async def test_what_is_not_there_is_a_404(clock: object, stage: Stage) -> None:
    with pytest.raises(Refused) as refused:
        await stage.client.get(CONFIG_MAPS, stage.namespace, "nothing")
    assert (refused.value.code, refused.value.reason) == (404, "NotFound")


async def test_the_same_name_twice_is_a_409(clock: object, stage: Stage) -> None:
    await stage.config_map("one")
    with pytest.raises(Refused) as refused:
        await stage.config_map("one")
    assert (refused.value.code, refused.value.reason) == (409, "AlreadyExists")


async def test_a_name_that_is_missing_is_a_422(clock: object, stage: Stage) -> None:
    with pytest.raises(Refused) as refused:
        await stage.config_map("")
    assert (refused.value.code, refused.value.reason) == (422, "Invalid")


async def test_a_merge_patch_changes_what_it_names_and_removes_what_is_null(
    clock: object, stage: Stage
) -> None:
    made = await stage.config_map("one", a="1", b="2")
    changed = await stage.client.patch(CONFIG_MAPS, made, {"data": {"a": None, "c": "3"}})
    assert changed.data == {"b": "2", "c": "3"}
    assert int(changed.metadata.resource_version) > int(made.metadata.resource_version)


async def test_a_patch_that_changes_nothing_makes_no_new_version(
    clock: object, stage: Stage
) -> None:
    made = await stage.config_map("one", a="1")
    assert await stage.client.patch(CONFIG_MAPS, made, {"data": {"a": "1"}}) == made


async def test_a_patch_of_an_older_version_is_a_409(clock: object, stage: Stage) -> None:
    made = await stage.config_map("one", a="1")
    await stage.client.patch(CONFIG_MAPS, made, {"data": {"a": "2"}})
    with pytest.raises(Refused) as refused:
        await stage.client.patch(
            CONFIG_MAPS,
            made,
            {"metadata": {"resourceVersion": made.metadata.resource_version}, "data": {"a": "3"}},
        )
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")


async def test_a_status_is_patched_apart_from_the_rest(clock: object, stage: Stage) -> None:
    made = await stage.service("web")
    condition = {
        "type": "isthmus.dev/seen",
        "status": "True",
        "reason": "Seen",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    changes = {"status": {"conditions": [condition]}, "spec": {"ports": [{"port": 81}]}}
    await stage.client.patch(SERVICES, made, changes, "status")
    found = await stage.client.get(SERVICES, stage.namespace, "web")
    assert [port.port for port in found.spec.ports or ()] == [80]
    assert found.metadata.resource_version != made.metadata.resource_version


async def test_a_delete_removes_only_the_object_with_the_expected_uid(
    clock: object, stage: Stage
) -> None:
    first = await stage.config_map("one")
    await stage.client.delete(CONFIG_MAPS, first)
    await stage.client.delete(CONFIG_MAPS, first)  # it has been removed already
    second = await stage.config_map("one")
    with pytest.raises(Refused) as refused:
        await stage.client.delete(CONFIG_MAPS, first)
    assert refused.value.code == 409
    assert await stage.client.get(CONFIG_MAPS, stage.namespace, "one") == second


# Server-side apply...


def wanted(stage: Stage, **data: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "ours", "namespace": stage.namespace},
        "data": data,
    }


async def test_apply_creates_changes_and_removes_omitted_fields(
    clock: object, stage: Stage
) -> None:
    made = await stage.client.apply(CONFIG_MAPS, wanted(stage, a="1", b="2"), "isthmus")
    assert made.data == {"a": "1", "b": "2"}
    changed = await stage.client.apply(CONFIG_MAPS, wanted(stage, a="3"), "isthmus")
    assert changed.data == {"a": "3"}
    again = await stage.client.apply(CONFIG_MAPS, wanted(stage, a="3"), "isthmus")
    assert again.metadata.resource_version == changed.metadata.resource_version


async def test_apply_keeps_fields_of_other_managers(clock: object, stage: Stage) -> None:
    await stage.client.apply(CONFIG_MAPS, wanted(stage, a="1"), "isthmus")
    await stage.client.apply(CONFIG_MAPS, wanted(stage, b="2"), "another")
    assert (await stage.client.apply(CONFIG_MAPS, wanted(stage, c="3"), "isthmus")).data == {
        "b": "2",
        "c": "3",
    }


async def test_apply_takes_fields_of_other_managers_only_by_force(
    clock: object, stage: Stage
) -> None:
    await stage.client.apply(CONFIG_MAPS, wanted(stage, a="1"), "another")
    with pytest.raises(Refused) as refused:
        await stage.client.apply(CONFIG_MAPS, wanted(stage, a="2"), "isthmus", force=False)
    assert (refused.value.code, refused.value.causes) == (409, frozenset({"FieldManagerConflict"}))
    assert (await stage.client.apply(CONFIG_MAPS, wanted(stage, a="2"), "isthmus")).data == {
        "a": "2"
    }


# Lists...


async def test_pages_are_of_one_version(clock: object, stage: Stage) -> None:
    for number in range(5):
        await stage.config_map(f"m{number}", {"of": "ours"})
    ours = Selection(stage.namespace, "of=ours")
    first = await stage.client.page(CONFIG_MAPS, ours, {"limit": "2"})
    await stage.config_map("m9", {"of": "ours"})
    names, page = [], first
    while True:
        names.append([item.metadata.name for item in page.items or ()])
        assert page.metadata.resource_version == first.metadata.resource_version
        if not page.metadata.continue_:
            break
        page = await stage.client.page(
            CONFIG_MAPS, ours, {"limit": "2", "continue": page.metadata.continue_}
        )
    assert names == [["m0", "m1"], ["m2", "m3"], ["m4"]]


async def test_metadata_alone(clock: object, stage: Stage) -> None:
    await stage.config_map("one", {"app": "web"}, key="value")
    page = await stage.client.page(METADATA, Selection(stage.namespace, "app=web"), {})
    assert page.kind == "PartialObjectMetadataList"
    assert [(item.metadata.name, item.metadata.labels) for item in page.items or ()] == [
        ("one", {"app": "web"})
    ]
    assert (await stage.client.get(METADATA, stage.namespace, "one")).metadata.name == "one"


async def test_selectors(clock: object, stage: Stage) -> None:
    for name, app in (("a", "web"), ("b", "mail"), ("c", "web")):
        await stage.config_map(name, {"app": app})
    for labels, fields, names in (
        ("app=web", "", ["a", "c"]),
        ("app", "metadata.name!=a", ["b", "c"]),
        ("app in (web,mail)", "metadata.name=b", ["b"]),
        ("app!=web", f"metadata.name!={OWN}", ["b"]),
    ):
        page = await stage.client.page(CONFIG_MAPS, Selection(stage.namespace, labels, fields), {})
        assert [item.metadata.name for item in page.items or ()] == names


async def test_a_field_that_cannot_be_selected_by_is_a_400(clock: object, stage: Stage) -> None:
    with pytest.raises(Refused) as refused:
        await stage.client.page(CONFIG_MAPS, Selection(stage.namespace, fields="data.key=1"), {})
    assert refused.value.code == 400


async def test_a_version_from_the_future_has_its_own_error(clock: object, stage: Stage) -> None:
    future = str(int(await version(stage)) + 1_000_000)
    query = {"resourceVersion": future, "resourceVersionMatch": "NotOlderThan"}
    with pytest.raises(Refused) as refused:
        await stage.client.page(CONFIG_MAPS, stage.here, query, attempts=1)
    assert refused.value.code == 504
    assert refused.value.from_the_future
    assert refused.value.retry_after == 1


# Watches...


async def test_a_watch_reports_what_has_happened_since_a_version_in_order(
    clock: object, stage: Stage
) -> None:
    since = await version(stage)
    made = await stage.config_map("one", a="1")
    await stage.client.patch(CONFIG_MAPS, made, {"data": {"a": "2"}})
    await stage.client.delete(CONFIG_MAPS, made)
    async with Watching(stage, stage.here, resourceVersion=since) as watch:
        assert await watch.named() == ("added", "one")
        event = await watch.next()
        assert isinstance(event, ObjectChange)
        assert (event.added, event.gone, event.item.data) == (False, False, {"a": "2"})
        gone = await watch.next()
        assert isinstance(gone, ObjectChange)
        assert gone.gone
        assert int(gone.item.metadata.resource_version) > int(event.item.metadata.resource_version)


async def test_a_label_that_changes_makes_an_object_come_and_go(
    clock: object, stage: Stage
) -> None:
    since = await version(stage)
    async with Watching(
        stage, Selection(stage.namespace, "app=web"), resourceVersion=since
    ) as watch:
        made = await stage.config_map("one", {"app": "mail"})
        await stage.client.patch(CONFIG_MAPS, made, {"metadata": {"labels": {"app": "web"}}})
        assert await watch.named() == ("added", "one")
        await stage.client.patch(CONFIG_MAPS, made, {"metadata": {"labels": {"app": "none"}}})
        assert await watch.named() == ("gone", "one")


async def test_a_streaming_list_ends_with_a_bookmark_and_continues_as_a_watch(
    clock: object, stage: Stage
) -> None:
    await stage.config_map("one", {"of": "ours"})
    await stage.config_map("two", {"of": "ours"})
    query = {
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
    }
    async with Watching(stage, Selection(stage.namespace, "of=ours"), **query) as watch:
        assert [await watch.named(), await watch.named()] == [("added", "one"), ("added", "two")]
        bookmark = await watch.next()
        assert isinstance(bookmark, Bookmark)
        assert bookmark.complete
        assert int(bookmark.version) > 0
        await stage.config_map("three", {"of": "ours"})
        assert await watch.named() == ("added", "three")


async def test_a_stream_of_metadata(clock: object, stage: Stage) -> None:
    await stage.config_map("one", {"of": "ours"}, key="value")
    query = {
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": "60",
    }
    lines = Lines(2**20)
    events: list[ObjectChange[Any] | Bookmark] = []
    async with await stage.client.watch(
        METADATA, Selection(stage.namespace, "of=ours"), query
    ) as answer:
        with trio.fail_after(30):
            while len(events) < 2:
                events += [event_of(line, METADATA) for line in lines.feed(await answer.read())]
    assert isinstance(events[0], ObjectChange)
    assert events[0].item.metadata.name == "one"
    assert isinstance(events[1], Bookmark)
    assert events[1].complete


async def test_a_version_that_is_too_old_is_a_410(clock: object, stage: Stage) -> None:
    old = await stage.old_version()
    with pytest.raises(Refused) as refused:
        async with Watching(stage, stage.here, resourceVersion=old) as watch:
            await watch.next()
    assert refused.value.code == 410
    assert refused.value.expired


async def test_a_watch_ends_cleanly_when_its_time_is_over(clock: object, stage: Stage) -> None:
    query = {"resourceVersion": await version(stage), "timeoutSeconds": "2"}
    async with await stage.client.watch(CONFIG_MAPS, stage.here, query) as answer:
        with trio.fail_after(30):
            while await answer.read():
                pass


# The reflector...


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_reflector_follows(
    clock: object, stage: Stage, nursery: trio.Nursery, streaming: bool
) -> None:
    one = await stage.config_map("one", a="1")
    await stage.config_map("two", a="1")
    reports: Reports[dict[str, str]] = Reports()
    reflector = follow(stage, reports)
    reflector._streaming = streaming
    nursery.start_soon(reflector.run)
    with trio.fail_after(30):
        await reflector.synced.wait()
    assert {name for _, name in reports.now} - {OWN} == {"one", "two"}
    await stage.client.patch(CONFIG_MAPS, one, {"data": {"a": "2"}})
    await reports.until(lambda now: now.get((stage.namespace, "one")) == {"a": "2"})
    await stage.client.delete(CONFIG_MAPS, one)
    await reports.until(lambda now: (stage.namespace, "one") not in now)
    three = await stage.config_map("three", a="3")
    await reports.until(lambda now: (stage.namespace, "three") in now)
    # A change of fields that are not kept is not reported. The change after it is.
    await stage.client.patch(CONFIG_MAPS, three, {"metadata": {"annotations": {"some": "thing"}}})
    await stage.client.patch(CONFIG_MAPS, three, {"data": {"a": "4"}})
    await reports.until(lambda now: now.get((stage.namespace, "three")) == {"a": "4"})
    assert [item for key, item in reports.log if key[1] == "three"] == [{"a": "3"}, {"a": "4"}]
    assert reflector.counts.lists == 1
    assert reflector.counts.failures == 0


async def test_a_reflector_reads_pages(clock: object, stage: Stage, nursery: trio.Nursery) -> None:
    for number in range(7):
        await stage.config_map(f"m{number}")
    reports: Reports[dict[str, str]] = Reports()
    reflector = follow(stage, reports)
    reflector._streaming = False
    reflector.rules = type(reflector.rules)(page_size=3)
    nursery.start_soon(reflector.run)
    with trio.fail_after(30):
        await reflector.synced.wait()
    assert sorted(name for _, name in reports.now if name != OWN) == [
        f"m{number}" for number in range(7)
    ]


# Leases...

QUICK = LeaseRules(duration=3, renew_timeout=2.0, retry_interval=0.5)


async def test_one_leads_and_the_next_one_does_when_it_stops(clock: object, stage: Stage) -> None:
    leaders: list[str] = []
    elections = [
        Election(stage.client, (stage.namespace, "leader"), name, QUICK) for name in ("a", "b")
    ]
    stop: dict[str, trio.Event] = {"a": trio.Event(), "b": trio.Event()}
    began = trio.Event()

    async def take_part(election: Election) -> None:
        async def lead() -> None:
            nonlocal began
            leaders.append(election.identity)
            assert sum(other.leading for other in elections) == 1
            began.set()
            await stop[election.identity].wait()

        await election.run(lead)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for election in elections:
                nursery.start_soon(take_part, election)
            await began.wait()
            await trio.sleep(4)  # longer than the lease holds without being renewed
            assert len(leaders) == 1
            began = trio.Event()
            stop[leaders[0]].set()
            await began.wait()
            assert sorted(leaders) == ["a", "b"]
            stop[leaders[1]].set()
    lease = await stage.client.get(LEASES, stage.namespace, "leader")
    assert lease.spec.holder_identity == ""
    assert lease.spec.lease_transitions is not None


async def test_a_lease_keeps_fields_of_other_writers(clock: object, stage: Stage) -> None:
    election = Election(stage.client, (stage.namespace, "leader"), "a", QUICK)

    async def lead() -> None:
        lease = await stage.client.get(LEASES, stage.namespace, "leader")
        await stage.client.patch(LEASES, lease, {"metadata": {"labels": {"some": "label"}}})
        await trio.sleep(3)

    with trio.fail_after(30):
        await election.run(lead)
    assert election.terms == 1
    lease = await stage.client.get(LEASES, stage.namespace, "leader")
    assert lease.metadata.labels == {"some": "label"}
    assert int(lease.metadata.resource_version) > 0
    assert isinstance(lease, Lease)


# Events and reviews...


async def test_an_event_is_written_once_with_a_count(
    clock: object, stage: Stage, nursery: trio.Nursery
) -> None:
    recorder = EventRecorder(
        stage.client, "isthmus.dev/test", "test-1", RecorderRules(repeat_interval=2.0)
    )
    service = await stage.service("web")
    about = ObjectReference("Service", stage.namespace, "web", service.metadata.uid, "v1")
    event = EventContent(about, "Refused", "an endpoint is not used", "Discover", warning=True)
    nursery.start_soon(recorder.run)
    for _ in range(3):
        recorder.record(event)
    counts: Reports[int] = Reports()
    reflector = Reflector(
        stage.client,
        EVENTS,
        lambda event: event.series.count if event.series is not None else 0,
        counts,
        stage.here,
    )
    nursery.start_soon(reflector.run)
    await counts.until(lambda now: list(now.values()) == [3])
    recorder.record(event)
    await counts.until(lambda now: list(now.values()) == [4])
    found = (await stage.client.page(EVENTS, stage.here, {})).items or []
    assert len(found) == 1
    assert (found[0].type, found[0].note, found[0].reporting_controller) == (
        "Warning",
        event.note,
        "isthmus.dev/test",
    )
    assert found[0].regarding is not None
    assert found[0].regarding.uid == service.metadata.uid


async def test_a_token_is_good_for_its_audience_only(clock: object, stage: Stage) -> None:
    token, name = await stage.token("isthmus")
    user = await review_token(stage.client, token, "isthmus")
    assert user is not None
    assert user.username == name
    assert service_account(user) == (stage.namespace, name.rpartition(":")[2])
    assert await review_token(stage.client, token, "another") is None
    assert await review_token(stage.client, token.swapcase(), "isthmus") is None


async def test_a_permission_can_be_queried(clock: object, stage: Stage) -> None:
    await stage.grant("jane")
    jane = UserInfo("jane")
    assert await may(
        stage.client, jane, ResourceAttributes("get", "configmaps", namespace=stage.namespace)
    )
    assert not await may(
        stage.client, jane, ResourceAttributes("delete", "configmaps", namespace=stage.namespace)
    )
    assert not await may(
        stage.client,
        UserInfo("joe"),
        ResourceAttributes("get", "configmaps", namespace=stage.namespace),
    )


async def test_pods_are_read_with_the_required_fields(clock: object, stage: Stage) -> None:
    """The pod has no node, so it never starts. The test writes its status."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": stage.namespace},
        "spec": {
            "serviceAccountName": "default",
            "nodeName": "nowhere",
            "containers": [{"name": "c", "image": "web:1.0"}],
        },
    }
    made = await stage.client.apply(PODS, pod, "tests")
    await stage.client.patch(
        PODS,
        made,
        {"status": {"phase": "Running", "podIP": "10.9.9.9", "podIPs": [{"ip": "10.9.9.9"}]}},
        "status",
    )
    found: Pod = await stage.client.get(PODS, stage.namespace, "p")
    assert (found.spec.service_account_name, found.spec.node_name) == ("default", "nowhere")
    assert [address.ip for address in found.status.pod_ips or ()] == ["10.9.9.9"]
    assert found.metadata.name == Meta(name="p").name
