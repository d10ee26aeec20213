"""A server that does what a request's target says: /kind/size. Where a client sends a complete
body, it reads the body."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import trio

from tests.both_paths.stage import End, Stage
from tests.kit.http import chunked

_TARGET = re.compile(rb"[A-Z]+ (?:http://[^/]*)?/([a-z0-9-]+)(?:/(\d+))?[^ ]* HTTP/1.[01]\r\n")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)\r\n")


def _body(size: int) -> bytes:
    return bytes(48 + n % 64 for n in range(size))


def _ok(size: int, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nServer: x\r\n%bContent-Length: %d\r\n\r\n" % (more, size)


async def serve(stage: Stage, end: End) -> None:
    """One connection."""
    while True:
        await stage.until(lambda: b"\r\n\r\n" in end.new or end.ended is not None, 100)
        if b"\r\n\r\n" not in end.new:
            if end.ended is not None:
                end.close()
                return
            continue
        head = end.take(end.new.index(b"\r\n\r\n") + 4)
        target = _TARGET.match(head)
        assert target is not None, head
        kind, size = target[1].decode(), int(target[2] or 0)
        if not kind.startswith("early"):
            await _read_body(stage, end, head, continued=kind == "continue")
        if end.ended == "closed here" or await KINDS[kind](
            stage, end, size, head.startswith(b"HEAD")
        ):
            end.close()
            return


async def _read_body(stage: Stage, end: End, head: bytes, *, continued: bool) -> None:
    length = _LENGTH.search(head)
    if continued:
        await end.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    if b"transfer-encoding" in head.lower():
        await stage.until(lambda: b"0\r\n\r\n" in end.new or end.ended is not None, 100)
        end.take(len(end.new))
    elif length is not None:
        wanted = int(length[1])
        await stage.until(lambda: len(end.new) >= wanted or end.ended is not None, 100)
        end.take(wanted)


# What it does: (stage, end, size of the response, whether that has no body) -> whether its
# connection ends.
Kind = Callable[[Stage, End, int, bool], Awaitable[bool]]


def _sends(make: Callable[[int], tuple[bytes, ...]], *, ends: bool = False) -> Kind:
    async def kind(_: Stage, end: End, size: int, bare: bool) -> bool:
        pieces = make(size)
        await end.send(*(pieces[:1] if bare else pieces))
        return ends

    return kind


async def _reset(_: Stage, end: End, __: int, ___: bool) -> bool:
    end.close(reset=True)
    return True


async def _half_reset(stage: Stage, end: End, size: int, _: bool) -> bool:
    """When the client has its half: an earlier reset would destroy data in flight."""
    await end.send(_ok(size) + _body(size // 2))
    await stage.wait()
    end.close(reset=True)
    return True


async def _half_wait(stage: Stage, end: End, size: int, _: bool) -> bool:
    await end.send(_ok(size) + _body(size // 2))
    await stage.wait()
    await end.send(_body(size)[size // 2 :])
    return False


async def _wait(stage: Stage, end: End, size: int, bare: bool) -> bool:
    await stage.wait()
    await end.send(_ok(size) + (b"" if bare else _body(size)))
    return False


async def _wait_close(stage: Stage, __: End, ___: int, ____: bool) -> bool:
    await stage.wait()
    return True


async def _never(stage: Stage, end: End, _: int, __: bool) -> bool:
    await stage.until(lambda: end.ended is not None, 100)
    return True


async def _half_never(stage: Stage, end: End, size: int, bare: bool) -> bool:
    await end.send(_ok(size) + _body(size // 2))
    return await _never(stage, end, size, bare)


async def _drip(stage: Stage, end: End, size: int, bare: bool) -> bool:
    await end.send(_ok(size))
    for _ in range(size):
        if end.ended is not None:  # the proxy has ended the connection
            break
        await end.send(b"x")
        await trio.sleep(0.05)
    return True


_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _bytewise(_: Stage, end: End, size: int, bare: bool) -> bool:
    data = _ok(size) + (b"" if bare else _body(size))
    await end.send(*(data[n : n + 1] for n in range(len(data))))
    return False


async def _bytewise_chunks(_: Stage, end: End, size: int, bare: bool) -> bool:
    size = min(size, 300)
    data = _CHUNKED + (
        b"" if bare else chunked(_body(size)[:100] or b"x", b"y", trailers=b"X-T: 1\r\n")
    )
    await end.send(*(data[n : n + 1] for n in range(len(data))))
    return False


KINDS: dict[str, Kind] = {
    "ok": _sends(lambda size: (_ok(size), _body(size))),
    "together": _sends(
        lambda size: (_ok(size), _body(size)) if size > 60_000 else (_ok(size) + _body(size),)
    ),
    "bytewise": _bytewise,
    "none": _sends(lambda _: (b"HTTP/1.1 204 No Content\r\n\r\n",)),
    "same": _sends(lambda _: (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n",)),
    "kept": _sends(
        lambda size: (
            _ok(size, b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n"),
            _body(size),
        )
    ),
    "error": _sends(
        lambda size: (b"HTTP/1.1 500 Oops\r\nContent-Length: %d\r\n\r\n" % size, _body(size))
    ),
    "busy": _sends(
        lambda size: (b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n" % size, _body(size))
    ),
    "missing": _sends(
        lambda size: (b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % size, _body(size))
    ),
    "spare": _sends(lambda size: (_ok(size), _body(size) + b"spare")),
    "says-close": _sends(
        lambda size: (_ok(size, b"Connection: close\r\n"), _body(size)), ends=True
    ),
    "then-close": _sends(lambda size: (_ok(size), _body(size)), ends=True),
    "old": _sends(lambda size: (b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\n", _body(size)), ends=True),
    "chunked": _sends(lambda size: (_CHUNKED + chunked(_body(size or 1), trailers=b"X-T: 1\r\n"),)),
    "chunked-bytewise": _bytewise_chunks,
    "chunked-spare": _sends(
        lambda size: (
            _CHUNKED,
            chunked(_body(size)[: size // 2], _body(size)[size // 2 :] or b"x") + b"spare",
        )
    ),
    "drip": _drip,
    "torn": _sends(lambda size: (_CHUNKED + b"5\r\nhello\r\n5\r\nhe",), ends=True),
    "torn-late": _sends(lambda size: (_CHUNKED + b"5\r\nhello\r\n", b"5\r\nhello\r\n5"), ends=True),
    "spoiled": _sends(
        lambda size: (_CHUNKED + b"5\r\nhello\r\n", b"3\r\nabc\r\n4\r\nlonger\r\n0\r\n\r\n"),
        ends=True,
    ),
    "spoiled-size": _sends(lambda size: (_CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",), ends=True),
    "spoiled-behind": _sends(lambda size: (_CHUNKED + b"5\r\nhello\r\n3\r\nabcd\r\n",), ends=True),
    "control": _sends(lambda size: (_ok(size, b"X: a\x01b\r\n"), _body(size)), ends=True),
    "blank": _sends(
        lambda size: (
            b"HTTP/1.1 200 OK\r\nX-A : 1\r\nContent-Length\t: %d\r\n\r\n" % size,
            _body(size),
        )
    ),
    "interim-length": _sends(
        lambda size: (
            b"HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\nLink: x\r\n\r\n" + _ok(size),
            _body(size),
        )
    ),
    "two-framings": _sends(
        lambda size: (
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + _CHUNKED[17:] + chunked(b"hello"),
        ),
        ends=True,
    ),
    "interim": _sends(
        lambda size: (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + _ok(size), _body(size))
    ),
    "continue": _sends(lambda size: (_ok(size), _body(size))),
    "close": _sends(lambda _: (), ends=True),
    "reset": _reset,
    "part-head": _sends(lambda _: (b"HTTP/1.1 200 OK\r\nContent-Le",), ends=True),
    "half": _sends(lambda size: (_ok(size), _body(size // 2)), ends=True),
    "half-reset": _half_reset,
    "half-wait": _half_wait,
    "half-never": _half_never,
    "wait": _wait,
    "wait-close": _wait_close,
    "never": _never,
    "garbage": _sends(lambda _: (b"what is this?\r\n\r\n",), ends=True),
    "two-lengths": _sends(
        lambda _: (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n", b"hi"),
        ends=True,
    ),
    "early": _sends(lambda size: (_ok(size), _body(size))),
    "early-close": _sends(
        lambda size: (_ok(size, b"Connection: close\r\n"), _body(size)), ends=True
    ),
}
