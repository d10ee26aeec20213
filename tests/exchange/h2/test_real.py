"""HTTP/2 programs of other projects, on either side of the proxy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest
import trio

from proxy.exchange.h1.pool import PoolSettings
from proxy.exchange.h2.settings import Http2Settings
from proxy.net.address import Address
from tests.kit.http import origin, until
from tests.kit.http2_hop import Settings2, hop2
from tests.kit.http2_peers import answering2, echo2, speaking
from tests.kit.ports import free_port

httpx = pytest.importorskip("httpx")

BODY = os.urandom(300_000)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin") is None,
        reason=f"{program} is not installed",
    )


async def test_httpx() -> None:
    def run(address: Address) -> None:
        with httpx.Client(
            http1=False, http2=True, trust_env=False, base_url=f"http://{address}", timeout=60
        ) as client:
            for number in range(20):
                body = BODY[: number * 10_000]
                answer = client.post(
                    "/", content=iter([body[:100], body[100:]]) if number % 2 else body
                )
                assert (answer.http_version, answer.status_code) == ("HTTP/2", 200)
                assert answer.content == body

    async with origin(speaking(answering2(echo2))) as up, hop2(up.address) as proxy:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(trio.to_thread.run_sync, run, proxy.address)
        await proxy.idle()
        assert proxy.dialled == 1
        assert {e.failure for e in proxy.ended} == {None}


def _several(request: bytes, _: object) -> Iterator[bytes]:
    for n in range(5):
        yield request + b"%d" % n


def _abort(_: bytes, context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.NOT_FOUND, "nö")
    return b""


def _quiet(request: bytes, _: object) -> Iterator[bytes]:
    yield request
    time.sleep(1.5)
    yield request


_METHODS = {
    "unary": grpc.unary_unary_rpc_method_handler(lambda request, _: request * 2),
    "server": grpc.unary_stream_rpc_method_handler(_several),
    "client": grpc.stream_unary_rpc_method_handler(lambda requests, _: b"".join(requests)),
    "both": grpc.stream_stream_rpc_method_handler(lambda requests, _: (r + b"!" for r in requests)),
    "abort": grpc.unary_unary_rpc_method_handler(_abort),
    "quiet": grpc.unary_stream_rpc_method_handler(_quiet),
}


@pytest.fixture
def grpc_server() -> Iterator[Address]:
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", _METHODS),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Address("127.0.0.1", port)
    server.stop(0).wait()


async def test_every_kind_of_grpc_call(grpc_server: Address) -> None:
    def run(address: Address) -> None:
        with grpc.insecure_channel(str(address)) as channel:
            assert channel.unary_unary("/t.T/unary")(b"x" * 100_000, timeout=60) == b"x" * 200_000
            assert list(channel.unary_stream("/t.T/server")(b"a", timeout=60)) == [
                b"a%d" % n for n in range(5)
            ]
            assert (
                channel.stream_unary("/t.T/client")(iter([b"a", b"b", b"c"]), timeout=60) == b"abc"
            )
            assert list(channel.stream_stream("/t.T/both")(iter([b"a", b"b"]), timeout=60)) == [
                b"a!",
                b"b!",
            ]
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary("/t.T/abort")(b"", timeout=60)
            assert (error.value.code(), error.value.details()) == (grpc.StatusCode.NOT_FOUND, "nö")
            with pytest.raises(grpc.RpcError) as error:
                list(channel.unary_stream("/t.T/quiet")(b"", timeout=0.3))
            assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED

    async with hop2(grpc_server) as proxy:
        await trio.to_thread.run_sync(run, proxy.address)
        await proxy.idle()
        assert proxy.dialled == 1


async def test_a_call_that_is_quiet_for_long_survives_our_pings(grpc_server: Address) -> None:
    """gRPC servers end connections that ping them too often since their last DATA."""

    def run(address: Address) -> None:
        with grpc.insecure_channel(str(address)) as channel:
            assert list(channel.unary_stream("/t.T/quiet")(b"x", timeout=60)) == [b"x", b"x"]

    async with hop2(
        grpc_server, settings=Settings2(upstream=Http2Settings(ping_interval=0.15, ping_timeout=30))
    ) as proxy:
        await trio.to_thread.run_sync(run, proxy.address)


async def _run(*command: str) -> bytes:
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"}
    return bytes(
        (
            await trio.run_process(
                list(command), capture_stdout=True, capture_stderr=True, env=environment
            )
        ).stdout
    )


@pytest.fixture
def nghttpd(tmp_path: Path) -> Iterator[Address]:
    address = Address("127.0.0.1", free_port())
    (tmp_path / "index.html").write_bytes(BODY)
    program = shutil.which("nghttpd", path=os.environ["PATH"] + ":/usr/sbin") or "nghttpd"
    process = subprocess.Popen(
        [program, "--no-tls", "-a", address.host, "-d", str(tmp_path), str(address.port)]
    )
    yield address
    process.terminate()
    process.wait(60)


@pytest.mark.real
@needs("nghttpd")
@needs("curl")
@needs("h2load")
@needs("nghttp")
async def test_nghttp2_s_programs_and_curl(nghttpd: Address) -> None:
    curl = partial(
        _run,
        "curl",
        "-sS",
        "--noproxy",
        "*",
        "--max-time",
        "60",
        "--retry-connrefused",
        "--retry",
        "10",
    )
    async with hop2(nghttpd) as proxy:
        url = f"http://{proxy.address}/"
        with trio.fail_after(120):
            # the server is another process: there is no event to wait for
            while await curl("--http2-prior-knowledge", url) != BODY:  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert await curl("--http1.1", url) == BODY
        proxy.ended.clear()
        assert b"200" in await _run("nghttp", "-nv", url)
        out = await _run("h2load", "-n", "300", "-c", "4", "-m", "8", url)
        assert b"300 succeeded, 0 failed" in out, out
        assert {e.failure for e in proxy.ended} == {None}


@pytest.mark.real
@needs("nghttpd")
@needs("h2load")
async def test_thousands_of_concurrent_requests_to_a_cold_pool_are_all_answered(
    nghttpd: Address,
) -> None:
    """More than the 16 connections to the server have streams for, which is 100 each. The others
    wait. The limit of their wait is longer than the test, so that a busy machine does not fail
    it."""
    settings = Settings2(pool=PoolSettings(wait_timeout=200))
    async with hop2(nghttpd, settings=settings) as proxy:
        await until(lambda: listens(nghttpd))
        with trio.fail_after(120):
            out = await _run(
                "h2load", "-n", "2048", "-c", "32", "-m", "64", f"http://{proxy.address}/"
            )
        assert {e.failure for e in proxy.ended} == {None}
        assert b"2048 succeeded, 0 failed, 0 errored" in out, out.decode()
        assert b"status codes: 2048 2xx" in out, out
        assert proxy.dialled <= 16


def listens(address: Address) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address.host, address.port)) == 0
