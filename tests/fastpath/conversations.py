"""A relay of the fast path between two ends that exchange data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio
import trio.testing

from proxy.exchange.server_settings import Drain
from proxy.fastpath.fast_path import FastPath
from proxy.net.exceptions import NetError
from proxy.net.relay import Relayed, relay
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream
from tests.kit.http import until
from tests.net.conftest import Mesh, pair

Either = SocketStream | TLSStream


MESH = Mesh()


IDLE = 60.0


@asynccontextmanager
async def running_fast_path(
    idle_timeout: float = 1_000_000, silence: float = 1_000_000
) -> AsyncIterator[FastPath]:
    """A running fast path. By default its watchdog does not check during the test."""
    fast_path = FastPath(Drain(), idle_timeout, silence)
    await fast_path.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fast_path.run)
        yield fast_path
        nursery.cancel_scope.cancel()


async def ends(tls: bool, buffers: int | None = None) -> tuple[Either, Either]:
    """The two ends of a connection."""
    return await MESH.connect(pair(buffers=buffers)) if tls else pair(buffers=buffers)


@dataclass
class Received:
    """What one of the two peers has received."""

    data: bytes = b""
    end: str = ""


@dataclass
class Conversation:
    """What each peer sends, piece by piece, how it ends, and after how many pieces in all the fast
    path hands the relay back."""

    pieces: list[tuple[int, int]]  # which peer, how many bytes
    last: tuple[str, str]  # of each: "eof", "reset"
    given_back: int | None = None
    outcome: Relayed | None = None
    peers: tuple[Received, Received] = field(default_factory=lambda: (Received(), Received()))


async def held(
    talk: Conversation, kinds: tuple[bool, bool], fast_path: FastPath | None
) -> Conversation:
    """Run it through a relay between two connections (`kinds`: which of them is TLS)."""
    one, a = await ends(kinds[0])
    b, other = await ends(kinds[1])
    speakers = (one, other)

    async def run() -> None:
        talk.outcome = await relay(
            a, b, idle=IDLE, carry=fast_path.join if fast_path is not None else None
        )
        a.close()
        b.close()

    async def listen(who: int) -> None:
        received = talk.peers[who]
        try:
            while data := await speakers[who].receive_some():
                received.data += data
            received.end = "eof"
        except NetError:
            received.end = "lost"
        except trio.ClosedResourceError:  # by this side
            received.end = ""

    async def speak() -> None:
        said = [0, 0]
        for number, (who, size) in enumerate(talk.pieces):
            if number == talk.given_back and fast_path is not None:
                for fast_relay in list(fast_path._relays):
                    fast_relay.leave()
            await speakers[who].send_all(bytes([number % 256]) * size)
            said[who] += size
            await until(
                lambda: all(len(talk.peers[1 - who].data) == said[who] for who in (0, 1))
            )  # so that a reset destroys nothing
        for who, how in enumerate(talk.last):
            if how == "reset":
                speakers[who].reset()
                return
            await speakers[who].send_eof()
            await until(partial(_has_heard, talk.peers[1 - who]))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            nursery.start_soon(listen, 0)
            nursery.start_soon(listen, 1)
            await trio.testing.wait_all_tasks_blocked()
            await speak()
    for stream in speakers:
        stream.close()
    return talk


def _has_heard(peer: Received) -> bool:
    return bool(peer.end)
