"""A reflector under faults: nothing is deleted, a server in trouble gets few requests, and the
final state is correct.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from trio.abc import Clock

from control.kube.client import Client, ClientLimits
from control.kube.reflector import Reflector, WatchRules
from control.kube.resources import Key
from lab.kube_api.server import ApiServer, Fault, refuse
from lab.kube_api.store import KINDS
from tests.control.conftest import AT
from tests.control.stage import CONFIG_MAPS, ConfigMap, FakeStage, Reports, data, follow

KIND = KINDS["v1", "configmaps"]
TEXTS: dict[str, dict[str, Any]] = {"one": {"a": "1"}, "two": {"a": "2"}}


class Scene:
    """A reflector that has read two config maps, and its server."""

    def __init__(self, stage: FakeStage, nursery: trio.Nursery) -> None:
        self.stage, self.server, self.nursery = stage, stage.server, nursery
        self.reports: Reports[dict[str, str]] = Reports()
        self.reflector = follow(stage, self.reports)

    async def begin(self) -> None:
        for name, texts in TEXTS.items():
            await self.stage.config_map(name, **texts)
        self.nursery.start_soon(self.reflector.run)
        await self.reflector.synced.wait()
        await trio.sleep(1)
        assert self.now() == TEXTS
        self.reports.log.clear()
        self.server.log.clear()

    def now(self) -> dict[str, dict[str, str]]:
        return {name: item for (_, name), item in self.reports.now.items()}

    def change(self) -> None:
        """Without an event for the reflector: `one` is deleted, `two` changed, `three` new."""
        store = self.server.store
        store.delete(KIND, ("default", "one"))
        store.update(KIND, ("default", "two"), lambda item: {**item, "data": {"a": "22"}})
        store.create(KIND, "default", {"metadata": {"name": "three"}, "data": {"a": "3"}})

    async def recovered(self) -> None:
        await self.reports.until(
            lambda now: (
                {name: item for (_, name), item in now.items()}
                == {"two": {"a": "22"}, "three": {"a": "3"}}
            )
        )


@pytest.fixture
async def scene(stage: FakeStage, nursery: trio.Nursery) -> Scene:
    made = Scene(stage, nursery)
    await made.begin()
    return made


# A version that is too old...


@pytest.mark.parametrize("gone", ["event", "status"])
async def test_after_a_410_the_list_is_made_anew_and_only_then_is_anything_deleted(
    clock: Clock, scene: Scene, gone: str
) -> None:
    scene.server.behaviour.gone = gone
    scene.server.behaviour.down = True
    scene.server.cut()
    scene.change()
    scene.server.store.compact()
    await trio.sleep(20)
    assert scene.now() == TEXTS
    scene.server.behaviour.down = False
    await scene.recovered()
    assert scene.reflector.counts.relists == 1
    assert scene.reflector.counts.lists == 2
    assert [key[1] for key, item in scene.reports.log if item is None] == ["one"]
    assert len(scene.server.log) <= 4  # which version, from there on, and the list


async def test_a_410_within_a_watch_that_was_fine(clock: Clock, scene: Scene) -> None:
    scene.change()
    scene.server.store.compact()  # before the watch has reported it
    await trio.sleep(10)
    assert scene.reflector.counts.lists == 2
    assert scene.reflector.error == ""
    await scene.recovered()


async def test_a_server_that_answers_every_watch_by_410_is_not_asked_in_a_loop(
    clock: Clock, scene: Scene
) -> None:
    scene.reflector._streaming = False
    scene.server.faults.extend(refuse(410, "Expired", only="watch=1") for _ in range(1000))
    scene.server.cut()
    await trio.sleep(600)
    assert len(scene.server.log) < 60
    assert scene.now() == TEXTS


# A server in trouble...


async def test_a_server_that_is_down_for_a_minute_loses_nothing(clock: Clock, scene: Scene) -> None:
    scene.server.behaviour.down = True
    scene.server.cut()
    await trio.sleep(60)
    assert scene.now() == TEXTS
    assert scene.reflector.error != ""
    assert scene.reflector._client.requests < 12
    scene.change()
    scene.server.behaviour.down = False
    await scene.recovered()
    assert scene.reflector.counts.lists == 1  # the watch continued from where it was


async def test_500s_for_a_minute(clock: Clock, scene: Scene) -> None:
    scene.server.faults.extend(refuse(500, "InternalError") for _ in range(1000))
    scene.server.cut()
    await trio.sleep(60)
    assert scene.now() == TEXTS
    assert len(scene.server.log) < 12
    scene.server.faults.clear()
    scene.change()
    await scene.recovered()


async def test_a_403_empties_nothing(clock: Clock, scene: Scene) -> None:
    scene.server.behaviour.forbidden.add("configmaps")
    scene.server.store.compact()
    scene.server.cut()
    await trio.sleep(300)
    assert scene.now() == TEXTS
    assert "403" in scene.reflector.error
    assert len(scene.server.log) < 30
    scene.server.behaviour.forbidden.clear()
    scene.change()
    await scene.recovered()


async def test_retry_after_is_obeyed(clock: Clock, scene: Scene) -> None:
    scene.server.faults.append(refuse(429, "TooManyRequests", retry_after=40))
    scene.server.cut()
    await trio.sleep(5)
    assert len(scene.server.log) == 1
    await trio.sleep(34)
    assert len(scene.server.log) == 1
    await trio.sleep(10)
    assert len(scene.server.log) > 1
    assert scene.now() == TEXTS


async def test_a_retry_after_of_a_year_is_not(clock: Clock, scene: Scene) -> None:
    scene.server.faults.append(refuse(429, "TooManyRequests", retry_after=31_536_000))
    scene.server.cut()
    scene.change()
    await trio.sleep(400)
    assert len(scene.server.log) > 1


async def test_silence_is_a_dead_connection(clock: Clock, scene: Scene) -> None:
    scene.server.behaviour.mute = True
    await trio.sleep(100)
    scene.change()
    scene.server.behaviour.mute = False  # for other connections: this one hangs
    with trio.fail_after(60):  # 150 s after the last event
        await scene.recovered()
    assert scene.reflector.counts.lists == 1


async def test_bookmarks_show_that_a_connection_lives(clock: Clock, scene: Scene) -> None:
    await trio.sleep(290)
    assert scene.reflector.counts.watches == 1
    assert scene.reflector.counts.failures == 0


async def test_watches_that_the_server_ends_are_restarted_at_once(
    clock: Clock, scene: Scene
) -> None:
    await trio.sleep(3600)
    assert 6 <= scene.reflector.counts.watches <= 13
    assert scene.reflector.counts.failures == 0
    assert len(scene.server.log) == scene.reflector.counts.watches - 1


async def test_a_server_that_ends_each_watch_at_once_is_not_asked_in_a_loop(
    clock: Clock, scene: Scene
) -> None:
    empty = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    scene.server.faults.extend(Fault(raw=empty, only="watch=1") for _ in range(1000))
    scene.server.cut()
    await trio.sleep(600)
    assert len(scene.server.log) < 40
    assert scene.now() == TEXTS


async def test_a_server_that_was_restored_from_a_backup(clock: Clock, scene: Scene) -> None:
    backup = scene.server.store.backup()
    for number in range(50):
        scene.server.store.create(KIND, "default", {"metadata": {"name": f"lost{number}"}})
    await scene.reports.until(lambda now: len(now) == 52)
    scene.server.store.restore(backup)
    scene.server.cut()
    await scene.reports.until(lambda now: {name for _, name in now} == {"one", "two"})
    scene.change()
    await scene.recovered()


async def test_a_watch_from_the_future_is_found_by_its_silence(clock: Clock, scene: Scene) -> None:
    """A connection was lost without a notice: a load balancer kept it open, and now connects to
    another server."""
    scene.reflector._version = "999999"
    scene.server.cut()
    scene.reflector._version_unsure = False
    await trio.sleep(1)
    scene.change()
    await scene.recovered()
    assert scene.reflector.counts.relists == 1


# Lists...


@pytest.mark.parametrize(("streaming", "patience"), [("refused", 5), ("unknown", 70)])
async def test_a_server_without_streaming_lists_is_asked_in_pages(
    clock: Clock, stage: FakeStage, nursery: trio.Nursery, streaming: str, patience: float
) -> None:
    stage.server.behaviour.streaming = streaming
    scene = Scene(stage, nursery)
    for number in range(5):
        await stage.config_map(f"m{number}")
    scene.reflector.rules = WatchRules(page_size=2)
    with trio.fail_after(patience):
        nursery.start_soon(scene.reflector.run)
        await scene.reflector.synced.wait()
    assert len(scene.now()) == 5
    stage.server.log.clear()
    for name in ("m5", "m6"):
        stage.server.store.create(KIND, "default", {"metadata": {"name": name}})
    stage.server.store.compact()  # before the watch has reported them
    stage.server.cut()
    await trio.sleep(30)
    assert len(scene.now()) == 7
    assert scene.reflector.counts.lists == 2
    assert not [target for _, target in stage.server.log if "sendInitialEvents" in target]


@pytest.mark.parametrize("after", [0, 10, 200])
async def test_a_truncated_list_is_ignored(clock: Clock, scene: Scene, after: int) -> None:
    scene.reflector._streaming = False
    scene.server.faults.extend(Fault(after=after, only="limit=500") for _ in range(4))
    scene.change()
    scene.server.store.compact()
    scene.server.cut()
    await trio.sleep(5)
    assert scene.now() == TEXTS
    await scene.recovered()


async def test_a_truncated_streaming_list_is_ignored(clock: Clock, scene: Scene) -> None:
    item = {
        "kind": "ConfigMap",
        "apiVersion": "v1",
        "metadata": {"name": "x", "namespace": "default", "resourceVersion": "1000"},
    }
    line = json.dumps({"type": "ADDED", "object": item}).encode() + b"\n"
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(line)
    scene.server.faults.extend(Fault(raw=raw + line, only="sendInitialEvents") for _ in range(4))
    scene.change()
    scene.server.store.compact()
    scene.server.cut()
    await trio.sleep(5)
    assert scene.now() == TEXTS
    await scene.recovered()
    assert "x" not in [key[1] for key, _ in scene.reports.log]


async def test_a_continue_token_that_is_too_old_begins_the_list_again(
    clock: Clock, stage: FakeStage, nursery: trio.Nursery
) -> None:
    for number in range(6):
        await stage.config_map(f"m{number}")
    stage.server.faults.append(refuse(410, "Expired", only="continue="))
    scene = Scene(stage, nursery)
    scene.reflector._streaming = False
    scene.reflector.rules = WatchRules(page_size=2)
    nursery.start_soon(scene.reflector.run)
    await scene.reflector.synced.wait()
    assert len(scene.now()) == 6
    lists = [target for _, target in stage.server.log if "limit=" in target]
    assert ["limit=2" in target for target in lists[:2]] == [True, True]
    assert "limit=4" in lists[2]  # fewer pages take less time


async def test_a_page_that_is_too_large_is_asked_for_in_smaller_ones(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    client = Client(AT, ClientLimits(max_response_bytes=20_000), server.dial)
    stage = FakeStage(client, "default", server)
    for number in range(9):
        await stage.config_map(f"m{number}", text="x" * 6000)
    scene = Scene(stage, nursery)
    scene.reflector._streaming = False
    scene.reflector.rules = WatchRules(page_size=64)
    nursery.start_soon(scene.reflector.run)
    await scene.reflector.synced.wait()
    assert len(scene.now()) == 9


# A hostile server...

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def event(
    kind: str, name: str = "one", version: str = "9000", of: str = "ConfigMap", **more: object
) -> bytes:
    item = {
        "kind": of,
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "default", "resourceVersion": version},
        **more,
    }
    return json.dumps({"type": kind, "object": item}).encode() + b"\n"


HOSTILE = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000,
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "a line without an end": HEAD + chunk(b"x" * 100_000),
    "no JSON": HEAD + chunk(b"hello\n"),
    "no UTF-8": HEAD + chunk(b'{"type": "ADDED", "object": {"kind": "\xff\xfe"}}\n'),
    "deep JSON": HEAD
    + chunk(b'{"type": "ADDED", "object": ' + b"[" * 40_000 + b"]" * 40_000 + b"}\n"),
    "another kind": HEAD + chunk(event("DELETED", of="Secret")),
    "a list": HEAD + chunk(event("DELETED", of="ConfigMapList")),
    "an unknown event": HEAD + chunk(event("EXPLODED")),
    "no name": HEAD + chunk(event("DELETED", name="")),
    "no version": HEAD + chunk(event("DELETED", version="")),
    "version 0": HEAD + chunk(event("DELETED", version="0")),
    "a version without an end": HEAD + chunk(event("DELETED", version="9" * 5000)),
    "a version that runs backwards": HEAD + chunk(event("DELETED", version="1")),
    "a text for a map": HEAD + chunk(event("MODIFIED", data="all")),
    "a number for a text": HEAD + chunk(event("MODIFIED", data={"a": 1})),
    "a bookmark of another kind": HEAD + chunk(event("BOOKMARK", of="Secret")),
    "an error without a status": HEAD + chunk(b'{"type": "ERROR", "object": 7}\n'),
    "half a line": HEAD + chunk(event("DELETED")[:-20]) + b"0\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_hostile_server_deletes_nothing(
    clock: Clock, server: ApiServer, nursery: trio.Nursery, what: str, streaming: bool
) -> None:
    stage = FakeStage(Client(AT, dial=server.dial), "default", server)
    scene = Scene(stage, nursery)
    scene.reflector.rules = WatchRules(max_event_bytes=50_000)
    scene.reflector._streaming = streaming
    await scene.begin()
    server.faults.extend(Fault(raw=HOSTILE[what]) for _ in range(20))
    server.cut()
    await trio.sleep(120)
    assert scene.now() == TEXTS
    assert scene.reports.log == []
    assert scene.reflector.counts.failures > 0
    assert len(server.log) < 15
    server.faults.clear()
    scene.change()
    await scene.recovered()


PAGES = {
    "another kind": {"kind": "SecretList", "metadata": {"resourceVersion": "900"}, "items": []},
    "no kind": {"metadata": {"resourceVersion": "900"}, "items": []},
    "no version": {"kind": "ConfigMapList", "metadata": {}, "items": []},
    "version 0": {"kind": "ConfigMapList", "metadata": {"resourceVersion": "0"}, "items": []},
    "no items": {"kind": "ConfigMapList", "metadata": {"resourceVersion": "900"}},
    "an item of another kind": {
        "kind": "ConfigMapList",
        "metadata": {"resourceVersion": "900"},
        "items": [{"kind": "Secret", "metadata": {"name": "x", "namespace": "default"}}],
    },
    "an item without a name": {
        "kind": "ConfigMapList",
        "metadata": {"resourceVersion": "900"},
        "items": [{"metadata": {}}],
    },
    "an endless list": {
        "kind": "ConfigMapList",
        "metadata": {"resourceVersion": "900", "continue": "more"},
        "items": [],
    },
    "the same page for ever": {
        "kind": "ConfigMapList",
        "metadata": {"resourceVersion": "900", "continue": "more"},
        "items": [{"metadata": {"name": "x", "namespace": "default"}}],
    },
}


@pytest.mark.parametrize("what", PAGES)
async def test_an_invalid_page_deletes_nothing(clock: Clock, scene: Scene, what: str) -> None:
    scene.reflector._streaming = False
    body = json.dumps(PAGES[what]).encode()
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    scene.server.faults.extend(Fault(raw=raw, only="limit=500") for _ in range(100))
    scene.server.store.compact()
    scene.server.cut()
    await trio.sleep(60)
    assert scene.now() == TEXTS
    assert len(scene.server.log) < 40
    scene.server.faults.clear()
    scene.change()
    await scene.recovered()


async def test_more_objects_than_the_limit_are_not_kept(
    clock: Clock, server: ApiServer, nursery: trio.Nursery
) -> None:
    stage = FakeStage(Client(AT, dial=server.dial), "default", server)
    scene = Scene(stage, nursery)
    scene.reflector.rules = WatchRules(max_objects=3)
    await scene.begin()
    for number in range(5):
        await stage.config_map(f"m{number}")
    await trio.sleep(60)
    assert len(scene.now()) == 3
    assert "more than 3 configmaps" in scene.reflector.error


async def test_objects_that_are_not_kept_are_ignored(
    clock: Clock, stage: FakeStage, nursery: trio.Nursery
) -> None:
    def keep(item: ConfigMap) -> dict[str, str] | None:
        found = data(item)
        return found if found.get("a") != "hidden" else None

    reports: Reports[dict[str, str]] = Reports()
    await stage.config_map("one", a="hidden")
    two = await stage.config_map("two", a="2")
    nursery.start_soon(Reflector(stage.client, CONFIG_MAPS, keep, reports, stage.here).run)
    key: Key = ("default", "two")
    await reports.until(lambda now: now == {key: {"a": "2"}})
    await stage.client.patch(CONFIG_MAPS, two, {"data": {"a": "hidden"}})
    await reports.until(lambda now: not now)
    await stage.client.patch(CONFIG_MAPS, two, {"data": {"a": "3"}})
    await reports.until(lambda now: now == {key: {"a": "3"}})
