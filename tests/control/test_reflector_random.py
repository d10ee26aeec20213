"""Random histories: the copy finally equals the server's state.

The reflector never reports an object as deleted that was not deleted, and never reports an older
state of the server.
"""

from __future__ import annotations

import random
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from control.kube.client import Client
from control.kube.reflector import WatchRules
from lab.kube_api.server import ApiServer, Fault, refuse
from lab.kube_api.store import KINDS, Problem
from tests.control.conftest import AT
from tests.control.stage import FakeStage, Reports, follow

KIND = KINDS["v1", "configmaps"]
ALL = [f"m{number}" for number in range(6)]
NAMES = st.sampled_from(ALL)

STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, st.integers(0, 3)),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.5, 3.0, 40.0, 200.0])),
    st.sampled_from(
        [("cut",), ("compact",), ("save",), ("restore",), ("break list",), ("break stream",)]
    ),
    st.tuples(st.sampled_from(["forbid", "down", "mute"]), st.booleans()),
    st.tuples(st.just("refuse"), st.sampled_from([410, 429, 500, 503])),
)


class World:
    """The server, and what has been true of it at any time since the copy was reported."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.backup = server.store.backup()
        self.absent: set[str] = (
            set()
        )  # names that did not exist at some time after they had been reported

    def step(self, what: str, *words: Any) -> None:
        getattr(self, what.replace(" ", "_"))(*words)

    def put(self, name: str, value: int) -> None:
        data = {"a": str(value)}
        try:
            self.server.store.update(KIND, ("default", name), lambda old: {**old, "data": data})
        except Problem:
            self.server.store.create(KIND, "default", {"metadata": {"name": name}, "data": data})

    def delete(self, name: str) -> None:
        if ("default", name) in self.server.store.objects[KIND]:
            self.server.store.delete(KIND, ("default", name))
            self.absent.add(name)

    def cut(self) -> None:
        self.server.cut()

    def compact(self) -> None:
        self.server.store.compact()

    def down(self, down: bool) -> None:
        self.server.behaviour.down = down
        self.server.cut()

    def mute(self, mute: bool) -> None:
        self.server.behaviour.mute = mute

    def forbid(self, forbidden: bool) -> None:
        self.server.behaviour.forbidden = {"configmaps"} if forbidden else set()
        self.server.cut()

    def refuse(self, code: int) -> None:
        self.server.faults.append(refuse(code, "Expired" if code == 410 else ""))
        self.server.cut()

    def break_list(self) -> None:
        self.server.faults.append(Fault(after=30, only="limit="))

    def break_stream(self) -> None:
        self.server.faults.append(
            Fault(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{", only="watch=")
        )
        self.server.cut()

    def save(self) -> None:
        self.backup = self.server.store.backup()

    def restore(self) -> None:
        """Restore an older state. No client can notice that the server passed its version again
        before the client asked. So there is time for the client to ask."""
        self.calm()
        self.server.store.restore(self.backup)
        self.server.cut()
        self.absent.update(
            name for name in ALL if ("default", name) not in self.server.store.objects[KIND]
        )

    def calm(self) -> None:
        self.server.faults.clear()
        self.server.behaviour.down = self.server.behaviour.mute = False
        self.server.behaviour.forbidden = set()


async def play(steps: list[tuple[Any, ...]], streaming: str, page: int) -> None:
    async with trio.open_nursery() as nursery:
        server = ApiServer(nursery)
        server.behaviour.streaming = streaming
        stage = FakeStage(Client(AT, dial=server.dial, chance=random.Random(1)), "default", server)
        world = World(server)
        reports: Reports[dict[str, str]] = Reports()
        reflector = follow(stage, reports)
        reflector.rules = WatchRules(page_size=page)
        reflector.chance = random.Random(2)
        nursery.start_soon(reflector.run)
        for step in steps:
            if step[0] == "wait":
                await trio.sleep(step[1])
            else:
                world.step(*step)
            if step[0] == "restore":
                await trio.sleep(130)
        world.calm()
        # Two silences, the longest pause, and a list: after that the copy must be right.
        await trio.sleep(600)
        truth = {key: item["data"] for key, item in server.store.objects[KIND].items()}
        assert reflector.known == truth
        assert reports.now == truth
        assert {key[1] for key, item in reports.log if item is None} <= world.absent
        last: dict[str, object] = {}
        for key, item in reports.log:
            assert last.get(key[1]) != item, "a change that changes nothing"
            last[key[1]] = item
        elapsed = trio.current_time()
        assert len(server.log) <= 10 + 3 * len(steps) + elapsed / 8
        nursery.cancel_scope.cancel()


@settings(max_examples=60)
@given(
    st.lists(STEPS, max_size=40),
    st.sampled_from(["yes", "refused", "unknown"]),
    st.sampled_from([1, 2, 500]),
)
def test_in_the_end_the_copy_is_the_truth(
    steps: list[tuple[Any, ...]], streaming: str, page: int
) -> None:
    trio.run(play, steps, streaming, page, clock=MockClock(autojump_threshold=0))
