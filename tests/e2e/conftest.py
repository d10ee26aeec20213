"""One laboratory for each file of end-to-end tests: its pods and sidecars are built once and shared
by the tests of the file.

An async test of pytest-trio has its own event loop, and objects of one loop cannot be used from
another. So a laboratory gets a loop in its own thread, and the async tests in this directory run
there."""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import outcome
import pytest
import trio

from lab.cluster import Lab
from lab.sandbox import inside

T = TypeVar("T")
_HERE = Path(__file__).parent
_PATIENCE = 240.0  # seconds for one test on a slow and busy machine; most take less than two


class Laboratory:
    """A laboratory with its own thread and event loop. `run` calls an async function there, and
    waits."""

    lab: Lab

    def __init__(self) -> None:
        self._started: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name="laboratory")
        self._ended: outcome.Outcome[None] | None = None

    def _live(self) -> None:
        self._ended = outcome.capture(trio.run, self._be_open)
        self._started.put(None)

    async def _be_open(self) -> None:
        async with Lab() as self.lab:
            self._token = trio.lowlevel.current_trio_token()
            self._end = trio.Event()
            self._started.put(None)
            await self._end.wait()

    def run(self, function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        async def bounded() -> T:
            with trio.fail_after(_PATIENCE):
                return await function(*args, **kwargs)

        return trio.from_thread.run(bounded, trio_token=self._token)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.get()
        if self._ended is not None:
            self._ended.unwrap()
        return self

    def __exit__(self, *_: object) -> None:
        self._token.run_sync_soon(self._end.set)
        self._thread.join()
        if self._ended is not None:
            self._ended.unwrap()


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    with Laboratory() as laboratory:
        yield laboratory


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(
        reason="not in the sandbox: run `make test`, or `python -m lab.sandbox -- pytest`"
    )
    for item in items:
        if not isinstance(item, pytest.Function) or not item.path.is_relative_to(_HERE):
            continue
        if item.get_closest_marker("lab") and not inside():
            item.add_marker(skip)
        if inspect.iscoroutinefunction(item.obj):
            item.fixturenames.append("laboratory")
            item.obj = partial(_run_in_laboratory, item, item.obj)


def _run_in_laboratory(
    item: pytest.Function, test: Callable[..., Awaitable[None]], **fixtures: Any
) -> None:
    laboratory: Any = item.funcargs["laboratory"]
    laboratory.run(test, **fixtures)
