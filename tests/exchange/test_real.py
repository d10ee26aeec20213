"""Programs of other projects, on either side of the proxy."""

from __future__ import annotations

import http.client
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import websockets.sync.client
import websockets.sync.server

from proxy.net.address import Address
from tests.kit.hop import Hop, hop
from tests.kit.ports import free_port

httpx = pytest.importorskip("httpx")

BODY = os.urandom(300_000)


class _Mirror(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.do_POST()

    def do_GET(self) -> None:
        self.do_POST()

    # the signature of the standard library
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def mirror() -> Iterator[Address]:
    """Python's own server, which keeps connections and echoes bodies."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Mirror) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Address.of(server.server_address[:2])  # type: ignore[arg-type]
        server.shutdown()
        thread.join()


def _http_client(address: Address) -> None:
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        for number in range(16):
            chunks = number % 2 == 1
            body = BODY[: number * 9000]
            connection.request(
                "POST",
                f"/{number}",
                iter([body[:5000], body[5000:]]) if chunks else body,
                encode_chunked=chunks,
            )
            response = connection.getresponse()
            assert response.status == 200
            assert response.read() == body
    finally:
        connection.close()


def _httpx(address: Address) -> None:
    with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=60) as client:
        for number in range(20):
            body = BODY[: number * 10_000]
            answer = client.post(
                "/", content=iter([body[:100], body[100:]]) if number % 2 else body
            )
            assert answer.status_code == 200
            assert answer.content == body


@pytest.mark.parametrize("client", [_http_client, _httpx], ids=["http.client", "httpx"])
async def test_python_clients_and_python_s_server(mirror: Address, client: object) -> None:
    assert callable(client)
    async with hop(mirror) as proxy:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(trio.to_thread.run_sync, client, proxy.address)
        await proxy.gone()
        assert proxy.errors == []
        assert {e.failure for e in proxy.ended} == {None}


async def test_a_websocket_between_a_real_client_and_a_real_server() -> None:
    def talk(connection: websockets.sync.server.ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    def converse(address: Address) -> None:
        with websockets.sync.client.connect(f"ws://{address}/chat", proxy=None) as client:
            for message in ("hello", b"\x00\xff" * 1000, "ü" * 70_000):
                client.send(message)
                assert client.recv(timeout=60) == message
            client.ping().wait(60)

    with websockets.sync.server.serve(talk, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            async with hop(Address.of(server.socket.getsockname())) as proxy:
                await trio.to_thread.run_sync(converse, proxy.address)
                await proxy.gone()
                assert [(e.status, e.failure) for e in proxy.ended] == [(101, None)]
        finally:
            server.shutdown()
            thread.join()


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


async def _curl(proxy: Hop, *arguments: str) -> bytes:
    run = partial(trio.run_process, capture_stdout=True, capture_stderr=True)
    ended = await run(
        [
            "curl",
            "-sS",
            "--noproxy",
            "*",
            "--max-time",
            "10",
            *arguments,
            f"http://{proxy.address}/",
        ]
    )
    return bytes(ended.stdout)


@pytest.mark.real
@needs_curl
async def test_curl(mirror: Address, tmp_path: Path) -> None:
    file = tmp_path / "body"
    file.write_bytes(BODY * 10)
    async with hop(mirror) as proxy:
        assert await _curl(proxy) == b""
        assert await _curl(proxy, "--http1.0") == b""
        assert await _curl(proxy, "--http2") == b""  # it offers h2c, and is understood without
        assert (
            await _curl(proxy, "--data-binary", f"@{file}") == BODY * 10
        )  # with Expect: 100-continue
        assert await _curl(proxy, "-T", str(file)) == BODY * 10
        assert (
            await _curl(proxy, "-H", "Transfer-Encoding: chunked", "--data-binary", f"@{file}")
            == BODY * 10
        )
        assert {e.failure for e in proxy.ended} == {None}


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Address]:
    address = Address("127.0.0.1", free_port())
    (tmp_path / "www").mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    (tmp_path / "www" / "index.html").write_bytes(BODY)
    (tmp_path / "nginx.conf").write_text(
        f"""daemon off; worker_processes 1; pid {tmp_path}/pid; error_log {tmp_path}/error.log; user root;
        events {{}}
        http {{ access_log off; client_body_temp_path {tmp_path}/a; proxy_temp_path {tmp_path}/b; fastcgi_temp_path {tmp_path}/c;
               uwsgi_temp_path {tmp_path}/d; scgi_temp_path {tmp_path}/e; client_max_body_size 1m; default_type text/plain;
               server {{ listen {address.host}:{address.port}; root {tmp_path}/www; keepalive_requests 3; }} }}"""
    )
    process = subprocess.Popen(
        ["nginx", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield address
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.real
@needs_nginx
@needs_curl
@pytest.mark.skipif(os.geteuid() != 0, reason="this test's nginx runs as root")
async def test_nginx(nginx: Address) -> None:
    async with hop(nginx) as proxy:
        with trio.fail_after(60):
            while True:
                try:
                    if await _curl(proxy) == BODY:
                        break
                except subprocess.CalledProcessError:
                    pass
                await trio.sleep(0.02)
        proxy.ended.clear()
        client = await proxy.connect()
        for _ in range(10):  # nginx closes its connection after each third
            assert (await client.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")).body == BODY
            head = await client.ask(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HEAD")
            assert head.get(b"content-length") == b"%d" % len(BODY)
        etag = head.get(b"etag")
        assert etag
        assert (
            await client.ask(b"GET / HTTP/1.1\r\nHost: a\r\nIf-None-Match: " + etag + b"\r\n\r\n")
        ).status == 304
        assert (await client.ask(b"GET / HTTP/1.0\r\n\r\n")).body == BODY
        too_large = await proxy.connect()
        await too_large.send(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n" + bytes(50_000)
        )
        assert (await too_large.response("POST")).status == 413
        assert {e.failure for e in proxy.ended} <= {None}
