"""Sidecars of two workers each, under real redirection: both carry traffic, one may be killed, and
the shutdown is as orderly as with one process.

Rules: only connections of the killed worker are lost. So clients see at most as many failures as
they have connections. The counters of both sidecars of a pair agree."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio

from lab.load import Load
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    FAST_PATH,
    LAST_GET,
    WEB,
    Pair,
    ask_again_and_again,
    counted,
    echo_server,
    eventually,
    exchange_raw,
    on_fast_path,
    prepare,
    web_server,
)
from tests.workers.processes import children

pytestmark = pytest.mark.lab

CLIENTS = 6


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        settings: dict[str, Any] = {"workers": 2, "shutdown": {"grace": "60s"}}
        pair = prepare(laboratory.lab, {WEB: "detect", ECHO: "opaque"}, web=settings, shop=settings)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(web_server, pair.shop)
            nursery.start_soon(echo_server, pair.shop)
            nursery.start_soon(pair.mesh.start)
        return pair

    return laboratory.run(build)


def supervisor(sidecar: Sidecar) -> int:
    """Its process id. The laboratory's own may be that of the program that put it into the pod."""
    found = [sidecar.running().pid]
    while len(below := children(found[-1])) == 1:
        found += below
    assert len(below) == 2
    return found[-1]


def workers_seen(sidecar: Sidecar) -> set[int]:
    """The workers that have logged a connection."""
    return {line["worker"] for line in sidecar.logged() if line.get("message") == "connection"}


def _both_seen(sidecar: Sidecar) -> bool:
    return workers_seen(sidecar) == {1, 2}


@pytest.mark.parametrize("version", [4, 6])
async def test_both_workers_of_both_sidecars_carry_redirected_connections(
    pair: Pair, version: int
) -> None:
    host = pair.service.address(version)
    for _ in range(24):
        assert (await exchange_raw(pair.web, host, WEB, LAST_GET)).startswith(b"HTTP/1.1 200")
        assert await exchange_raw(pair.web, host, ECHO, b"hello", end=True) == b"hello"
    for sidecar in (pair.near, pair.far):
        await eventually(partial(_both_seen, sidecar), "both workers")


async def test_both_sidecars_count_the_same_and_all_requests(pair: Pair) -> None:
    async def requests() -> tuple[float, float]:
        return (
            await counted(pair.near, "isthmus_requests_total", direction="outbound"),
            await counted(pair.far, "isthmus_requests_total", direction="inbound"),
        )

    before = await requests()
    for _ in range(30):
        assert (await exchange_raw(pair.web, pair.service.ipv4, WEB, LAST_GET)).startswith(
            b"HTTP/1.1 200"
        )
    after = before[0] + 30, before[1] + 30
    await eventually(lambda: _reached(requests, after), "both sidecars have counted all")
    assert await requests() == after


async def _reached(
    numbers: Callable[[], Awaitable[tuple[float, float]]], goal: tuple[float, float]
) -> bool:
    return all(number >= wanted for number, wanted in zip(await numbers(), goal, strict=True))


async def test_plain_exchanges_take_the_fast_path_in_workers_too(pair: Pair) -> None:
    before = [await on_fast_path(sidecar) for sidecar in pair.both]
    await ask_again_and_again(pair, 50)
    for sidecar, count in zip(pair.both, before, strict=True):
        assert (await on_fast_path(sidecar) >= count + 40) is FAST_PATH


@pytest.mark.parametrize("side", ["near", "far"])
async def test_a_worker_that_is_killed_under_load_loses_only_its_own_connections(
    pair: Pair, side: str
) -> None:
    sidecar: Sidecar = getattr(pair, side)
    ends, above = (
        await counted(sidecar, "isthmus_worker_exits_total", how="signal"),
        supervisor(sidecar),
    )
    async with Load(pair.web, pair.service.ipv4, WEB, clients=CLIENTS) as load:
        await load.more(100)
        victim = children(above)[0]
        os.kill(victim, signal.SIGKILL)
        await load.more(200)
        await eventually(lambda: _well(sidecar, above, victim), "two workers, and ready")
        await load.more(200)
        await load.stop()
    assert sum(load.bad.values()) <= CLIENTS, load.bad
    assert await counted(sidecar, "isthmus_worker_exits_total", how="signal") == ends + 1


async def _well(sidecar: Sidecar, above: int, gone: int) -> bool:
    below = children(above)
    return len(below) == 2 and gone not in below and (await sidecar.admin("/ready"))[0] == 200


async def test_the_clients_sidecar_stops_under_load_and_loses_nothing(pair: Pair) -> None:
    """One connection stays open during it. Otherwise a moment without requests would be the end."""
    held = await pair.web.connect(pair.service.ipv4, ECHO)
    async with held, Load(pair.web, pair.service.ipv4, WEB, clients=CLIENTS) as load:
        await load.more(100)
        os.kill(supervisor(pair.near), signal.SIGTERM)
        await load.more(200)
        await load.stop()
    assert load.bad == {}
    try:
        with trio.fail_after(60):
            assert await pair.near.running().wait() == 0
    finally:
        with trio.fail_after(60, shield=True):
            await pair.near.restart()
