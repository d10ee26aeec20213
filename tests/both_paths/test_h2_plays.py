"""The same for HTTP/2. Messages are compared instead of bytes: where a body is cut into frames is
nobody's business, nor is how many bytes that takes."""

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
from tests.both_paths.stage import PATHS, Cast, Left, Shape, Theatre
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
async def test_nobody_can_tell_which_path_a_stream_took(
    shape: Shape, seed: int, theatre: Callable[..., Theatre]
) -> None:
    ordinary, fast, disturbed = await theatre().on_all_paths(drawn(seed, 40), shape, seed)
    assert fast.finished >= 12, "nothing was put to the test"
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
    assert fast.finished >= 8, "nothing was put to the test"
    assert any(
        "isthmus_retries_total" in name and count for name, count in ordinary.metrics.items()
    )
    same(ordinary, fast)
    same(ordinary, disturbed)


@pytest.mark.parametrize("shape", ["inbound", "outbound"])
async def test_what_takes_too_long_ends_alike(
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
async def test_an_endpoint_that_fails_in_a_row_is_broken_alike(
    kind: str, theatre: Callable[..., Theatre]
) -> None:
    acts = [good, partial(fail_in_a_row, kind=kind)]
    ordinary, *others = [await theatre().play(acts, "outbound", path, 1) for path in PATHS]
    assert any(
        "isthmus_breaker_changes_total" in name and count
        for name, count in ordinary.metrics.items()
    )
    for other in others:
        same(ordinary, other)


@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_a_proxy_that_goes_down_sends_its_clients_away_alike(
    shape: Shape, theatre: Callable[..., Theatre]
) -> None:
    ordinary, *others = [
        await theatre().play([good, plain_call, stop], shape, path, 1) for path in PATHS
    ]
    assert others[0].finished
    for other in others:
        same(ordinary, other)


@pytest.mark.parametrize("shape", ["inbound", "outbound", "pair"])
async def test_many_streams_at_once_are_served_alike(
    shape: Shape, theatre: Callable[..., Theatre], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_path, "PATIENCE", 30)  # nobody is slow here but the machine
    ordinary, *others = [
        await theatre().play([good, many_at_once], shape, path, 1) for path in PATHS
    ]
    assert others[0].finished >= 50
    for other in others:
        for left in (ordinary, other):
            left.clients.sort(key=str)
        same(ordinary, other)
