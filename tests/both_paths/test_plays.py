"""A play has one result, whether the fast path is off, on, or hands over exchanges at any moment.
Compared are what the client got, byte for byte, what the server got, all metrics except times, the
log lines, and the records for spans."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from proxy.fastpath import fast_path
from tests.both_paths.acts import (
    TRIED_AGAIN,
    drawn,
    drip,
    fail_in_a_row,
    good,
    many_at_once,
    stop,
    unanswered,
)
from tests.both_paths.server import serve
from tests.both_paths.stage import PATHS, Cast, Shape, Theatre, WhichPath, same

CAST = Cast(serve)


@pytest.fixture
def theatre(made: Callable[..., Theatre]) -> Callable[..., Theatre]:
    return partial(made, CAST)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_both_paths_give_the_same_exchange(
    shape: Shape, seed: int, theatre: Callable[..., Theatre]
) -> None:
    ordinary, fast, disturbed = await theatre().on_all_paths(drawn(seed, 16), shape, seed)
    assert fast.finished >= 8, "the play tested nothing"
    same(ordinary, fast)
    same(ordinary, disturbed)


# What the fast path supports of a policy. No limit is reached here, because nothing is slow.
POLICY = {
    "timeouts": {"request": "60s"},
    "retries": {
        "statuses": ["503", "404"],
        "limit": 2,
        "all_methods": True,
        "max_body": 10_000,
        "backoff": "1ms",
        "max_backoff": "2ms",
    },
    "breaker": {"failures": 0, "statuses": ["5xx"]},
    "balancing": {"decay": "1s"},
}


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("shape", ["outbound", "pair"])
async def test_a_policy_is_kept_to_on_either_path(
    shape: Shape, seed: int, made: Callable[..., Theatre]
) -> None:
    theatre = made(replace(CAST, policy=POLICY))
    ordinary, fast, disturbed = await theatre.on_all_paths(
        [*drawn(seed, 12), *TRIED_AGAIN], shape, seed
    )
    assert fast.finished >= 8, "the play tested nothing"
    assert (
        sum(count for name, count in ordinary.metrics.items() if "isthmus_retries_total" in name)
        >= 4
    )
    same(ordinary, fast)
    same(ordinary, disturbed)


async def test_a_policy_that_the_fast_path_cannot_apply_takes_the_ordinary_path(
    made: Callable[..., Theatre],
) -> None:
    soon, paused, tried = (
        {"timeouts": {"request": "1s"}},
        {"timeouts": {"idle": "5s"}},
        {"retries": {"attempt_timeout": "5s"}},
    )
    for policy in (soon, paused, tried, {"overrides": True}):
        left = await made(replace(CAST, policy=policy)).play([good] * 3, "outbound", "fast", 1)
        assert not left.finished


@pytest.mark.parametrize("path", PATHS[:2])
async def test_a_request_that_moves_all_the_time_has_no_longer_than_its_policy_says(
    path: WhichPath, made: Callable[..., Theatre]
) -> None:
    began = time.monotonic()
    left = await made(replace(CAST, policy={"timeouts": {"request": "2s"}})).play(
        [good, good, drip], "outbound", path, 1
    )
    assert time.monotonic() - began >= 2
    assert any("reason='deadline_exceeded'" in line for line in left.requests), left.requests


@pytest.mark.parametrize("shape", ["inbound", "outbound"])
async def test_timeouts_end_the_same_on_both_paths(
    shape: Shape, theatre: Callable[..., Theatre]
) -> None:
    stage = theatre(http={"response_timeout": "2500ms", "response_body_timeout": "2500ms"})
    acts = [good, good, unanswered, good]
    ordinary, fast = [await stage.play(acts, shape, path, 1) for path in (PATHS[0], PATHS[1])]
    assert [
        status
        for status in (504, 499)
        if not any(f"status={status}" in line for line in ordinary.requests)
    ] == [499]
    assert fast.finished
    same(ordinary, fast)


async def test_failures_in_a_row_open_the_circuit_on_both_paths(
    theatre: Callable[..., Theatre],
) -> None:
    ordinary, *others = [
        await theatre().play([good, fail_in_a_row], "outbound", path, 1) for path in PATHS
    ]
    assert sum("reason='upstream_closed'" in line for line in ordinary.requests) >= 7
    for other in others:
        same(ordinary, other)


@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_a_shutdown_is_the_same_on_both_paths(
    shape: Shape, theatre: Callable[..., Theatre]
) -> None:
    ordinary, *others = [await theatre().play([good, good, stop], shape, path, 1) for path in PATHS]
    assert (
        sum(b"Connection: close" in received for received, _ in ordinary.clients) == 3
    )  # one already had its head, one had no request to answer
    for other in others:
        same(ordinary, other)


# Metrics about a client's connection, not about its requests.
PER_CONNECTION = ("_bytes_total", "_heads_declined_total", "_memory_used_bytes")


@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_many_concurrent_clients_have_the_same_result_on_both_paths(
    shape: Shape, theatre: Callable[..., Theatre], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which server connection serves which client is not defined."""
    monkeypatch.setattr(fast_path, "PATIENCE", 30)  # only the machine can be slow here
    ordinary, *others = [
        await theatre().play([good, many_at_once], shape, path, 1) for path in PATHS
    ]
    assert others[0].finished >= 50
    for other in others:
        for left in (ordinary, other):
            # Whether a client sees the server's close before it closes itself depends on timing.
            left.clients = sorted((received, None) for received, _ in left.clients)
            # Bytes are counted when a connection to the server is closed, and a pool that is full
            # of idle connections closes one sooner or later. With two proxies, the inbound one has
            # the pooled connections of the other as its clients.
            left.metrics = {
                name: count
                for name, count in left.metrics.items()
                if "_connections" not in name
                and not ("isthmus_bytes_total" in name and 'peer="dst"' in name)
                and not (shape == "pair" and any(part in name for part in PER_CONNECTION))
            }
        same(ordinary, other, ("requests", "clients", "spans", "metrics"))
