"""Ordinary HTTP clients, unmodified, through two sidecars to ordinary servers.

Rules: the client runs in one pod, the server in another, both behind real interception. The address
is the service's, which no interface has. Every test shows that the response is the server's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

import pytest

from lab.pod import User
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    LAST_GET,
    SOCKET,
    WEB,
    Health,
    Pair,
    client,
    counted,
    curl,
    exchange_raw,
    prepare,
    python,
    serve,
    web_server,
)

pytestmark = [pytest.mark.lab, pytest.mark.real]

NGINX, FILES, POLITE = 80, 8000, 8100
VERSIONS = pytest.mark.parametrize("version", ["-4", "-6"])

NGINX_CONFIG = """
daemon off; pid nginx.pid; error_log stderr warn; worker_processes 1;
events { worker_connections 1024; }
http {
  access_log off; default_type text/plain; keepalive_requests 100000; gzip on; gzip_types *; gzip_min_length 1;
  client_body_temp_path .; proxy_temp_path .; fastcgi_temp_path .; uwsgi_temp_path .; scgi_temp_path .;
  server {
    listen 80 backlog=1024; listen [::]:80 backlog=1024; root files;
    location /requests { return 200 "$connection $connection_requests\\n"; }
    location /nothing { return 204; }
    location /moved { return 302 /digits; }
  }
}
"""

# The standard library's server without changes: it sends 100 Continue at once, and writes without a
# buffer.
POLITE_SERVER = """
import hashlib, json, socket, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
Server(("::", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        ports = {
            NGINX: "detect",
            WEB: "detect",
            FILES: "detect",
            POLITE: "detect",
            SOCKET: "detect",
        }
        shop = {"log": {"access": False}, "pool": {"idle_timeout": "1m"}}
        pair = prepare(laboratory.lab, ports, web={"log": {"access": False}}, shop=shop)
        await nginx(pair)
        await web_server(pair.shop)
        await pair.shop.python("polite", POLITE_SERVER, str(POLITE), port=POLITE)
        await serve(pair.shop, "chat", str(SOCKET), port=SOCKET)
        await pair.shop.start(
            "files",
            ["python3", "-m", "http.server", "--bind", "::", "--directory", "files", str(FILES)],
            port=FILES,
        )
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


@pytest.fixture(autouse=True)
def healthy(laboratory: Laboratory, pair: Pair) -> Iterator[None]:
    """After each test: all of it went by mutual TLS, without an error or a warning."""
    health = laboratory.run(Health.of, pair)
    yield
    laboratory.run(health.only_mutual_tls)
    laboratory.run(health.no_errors)
    laboratory.run(health.nothing_wrong, "error", "warning")


async def nginx(pair: Pair) -> None:
    files = pair.shop.directory / "files"
    files.mkdir()
    (files / "digits").write_text("0123456789")
    (files / "text").write_text("abcdefgh" * 1024)
    config = pair.shop.directory / "nginx.conf"
    config.write_text(NGINX_CONFIG)
    await pair.shop.start(
        "nginx", ["nginx", "-p", ".", "-c", str(config)], user=User(never_root=True), port=NGINX
    )


def url(path: str, port: int = NGINX) -> str:
    return f"http://shop:{port}{path}"


@VERSIONS
async def test_curl_gets_a_file_from_nginx(pair: Pair, version: str) -> None:
    seen = await curl(pair.web, version, url("/digits"))
    assert (seen.status, seen.body) == (200, b"0123456789")
    assert seen.headers["server"][0].startswith("nginx")
    assert "proxy-status" not in seen.headers


@VERSIONS
async def test_curl_speaks_http_1_0(pair: Pair, version: str) -> None:
    seen = await curl(pair.web, version, "-0", url("/digits"))
    assert (seen.status, seen.body) == (200, b"0123456789")


async def test_curl_speaks_http_1_0_without_a_host(pair: Pair) -> None:
    seen = await curl(pair.web, "-0", "-H", "Host:", url("/digits"))
    assert (seen.status, seen.body) == (200, b"0123456789")


async def test_a_head_has_the_length_and_no_body(pair: Pair) -> None:
    seen = await curl(pair.web, "-I", url("/digits"))
    assert (seen.status, seen.headers["content-length"]) == (200, ["10"])
    again = await curl(pair.web, "-I", url("/digits"), "--next", "-sS", url("/digits"))
    assert again.body.endswith(b"0123456789")  # the next request on the connection works


@VERSIONS
async def test_two_requests_of_curl_share_a_connection(pair: Pair, version: str) -> None:
    done = await pair.web.run(
        [
            "curl",
            "-sS",
            version,
            "-w",
            "%{num_connects} ",
            "-o",
            "/dev/null",
            url("/digits"),
            "-o",
            "/dev/null",
            url("/text"),
        ]
    )
    assert done.text == "1 0 "


async def test_connections_to_the_server_are_kept_between_clients(pair: Pair) -> None:
    seen = [(await curl(pair.web, url("/requests"))).body.split()[0] for _ in range(8)]
    assert len(set(seen)) <= 2, "one connection for each address of the pod"


async def test_ranges_redirects_no_content_and_not_modified(pair: Pair) -> None:
    part = await curl(pair.web, "-r", "2-4", url("/digits"))
    assert (part.status, part.body, part.headers["content-range"]) == (
        206,
        b"234",
        ["bytes 2-4/10"],
    )
    assert (await curl(pair.web, "-L", url("/moved"))).body == b"0123456789"
    empty = await curl(pair.web, url("/nothing"))
    assert (empty.status, empty.body) == (204, b"")
    tag = (await curl(pair.web, url("/digits"))).headers["etag"][0]
    same = await curl(pair.web, "-H", f"If-None-Match: {tag}", url("/digits"))
    assert (same.status, same.body) == (304, b"")
    assert (await curl(pair.web, url("/missing"))).status == 404


async def test_a_chunked_and_compressed_response_of_nginx(pair: Pair) -> None:
    seen = await curl(pair.web, "--compressed", url("/text"))
    assert seen.body == b"abcdefgh" * 1024
    assert seen.headers["transfer-encoding"] == ["chunked"]
    assert seen.headers["content-encoding"] == ["gzip"]


async def test_a_server_that_speaks_http_1_0_and_closes(pair: Pair) -> None:
    seen = await curl(pair.web, url("/text", FILES), url("/digits", FILES))
    assert seen.body == b"abcdefgh" * 1024 + b"0123456789"


async def test_a_post_that_waits_for_100_continue(pair: Pair) -> None:
    body = bytes(range(256)) * 8192
    args = ("-v", "--expect100-timeout", "20", "-H", "Expect: 100-continue", "--data-binary", "@-")
    seen = await curl(pair.web, *args, url("/", POLITE), stdin=body)
    assert json.loads(seen.body) == {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    assert "HTTP/1.1 100 Continue" in seen.errors
    assert seen.info["time_total"] < 15


async def test_an_upload_of_unknown_length_is_chunked(pair: Pair) -> None:
    body = bytes(range(256)) * 20_000
    seen = await curl(pair.web, "-v", "-T", "-", "-X", "POST", url("/sink", WEB), stdin=body)
    assert json.loads(seen.body) == {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    assert "Transfer-Encoding: chunked" in seen.errors


async def test_an_absolute_target_as_proxies_are_sent_it(pair: Pair) -> None:
    seen = await curl(pair.web, "-x", f"http://shop:{NGINX}", "http://shop/digits")
    assert (seen.status, seen.body) == (200, b"0123456789")


async def test_http_client(pair: Pair) -> None:
    seen = await client(pair.web, "get", "shop", str(WEB), "tangerine")
    assert (seen["status"], seen["same"]) == (200, True)
    assert json.loads(seen["body"])["secret"] == "tangerine"


HTTPX = """
import asyncio, hashlib, json, sys
import httpx
base = sys.argv[1]
with httpx.Client(base_url=base) as client:
    one = [client.get("/").json()["message"] for _ in range(3)]
    with client.stream("GET", "/stream/3000000") as answer:
        size = sum(map(len, answer.iter_bytes()))
    posted = client.post("/sink", content=(b"x" * 1000 for _ in range(500))).json()
async def many():
    async with httpx.AsyncClient(base_url=base) as client:
        answers = await asyncio.gather(*(client.get("/", headers={"X-Secret": str(n)}) for n in range(40)))
        return [answer.json()["secret"] for answer in answers]
print(json.dumps([one, size, posted["bytes"], posted["sha256"] == hashlib.sha256(b"x" * 500000).hexdigest(), asyncio.run(many())]))
"""


async def test_httpx_sync_streaming_and_forty_at_once(pair: Pair) -> None:
    one, size, posted, same, many = json.loads(await python(pair.web, HTTPX, f"http://shop:{WEB}"))
    assert one == ["hello from the shop"] * 3
    assert (size, posted, same) == (3_000_000, 500_000, True)
    assert many == [str(number) for number in range(40)]


async def test_a_websocket(pair: Pair) -> None:
    seen = await client(pair.web, "websocket", "shop", str(SOCKET), "tangerine")
    assert (seen["echoed"], seen["large"]) == (50, True)


async def test_ten_thousand_requests_of_h2load_over_64_connections_without_one_error(
    pair: Pair,
) -> None:
    before = await counted(
        pair.far, "isthmus_responses_total", direction="inbound", status_class="2xx"
    )
    done = await pair.web.run(
        ["h2load", "--h1", "-n", "10000", "-c", "64", "-t", "1", url("/digits")], timeout=200
    )
    print(done.text)
    assert (
        "requests: 10000 total, 10000 started, 10000 done, 10000 succeeded, 0 failed, 0 errored, 0"
        " timeout" in done.text
    )
    after = await counted(
        pair.far, "isthmus_responses_total", direction="inbound", status_class="2xx"
    )
    assert after - before == 10000


async def test_wrk_over_64_connections_without_one_error(pair: Pair) -> None:
    done = await pair.web.run(
        ["wrk", "-t", "2", "-c", "64", "-d", "4s", "--timeout", "10s", url("/digits")], timeout=40
    )
    print(done.text)
    assert "Socket errors" not in done.text
    assert "Non-2xx" not in done.text
    found = re.search(r"(\d+) requests in", done.text)
    assert found is not None
    assert int(found[1]) > 100


async def test_a_request_goes_by_mutual_tls(pair: Pair) -> None:
    assert (await exchange_raw(pair.web, pair.service.ipv4, WEB, LAST_GET)).startswith(
        b"HTTP/1.1 200 "
    )
    mutual = await counted(
        pair.far,
        "isthmus_connections_opened_total",
        direction="inbound",
        peer="src",
        tls="mutual",
    )
    assert mutual > 0
