"""Both paths give the same results for HTTP/2. Messages are compared instead of bytes, because the
frames of a body and the size of its frames are not part of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from proxy.fastpath import fast_path
from tests.both_paths.h2_acts import good, many_at_once, stop
from tests.both_paths.h2_ends import Client2, Server2
from tests.both_paths.h2_faults import drawn, fail_in_a_row, plain_call, unanswered
from tests.both_paths.h2_server import serve
from tests.both_paths.stage import PATHS, Act, Cast, Left, Shape, Theatre
from tests.both_paths.stage import same as all_same

CAST = Cast(serve, Client2, Server2, "http2")


@pytest.fixture
def theatre(made: Callable[..., Theatre]) -> Callable[..., Theatre]:
    return partial(made, CAST)


def same(ordinary: Left, other: Left) -> None:
    for left in (ordinary, other):
        left.metrics = {
            name: count for name, count in left.metrics.items() if "isthmus_bytes_total" not in name
        }
    all_same(ordinary, other)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_both_paths_give_the_same_stream(
    shape: Shape, seed: int, theatre: Callable[..., Theatre]
) -> None:
    ordinary, fast, disturbed = await theatre().on_all_paths(drawn(seed, 40), shape, seed)
    assert fast.finished >= 12, "the play tested nothing"
    same(ordinary, fast)
    same(ordinary, disturbed)


@pytest.mark.parametrize("shape", ["outbound", "pair"])
async def test_a_policy_is_kept_to_on_either_path(
    shape: Shape, made: Callable[..., Theatre]
) -> None:
    retries = {
        "statuses": ["503", "404"],
        "limit": 2,
        "all_methods": True,
        "backoff": "1ms",
        "max_backoff": "2ms",
    }
    policy = {"timeouts": {"request": "60s"}, "retries": retries, "breaker": {"failures": 0}}
    ordinary, fast, disturbed = await made(replace(CAST, policy=policy)).on_all_paths(
        drawn(5, 30), shape, 5
    )
    assert fast.finished >= 8, "the play tested nothing"
    assert any(
        "isthmus_retries_total" in name and count for name, count in ordinary.metrics.items()
    )
    same(ordinary, fast)
    same(ordinary, disturbed)


@pytest.mark.parametrize("shape", ["inbound", "outbound"])
async def test_timeouts_end_the_same_on_both_paths(
    shape: Shape, theatre: Callable[..., Theatre]
) -> None:
    stage = theatre(
        http=dict.fromkeys(
            ("response_timeout", "response_body_timeout", "body_timeout", "write_timeout"), "2500ms"
        )
    )
    ordinary, fast = [
        await stage.play([good, plain_call, unanswered, good], shape, path, 1)
        for path in (PATHS[0], PATHS[1])
    ]
    assert sum("reason=''" not in line for line in ordinary.requests) == 5
    assert fast.finished
    same(ordinary, fast)


@pytest.mark.parametrize("kind", ["reset", "grpc-away", "grpc-late-away", "busy"])
async def test_failures_in_a_row_open_the_circuit_on_both_paths(
    kind: str, theatre: Callable[..., Theatre]
) -> None:
    acts: list[Act] = [good, partial(fail_in_a_row, kind=kind)]
    ordinary, *others = [await theatre().play(acts, "outbound", path, 1) for path in PATHS]
    assert any(
        "isthmus_breaker_changes_total" in name and count
        for name, count in ordinary.metrics.items()
    )
    for other in others:
        same(ordinary, other)


@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_a_shutdown_is_the_same_on_both_paths(
    shape: Shape, theatre: Callable[..., Theatre]
) -> None:
    ordinary, *others = [
        await theatre().play([good, plain_call, stop], shape, path, 1) for path in PATHS
    ]
    assert others[0].finished
    for other in others:
        same(ordinary, other)


@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_many_concurrent_streams_have_the_same_result_on_both_paths(
    shape: Shape, theatre: Callable[..., Theatre], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_path, "PATIENCE", 30)  # only the machine can be slow here
    ordinary, *others = [
        await theatre().play([good, many_at_once], shape, path, 1) for path in PATHS
    ]
    assert others[0].finished >= 50
    for other in others:
        for left in (ordinary, other):
            left.clients.sort(key=str)
        same(ordinary, other)
