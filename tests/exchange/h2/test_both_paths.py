"""A stream without a task: its faults do not affect other streams, and its deadlines hold although
nothing moves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.server_settings import ServerSettings
from proxy.fastpath import fast_path, h2_exchange
from proxy.fastpath.plan import StreamLease
from proxy.wire.h2.frames import Code
from tests.kit.build import interpreted
from tests.kit.http2_hop import Settings2, through2
from tests.kit.http2_peers import GET, OK, POST, Answer, Pair, Peer2, answering2

BAD: list[Pair] = [*POST[:3], (b":path", b"/bad")]
ON_BOTH = [pytest.param(fast, id="fast" if fast else "ordinary") for fast in (True, False)]


STEPS = [
    "account",
    "_open_stream",
    "_forward_request",
    "_forward_response",
    "_send_head",
    "_forward_body",
]


@pytest.mark.parametrize("where", [*STEPS, pytest.param("open", marks=interpreted)])
async def test_a_fault_of_ours_ends_its_stream_and_no_other(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(exchange: Exchange) -> AbstractContextManager[object]:
        if exchange.request.target == b"/bad":
            raise RuntimeError("a fault of ours")
        return nullcontext()

    owner = StreamLease if where == "open" else h2_exchange.FastExchange
    whole = getattr(owner, where, None)

    def step(self: Any, *args: Any, **named: Any) -> object:
        assert whole is not None
        fail(args[0] if owner is StreamLease else self._exchange)
        return whole(self, *args, **named)

    if where != "account":
        monkeypatch.setattr(owner, where, step)
    received: list[int] = []

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        peer.h2.send_headers(number, OK)
        await peer.send(number, b"ok" * 5000, end=message.get(b":path") != b"/bad")
        if message.get(b":path") == b"/bad":
            with trio.fail_after(20):
                while message.reset is None:
                    async with peer.moved:
                        await peer.moved.wait()
            received.append(message.reset)

    settings = Settings2(fast=True, account=fail if where == "account" else None)
    async with through2(answering2(respond), settings) as (client, proxy):
        await client.ask()
        bad = await client.request(BAD, end=False)
        await client.send(bad, b"hello", end=True)
        good = await client.request(GET)
        assert (await client.message(good)).body == b"ok" * 5000
        assert (await client.message(bad)).reset == Code.INTERNAL_ERROR
        assert proxy.fast_path is not None
        await proxy.idle()
        assert not proxy.fast_path._busy
        assert sorted(proxy.outcomes) == ([] if where == "account" else ["done", "done", "raised"])
        assert (await client.ask()).body == b"ok" * 5000
    assert [
        record.exc_text is not None
        for record in caplog.records
        if "internal error while carrying an HTTP/2 stream" in record.message
    ] == [True]
    assert received in ([], [Code.CANCEL])


@pytest.mark.parametrize("fast", ON_BOTH)
async def test_padding_is_not_progress(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends only padding within a request counts as silent."""
    monkeypatch.setattr(fast_path, "PATIENCE", 0.1)

    async def respond(peer: Peer2, number: int, message: Answer) -> None:
        if message.get(b":method") == b"GET":
            peer.h2.send_headers(number, OK, end_stream=True)

    settings = Settings2(server=ServerSettings(stream_timeout=0.5), fast=fast)
    async with through2(answering2(respond, early=True), settings) as (client, proxy):
        await client.ask()
        number = await client.request(POST, end=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.pump)
            with trio.fail_after(20):
                while number not in client.ended:
                    client.h2.send_data(number, b"", pad_length=9)
                    await client.flush()
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        assert client.messages[number].status == 408
        await proxy.idle()
        assert bool(proxy.fast) is fast
