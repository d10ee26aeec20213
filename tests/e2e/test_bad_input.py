"""Malformed, oversized and slow input through two sidecars: each gets a clear error response, the
application gets none of it, and all other connections continue.

Rules: bytes are sent exactly as written here; the first proxy responds (Proxy-Status names it); a
good request follows each attack."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator

import pytest
import trio

from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    LAST_GET,
    WEB,
    Pair,
    counted,
    echo_server,
    eventually,
    exchange_raw,
    logged,
    prepare,
    web_server,
)

pytestmark = pytest.mark.lab

QUICK = {"head_timeout": "600ms", "body_timeout": "600ms", "linger_timeout": "1s"}
# Bytes that a client can send after a refusal: linger's first MiB, a second of its 4 MiB/s, and the
# kernel's buffers on both sides.
LINGERING = 5 * 2**20 + 12 * 2**20
HEAD = b"POST /sink HTTP/1.1\r\nHost: shop\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: shop\r\n\r\n"


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        # Only the first proxy has short timeouts: with two it would not be certain which of them
        # ends the request. They are short only in these tests.
        pair = prepare(laboratory.lab, {WEB: "detect", ECHO: "opaque"})
        pair.cluster.pod("stranger")
        pair.mesh.join(pair.cluster.pod("hasty"), http=QUICK)
        await web_server(pair.shop)
        await echo_server(pair.shop)
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


@pytest.fixture(autouse=True)
def no_internal_error(laboratory: Laboratory, pair: Pair) -> Iterator[None]:
    """After each test: no attack has ended a proxy or caused an internal error."""
    yield
    for sidecar in pair.mesh.sidecars.values():
        assert sidecar.running().alive
        assert [
            line for line in sidecar.logged() if line.get("level") == "error" or "exception" in line
        ] == []
        internal = laboratory.run(counted, sidecar, "isthmus_errors_total", reason="internal")
        assert internal == 0


async def attack(pair: Pair, data: bytes, pod: str = "web") -> bytes:
    """The response to these bytes from the shop's service, until it ends the connection."""
    return await exchange_raw(pair.cluster.pods[pod], pair.service.ipv4, WEB, data)


async def requests(sidecar: Sidecar, direction: str) -> float:
    return await counted(sidecar, "isthmus_requests_total", direction=direction)


async def bad_requests(pair: Pair) -> float:
    return await counted(
        pair.near, "isthmus_errors_total", direction="outbound", reason="bad_request"
    )


async def goes_on(pair: Pair, pod: str = "web") -> None:
    answer = await attack(pair, LAST_GET, pod)
    assert answer.startswith(b"HTTP/1.1 200")


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


VECTORS = {
    "content-length-twice": HEAD
    + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"
    + SMUGGLED,
    "content-length-repeated": HEAD
    + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"
    + SMUGGLED,
    "content-length-list": HEAD + b"Content-Length: 5, 6\r\n\r\nhello" + SMUGGLED,
    "content-length-signed": HEAD + b"Content-Length: +5\r\n\r\nhello" + SMUGGLED,
    "content-length-negative": HEAD + b"Content-Length: -1\r\n\r\nhello" + SMUGGLED,
    "content-length-hexadecimal": HEAD + b"Content-Length: 0x5\r\n\r\nhello" + SMUGGLED,
    "content-length-and-chunked": HEAD
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunked-and-content-length": HEAD
    + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunked-twice": HEAD
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunked-not-last": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "nul-in-the-target": b"GET /\x00 HTTP/1.1\r\nHost: shop\r\n\r\n" + SMUGGLED,
    "two-blanks": b"GET  / HTTP/1.1\r\nHost: shop\r\n\r\n" + SMUGGLED,
    "chunked-misspelt": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked-with-a-vertical-tab": HEAD
    + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "blank-before-colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "folded-line": HEAD + b"X: a\r\n Transfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
    "folded-first-line": b"GET / HTTP/1.1\r\n Host: shop\r\n\r\n" + SMUGGLED,
    "bare-line-feed": b"GET / HTTP/1.1\nHost: shop\n\n" + SMUGGLED,
    "bare-line-feed-within": HEAD + b"X: a\nContent-Length: 5\r\n\r\nhello" + SMUGGLED,
    "bare-carriage-return": HEAD + b"X: a\rContent-Length: 5\r\n\r\nhello" + SMUGGLED,
    "nul-in-a-value": HEAD + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "nul-in-a-name": HEAD + b"Content\x00-Length: 5\r\n\r\nhello" + SMUGGLED,
    "a-control-character-in-a-value": HEAD + b"X: a\x01b\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "del-in-a-value": HEAD + b"X: a\x7fb\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "a-fragment": b"GET /#x HTTP/1.1\r\nHost: shop\r\n\r\n" + SMUGGLED,
    "no-colon": HEAD + b"Nonsense\r\n\r\n" + SMUGGLED,
    "empty-name": HEAD + b": nothing\r\n\r\n" + SMUGGLED,
    "two-hosts": b"GET / HTTP/1.1\r\nHost: shop\r\nHost: bank\r\n\r\n" + SMUGGLED,
    "no-host": b"GET / HTTP/1.1\r\nX: a\r\n\r\n" + SMUGGLED,
    "chunk-size-misspelt": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunk-size-signed": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunk-size-hexadecimal": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunk-size-huge": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunk-longer-than-said": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n"
    + SMUGGLED,
    "chunk-line-bare-line-feed": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n"
    + SMUGGLED,
}


