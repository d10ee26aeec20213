"""A soak of HTTP/2 through one proxy in this process: many requests of mixed kinds and sizes, some of them cancelled at any moment.

    python -m perf.soak [requests=200000] [clients=8] [seed=1]

Prints what it did and what is left: streams, tasks, file descriptors, memory. The streams and tasks that are left must be none.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import trio
from trio.lowlevel import current_statistics

from tests.kit.http import descriptors, until
from tests.kit.http2_hop import Hop2, through2
from tests.kit.http2_peers import POST, Peer2, answering2, echo2

ROUND = 64
SIZES = (0, 1, 200, 3000, 20_000, 100_000)


def resident() -> float:
    """MiB of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def _answered(wanted: list[tuple[Peer2, int]]) -> bool:
    return all(number in client.ended for client, number in wanted)


async def _one(client: Peer2, number: int, size: int, cancelled: bool) -> None:
    try:
        await client.send(number, bytes(size), end=not cancelled)
        if cancelled:
            await client.reset(number)
    except Exception:  # noqa: S110  # the other side was faster
        pass


async def _rounds(proxy: Hop2, clients: list[Peer2], requests: int, dice: random.Random) -> Counter[str]:
    done: Counter[str] = Counter()
    for _ in range(0, requests, ROUND):
        wanted: list[tuple[Peer2, int]] = []
        async with trio.open_nursery() as uploads:
            for _ in range(ROUND):
                client, cancelled = dice.choice(clients), dice.random() < 0.15
                number = await client.request(POST, end=False)
                uploads.start_soon(_one, client, number, dice.choice(SIZES), cancelled)
                done["cancelled" if cancelled else "asked"] += 1
                if not cancelled:
                    wanted.append((client, number))
        await until(partial(_answered, wanted), 60)
        for client, number in wanted:
            done["reset" if client.messages[number].reset is not None else str(client.messages[number].status)] += 1
        for client in clients:
            client.events.clear()
            client.messages.clear()
            client.ended.clear()
        proxy.ended.clear()
        proxy.outcomes.clear()
    return done


async def main() -> None:
    requests, count, seed = (int(sys.argv[at]) if len(sys.argv) > at else default for at, default in ((1, 200_000), (2, 8), (3, 1)))
    async with through2(answering2(echo2)) as (first, proxy):
        clients = [first, *[await proxy.connect2() for _ in range(count - 1)]]
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.pump)
            await _rounds(proxy, clients, 2000, random.Random(0))  # to warm up
            await proxy.idle()
            before = resident(), descriptors(), current_statistics().tasks_living
            started = time.perf_counter()
            done = await _rounds(proxy, clients, requests, random.Random(seed))
            seconds = time.perf_counter() - started
            await proxy.idle(30)
            after = resident(), descriptors(), current_statistics().tasks_living
            nursery.cancel_scope.cancel()
        print(f"{requests} requests in {seconds:.1f} s by {count} clients: {dict(done)}")
        for name, was, now in zip(("memory MiB", "descriptors", "tasks"), before, after, strict=True):
            print(f"  {name:12} before {was:8.1f}  after {now:8.1f}")
        print(f"  streams left {proxy.exchanges}; connections to the server {proxy.dialled}")


if __name__ == "__main__":
    trio.run(main)
