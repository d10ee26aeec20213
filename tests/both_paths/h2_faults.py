"""Faults of either side of an HTTP/2 play, and the acts that are drawn at random."""

from __future__ import annotations

import random
from functools import partial

from proxy.wire.h2.frames import Kind, frame
from tests.both_paths.h2_acts import (
    CALL,
    FIELDS,
    answer,
    answered_early,
    ask,
    ask_before_upload,
    asking,
    at_once,
    call,
    connected,
    converse,
    download,
    good,
    got,
    left,
    line,
    loop,
    once,
    received,
    sampled,
    slow,
    slow_reader,
    slow_taker,
    slow_upload,
    tunnel,
    upload,
)  # fmt: skip
from tests.both_paths.h2_ends import Pair
from tests.both_paths.stage import Act, Stage


async def broken(stage: Stage, rng: random.Random) -> None:
    """The server sends no response, or a wrong one. Where that is allowed, the request is
    retried."""
    kinds = [
        "reset",
        "cancelled",
        "calm",
        "refused",
        "close",
        "abort",
        "bad-status",
        "bad-name",
        "bad-field",
        "bad-length",
    ]
    kind, end = rng.choice(kinds), await line(stage)
    method, data = rng.choice([(b"GET", b""), (b"POST", b"x"), (b"PUT", b"yy"), (b"DELETE", b"")])
    number = end.open(asking(f"/{kind}/1000", rng.choice([*FIELDS, CALL]), method), end=not data)
    if data:
        end.piece(number, data, end=True)
    await end.flush()
    await answer(stage, end, number)
    await stage.known()


async def cut_within_answer(stage: Stage, rng: random.Random) -> None:
    kind = rng.choice(
        ["half-close", "half-abort", "half-reset", "half-calm", "half-refused", "half-grpc"]
    )
    end, fields = await line(stage), CALL if kind == "half-grpc" else rng.choice(FIELDS)
    number = end.open(asking(f"/{kind}/2000", fields, b"POST"))
    await end.flush()
    await got(stage, end, number, 1000)
    await stage.waiting()
    stage.go_on()
    await answer(stage, end, number)
    await stage.known()


async def refused(stage: Stage, rng: random.Random) -> None:
    """Once: without a body, with one, and with one that is too long to be kept."""
    end, size = await line(stage), rng.choice([0, 0, 3, 30_000, 90_000])
    number = end.open(
        asking(once("refused-once", 9, rng), rng.choice(FIELDS), b"POST"), end=not size
    )
    await end.put(number, b"z" * size, end=True) if size else await end.flush()
    await answer(stage, end, number)


async def broken_within_upload(stage: Stage, rng: random.Random) -> None:
    """The part of the body that was sent is sent again, if that is allowed."""
    end = await line(stage)
    path = once(rng.choice(["refused-upload", "refused-upload", "reset-upload"]), 9, rng)
    number = end.open(asking(path, rng.choice(FIELDS), rng.choice([b"POST", b"PUT"])), end=False)
    await end.put(number, b"hello")
    await stage.until(lambda: path in stage.notes)
    await stage.until(lambda: end.answered(number) or stage.notes.count(path) == 2)
    await end.put(number, b"world", end=True)
    await answer(stage, end, number)


async def sent_away(stage: Stage, rng: random.Random) -> None:
    """The server sends GOAWAY without having processed it. Other streams of its connection
    continue, or there are none."""
    end, other = await line(stage), None
    if rng.random() < 0.5:
        other = end.open(asking("/wait/30", []))
        await end.flush()
        await stage.waiting()
    data = rng.choice([b"", b"", b"hello"])
    number = end.open(asking(once("goaway", 9, rng), rng.choice(FIELDS), b"POST"), end=not data)
    if data:
        end.piece(number, data, end=True)
    await end.flush()
    await answer(stage, end, number)
    if other is not None:
        stage.go_on()
        await answer(stage, end, other)
    await stage.known()


