"""What the client of a play does. An act starts when nothing is in progress. When it ends, the next
act cannot overtake anything that it has started."""

from __future__ import annotations

import random
from functools import partial

import h11
import trio

from proxy.fastpath import fast_path
from tests.both_paths.stage import SPAN, TRACE, Act, End, Stage, pieces
from tests.kit.http import chunked

_HOP = b"oAAAAAAAABBBBBBBB"
# What a request may have: one of these sets.
FIELDS: tuple[list[bytes], ...] = (
    [],
    [],
    [b"Connection: keep-alive"],
    [b"TE: trailers", b"isthmus-client-id: me"],
    [b"Connection: x-mine", b"X-Mine: 1"],
    [b"traceparent: 00-%b-%b-01" % (TRACE, SPAN), b"tracestate: a=b"],
    [b"traceparent: 00-%b-%b-00" % (TRACE, SPAN)],
    [b"b3: %b-%b-1" % (TRACE, SPAN)],
    [b"uber-trace-id: %b:%b:0:0" % (TRACE, SPAN)],
    [b"Uber-Trace-Id: %b:%b:0:1" % (TRACE, SPAN)],
    [b"traceparent: 00-%b-%b-0x" % (TRACE, SPAN)],
    [b"isthmus-hops: %b:west/web-1" % _HOP],
    [b"Isthmus-Hops: %b" % _HOP, b"traceparent: 00-%b-%b-00" % (TRACE, SPAN)],
    [b"isthmus-hops: nonsense, %b" % _HOP],
)
SAMPLED = FIELDS[5]
TOO_FAR = [b"isthmus-hops: " + b", ".join([_HOP] * 8)]

# Kinds of responses (server.py) after which the server keeps its connection, and those after which
# it does not.
KEPT = (
    "ok", "ok", "together", "bytewise", "none", "same", "kept", "error", "busy", "missing", "interim", "spare",
    "chunked", "chunked-bytewise", "chunked-spare",
)  # fmt: skip
ENDED = ("says-close", "then-close", "old")
# Those that are not a complete response.
BROKEN = (
    "close", "reset", "part-head", "half", "torn", "garbage", "two-lengths", "torn-late", "spoiled", "spoiled-size", "spoiled-behind",
    "two-framings", "control",
)  # fmt: skip
SIZES = (0, 2, 1024, 1024, 9_000)


def request(target: str, fields: list[bytes], method: bytes = b"GET", body: bytes = b"") -> bytes:
    lines = [b"%b %b HTTP/1.1" % (method, target.encode()), b"Host: a", *fields]
    if body or method in (b"POST", b"PUT"):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def line(stage: Stage) -> End:
    """The client's connection. It is kept if that is possible."""
    if stage.clients and not (last := stage.clients[-1]).closed and last.ended is None:
        return last
    return await stage.client()


async def answer(stage: Stage, end: End, method: str = "GET") -> None:
    """Wait for the next response, or the end of the connection. After a response that announces the
    end, wait for both."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    reader.send(h11.EndOfMessage())
    fed, last = 0, False
    try:
        while not isinstance(event := reader.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
            if event is h11.NEED_DATA:
                data = await end.behind(fed)
                reader.receive_data(data)
                fed += len(data)
            elif isinstance(event, h11.Response):
                last = (b"connection", b"close") in event.headers.raw_items() or (
                    b"Connection",
                    b"close",
                ) in event.headers.raw_items()
        end.take(fed - len(reader.trailing_data[0]))
    except h11.RemoteProtocolError:
        end.take(fed)
        last = True
    if last:
        await stage.until(lambda: end.ended is not None)


async def left(stage: Stage, end: End, *, reset: bool) -> None:
    """The client closes, and the proxy has noticed."""
    end.close(reset=reset)
    await stage.forgotten()


async def closed(stage: Stage, before: int) -> None:
    """The server has closed a connection."""
    await stage.until(lambda: sum(end.closed for end in stage.servers) > before)


def endings(stage: Stage) -> int:
    """How many of the server's connections the proxy has closed, or half closed."""
    return sum(end.ended is not None for end in stage.servers)


