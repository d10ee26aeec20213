"""A soak test of HTTP/2 through one proxy: requests of mixed kinds and sizes, some cancelled at
random moments.

    python -m perf.soak [requests=200000] [clients=8] [seed=1]

The proxy is a separate process, so that only its memory is measured: the clients and the server, in
this process, keep records of every stream. Prints what was done and what remains in the proxy:
streams, tasks, file descriptors, memory. No stream may remain; the others must be as after the
warm-up.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import h2.exceptions
import trio
from trio.lowlevel import current_statistics

from lab.console import print_table
from proxy.net.address import Address
from tests.kit.http import connect, descriptors, origin, until
from tests.kit.http2_hop import Hop2, Settings2, hop2
from tests.kit.http2_peers import POST, Answer, Peer2, answering2, echo2, speaking

ROUND = 64
WARM_UP = 20_000
SIZES = (0, 1, 200, 3000, 20_000, 100_000)


# The proxy's process


def resident() -> float:
    """MiB of memory that this process uses now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


async def _report(proxy: Hop2) -> dict[str, float]:
    await proxy.idle(30)
    gc.collect()
    living, open_ = current_statistics().tasks_living, proxy.exchanges
    return {
        "memory MiB": resident(),
        "descriptors": descriptors(),
        "tasks": living,
        "streams": open_,
        "connections": proxy.dialled,
    }


async def _proxy(address: str) -> None:
    """Run a proxy to `address`. Prints its listener, then answers each input line with its counts,
    until the input ends.
    """
    # the test kit's records would grow with every request
    settings = Settings2(account=lambda _: contextlib.nullcontext())
    async with hop2(Address.parse(address), settings=settings) as proxy:
        print(proxy.address, flush=True)
        async for _ in trio.wrap_file(sys.stdin):
            print(json.dumps(await _report(proxy)), flush=True)


# The process of clients and server


async def _answer(peer: Peer2, number: int, message: Answer) -> None:
    await echo2(peer, number, message)
    peer.opened_by_peer.clear()
    for gone in [n for n, known in peer.messages.items() if known.reset is not None]:
        del peer.messages[gone]


def _answered(wanted: list[tuple[Peer2, int]]) -> bool:
    return all(number in client.ended for client, number in wanted)


async def _one(client: Peer2, number: int, size: int, cancelled: bool) -> None:
    try:
        await client.send(number, bytes(size), end=not cancelled)
        if cancelled:
            await client.reset(number)
    except (
        h2.exceptions.ProtocolError,
        trio.BrokenResourceError,
    ):  # the other side ended the stream first
        pass


async def _rounds(clients: list[Peer2], requests: int, dice: random.Random) -> Counter[str]:
    done: Counter[str] = Counter()
    for _ in range(0, requests, ROUND):
        wanted: list[tuple[Peer2, int]] = []
        async with trio.open_nursery() as uploads:
            for _ in range(ROUND):
                client, cancelled = dice.choice(clients), dice.random() < 0.15
                number = await client.request(POST, end=False)
                uploads.start_soon(_one, client, number, dice.choice(SIZES), cancelled)
                done["cancelled" if cancelled else "complete"] += 1
                if not cancelled:
                    wanted.append((client, number))
        await until(partial(_answered, wanted), 60)
        for client, number in wanted:
            done[
                "reset"
                if client.messages[number].reset is not None
                else str(client.messages[number].status)
            ] += 1
        for client in clients:
            client.events.clear()
            client.messages.clear()
            client.ended.clear()
    return done


async def _ask(process: trio.Process, line: bytes = b"") -> bytes:
    """Send a line to the proxy's process; returns its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdin.send_all(line)
    answer = b""
    while not answer.endswith(b"\n"):
        answer += await process.stdout.receive_some()
    return answer


async def main(requests: int, count: int, seed: int) -> None:
    async with origin(speaking(answering2(_answer))) as up:
        command = [sys.executable, "-m", "perf.soak", "--proxy", str(up.address)]
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            address = Address.parse((await _ask(process)).decode().strip())
            await _soak(process, address, (requests, count, seed))
        finally:
            process.kill()


async def _soak(process: trio.Process, address: Address, order: tuple[int, int, int]) -> None:
    requests, count, seed = order
    clients = [Peer2(await connect(address), client=True) for _ in range(count)]
    async with trio.open_nursery() as nursery:
        for client in clients:
            await client.start()
            nursery.start_soon(client.pump)
        await _rounds(clients, min(requests, WARM_UP), random.Random(0))
        before: dict[str, float] = json.loads(await _ask(process, b"report\n"))
        started = time.perf_counter()
        done = await _rounds(clients, requests, random.Random(seed))
        seconds = time.perf_counter() - started
        after: dict[str, float] = json.loads(await _ask(process, b"report\n"))
        nursery.cancel_scope.cancel()
    print(f"{requests} requests in {seconds:.1f} s by {count} clients: {dict(done)}")
    rows = [(name, f"{was:.1f}", f"{after[name]:.1f}") for name, was in before.items()]
    print_table(("in the proxy", "before", "after"), rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--proxy"]:
        trio.run(_proxy, sys.argv[2])
    else:
        given = [int(word) for word in sys.argv[1:4]]
        requests, clients, chance = (*given, *(200_000, 8, 1)[len(given) :])
        trio.run(main, requests, clients, chance)
