"""What the client of an HTTP/2 play does, except for faults (h2_faults.py). An act starts when
nothing is in progress. When it ends, the next act cannot overtake anything that it has started."""

from __future__ import annotations

import random
from functools import partial

import trio

from proxy.fastpath import fast_path
from tests.both_paths.acts import FIELDS as LINES
from tests.both_paths.acts import TOO_FAR as TOO_FAR_LINES
from tests.both_paths.h2_ends import INITIAL_WINDOW, Client2, Pair, Server2, fuzzed
from tests.both_paths.stage import Act, Stage

# Kinds of complete responses (h2_server.py).
PLAIN = (
    "ok", "ok", "ok", "length", "length", "empty", "hollow", "none", "same", "error", "busy", "missing", "pieces", "pieces", "padded",
    "padded", "trailers", "bare-trailers", "interim", "fuzzed", "fuzzed", "cut", "cut",
)  # fmt: skip
CALLS = ("grpc", "grpc", "grpc", "grpc-only", "grpc-late-away", "grpc-away", "early-head")
SIZES = (0, 2, 1024, 1024, 9_000, 40_000)


def pairs(lines: list[bytes]) -> list[Pair]:
    """The fields of the HTTP/1.1 plays, without those about a connection."""
    split = [line.partition(b": ")[::2] for line in lines]
    return [(name.lower(), value) for name, value in split if name != b"Connection"]


FIELDS: list[list[Pair]] = [
    *[pairs(lines) for lines in LINES],
    [(b"cookie", b"a=b"), (b"x-mine", b"1"), (b"cookie", b"c=d")],
    [(b"te", b"trailers"), (b"isthmus-timeout", b"9s"), (b"x-mine", b"1")],
]
SAMPLED, TOO_FAR = FIELDS[5], pairs(TOO_FAR_LINES)
CALL: list[Pair] = [
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"x"),
]


def asking(path: str, fields: list[Pair], method: bytes = b"GET") -> list[Pair]:
    return [
        (b":method", method),
        (b":scheme", b"http"),
        (b":authority", b"a"),
        (b":path", path.encode()),
        *fields,
    ]


def once(kind: str, size: int, rng: random.Random) -> str:
    """A path that is unique for the server."""
    return f"/{kind}/{size}/{rng.randrange(10**9)}"


async def line(stage: Stage) -> Client2:
    """The client's connection. It is kept if that is possible."""
    if stage.clients:
        last = stage.clients[-1]
        assert isinstance(last, Client2)
        if not last.closed and last.ended is None and not last.goaways and last.greedy:
            last.cut = None
            return last
    return await connected(stage)


async def connected(stage: Stage, window: int | None = None) -> Client2:
    """A new connection. With a `window`, the client does not enlarge windows by itself."""
    end = await stage.client(settings=None if window is None else {INITIAL_WINDOW: window})
    assert isinstance(end, Client2)
    end.greedy = window is None
    return end


async def answer(stage: Stage, end: Client2, *numbers: int) -> None:
    """Wait for the complete responses."""
    await stage.until(lambda: all(end.answered(number) for number in numbers))


async def got(stage: Stage, end: Client2, number: int, size: int) -> None:
    """Wait for the first bytes of a response."""
    await stage.until(lambda: len(end.messages[number].body) >= size)


def drawn_fields(rng: random.Random) -> list[Pair]:
    """The fields of one set, or random ones."""
    if rng.random() < 0.7:
        return rng.choice(FIELDS)
    return fuzzed(rng)


async def received(stage: Stage, size: int) -> None:
    """Wait until the server has that much of an incomplete body."""

    def known() -> bool:
        messages = [
            message
            for end in stage.servers
            if isinstance(end, Server2)
            for message in end.messages.values()
        ]
        return any(len(message.body) == size and not message.over for message in messages)

    await stage.until(known)


# Acts...


async def ask(
    stage: Stage,
    rng: random.Random,
    kinds: tuple[str, ...] = PLAIN,
    fields: list[Pair] | None = None,
) -> None:
    """A request without a body, or with one that came together with its head."""
    end, kind = await line(stage), rng.choice(kinds)
    method = rng.choice([b"GET", b"GET", b"GET", b"HEAD", b"OPTIONS", b"DELETE"])
    if method == b"HEAD" and kind not in ("ok", "length", "empty", "none", "same", "missing"):
        method = b"POST"
    fields, how = (
        drawn_fields(rng) if fields is None else fields,
        rng.choice(["end", "end", "hollow", "body"]),
    )
    end.cut = random.Random(0) if rng.random() < 0.3 else None
    number = end.open(asking(f"/{kind}/{rng.choice(SIZES)}", fields, method), end=how == "end")
    if how != "end":
        end.piece(number, b"" if how == "hollow" else b"abc", end=True)
    await end.flush()
    await answer(stage, end, number)