def closings(stage: Stage) -> int:
    return sum(end.closed for end in stage.servers)


# Acts...


async def ask(
    stage: Stage,
    rng: random.Random,
    kinds: tuple[str, ...] = (*KEPT, *ENDED),
    fields: list[bytes] | None = None,
) -> None:
    """A request and its response."""
    kind, before = rng.choice(kinds), closings(stage)
    method = rng.choice(
        [
            b"GET",
            b"GET",
            b"GET",
            b"HEAD" if kind in ("ok", "kept", "none", "same") else b"GET",
            b"OPTIONS",
            b"DELETE",
        ]
    )
    end = await line(stage)
    fields = rng.choice(FIELDS) if fields is None else fields
    await end.send(*pieces(request(f"/{kind}/{rng.choice(SIZES)}", fields, method), rng))
    await answer(stage, end, method.decode())
    if kind in ENDED:
        await closed(stage, before)


async def upload(stage: Stage, rng: random.Random) -> None:
    method, body = (
        rng.choice([b"POST", b"PUT", b"PATCH"]),
        bytes(rng.choice([1, 700, 20_000, 90_000])),
    )
    end = await line(stage)
    await end.send(
        *pieces(request(f"/ok/{rng.choice(SIZES)}", rng.choice(FIELDS), method, body), rng)
    )
    await answer(stage, end)


async def upload_in_chunks(stage: Stage, rng: random.Random) -> None:
    end = await line(stage)
    fields = [*rng.choice(FIELDS), b"Transfer-Encoding: chunked"]
    await end.send(request("/ok/5", fields) + chunked(b"some", b"thing"))
    await answer(stage, end)


async def upload_large_answer(stage: Stage, rng: random.Random) -> None:
    end = await line(stage)
    await end.send(request("/ok/300000", rng.choice(FIELDS), b"POST", b"x" * 300))
    await answer(stage, end)


async def ask_before_upload(stage: Stage, rng: random.Random) -> None:
    """Expect: 100-continue, to a server that sends 100, and to one that responds at once."""
    end, kind = await line(stage), rng.choice(["continue", "early"])
    await end.send(request(f"/{kind}/7", [b"Expect: 100-continue", b"Content-Length: 5"], b"PATCH"))
    if kind == "continue":
        await stage.until(lambda: b"100 Continue\r\n\r\n" in end.new)
        await end.send(b"hello")
    await answer(stage, end)


async def answered_early(stage: Stage, rng: random.Random) -> None:
    """The response comes before the upload is complete."""
    end, before = await line(stage), closings(stage)
    kind = rng.choice(["early", "early-close"])
    await end.send(request(f"/{kind}/30", [b"Content-Length: 10"], b"PATCH") + b"hello")
    await stage.until(
        lambda: end.new.endswith(b"\r\n\r\n0123456789:;<=>?@ABCDEFGHIJKLM") or end.ended is not None
    )
    await end.send(b"hello")
    await answer(stage, end)
    await closed(stage, before)


async def pipeline(stage: Stage, rng: random.Random) -> None:
    kinds = [
        rng.choice([kind for kind in KEPT if "spare" not in kind])
        for _ in range(rng.choice([2, 3, 6]))
    ]
    end = await line(stage)
    asked = b"".join(request(f"/{kind}/{rng.choice(SIZES)}", rng.choice(FIELDS)) for kind in kinds)
    await end.send(*pieces(asked, rng))
    for _ in kinds:
        await answer(stage, end)


async def pipeline_with_upload(stage: Stage, rng: random.Random) -> None:
    end = await line(stage)
    asked = (
        request("/ok/3", [], b"POST", b"abc")
        + request("/ok/4", [])
        + request("/ok/5", [], b"PUT", b"d" * 2000)
    )
    await end.send(*pieces(asked, rng))
    for _ in range(3):
        await answer(stage, end)


