"""Objects of finished exchanges, connections and relays are freed at once, without the garbage
collector. A reference cycle would keep 30 KiB of OpenSSL memory for each closed connection until a
collection, and the collector would have to visit all of it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from OpenSSL import SSL

from proxy.exchange.exchange import Exchange
from proxy.exchange.h2.connection import MultiplexedConnection
from proxy.exchange.h2.stream import Http2Stream
from proxy.fastpath.fast_relay import FastRelay
from proxy.fastpath.h1_connection import FastConnection
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream
from proxy.wire.h2.connection import Http2Connection
from tests.both_paths.acts import drawn, good
from tests.both_paths.h2_acts import good as good2
from tests.both_paths.h2_ends import Client2, Server2
from tests.both_paths.h2_faults import drawn as drawn2
from tests.both_paths.h2_server import serve as serve2
from tests.both_paths.server import serve
from tests.both_paths.stage import Cast, Theatre, WhichPath
from tests.fastpath.conversations import Conversation, held, running_fast_path

OURS = (
    Exchange,
    Http2Stream,
    MultiplexedConnection,
    Http2Connection,
    FastRelay,
    FastConnection,
    SocketStream,
    TLSStream,
    SSL.Connection,
)


@contextmanager
def garbage() -> Iterator[Counter[str]]:
    """The objects of our modules that only the collector would have found within the block."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.garbage.clear()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(type(thing).__name__ for thing in gc.garbage if isinstance(thing, OURS))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize("path", ["ordinary", "fast"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
async def test_exchanges_and_connections_leave_nothing_to_the_collector(
    version: str, path: WhichPath, made: Callable[..., Theatre]
) -> None:
    cast, act = (
        (Cast(serve), good)
        if version == "HTTP/1.1"
        else (Cast(serve2, Client2, Server2, "http2"), good2)
    )
    theatre = made(cast)
    with garbage() as left:
        play = await theatre.play([act] * 6, "pair", path, 1)
    assert len(play.requests) == 12, "at each of the two"
    assert not left


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("path", ["ordinary", "fast"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
async def test_failed_exchanges_leave_nothing_to_the_collector(
    version: str, path: WhichPath, seed: int, made: Callable[..., Theatre]
) -> None:
    cast, acts = (
        (Cast(serve), drawn(seed, 30))
        if version == "HTTP/1.1"
        else (Cast(serve2, Client2, Server2, "http2"), drawn2(seed, 40))
    )
    theatre = made(cast)
    with garbage() as left:
        play = await theatre.play(acts, "pair", path, seed)
    assert len(play.requests) > 40
    assert not left


@pytest.mark.parametrize("given_back", [None, 2], ids=["on the fast path to its end", "given back"])
async def test_relays_leave_nothing_to_the_collector(given_back: int | None) -> None:
    with garbage() as left:
        async with running_fast_path() as fast_path:
            for tls in ((False, True), (True, True), (False, False)):
                talk = await held(
                    Conversation([(0, 10), (1, 1000), (0, 10)], ("eof", "eof"), given_back),
                    tls,
                    fast_path,
                )
                assert talk.outcome is not None
                assert talk.outcome.how == "eof"
    assert not left
