"""Requests: which ones are retried, and that no behaviour of a server makes a request endless."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.abc import Clock

from control.kube.access import Access, Secret
from control.kube.api_errors import InvalidAnswer, Refused, TooLarge, Unreachable
from control.kube.client import Client, ClientLimits, Selection, refusal
from control.kube.resources import SERVICES
from lab.kube_api.server import ApiServer, Fault, refuse
from tests.control.conftest import AT
from tests.control.stage import CONFIG_MAPS, FakeStage


async def test_connections_are_kept_and_bounded(
    clock: Clock, stage: FakeStage, server: ApiServer
) -> None:
    made = await stage.config_map("one")
    for _ in range(3):
        await stage.client.get(CONFIG_MAPS, "default", made.metadata.name)
    assert server.connections == 1
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(stage.client.get, CONFIG_MAPS, "default", "one")
    assert server.connections == stage.client.limits.max_idle_connections
    await trio.sleep(stage.client.limits.idle_timeout + 1)
    await stage.client.get(CONFIG_MAPS, "default", "one")  # old ones are closed, and not used
    assert server.connections == 1
    await stage.client.aclose()
    await trio.sleep(1)
    assert server.connections == 0


async def test_a_kept_connection_that_the_server_has_closed_is_not_a_failure(
    clock: Clock, stage: FakeStage, server: ApiServer
) -> None:
    await stage.config_map("one")
    server.cut()
    await trio.sleep(1)
    began = trio.current_time()
    await stage.client.get(CONFIG_MAPS, "default", "one")
    assert trio.current_time() == began


async def test_reading_is_tried_again(clock: Clock, stage: FakeStage, server: ApiServer) -> None:
    await stage.config_map("one")
    await stage.client.aclose()
    server.faults.extend([refuse(503), Fault(), refuse(500)])
    assert (await stage.client.get(CONFIG_MAPS, "default", "one")).metadata.name == "one"
    assert len(server.log) == 5


async def test_attempts_are_few(clock: Clock, stage: FakeStage, server: ApiServer) -> None:
    server.faults.extend(refuse(503) for _ in range(100))
    with pytest.raises(Refused) as refused:
        await stage.client.get(CONFIG_MAPS, "default", "one")
    assert refused.value.code == 503
    assert len(server.log) == stage.client.limits.max_attempts


async def test_requests_that_may_have_been_processed_are_not_retried(
    clock: Clock, stage: FakeStage, server: ApiServer
) -> None:
    server.faults.append(Fault())
    with pytest.raises(Unreachable):
        await stage.config_map("one")
    server.faults.append(refuse(500))
    with pytest.raises(Refused):
        await stage.config_map("one")
    assert len(server.log) == 2


async def test_requests_refused_by_an_overloaded_server_are_retried_after_retry_after(
    clock: Clock, stage: FakeStage, server: ApiServer
) -> None:
    server.faults.append(refuse(429, retry_after=7))
    began = trio.current_time()
    made = await stage.config_map("one")
    assert made.metadata.name == "one"
    assert 7 <= trio.current_time() - began < 10
    server.faults.append(refuse(429, retry_after=31))
    await stage.client.aclose()
    with pytest.raises(Refused) as refused:
        await stage.config_map("two")
    assert refused.value.retry_after == 31  # the caller's responsibility


async def test_a_server_that_does_not_answer(
    clock: Clock, stage: FakeStage, server: ApiServer
) -> None:
    server.faults.extend(Fault(hang=True) for _ in range(10))
    began = trio.current_time()
    with pytest.raises(Unreachable, match=r"no response within 30 s \(api.response_timeout\)"):
        await stage.client.page(SERVICES, Selection(), {}, attempts=1)
    assert trio.current_time() - began == stage.client.limits.response_timeout


async def test_a_server_that_answers_byte_by_byte(clock: Clock, nursery: trio.Nursery) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def dial(_: Access) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async def drip() -> None:
        await theirs.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        with suppress(trio.BrokenResourceError):  # until the client has closed it
            while True:
                await trio.sleep(1)
                await theirs.send_all(b" ")

    nursery.start_soon(drip)
    with pytest.raises(
        Unreachable, match=r"no complete response within 60 s \(api.request_timeout\)"
    ):
        await Client(AT, dial=dial).page(SERVICES, Selection(), {}, attempts=1)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 1000000000\r\n\r\n" + b"x" * 3000,
        b"Transfer-Encoding: chunked\r\n\r\nfff\r\n" + b"x" * 0xFFF,
    ],
)
async def test_an_answer_without_an_end(clock: Clock, server: ApiServer, body: bytes) -> None:
    client = Client(AT, ClientLimits(max_response_bytes=2000), server.dial)
    server.faults.append(Fault(raw=b"HTTP/1.1 200 OK\r\n" + body))
    with pytest.raises(TooLarge, match=r"larger than 2000 bytes \(api.max_response_bytes\)"):
        await client.page(SERVICES, Selection(), {}, attempts=1)


async def test_a_response_head_without_an_end(clock: Clock, server: ApiServer) -> None:
    client = Client(AT, ClientLimits(max_head_bytes=4096), server.dial)
    server.faults.append(Fault(raw=b"HTTP/1.1 200 OK\r\nX: " + b"x" * 5000))
    with pytest.raises(InvalidAnswer, match=r"larger than 4096 bytes \(api.max_head_bytes\)"):
        await client.page(SERVICES, Selection(), {}, attempts=1)


async def test_the_text_of_a_refusal_may_be_anything(
    clock: Clock, stage: FakeStage, server: ApiServer
) -> None:
    for raw in (
        b"Content-Length: 5\r\n\r\nhello",
        b"Content-Length: 100000000\r\n\r\n" + b"x" * 200_000,
        b"Content-Length: 50\r\n\r\n{}",
    ):
        server.faults.append(Fault(raw=b"HTTP/1.1 403 Forbidden\r\n" + raw))
        with pytest.raises(Refused) as refused:
            await stage.client.page(SERVICES, Selection(), {}, attempts=1)
        assert (refused.value.code, refused.value.reason) == (403, "")


@pytest.mark.parametrize(
    ("body", "header", "seconds"),
    [
        (b"", "5", 5.0),
        (b"", "Wed, 21 Oct 2026 07:28:00 GMT", None),
        (b"", "-1", None),
        (b"", "9" * 400, None),
        (b'{"details": {"retryAfterSeconds": 3}}', "", 3.0),
        (b'{"details": {"retryAfterSeconds": -3}}', "", None),
        (b'{"details": {"retryAfterSeconds": 1e400}}', "", None),
    ],
)
def test_retry_after(body: bytes, header: str, seconds: float | None) -> None:
    assert refusal(body, 429, header).retry_after == seconds


async def test_a_token_that_has_been_replaced_is_read_again_when_it_is_refused(
    clock: Clock, server: ApiServer, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text("old\n")
    access = Access("api.test", 6443, None, Secret(path=path))
    client = Client(access, dial=server.dial)
    server.behaviour.tokens = {"old": {}}
    await client.page(SERVICES, Selection(), {})
    server.behaviour.tokens = {"new": {}}
    path.write_text("new\n")
    await client.page(SERVICES, Selection(), {})
    server.behaviour.tokens = {"newest": {}}
    path.write_text("newest\n")
    async with await client.watch(SERVICES, Selection(), {}) as answer:
        assert answer.head.status == 200
    server.behaviour.tokens = {"another": {}}
    with pytest.raises(Refused) as refused:
        await client.page(SERVICES, Selection(), {})
    assert refused.value.code == 401


async def test_the_prefix_of_a_server_stands_before_each_path(
    clock: Clock, server: ApiServer
) -> None:
    client = Client(Access("api.test", 6443, None, prefix="/k8s/c-1"), dial=server.dial)
    with pytest.raises((Refused, InvalidAnswer)):
        await client.page(SERVICES, Selection("a/../b"), {"limit": "5"})
    assert server.log == [("GET", "/k8s/c-1/api/v1/namespaces/a%2F..%2Fb/services?limit=5")]
