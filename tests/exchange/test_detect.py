"""Detection on a stream: data that is there is judged at once, later data is waited for, and
nothing is consumed."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from proxy.exchange.detect import Opening, detect
from proxy.net.exceptions import ConnectionLost
from proxy.wire.sniff import Protocol
from tests.net.conftest import pair

REQUEST = b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n"


async def test_available_bytes_are_judged_without_a_wait() -> None:
    """Run by hand: a coroutine that waits would yield to the scheduler."""
    client, stream = pair()
    client.socket.sendall(REQUEST)
    with pytest.raises(StopIteration) as returned:
        detect(stream, 0, 0).send(None)
    assert returned.value.value == Opening(Protocol.HTTP1, "http1")
    assert await stream.receive_some() == REQUEST
    client.close()
    stream.close()


async def test_bytes_that_arrive_in_pieces_are_waited_for() -> None:
    client, stream = pair()
    found: list[Opening] = []

    async def look() -> None:
        found.append(await detect(stream, 60, 60))

    with trio.fail_after(30):
        client.socket.sendall(REQUEST[:3])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await wait_all_tasks_blocked()
            assert not found
            client.socket.sendall(REQUEST[3:])
    assert found == [Opening(Protocol.HTTP1, "http1")]
    assert await stream.receive_some() == REQUEST
    client.close()
    stream.close()


@pytest.mark.parametrize(
    ("said", "silence", "patience", "how"),
    [(b"", 0.02, 60, "silent"), (b"GET", 60, 0.02, "opaque")],
)
async def test_a_client_has_a_timeout_for_the_first_byte_and_one_for_the_rest(
    said: bytes, silence: float, patience: float, how: str
) -> None:
    client, stream = pair()
    client.socket.sendall(said)
    with trio.fail_after(30):
        assert await detect(stream, silence, patience) == Opening(Protocol.OPAQUE, how, open=True)
    client.close()
    stream.close()


async def test_one_that_ends_without_a_byte_has_only_knocked() -> None:
    client, stream = pair()
    client.close()
    with trio.fail_after(30):
        assert await detect(stream, 60, 60) == Opening(Protocol.OPAQUE, "closed")
    stream.close()


async def test_a_reset_is_not_a_clean_end() -> None:
    client, stream = pair()
    client.reset()
    with trio.fail_after(30), pytest.raises(ConnectionLost):
        await detect(stream, 60, 60)
    stream.close()


async def test_a_cancelled_look_ends_as_one() -> None:
    client, stream = pair()
    client.socket.sendall(REQUEST)
    with trio.CancelScope() as scope:
        scope.cancel()
        await detect(stream, 60, 60)
    assert scope.cancelled_caught
    client.close()
    stream.close()