async def call(stage: Stage, rng: random.Random, kinds: tuple[str, ...] = CALLS) -> None:
    """A gRPC call."""
    end, more = await line(stage), rng.choice([[], [], [(b"grpc-timeout", b"9S")], SAMPLED])
    number = end.open(
        asking(f"/{rng.choice(kinds)}/{rng.choice(SIZES)}", [*CALL, *more], b"POST"), end=False
    )
    await end.put(number, b"x" * rng.choice([5, 100, 20_000]), end=True)
    await answer(stage, end, number)


async def upload(stage: Stage, rng: random.Random) -> None:
    """In pieces, with padding, after promises, with trailers, or with none of these."""
    end, data = await line(stage), rng.randbytes(rng.choice([1, 700, 20_000, 90_000]))
    promise = [(b"content-length", b"%d" % len(data))] if rng.random() < 0.5 else []
    number = end.open(
        asking(f"/{rng.choice(['ok', 'echo', 'grpc'])}/9", [*rng.choice(FIELDS), *promise], b"PUT"),
        end=False,
    )
    step = rng.choice([len(data), 16_000, 1 + len(data) // 7])
    pad, together = rng.choice([None, None, 0, 200]), rng.random() < 0.5
    end.cut = random.Random(0) if rng.random() < 0.3 else None
    for at in range(0, len(data), step):
        if step > 4000:
            await end.put(number, data[at : at + step])
            continue
        end.piece(number, data[at : at + step], pad=pad)
        if not together:
            end.piece(number, b"", pad=pad)
            await end.flush()
    if rng.random() < 0.5:
        end.head(number, [(b"x-sum", b"1"), (b"l5d-client-id", b"forged")], end=True)
    else:
        end.piece(number, b"", end=True, pad=pad)
    await end.flush()
    await answer(stage, end, number)


async def converse(stage: Stage, rng: random.Random) -> None:
    """A stream in both directions, in turns."""
    end = await line(stage)
    number, size = end.open(asking("/echo/0", CALL, b"POST"), end=False), 0
    for _ in range(rng.choice([1, 3, 6])):
        data = b"x" * rng.choice([1, 500, 5000, 20_000])
        size += len(data)
        await end.put(number, data)
        await got(stage, end, number, size)
    end.head(number, [(b"x-end", b"1")], end=True)
    await end.flush()
    await answer(stage, end, number)


async def download(stage: Stage, rng: random.Random) -> None:
    """More than the windows of all connections on the path hold."""
    end = await line(stage)
    number = end.open(asking(f"/{rng.choice(['ok', 'length', 'grpc'])}/400000", rng.choice(FIELDS)))
    await end.flush()
    await answer(stage, end, number)


async def slow_reader(stage: Stage, rng: random.Random) -> None:
    """A client with a small window, which it enlarges late. Its other streams continue."""
    end, window = await connected(stage, window=2000), 2000
    number = end.open(asking(f"/{rng.choice(['ok', 'trailers', 'grpc'])}/9000", rng.choice(FIELDS)))
    await end.flush()
    while window < 9000:
        await got(stage, end, number, window)
        other = end.open(asking("/ok/20", []))
        await end.flush()
        await answer(stage, end, other)
        size = rng.choice([1500, 3000])
        end.h2.increment_flow_control_window(size, number)
        window += size
        await end.flush()
    await answer(stage, end, number)
    await left(stage, end, reset=False)


async def slow_taker(stage: Stage, rng: random.Random) -> None:
    """A server that takes a long upload slowly."""
    end = await line(stage)
    number = end.open(asking("/slow-take/9", rng.choice(FIELDS), b"POST"), end=False)
    await end.put(number, rng.randbytes(150_000), end=rng.random() < 0.5)
    if not end.messages[number].finished:
        end.head(number, [(b"x-sum", b"1")], end=True)
        await end.flush()
    await answer(stage, end, number)


async def left(stage: Stage, end: Client2, *, reset: bool) -> None:
    """The client closes, and the proxy has noticed."""
    end.close(reset=reset)
    await stage.forgotten()


async def answered_early(stage: Stage, rng: random.Random) -> None:
    """The response is complete before the request is. The rest of the request is not wanted."""
    end = await line(stage)
    number = end.open(
        asking(
            f"/{rng.choice(['early', 'early-reset'])}/{rng.choice(SIZES)}",
            rng.choice(FIELDS),
            b"POST",
        ),
        end=False,
    )
    await end.put(number, b"hello")
    await answer(stage, end, number)


async def ask_before_upload(stage: Stage, rng: random.Random) -> None:
    """Expect: 100-continue, to a server that sends 100, and to one that responds at once."""
    end, kind = await line(stage), rng.choice(["continue", "early"])
    number = end.open(
        asking(f"/{kind}/7", [*rng.choice(FIELDS), (b"expect", b"100-continue")], b"PUT"), end=False
    )
    await end.flush()
    if kind == "continue":
        await stage.until(lambda: bool(end.messages[number].interim))
    await end.put(number, b"hello", end=kind == "continue")
    await answer(stage, end, number)


async def slow(stage: Stage, rng: random.Random) -> None:
    """The server takes longer than the fast path waits."""
    end, kind = await line(stage), rng.choice(["wait", "half-wait"])
    fields = rng.choice([[], SAMPLED, CALL, [*CALL, (b"grpc-timeout", b"8S")]])
    number = end.open(asking(f"/{kind}/2000", fields, b"POST"), end=rng.random() < 0.5)
    if not end.messages[number].finished:
        end.piece(number, b"abc", end=True)
    await end.flush()
    await stage.waiting()
    await trio.sleep(2 * fast_path.PATIENCE)
    stage.go_on()
    await answer(stage, end, number)


async def slow_upload(stage: Stage, rng: random.Random) -> None:
    """The client takes longer than the fast path waits."""
    end, kind = await line(stage), rng.choice(["ok", "echo"])
    number = end.open(asking(f"/{kind}/9", rng.choice(FIELDS), b"POST"), end=False)
    await end.put(number, b"hello")
    await trio.sleep(2 * fast_path.PATIENCE)
    await end.put(number, b"world", end=True)
    await answer(stage, end, number)


async def tunnel(stage: Stage, rng: random.Random) -> None:
    """CONNECT, plain and extended."""
    end = await line(stage)
    websocket: list[Pair] = [
        (b":method", b"CONNECT"),
        (b":protocol", b"websocket"),
        *asking("/chat/0", [])[1:],
    ]
    number = end.open(
        rng.choice([[(b":method", b"CONNECT"), (b":authority", b"far:443")], websocket]), end=False
    )
    await end.put(number, b"x" * 3000)
    await got(stage, end, number, 3000)
    await end.put(number, b"", end=True)
    await answer(stage, end, number)


async def at_once(stage: Stage, rng: random.Random) -> None:
    """A few streams on one connection, in one write. The kinds are the same, so no response of the
    server can overtake another."""
    end, size = await line(stage), rng.choice(SIZES)
    numbers = [end.open(asking(f"/ok/{size}/{n}", [])) for n in range(rng.choice([2, 5]))]
    await end.flush()
    await answer(stage, end, *numbers)


async def loop(stage: Stage, rng: random.Random) -> None:
    await ask(stage, rng, kinds=("ok",), fields=TOO_FAR)  # it stops at the first proxy


async def sampled(stage: Stage, rng: random.Random) -> None:
    await ask(stage, rng, fields=SAMPLED)


good: Act = partial(ask, kinds=("ok", "length"), fields=[])

# Acts that are not drawn at random...


async def stop(stage: Stage, _: random.Random) -> None:
    """The proxies shut down: open streams continue, and the last ones that came before the client
    could know are served."""
    end, idle = await connected(stage), await connected(stage)
    first = [end.open(asking("/ok/4", [])), idle.open(asking("/ok/4", []))]
    await end.flush()
    await idle.flush()
    await answer(stage, end, first[0])
    await answer(stage, idle, first[1])
    await stage.settled()
    numbers = [end.open(asking(f"/{kind}/2000", [])) for kind in ("wait", "half-wait")]
    numbers.append(end.open(asking("/echo/0", CALL, b"POST"), end=False))
    await end.put(numbers[-1], b"hello")
    await got(stage, end, numbers[1], 1000)
    await got(stage, end, numbers[2], 5)
    await stage.until(lambda: stage.waits - stage.released == 2)
    for app in stage.apps:
        app.drain.begin()
    await stage.until(lambda: len(end.goaways) == 2)
    await end.put(numbers[2], b"world", end=True)
    await answer(stage, end, numbers[2])
    stage.go_on()
    stage.go_on()
    await answer(stage, end, *numbers)
    await stage.until(lambda: end.ended is not None and idle.ended is not None)


async def many_at_once(stage: Stage, rng: random.Random) -> None:
    """Clients that do not wait for each other, each with concurrent streams."""

    async def one(seed: float) -> None:
        drawn = random.Random(seed)
        end = await connected(stage)
        for turn in range(3):
            kinds = [
                drawn.choice(
                    ("ok/60000", "pieces/900", "padded/600", "length/3", "none/0", "trailers/500")
                )
                for _ in range(8)
            ]
            numbers = [
                end.open(asking(f"/{kind}/{seed}-{turn}-{n}", [])) for n, kind in enumerate(kinds)
            ]
            await end.flush()
            for number in range(2):
                numbers.append(
                    end.open(asking(f"/echo/0/{seed}-{turn}-{number}", CALL, b"POST"), end=False)
                )
                await end.put(numbers[-1], b"y" * drawn.choice([1, 3000, 40_000]), end=True)
            await answer(stage, end, *numbers)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one, rng.random())