async def broken(stage: Stage, rng: random.Random, kinds: tuple[str, ...] = BROKEN) -> None:
    """The server sends no complete response."""
    kind, before = rng.choice(kinds), closings(stage)
    method, body = rng.choice([(b"GET", b""), (b"GET", b""), (b"POST", b"x"), (b"PUT", b"yy")])
    end = await line(stage)
    await end.send(request(f"/{kind}/1000", rng.choice(FIELDS), method, body))
    await answer(stage, end)
    await closed(stage, before)


async def cut_within_answer(stage: Stage, rng: random.Random) -> None:
    """The server resets its connection when half of its response has arrived at the client."""
    end, before = await line(stage), closings(stage)
    await end.send(request("/half-reset/2000", rng.choice(FIELDS)))
    await stage.until(lambda: len(end.new) > 1000)
    await stage.waiting()
    stage.go_on()
    await stage.until(lambda: end.ended is not None)
    await closed(stage, before)


async def slow(stage: Stage, rng: random.Random) -> None:
    """The server takes longer than the fast path waits."""
    end, kind = await line(stage), rng.choice(["wait", "half-wait", "wait-close"])
    before = closings(stage)
    await end.send(
        request(
            f"/{kind}/2000", rng.choice(FIELDS), *rng.choice([(b"GET", b""), (b"POST", b"abc")])
        )
    )
    await stage.waiting()
    await trio.sleep(2 * fast_path.PATIENCE)
    stage.go_on()
    if kind == "wait-close":
        await closed(stage, before)
        if stage.waits == stage.released:
            await stage.until(
                lambda: end.ended is not None or stage.waits > stage.released or len(end.new) > 0
            )
        while stage.waits > stage.released:  # it is retried
            stage.go_on()
            await stage.until(
                lambda: end.ended is not None or stage.waits > stage.released or len(end.new) > 0
            )
    await answer(stage, end)


async def half_closed(stage: Stage, rng: random.Random) -> None:
    """A client that half-closes after its request gets its response, and the server sees the
    end."""
    end, before = await line(stage), endings(stage)
    await end.send(request("/wait/500", rng.choice(FIELDS)))
    await stage.waiting()
    await end.finish()
    await stage.until(lambda: endings(stage) > before)
    stage.go_on()
    await answer(stage, end)
    await stage.until(lambda: end.ended is not None)


async def leave_idle(stage: Stage, rng: random.Random) -> None:
    await left(stage, await line(stage), reset=rng.random() < 0.5)


async def leave_within_head(stage: Stage, rng: random.Random) -> None:
    end = await line(stage)
    await end.send(b"GET /ok/1 HTTP/1.1\r\nHos")
    await trio.sleep(0.02)  # it has been read by then, or is read together with the end
    await left(stage, end, reset=rng.random() < 0.5)


async def leave_within_upload(stage: Stage, rng: random.Random) -> None:
    end, before = await line(stage), closings(stage)
    await end.send(request("/ok/1", [b"Content-Length: 10"], b"PATCH") + b"hello")
    await stage.until(lambda: any(server.new == b"hello" for server in stage.servers))
    # Not by a reset: it is not certain which side sees that first, and so what it logs.
    await left(stage, end, reset=False)
    await closed(stage, before)


async def leave_before_answer(stage: Stage, rng: random.Random) -> None:
    end, before = await line(stage), endings(stage)
    await end.send(request("/wait/200", rng.choice(FIELDS)))
    await stage.waiting()
    end.close(reset=rng.random() < 0.5)
    await stage.until(lambda: endings(stage) > before)
    stage.go_on()
    await left(stage, end, reset=True)


