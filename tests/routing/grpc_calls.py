"""gRPC calls that go through the dispatcher."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tests.kit.http import Script
from tests.kit.http2_peers import Answer, Peer2, answering2, speaking


def calls(respond: list[Callable[[Peer2, int, Answer], Awaitable[None]]]) -> Script:
    async def one(peer: Peer2, number: int, message: Answer) -> None:
        await respond.pop(0)(peer, number, message)

    return speaking(answering2(one))