async def given_up_before_answer(stage: Stage, rng: random.Random) -> None:
    """The client resets its stream."""
    end = await line(stage)
    number = end.open(asking("/wait/200", rng.choice(FIELDS)))
    await end.flush()
    await stage.waiting()
    end.reset(number, rng.choice([8, 0, 2]))
    await end.flush()
    await stage.settled()
    stage.go_on()


async def given_up_within_answer(stage: Stage, rng: random.Random) -> None:
    end = await line(stage)
    number = end.open(asking("/half-wait/2000", rng.choice([[], CALL])))
    await end.flush()
    await got(stage, end, number, 1000)
    await stage.waiting()
    end.reset(number, 8)
    await end.flush()
    await stage.settled()
    stage.go_on()


async def given_up_within_upload(stage: Stage, rng: random.Random) -> None:
    end = await line(stage)
    kind = rng.choice(["ok", "echo"])
    number = end.open(asking(f"/{kind}/1", rng.choice([[], CALL]), b"POST"), end=False)
    await end.put(number, b"hello")
    await received(stage, 5)
    if kind == "echo":
        await got(stage, end, number, 5)
    end.reset(number, 8)
    await end.flush()


async def given_up_at_once(stage: Stage, rng: random.Random) -> None:
    """In one write with the head: no proxy has processed it before."""
    end = await line(stage)
    number = end.open(asking("/ok/1", rng.choice(FIELDS)), end=rng.random() < 0.5)
    end.reset(number, 8)
    other = end.open(asking("/ok/2", []))
    await end.flush()
    await answer(stage, end, other)


async def given_up_while_it_waits(stage: Stage, _: random.Random) -> None:
    """While it waits for the client's own window."""
    end = await connected(stage, window=2000)
    number = end.open(asking("/ok/9000", []))
    await end.flush()
    await got(stage, end, number, 2000)
    await stage.until(lambda: all(end.quiet for end in stage.servers))
    end.reset(number, 8)
    await end.flush()
    await stage.settled()
    await left(stage, end, reset=False)


async def leave(stage: Stage, rng: random.Random) -> None:
    """The client closes its connection: with nothing in progress, or in the middle of a few
    streams."""
    end, reset = await line(stage), rng.random() < 0.5
    if rng.random() < 0.8:
        waits, half = (
            end.open(asking("/wait/200", [])),
            end.open(asking("/half-wait/2000", CALL, b"POST")),
        )
        uploads = end.open(asking("/ok/200", [], b"POST"), end=False)
        await end.put(uploads, b"hello")
        await got(stage, end, half, 1000)
        await received(stage, 5)
        await stage.until(lambda: stage.waits - stage.released == 2)
        assert not end.messages[waits].over
        await left(stage, end, reset=reset)
        await stage.settled()
        stage.go_on()
        stage.go_on()
    else:
        await left(stage, end, reset=reset)


async def leave_politely(stage: Stage, rng: random.Random) -> None:
    """With GOAWAY: open streams continue."""
    end = await line(stage)
    number = end.open(asking("/wait/200", rng.choice(FIELDS)))
    await end.flush()
    await stage.waiting()
    await end.goaway(0)
    stage.go_on()
    await answer(stage, end, number)
    await stage.until(lambda: end.ended is not None)


def _head(*fields: Pair, without: tuple[bytes, ...] = (), method: bytes = b"GET") -> list[Pair]:
    return [pair for pair in asking("/ok/5", [], method) if pair[0] not in without] + list(fields)


MALFORMED: list[list[Pair]] = [
    _head((b"X-Upper", b"1")),
    _head((b"connection", b"close")),
    _head((b"te", b"gzip")),
    _head((b"x", b"a\r\nb: c")),
    _head((b"host", b"b")),
    _head((b":status", b"200")),
    _head((b"content-length", b"3"), (b"content-length", b"4")),
    _head(without=(b":path",)),
    _head(without=(b":scheme",)),
    _head((b":path", b"nowhere"), without=(b":path",)),
    _head((b":protocol", b"websocket")),
]