async def leave_within_answer(stage: Stage, rng: random.Random) -> None:
    end, before = await line(stage), endings(stage)
    await end.send(request("/half-wait/2000", rng.choice(FIELDS)))
    await stage.until(lambda: len(end.new) > 1000)
    await stage.waiting()
    end.close(reset=True)
    await stage.until(lambda: endings(stage) > before)
    stage.go_on()
    await left(stage, end, reset=True)


async def odd(stage: Stage, rng: random.Random) -> None:
    """Correct, but unusual."""
    end = await line(stage)
    lines = rng.choice(
        [
            b"GET http://b/ok/5 HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /ok/5 HTTP/1.0\r\nHost: a\r\n\r\n",
            b"GET /chunked/5 HTTP/1.0\r\nHost: a\r\n\r\n",
            b"GET /ok/5 HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nhost:a\r\n\r\n",
            b"\r\nGET /ok/5 HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            (
                b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade:"
                b" TLS/1.2\r\n\r\n"
            ),
            b"POST /ok/5 HTTP/1.1\r\nHost: a\r\nContent-Length: 02\r\n\r\nhi",
            (
                b"POST /ok/5 HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length:"
                b" 2\r\n\r\nhi"
            ),
            b"OPTIONS /ok/5 HTTP/1.1\r\nHost: a\r\nMax-Forwards: 5\r\n\r\n",
            b"OPTIONS /ok/5 HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n",
            b"TRACE /ok/5 HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nConnection: isthmus-hops, b3, x-mine\r\nX-Mine:"
            b" 1\r\nisthmus-hops: %b\r\n\r\n" % _HOP,
            b"GET /blank/5 HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /interim-length/5 HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nX-Long: %b\r\n\r\n" % (b"x" * 20_000),
        ]
    )
    await end.send(*pieces(lines, rng))
    await answer(stage, end)


async def wrong(stage: Stage, rng: random.Random) -> None:
    """The proxy responds, and ends the connection."""
    end = await line(stage)
    lines = rng.choice(
        [
            b"GET /ok/5 HTTP/1.1\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nsmuggled : 1\r\n\r\n",
            (
                b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding:"
                b" chunked\r\n\r\n"
            ),
            b"GET /ok/5 HTTP/3.1\r\nHost: a\r\n\r\n",
            b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"y" * 20_000),
            b"GET /ok/5#x HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nX: a\x01b\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\nX: a\x7f\r\n\r\n",
            b"GET /ok/5 HTTP/1.1\r\nHost: a\r\n folded: 1\r\n\r\n",
        ]
    )
    await end.send(lines)
    await answer(stage, end)
    await left(stage, end, reset=False)


async def loop(stage: Stage, rng: random.Random) -> None:
    await ask(stage, rng, kinds=("ok",), fields=TOO_FAR)  # it stops at the first proxy


async def sampled(stage: Stage, rng: random.Random) -> None:
    await ask(stage, rng, fields=SAMPLED)


# Acts that are not drawn at random...


async def unanswered(stage: Stage, _: random.Random) -> None:
    """The server has the request, and sends nothing, or at most half of its response."""
    for kind in ("never", "half-never"):
        before = closings(stage)
        end = await line(stage)
        await end.send(request(f"/{kind}/2000", []))
        await answer(stage, end)
        await closed(stage, before)


async def drip(stage: Stage, _: random.Random) -> None:
    """The server sends its response byte by byte, and does not finish in time."""
    before = closings(stage)
    end = await line(stage)
    await end.send(request("/drip/400", []))
    await stage.until(lambda: end.ended is not None)
    await closed(stage, before)


