"""An HTTP/2 server that does what a request's path says: /kind/size. It waits for the complete
request, unless the kind is EARLY."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from tests.both_paths.h2_ends import End2, Message, Pair, fuzzed
from tests.both_paths.stage import End, Stage

OK: list[Pair] = [(b":status", b"200"), (b"server", b"x")]
GRPC: list[Pair] = [(b":status", b"200"), (b"content-type", b"application/grpc")]
REFUSED, CANCEL = 7, 8


def body(size: int) -> bytes:
    return bytes(48 + n % 64 for n in range(64)) * (size // 64) + bytes(
        48 + n for n in range(size % 64)
    )


async def serve(stage: Stage, end: End) -> None:
    """One connection."""
    assert isinstance(end, End2)
    done = 0
    async with trio.open_nursery() as nursery:
        while end.ended is None and not end.closed:
            await stage.until(
                lambda: len(end.opened_by_peer) > done or end.ended is not None or end.closed,  # noqa: B023  # called before the loop continues
                100,
            )
            for number in end.opened_by_peer[done:]:
                nursery.start_soon(_respond, stage, end, number)
            done = len(end.opened_by_peer)
        end.close()
        nursery.cancel_scope.cancel()


async def _respond(stage: Stage, end: End2, number: int) -> None:
    message = end.messages[number]
    kind, size = "tunnel", 0
    if message.get(b":method") != b"CONNECT":
        _, kind, rest, *_ = message.get(b":path").decode().split("/")
        size = int(rest)
    if kind not in EARLY:
        await stage.until(lambda: message.over or end.ended is not None, 100)
    if message.reset is None and end.ended is None:
        bare = message.get(b":method") == b"HEAD"
        await KINDS[kind](Request(stage, end, number, message, 0 if bare else size))
    await end.flush()
    end.messages[number].finished = True


class Request:
    """A request, and where its response goes."""

    def __init__(self, stage: Stage, end: End2, number: int, message: Message, size: int) -> None:
        self.stage, self.end, self.number, self.message, self.size = (
            stage,
            end,
            number,
            message,
            size,
        )

    async def answer(self, data: bytes, head: list[Pair] = OK) -> None:
        self.end.head(self.number, head, end=not data)
        if data:
            await self.end.put(self.number, data, end=True)

    async def begin(self, head: list[Pair] = OK) -> None:
        """Sends the head and half of the body. All of that has arrived at the client when `wait`
        returns."""
        self.end.head(self.number, head)
        await self.end.put(self.number, body(self.size)[: self.size // 2])

    async def rest(self) -> None:
        await self.end.put(self.number, body(self.size)[self.size // 2 :], end=True)

    def trailers(self, *pairs: Pair) -> None:
        self.end.head(self.number, list(pairs), end=True)

    def first(self) -> bool:
        """Whether this request is here for the first time."""
        path = self.message.get(b":path").decode()
        self.stage.notes.append(path)
        self.stage.tell()
        return self.stage.notes.count(path) == 1

    async def some(self) -> None:
        """Waits until a part of the body has arrived."""
        await self.stage.until(
            lambda: bool(self.message.body) or self.message.over or self.end.ended is not None
        )

    async def whole(self) -> None:
        await self.stage.until(lambda: self.message.over or self.end.ended is not None, 100)


Kind = Callable[[Request], Awaitable[None]]
KINDS: dict[str, Kind] = {}
# These do not wait for the end of the request.
EARLY = {
    "tunnel",
    "slow-take",
    "continue",
    "early",
    "early-reset",
    "early-head",
    "echo",
    "refused-upload",
    "reset-upload",
}


def kind(*names: str) -> Callable[[Kind], Kind]:
    def relay_recorded(function: Kind) -> Kind:
        KINDS.update(dict.fromkeys(names, function))
        return function

    return relay_recorded


def _says(head: list[Pair], *, empty: bool = False) -> Kind:
    async def answer(asked: Request) -> None:
        await asked.answer(b"" if empty else body(asked.size), head)

    return answer


KINDS["ok"] = _says(OK)
KINDS["empty"] = _says(OK, empty=True)
KINDS["none"] = _says([(b":status", b"204")], empty=True)
KINDS["same"] = _says(
    [(b":status", b"304"), (b"content-length", b"77"), (b"etag", b"x")], empty=True
)
KINDS["error"] = _says([(b":status", b"500")])
KINDS["busy"] = _says([(b":status", b"503")])
KINDS["missing"] = _says([(b":status", b"404"), (b"set-cookie", b"a=b"), (b"set-cookie", b"c=d")])
KINDS["grpc-only"] = _says([*GRPC, (b"grpc-status", b"5"), (b"grpc-message", b"none")], empty=True)
KINDS["grpc-away"] = _says([*GRPC, (b"grpc-status", b"14")], empty=True)
KINDS["bad-status"] = _says([(b":status", b"20")])
KINDS["bad-name"] = _says([*OK, (b"X-Upper", b"1")])
KINDS["bad-field"] = _says([*OK, (b"connection", b"close")])
KINDS["bad-length"] = _says([*OK, (b"content-length", b"3")])


@kind("length")
async def _length(asked: Request) -> None:
    await asked.answer(body(asked.size), [*OK, (b"content-length", b"%d" % asked.size)])


@kind("hollow")
async def _hollow(asked: Request) -> None:
    asked.end.head(asked.number, OK)
    asked.end.piece(asked.number, b"", end=True)


@kind("pieces", "padded")
async def _pieces(asked: Request) -> None:
    """DATA of random sizes, some of it empty, the last one too. Each in its own write, or a few
    together."""
    end, number, data = asked.end, asked.number, body(asked.size % 1000)
    padded = asked.message.get(b":path").startswith(b"/padded")
    end.head(number, OK)
    for at in range(0, len(data), 37):
        end.piece(number, data[at : at + 37], pad=at % 200 if padded else None)
        if at % 3 == 0:
            end.piece(number, b"", pad=7 if padded else None)
        if at % 5 == 0:
            await end.flush()
    end.piece(number, b"", end=True, pad=3 if padded else None)


@kind("trailers", "bare-trailers")
async def _trailers(asked: Request) -> None:
    asked.end.head(asked.number, OK)
    if asked.message.get(b":path").startswith(b"/trailers"):
        await asked.end.put(asked.number, body(asked.size))
    asked.trailers((b"x-sum", b"1"), (b"isthmus-client-id", b"forged"))


@kind("grpc", "grpc-late-away")
async def _grpc(asked: Request) -> None:
    asked.end.head(asked.number, GRPC)
    await asked.end.put(asked.number, body(asked.size))
    asked.trailers(
        (b"grpc-status", b"0" if asked.message.get(b":path").startswith(b"/grpc/") else b"14"),
        (b"x-more", b"1"),
    )


@kind("interim")
async def _interim(asked: Request) -> None:
    asked.end.head(asked.number, [(b":status", b"103"), (b"link", b"</a>")])
    asked.end.head(asked.number, [(b":status", b"103"), (b"link", b"</b>")])
    await asked.answer(body(asked.size))


@kind("slow-take")
async def _slow_take(asked: Request) -> None:
    """The server enlarges the window at its own pace."""
    end, message, window = asked.end, asked.message, 65535
    # The connection's window: only the stream's window is small.
    end.h2.increment_flow_control_window(10**6)
    for more in (100, 3000, 40_000, 10**6):
        await end.flush()
        await asked.stage.until(lambda: len(message.body) == window or message.over)  # noqa: B023  # used in this turn
        if not message.over:
            end.h2.increment_flow_control_window(more, asked.number)
        window += more
    await end.flush()
    await asked.whole()
    await asked.answer(bytes(message.body[-9:]))


@kind("continue")
async def _continue(asked: Request) -> None:
    asked.end.head(asked.number, [(b":status", b"100")])
    await asked.end.flush()
    await asked.whole()
    await asked.answer(body(asked.size))


@kind("fuzzed", "cut")
async def _fuzzed(asked: Request) -> None:
    """A head with random fields, or a response in random pieces."""
    rng = random.Random(asked.size)
    name = asked.message.get(b":path").split(b"/")[1]
    asked.end.cut = rng if name == b"cut" else None
    await asked.answer(b"x" * (1 + asked.size), [*OK, *fuzzed(rng)])
    asked.end.cut = None


@kind("early", "early-reset")
async def _early(asked: Request) -> None:
    """Responds within the request. Its rest is not wanted: the proxies find that out by themselves,
    or get a reset."""
    await asked.some()
    await asked.answer(body(asked.size))
    if asked.message.get(b":path").startswith(b"/early-reset"):
        asked.end.reset(asked.number, 0)


@kind("early-head")
async def _early_head(asked: Request) -> None:
    asked.end.head(asked.number, OK)
    await asked.end.flush()
    await asked.whole()
    await asked.end.put(asked.number, body(asked.size), end=True)


@kind("echo", "tunnel")
async def _echo(asked: Request) -> None:
    """Sends everything back as it arrives, trailers too."""
    end, number, message = asked.end, asked.number, asked.message
    end.head(number, GRPC if message.get(b"content-type") else OK)
    await end.flush()
    over, sent = False, 0
    while not over:
        await asked.stage.until(
            # B023: called before the loop continues
            lambda: len(message.body) > sent or message.over or end.ended is not None,  # noqa: B023
            100,
        )
        over, new = message.over or end.ended is not None, bytes(message.body[sent:])
        sent += len(new)
        if new or (over and not message.trailers):
            await end.put(number, new, end=over and not message.trailers)
    if message.trailers:
        asked.trailers(*message.trailers)


@kind("reset", "cancelled", "calm", "refused", "refused-once")
async def _reset(asked: Request) -> None:
    name = asked.message.get(b":path").split(b"/")[1]
    if name == b"refused-once" and not asked.first():
        await asked.answer(bytes(asked.message.body) or b"again")
    else:
        asked.end.reset(
            asked.number, {b"reset": 2, b"cancelled": CANCEL, b"calm": 11}.get(name, REFUSED)
        )


@kind("refused-upload", "reset-upload")
async def _within_upload(asked: Request) -> None:
    """The first time, when a part of the body has arrived."""
    await asked.some()
    if asked.first():
        asked.end.reset(
            asked.number, REFUSED if asked.message.get(b":path").startswith(b"/refused") else 2
        )
        return
    await asked.whole()
    await asked.answer(bytes(asked.message.body))


@kind("goaway")
async def _goaway(asked: Request) -> None:
    """The first time, the request is not processed."""
    if asked.first():
        await asked.end.goaway(asked.number - 2)
        asked.message.left = True
    else:
        await asked.answer(body(asked.size))


@kind("close", "abort")
async def _close(asked: Request) -> None:
    asked.end.close(reset=asked.message.get(b":path").startswith(b"/abort"))


@kind(
    "half-close", "half-abort", "half-reset", "half-calm", "half-refused", "half-wait", "half-grpc"
)
async def _half(asked: Request) -> None:
    name = asked.message.get(b":path").split(b"/")[1]
    await asked.begin(GRPC if name == b"half-grpc" else OK)
    await asked.stage.wait()
    if name == b"half-wait":
        await asked.rest()
    elif name not in (b"half-close", b"half-abort"):
        asked.end.reset(asked.number, {b"half-calm": 11, b"half-refused": REFUSED}.get(name, 2))
    else:
        asked.end.close(reset=name == b"half-abort")


@kind("wait", "wait-reset")
async def _wait(asked: Request) -> None:
    await asked.stage.wait()
    if asked.message.get(b":path").startswith(b"/wait/"):
        await asked.answer(body(asked.size))
    else:
        asked.end.reset(asked.number, 2)


@kind("never", "half-never")
async def _never(asked: Request) -> None:
    if asked.message.get(b":path").startswith(b"/half"):
        await asked.begin()
    await asked.stage.until(
        lambda: asked.message.reset is not None or asked.end.ended is not None, 100
    )