async def malformed(stage: Stage, rng: random.Random) -> None:
    """An invalid head, and a body that does not agree with its head. The other streams continue."""
    end, other = await line(stage), None
    if rng.random() < 0.7:
        number = end.open(rng.choice(MALFORMED))
    else:
        number = end.open(_head((b"content-length", b"3"), method=b"POST"), end=False)
        if rng.random() < 0.5:
            await end.put(number, b"ab")
            await received(stage, 2)
        end.piece(number, b"cdefg", end=rng.random() < 0.5)
    other = end.open(asking("/ok/2", []))
    await end.flush()
    await answer(stage, end, number, other)


async def wrong_frame(stage: Stage, _: random.Random) -> None:
    """It ends the connection, and all streams in progress on it."""
    end = await line(stage)
    number = end.open(asking("/wait/5", []))
    await end.flush()
    await stage.waiting()
    await end.flush(frame(Kind.DATA, 0, 9999, b"x"))
    await stage.until(lambda: end.ended is not None)
    assert not end.messages[number].head
    await stage.settled()
    stage.go_on()


async def late(stage: Stage, rng: random.Random) -> None:
    """A call whose deadline passes. Only a single outbound proxy enforces it: of two proxies in a
    row, either may be the first to answer, so the result would not be certain."""
    end = await line(stage)
    if len(stage.apps) == 1 and stage.apps[0].listeners.outbound:
        kind = rng.choice(["never", "half-never"])
        number = end.open(
            asking(
                f"/{kind}/2000",
                [*CALL, (b"grpc-timeout", rng.choice([b"50m", b"150m", b"250m"]))],
                b"POST",
            )
        )
        await end.flush()
        await answer(stage, end, number)


# Acts that are not drawn at random...


async def unanswered(stage: Stage, _: random.Random) -> None:
    """All that can be waited for, at the same time: a head, the rest of a response, the rest of a
    request, a client's window."""
    end, slow_end = await line(stage), await connected(stage, window=2000)
    numbers = [end.open(asking(f"/{kind}/2000", [])) for kind in ("never", "half-never")]
    numbers += [end.open(asking(f"/{kind}/1/{kind}", CALL)) for kind in ("never",)]
    numbers.append(end.open(asking("/ok/7", [], b"POST"), end=False))
    await end.put(numbers[-1], b"hello")
    closed = slow_end.open(asking("/ok/9000", []))
    await slow_end.flush()
    await answer(stage, end, *numbers)
    await answer(stage, slow_end, closed)
    await left(stage, slow_end, reset=False)


async def fail_in_a_row(stage: Stage, rng: random.Random, kind: str = "reset") -> None:
    """Enough failures to open an endpoint's circuit."""
    for n in range(9):
        end = await line(stage)
        number = end.open(asking(f"/{kind}/{n}", CALL, b"POST"))
        await end.flush()
        await answer(stage, end, number)
        await stage.settled()
    await good(stage, rng)


ODD: tuple[Act, ...] = (
    upload, upload, upload, converse, converse, download, slow_reader, slow_taker, ask_before_upload, answered_early, answered_early, slow,
    slow_upload, tunnel, at_once, loop, sampled, call, call, broken, broken, broken, cut_within_answer, cut_within_answer, refused,
    refused, broken_within_upload, sent_away, sent_away, given_up_before_answer, given_up_within_answer, given_up_within_upload,
    given_up_at_once, given_up_while_it_waits, leave, leave, leave_politely, malformed, malformed, wrong_frame, late, late,
)  # fmt: skip

plain_call: Act = partial(call, kinds=("grpc",))


def drawn(seed: int, number: int) -> list[Act]:
    """A play: unusual acts, each after plain ones, so that it meets connections that are ready for
    the fast path."""
    rng = random.Random(seed)
    acts: list[Act] = [sampled]
    odd = [act for _ in range(2) for act in rng.sample(ODD, len(ODD))][:number]
    for act in odd:
        acts += (
            [good, plain_call, ask]
            if rng.random() < 0.5
            else [plain_call]
            if rng.random() < 0.8
            else [good]
        )
        acts.append(act)
    return acts