async def fail_in_a_row(stage: Stage, rng: random.Random) -> None:
    """Enough failures to open an endpoint's circuit, each on a connection that was kept."""
    ends = [await stage.client() for _ in range(8)]
    for number, end in enumerate(ends, 1):
        await end.send(request("/wait/3", []))
        # The default argument keeps the number of this turn; mypy does not infer such a lambda.
        await stage.until(lambda number=number: stage.waits - stage.released == number)  # type: ignore[misc]
    for _ in ends:
        stage.go_on()
    for end in ends:
        await answer(stage, end)
    for _ in range(9):
        before = closings(stage)
        await ends[-1].send(request("/reset/1", [], b"POST", b"x"))
        await answer(stage, ends[-1])
        await closed(stage, before)
    await good(stage, rng)


async def stop(stage: Stage, _: random.Random) -> None:
    """The proxies shut down while connections are idle, wait for a response, have half of it, or
    have pipelined more requests."""
    idle, asks, waits, has_half, has_more = [await stage.client() for _ in range(5)]
    for end in (idle, asks, waits, has_half, has_more):
        await end.send(request("/ok/4", []))
        await answer(stage, end)
        await stage.settled()
    await waits.send(request("/wait/10", []))
    await stage.waiting()
    await has_half.send(request("/half-wait/2000", []))
    await stage.until(lambda: len(has_half.new) > 1000 and stage.waits - stage.released == 2)
    await has_more.send(request("/wait/20", []) + request("/ok/21", []))
    await stage.until(lambda: stage.waits - stage.released == 3)
    for app in stage.apps:
        app.drain.begin()
    await asks.send(request("/ok/30", []))
    await answer(stage, asks)
    for end in (waits, has_half, has_more):
        stage.go_on()
        await answer(stage, end)
    await stage.until(
        lambda: all(end.ended is not None for end in (idle, asks, waits, has_half, has_more))
    )


async def many_at_once(stage: Stage, rng: random.Random) -> None:
    """Clients that do not wait for each other, each with pipelined requests."""

    async def one(seed: float) -> None:
        drawn = random.Random(seed)
        end = await stage.client()
        for _ in range(4):
            kinds = [
                drawn.choice(("ok/100000", "together/9000", "bytewise/60", "kept/3", "none"))
                for _ in range(drawn.choice([1, 2, 8]))
            ]
            data = b"".join(request(f"/{kind}", []) for kind in kinds)
            await end.send(*pieces(data, drawn))
            for _ in kinds:
                await answer(stage, end)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(one, rng.random())


good: Act = partial(ask, kinds=("ok", "together"), fields=[])

# Chunked responses, each after a plain one, and damaged or incomplete ones.
IN_CHUNKS: tuple[Act, ...] = tuple(
    partial(ask, kinds=(kind,)) for kind in KEPT if kind.startswith("chunked")
)
BAD_CHUNKS: tuple[Act, ...] = tuple(
    partial(broken, kinds=(kind,))
    for kind in BROKEN
    if kind.startswith(("torn", "spoiled", "two-fr"))
)

TRIED_AGAIN: tuple[Act, ...] = tuple(
    act
    for kind in ("busy", "missing", "chunked", "reset")
    for act in (good, partial(broken if kind == "reset" else ask, kinds=(kind,)))
)

ODD: tuple[Act, ...] = (
    upload, upload, upload_in_chunks, upload_large_answer, ask_before_upload, answered_early, pipeline, pipeline, pipeline_with_upload,
    broken, broken, broken, broken, cut_within_answer, slow, slow, half_closed, leave_idle, leave_within_head, leave_within_upload,
    leave_before_answer, leave_within_answer, odd, odd, wrong, loop, sampled,
)  # fmt: skip


def drawn(seed: int, number: int) -> list[Act]:
    """A play: unusual acts, each after plain ones, so that it meets connections that are kept on
    the fast path."""
    rng = random.Random(seed)
    acts: list[Act] = [sampled, *IN_CHUNKS]
    for act in BAD_CHUNKS:
        acts += [good, act]
    for _ in range(number):
        acts += [good, good, ask] if rng.random() < 0.7 else [good] if rng.random() < 0.6 else []
        acts.append(rng.choice(ODD))
    return acts