@pytest.mark.parametrize("name", VECTORS)
async def test_ambiguous_requests_are_refused_by_the_first_proxy(pair: Pair, name: str) -> None:
    before = await counted(pair.far, "isthmus_responses_total", status_class="2xx")
    bad = await bad_requests(pair)
    answer = await attack(pair, VECTORS[name])
    assert status(answer) == 400, answer[:300]
    assert b"web.default.outbound;error=http_request_error" in answer
    assert (
        len(re.findall(rb"HTTP/1\.1 \d{3} ", answer)) == 1
    )  # and no bytes after it were taken for a request
    assert await counted(pair.far, "isthmus_responses_total", status_class="2xx") == before
    assert await bad_requests(pair) == bad + 1
    assert not any(
        line.get("target") == "/smuggled" for line in pair.near.logged() + pair.far.logged()
    )
    await goes_on(pair)


async def test_the_log_has_the_reason(pair: Pair) -> None:
    assert status(await attack(pair, VECTORS["bare-line-feed"])) == 400
    assert (await logged(pair.near, "bare LF", status=400))["reason"] == "bad_request"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: shop\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (
            b"GET / HTTP/1.1\r\nHost: shop\r\n"
            + b"".join(b"X-%d: a\r\n" % number for number in range(300))
            + b"\r\n",
            431,
        ),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: shop\r\n\r\n", 414),
        (b"GET / HTTP/3.7\r\nHost: shop\r\n\r\n", 505),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    ],
    ids=[
        "a field of 70 kB",
        "300 fields",
        "a target of 20 kB",
        "a version that is not there",
        "a coding below chunked",
    ],
)
async def test_too_large_and_too_new_requests_are_answered_as_such(
    pair: Pair, data: bytes, expected: int
) -> None:
    before = await requests(pair.far, "inbound")
    answer = await attack(pair, data)
    assert status(answer) == expected, answer[:300]
    assert b"Proxy-Status: web.default.outbound" in answer
    assert await requests(pair.far, "inbound") == before
    await goes_on(pair)


async def test_a_head_without_end_is_cut_off_at_the_limit_not_collected(pair: Pair) -> None:
    hasty = pair.mesh.sidecars["hasty"]
    before = hasty.running().rss()
    stream = await pair.cluster.pods["hasty"].connect(pair.service.ipv4, WEB)
    sent = 0
    async with stream:
        with trio.fail_after(40):
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: shop\r\n")
            try:
                while sent < LINGERING:
                    await stream.send_all(b"X: " + b"a" * 60_000 + b"\r\n")
                    sent += 60_005
            except trio.BrokenResourceError:
                pass
    assert sent < LINGERING
    assert hasty.running().rss() - before < 8 * 2**20
    assert (await logged(hasty, "head", status=431))["reason"] == "bad_request"
    await goes_on(pair, "hasty")


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: shop\r\nX-Slow: "],
    ids=["a line", "half a field"],
)
async def test_a_head_that_never_ends_is_answered_408(pair: Pair, sent: bytes) -> None:
    answer = await attack(pair, sent, "hasty")
    assert status(answer) == 408
    assert b"hasty.default.outbound;error=http_request_error" in answer
    assert b"not complete in time" in answer
    await goes_on(pair, "hasty")


