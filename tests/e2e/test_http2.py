"""Unmodified HTTP/2 clients and servers through two sidecars: h2load, curl, nghttpd, hypercorn,
httpx, nginx; and translation where the two ends do not use the same version.

Rules: the client runs in one pod, the server in another. The server reports the version of its
requests (hypercorn's application returns what it sees). An HTTP/1 server cannot be reached with
HTTP/2."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lab.pod import User
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    PROGRAMS,
    WEB,
    Health,
    Pair,
    counted,
    curl,
    prepare,
    python,
    web_server,
)

pytestmark = [pytest.mark.lab, pytest.mark.real]

NGHTTPD, ECHO, ASGI = 8443, 8444, 8500
NGINX, NGINX_DECLARED, ASGI_DECLARED, WEB_DECLARED = 80, 81, 8501, 8081
MIB = 2**20
LARGE = 64 * MIB
PRIOR = "--http2-prior-knowledge"

# The properties of a request, and bodies in both directions. hypercorn accepts HTTP/1.1, h2c, and
# an offer to upgrade, on one port.
APPLICATION = """
import hashlib, json
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    digest, size, more = hashlib.sha256(), 0, True
    while more:
        message = await receive()
        digest.update(message.get("body", b""))
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    path, headers = scope["path"], [[name.decode(), value.decode()] for name, value in scope["headers"]]
    seen = {"version": scope["http_version"], "method": scope["method"], "path": path, "query": scope["query_string"].decode(),
            "headers": headers, "bytes": size, "sha256": digest.hexdigest()}
    body = json.dumps(seen).encode()
    status, extra = int(dict(headers).get("x-status", "200")), []
    if path.startswith("/stream/"):
        total, block = int(path[8:]), bytes(range(256)) * 256
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/octet-stream")]})
        while total:
            piece = block[:total]
            total -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": bool(total)})
        return
    if status in (204, 304):
        body = b""
    else:
        extra = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*extra, (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
"""

HYPERCORN = """
import asyncio, sys
from hypercorn.asyncio import serve
from hypercorn.config import Config
sys.path.insert(0, ".")
from application import app
config = Config()
config.bind, config.loglevel, config.keep_alive_timeout = [f"[::]:{port}" for port in sys.argv[1:]], "warning", 60
# With the 1001st request of a connection it would say GOAWAY, and never answer that request.
config.keep_alive_max_requests = 10**9
asyncio.run(serve(app, config))
"""

NGINX_CONFIG = """
daemon off; pid nginx.pid; error_log stderr warn; worker_processes 1;
events { worker_connections 1024; }
http {
  access_log off; default_type text/plain; keepalive_requests 1000000; client_max_body_size 0;
  client_body_temp_path .; proxy_temp_path .; fastcgi_temp_path .; uwsgi_temp_path .; scgi_temp_path .;
  server {
    listen 80 backlog=1024; listen [::]:80 backlog=1024; listen 81 backlog=1024; listen [::]:81 backlog=1024; root files;
    location /version { return 200 "$server_protocol $http_host\\n"; }
    location /nothing { return 204; }
  }
}
"""


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        ports = dict.fromkeys((NGHTTPD, ECHO, ASGI, NGINX, WEB), "detect")
        ports |= {NGINX_DECLARED: "http1", WEB_DECLARED: "http1", ASGI_DECLARED: "http2"}
        pair = prepare(
            laboratory.lab, ports, web={"log": {"access": False}}, shop={"log": {"access": False}}
        )
        await servers(pair)
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


@pytest.fixture(autouse=True)
def healthy(laboratory: Laboratory, pair: Pair) -> Iterator[None]:
    """After each test: all of it went by mutual TLS, and the proxies are well."""
    health = laboratory.run(Health.of, pair)
    yield
    laboratory.run(health.only_mutual_tls)
    laboratory.run(health.nothing_wrong, "error")


async def servers(pair: Pair) -> None:
    shop = pair.shop
    files = shop.directory / "files"
    files.mkdir()
    (files / "digits").write_text("0123456789")
    (files / "index.html").write_text("hello from the shop\n")
    with (files / "large").open("wb") as file:
        for _ in range(LARGE // MIB):
            file.write(os.urandom(MIB))
    for port, name in ((NGHTTPD, "nghttpd"), (ECHO, "nghttpd-echo")):
        echo = ["--echo-upload"] if port == ECHO else []
        await shop.start(
            name, ["nghttpd", "--no-tls", "-d", str(files), *echo, str(port)], port=port
        )
    (shop.directory / "application.py").write_text(APPLICATION)
    ports = [str(ASGI), str(ASGI_DECLARED)]
    await shop.start(
        "hypercorn", [sys.executable, "-c", HYPERCORN, *ports], port=ASGI_DECLARED, env=PROGRAMS
    )
    config = shop.directory / "nginx.conf"
    config.write_text(NGINX_CONFIG)
    await shop.start(
        "nginx", ["nginx", "-p", ".", "-c", str(config)], user=User(never_root=True), port=NGINX
    )
    await web_server(shop)
    await web_server(shop, WEB_DECLARED)


def url(path: str, port: int) -> str:
    return f"http://shop:{port}{path}"


async def seen(
    pair: Pair, *arguments: str, path: str = "/", port: int = ASGI, stdin: bytes = b""
) -> dict[str, Any]:
    """What hypercorn's application saw of a request of curl's."""
    answer = await curl(pair.web, *arguments, url(path, port), stdin=stdin)
    assert answer.status == 200, (answer.errors, answer.headers, answer.body[:200])
    found: dict[str, Any] = json.loads(answer.body)
    return found


# HTTP/2 at both ends...


async def test_ten_thousand_requests_of_h2load_without_one_error(pair: Pair) -> None:
    before = await counted(
        pair.far, "isthmus_responses_total", direction="inbound", status_class="2xx"
    )
    done = await pair.web.run(
        ["h2load", "-n", "10000", "-c", "16", "-m", "8", "-t", "1", url("/digits", NGHTTPD)],
        timeout=200,
    )
    print(done.text)
    assert (
        "requests: 10000 total, 10000 started, 10000 done, 10000 succeeded, 0 failed, 0 errored, 0"
        " timeout" in done.text
    )
    assert "10000 2xx" in done.text
    assert (
        await counted(pair.far, "isthmus_responses_total", direction="inbound", status_class="2xx")
        - before
        == 10000
    )


@pytest.mark.parametrize("version", ["-4", "-6"])
async def test_curl_with_prior_knowledge_gets_a_file_from_nghttpd(pair: Pair, version: str) -> None:
    answer = await curl(pair.web, PRIOR, version, url("/digits", NGHTTPD))
    assert (answer.status, answer.body, answer.info["http_version"]) == (200, b"0123456789", "2")
    assert answer.headers["server"][0].startswith("nghttpd")
    assert "proxy-status" not in answer.headers
    assert (await curl(pair.web, PRIOR, url("/missing", NGHTTPD))).status == 404


async def test_curl_downloads_64_mib_unchanged(pair: Pair) -> None:
    peak = [sidecar.running().rss() for sidecar in pair.both]
    done = await pair.web.run(
        ["curl", "-sS", PRIOR, "-o", "got", url("/large", NGHTTPD)], timeout=200
    )
    assert done.ok, done.stderr
    assert (pair.web.directory / "got").read_bytes() == (
        pair.shop.directory / "files/large"
    ).read_bytes()
    for sidecar, before in zip(pair.both, peak, strict=True):
        assert sidecar.running().peak_rss() - before < 16 * MIB


async def test_curl_uploads_64_mib_and_gets_them_back_at_the_same_time(pair: Pair) -> None:
    large = pair.shop.directory / "files/large"
    command = [
        "curl",
        "-sS",
        PRIOR,
        "-X",
        "POST",
        "--data-binary",
        f"@{large}",
        "-H",
        "Expect:",
        "-o",
        "back",
        url("/", ECHO),
    ]
    done = await pair.web.run(command, timeout=200)
    assert done.ok, done.stderr
    assert (pair.web.directory / "back").read_bytes() == large.read_bytes()


async def test_nghttp_sees_the_server_and_no_error(pair: Pair) -> None:
    done = await pair.web.run(["nghttp", "-ns", "-m", "50", url("/digits", NGHTTPD)], timeout=30)
    assert done.ok, done.stderr
    assert done.text.count(" 200 ") == 50
    assert "ERROR" not in done.text + done.stderr.decode()


HTTPX = """
import asyncio, hashlib, json, sys
import httpx
base = sys.argv[1]
async def main():
    async with httpx.AsyncClient(base_url=base, http1=False, http2=True, timeout=20) as client:
        first = await client.get("/one?two=3", headers={"x-many": "a"})
        many = await asyncio.gather(*(client.get(f"/{number}") for number in range(100)))
        body = b"tangerine" * 200_000
        posted = (await client.post("/sink", content=body)).json()
        async with client.stream("GET", "/stream/3000000") as answer:
            size = 0
            async for piece in answer.aiter_bytes():
                size += len(piece)
        head = await client.head("/")
        empty = await client.get("/", headers={"x-status": "204"})
        print(json.dumps([first.http_version, first.json(), [answer.json()["path"] for answer in many],
            posted["sha256"] == hashlib.sha256(body).hexdigest(), size, head.status_code, len(head.content), empty.status_code]))
asyncio.run(main())
"""


async def test_httpx_speaks_http_2_with_hypercorn_a_hundred_requests_at_once_on_one_connection(
    pair: Pair,
) -> None:
    async def opened() -> float:
        return await counted(
            pair.near, "isthmus_connections_opened_total", direction="outbound", peer="src"
        )

    before = await opened()
    version, first, paths, same, size, head, length, empty = json.loads(
        await python(pair.web, HTTPX, url("", ASGI))
    )
    assert version == "HTTP/2"
    assert (first["version"], first["path"], first["query"]) == ("2", "/one", "two=3")
    assert paths == [f"/{number}" for number in range(100)]
    assert (same, size, head, length, empty) == (True, 3_000_000, 200, 0, 204)
    assert await opened() - before == 1


# What is not forwarded...


async def test_an_offer_of_h2c_is_not_forwarded_and_http_1_continues(pair: Pair) -> None:
    """hypercorn would accept it, and use HTTP/2 where the proxies expect HTTP/1."""
    answer = await curl(pair.web, "--http2", "-v", url("/", ASGI), url("/again", ASGI))
    assert "Upgrade: h2c" in answer.errors
    assert (answer.status, answer.info["http_version"]) == (200, "1.1")
    first, second = answer.body.decode().split("}{")
    assert json.loads(first + "}")["path"] == "/"
    saw = json.loads("{" + second)
    assert (saw["version"], saw["path"]) == ("1.1", "/again")
    assert not {"upgrade", "http2-settings"} & {
        name for name, _ in json.loads(first + "}")["headers"]
    }
    direct = await curl(pair.shop, "--http2", url("/", ASGI).replace("shop", "127.0.0.1"))
    assert direct.info["http_version"] == "2"  # so it would have


async def test_an_offer_of_h2c_with_a_body_works_as_http_1(pair: Pair) -> None:
    body = os.urandom(300_000)
    saw = await seen(pair, "--http2", "-X", "POST", "--data-binary", "@-", stdin=body)
    assert (saw["version"], saw["bytes"], saw["sha256"]) == (
        "1.1",
        len(body),
        hashlib.sha256(body).hexdigest(),
    )


# Translation...


@pytest.mark.parametrize("port", [NGINX_DECLARED, WEB_DECLARED])
async def test_an_http_2_client_of_a_service_declared_http1(pair: Pair, port: int) -> None:
    path = "/digits" if port == NGINX_DECLARED else "/"
    answer = await curl(pair.web, PRIOR, url(path, port))
    assert (answer.status, answer.info["http_version"]) == (200, "2")
    assert (
        answer.body == b"0123456789" or json.loads(answer.body)["message"] == "hello from the shop"
    )
    assert not {"connection", "keep-alive", "transfer-encoding"} & set(answer.headers)


async def test_nginx_gets_the_authority_as_host_and_sends_all_kinds_of_responses(
    pair: Pair,
) -> None:
    assert (
        await curl(pair.web, PRIOR, url("/version", NGINX_DECLARED))
    ).body == f"HTTP/1.1 shop:{NGINX_DECLARED}\n".encode()
    empty = await curl(pair.web, PRIOR, url("/nothing", NGINX_DECLARED))
    assert (empty.status, empty.body) == (204, b"")
    head = await curl(pair.web, PRIOR, "-I", url("/digits", NGINX_DECLARED))
    assert (head.status, head.headers["content-length"]) == (200, ["10"])
    part = await curl(pair.web, PRIOR, "-r", "2-4", url("/digits", NGINX_DECLARED))
    assert (part.status, part.body) == (206, b"234")
    same = await curl(
        pair.web,
        PRIOR,
        "-H",
        f"If-None-Match: {head.headers['etag'][0]}",
        url("/digits", NGINX_DECLARED),
    )
    assert (same.status, same.body) == (304, b"")


async def test_h2load_against_nginx_declared_http1_without_one_error(pair: Pair) -> None:
    done = await pair.web.run(
        ["h2load", "-n", "3000", "-c", "8", "-m", "8", "-t", "1", url("/digits", NGINX_DECLARED)],
        timeout=200,
    )
    assert "3000 succeeded, 0 failed, 0 errored, 0 timeout" in done.text, done.text


async def test_large_bodies_of_an_http_2_client_and_an_http_1_server(pair: Pair) -> None:
    large = (pair.shop.directory / "files/large").read_bytes()
    command = [
        "curl",
        "-sS",
        PRIOR,
        "-X",
        "POST",
        "-T",
        str(pair.shop.directory / "files/large"),
        url("/sink", WEB_DECLARED),
    ]
    done = await pair.web.run(command, timeout=200)
    assert json.loads(done.stdout) == {"bytes": LARGE, "sha256": hashlib.sha256(large).hexdigest()}
    done = await pair.web.run(
        ["curl", "-sS", PRIOR, "-o", "got1", url("/large", NGINX_DECLARED)], timeout=200
    )
    assert (pair.web.directory / "got1").read_bytes() == large


async def test_an_http_1_client_of_a_service_declared_http2(pair: Pair) -> None:
    arguments = (
        "-H",
        "Connection: close, x-private",
        "-H",
        "X-Private: 1",
        "-H",
        "Cookie: a=1; b=2",
        "-H",
        "X-Kept: yes",
    )
    saw = await seen(pair, "--http1.1", *arguments, path="/one?two=3", port=ASGI_DECLARED)
    assert (saw["version"], saw["path"], saw["query"]) == ("2", "/one", "two=3")
    headers: dict[str, list[str]] = {}
    for name, value in saw["headers"]:
        headers.setdefault(name, []).append(value)
    assert headers.get("host", headers.get(":authority")) == [f"shop:{ASGI_DECLARED}"]
    assert "; ".join(headers["cookie"]) == "a=1; b=2"
    assert headers["x-kept"] == ["yes"]
    assert not {"connection", "x-private", "upgrade", "transfer-encoding", "keep-alive"} & set(
        headers
    )


async def test_answers_of_an_http_2_server_are_right_in_http_1(pair: Pair) -> None:
    answer = await curl(pair.web, "--http1.1", url("/", ASGI_DECLARED), url("/", ASGI_DECLARED))
    assert (answer.status, answer.info["http_version"]) == (200, "1.1")
    done = await pair.web.run(
        [
            "curl",
            "-sS",
            "-w",
            "%{num_connects} ",
            *(["-o", "/dev/null", url("/", ASGI_DECLARED)] * 2),
        ]
    )
    assert done.text == "1 0 "
    assert answer.headers["set-cookie"] == ["a=1", "b=2"]
    head = await curl(pair.web, "--http1.1", "-I", url("/", ASGI_DECLARED))
    assert (head.status, head.body.count(b"HTTP/1.1 200 OK\r\n")) == (200, 1)
    for status in (204, 304):
        empty = await curl(
            pair.web, "--http1.1", "-H", f"X-Status: {status}", url("/", ASGI_DECLARED)
        )
        assert (empty.status, empty.body) == (status, b"")
    old = await curl(pair.web, "-0", url("/", ASGI_DECLARED))
    assert json.loads(old.body)["version"] == "2"
    chunked = await curl(pair.web, "--http1.1", url("/stream/100000", ASGI_DECLARED))
    assert (len(chunked.body), chunked.headers["transfer-encoding"]) == (100000, ["chunked"])


async def test_bodies_of_an_http_1_client_and_an_http_2_server(pair: Pair) -> None:
    body = os.urandom(3 * MIB)
    right = (len(body), hashlib.sha256(body).hexdigest())
    saw = await seen(
        pair,
        "--http1.1",
        "-X",
        "POST",
        "--data-binary",
        "@-",
        "-H",
        "Expect:",
        port=ASGI_DECLARED,
        stdin=body,
    )
    assert (saw["bytes"], saw["sha256"]) == right
    assert ["content-length", str(len(body))] in saw["headers"]
    saw = await seen(
        pair, "--http1.1", "-X", "POST", "-T", "-", port=ASGI_DECLARED, stdin=body
    )  # chunked
    assert (saw["bytes"], saw["sha256"]) == right


async def test_h2load_of_http_1_against_a_service_declared_http2(pair: Pair) -> None:
    done = await pair.web.run(
        ["h2load", "--h1", "-n", "1000", "-c", "8", "-t", "1", url("/", ASGI_DECLARED)], timeout=200
    )
    assert "1000 succeeded, 0 failed, 0 errored, 0 timeout" in done.text, done.text


async def test_an_http_2_client_of_an_undeclared_http_1_server_gets_an_error_with_the_reason(
    pair: Pair,
) -> None:
    """The directory does not say that nginx has no HTTP/2. So it gets the client's version, and its
    response is not HTTP/2."""
    answer = await curl(pair.web, PRIOR, url("/digits", NGINX))
    assert answer.status == 502
    assert answer.headers["proxy-status"][0].startswith("shop.default.inbound;error=")