async def test_bytes_that_do_not_start_like_http_are_forwarded_to_the_server(pair: Pair) -> None:
    """Bytes pass unchanged, so no proxy parses them."""
    answer = await attack(pair, b"hello\r\n")
    assert b"Bad request syntax" in answer
    assert b"Proxy-Status" not in answer


async def test_bytes_that_some_servers_take_for_http_are_refused_before_the_server(
    pair: Pair,
) -> None:
    answer = await attack(pair, b"get /a b HTTP/1.1\r\nHost: shop\r\n\r\n")
    assert status(answer) == 400
    assert b"Proxy-Status: web.default.outbound" in answer


async def test_a_head_that_comes_byte_by_byte_is_cut_at_the_same_deadline(pair: Pair) -> None:
    stream = await pair.cluster.pods["hasty"].connect(pair.service.ipv4, WEB)
    answer = b""
    async with stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: shop\r\nX-Slow: ")
        with trio.fail_after(40):
            while not answer:
                await stream.send_all(b"a")
                with trio.move_on_after(0.1):
                    answer = await stream.receive_some()
    assert status(answer) == 408
    assert b"not complete in time" in answer


async def test_a_body_that_stops_is_answered_408(pair: Pair) -> None:
    for framing in (
        b"Content-Length: 100\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ):
        answer = await attack(pair, HEAD + framing, "hasty")
        assert status(answer) == 408, answer[:300]
    await logged(pair.mesh.sidecars["hasty"], "body stopped after 5 bytes", status=408)
    await goes_on(pair, "hasty")


async def test_a_crowd_of_slow_clients_leaves_room_for_the_others(pair: Pair) -> None:
    slow = [await pair.cluster.pods["hasty"].connect(pair.service.ipv4, WEB) for _ in range(100)]
    for stream in slow:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: ")
    await goes_on(pair, "hasty")
    answers = []
    with trio.fail_after(40):
        for stream in slow:
            async with stream:
                answers.append(status(await stream.receive_some()))
    assert answers == [408] * 100


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\xff\xff" + b"\x00" * 100,
        b"\x16\x03\x01\x00\x05hello",
        b"\x16\x03\x03\x00\x10\x01\x00\x00\x0c" + b"\xff" * 12,
        b"\x80\x2e\x01\x03\x01" + b"\x00" * 41,
        bytes(range(256)) * 300,
        b"PRI * HTTP/2.0\r\n\r\nnonsense\r\n\r\n" + b"\xff" * 100,
    ],
    ids=[
        "record too long",
        "no hello",
        "hello of nonsense",
        "SSL 2",
        "all bytes",
        "half a preface",
    ],
)
async def test_bytes_that_are_not_tls_do_no_harm(pair: Pair, data: bytes) -> None:
    """From outside the mesh, to the inbound listener. They are not TLS for this workload, so they
    go to the application."""
    stranger = pair.cluster.pods["stranger"]
    await exchange_raw(stranger, pair.shop.ipv4, WEB, data, end=True)
    await exchange_raw(stranger, pair.shop.ipv4, ECHO, data, end=True)
    await goes_on(pair)
    assert pair.far.running().alive


async def test_a_mesh_handshake_that_fails_after_its_hello_is_logged(pair: Pair) -> None:
    assert pair.far.identity is not None
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    half = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=pair.far.identity.sni)
    with pytest.raises(ssl.SSLWantReadError):
        half.do_handshake()
    hello = outgoing.read()
    stranger = pair.cluster.pods["stranger"]
    before = await counted(pair.far, "isthmus_tls_failures_total", direction="inbound")
    await exchange_raw(
        stranger, pair.shop.ipv4, WEB, hello + b"\x17\x03\x03\x00\x20" + b"\xaa" * 32
    )
    await exchange_raw(stranger, pair.shop.ipv4, WEB, hello + b"GET / HTTP/1.1\r\n\r\n")
    await exchange_raw(stranger, pair.shop.ipv4, WEB, hello, end=True)
    await eventually(lambda: _failures(pair, before + 3), "three failed handshakes counted")
    await goes_on(pair)


async def _failures(pair: Pair, number: float) -> bool:
    return await counted(pair.far, "isthmus_tls_failures_total", direction="inbound") >= number
