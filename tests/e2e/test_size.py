"""The memory of connections and bodies.

Rules: resident memory of the proxies as the kernel counts it, measured at rest before and after,
and at its peak during the transfer of bodies. The proxies have done the same work once before the
measurement, because the first connection builds objects that all share."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from lab.pod import User
from lab.process import Process
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import ECHO, WEB, Pair, counted, curl, echo_server, eventually, prepare

pytestmark = [pytest.mark.lab, pytest.mark.real]

CONNECTIONS = 1000
PER_CONNECTION = 64 * 1024  # bytes
GIBIBYTE = 1024**3
GROWTH = 5 * 1024**2  # bytes
IDLE = 100 * 1024**2  # bytes; far above the measured values: only to notice a mistake

NGINX = """
daemon off; pid nginx.pid; error_log stderr warn; worker_processes 1;
events {}
http {
  access_log off; default_type application/octet-stream; client_max_body_size 0; keepalive_timeout 60;
  client_body_temp_path .; proxy_temp_path .; fastcgi_temp_path .; uwsgi_temp_path .; scgi_temp_path .;
  server { listen 8080; listen [::]:8080; root files; }
}
"""

# Reads a body of any length as fast as it arrives, and responds with its length.
SINK = """
import socket, sys
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
buffer = bytearray(1 << 20)
while True:
    stream, _ = listener.accept()
    with stream:
        data = b""
        while b"\\r\\n\\r\\n" not in data:
            data += stream.recv(65536)
        head, _, body = data.partition(b"\\r\\n\\r\\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\\r\\n") if line.lower().startswith(b"content-length"))
        total = len(body)
        while total < length and (count := stream.recv_into(buffer)):
            total += count
        answer = str(total).encode()
        stream.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(answer), answer))
"""
UPLOADS = 8090
STREAMS = 8091

# Opens connections that send six bytes, which start no request, and stay open. Then waits for the
# end of its input.
HOLDER = """
import resource, socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held = []
for number in range(count):
    stream = socket.create_connection((host, port), timeout=20)
    stream.sendall(b"\\0%05d" % number)
    assert stream.recv(6) == b"\\0%05d" % number
    held.append(stream)
print("all open", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        pair = prepare(
            laboratory.lab, {WEB: "detect", UPLOADS: "detect", STREAMS: "detect", ECHO: "opaque"}
        )
        files = pair.shop.directory / "files"
        files.mkdir()
        for name, size in (("large", GIBIBYTE), ("small", 64 * 1024**2)):
            with (files / name).open("wb") as file:
                file.truncate(size)
            with (pair.web.directory / name).open("wb") as file:
                file.truncate(size)
        config = pair.shop.directory / "nginx.conf"
        config.write_text(NGINX)
        await pair.shop.start(
            "nginx", ["nginx", "-p", ".", "-c", str(config)], user=User(never_root=True), port=WEB
        )
        await pair.shop.start(
            "nghttpd", ["nghttpd", "--no-tls", "-d", str(files), str(STREAMS)], port=STREAMS
        )
        await pair.shop.python("sink", SINK, str(UPLOADS), port=UPLOADS)
        await echo_server(pair.shop)
        with usual_limit():
            await pair.mesh.start()
        return pair

    return laboratory.run(build)


@contextmanager
def usual_limit() -> Iterator[None]:
    """Programs that are started in the block get the soft limit that most systems set, and have to
    raise it themselves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def proxies(pair: Pair) -> list[Process]:
    return [sidecar.running() for sidecar in pair.both]


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


class Highest:
    """The peak of the resident memory while a block runs, sampled often."""

    def __init__(self, processes: list[Process]) -> None:
        self._processes = processes
        self.rss = [process.rss() for process in processes]

    async def watch(self) -> None:
        while True:
            self.rss = [
                max(old, process.rss())
                for old, process in zip(self.rss, self._processes, strict=True)
            ]
            await trio.sleep(0.05)


async def hold(pair: Pair, count: int) -> Process:
    holder = await pair.web.python("holder", HOLDER, pair.service.ipv4, str(ECHO), str(count))
    await holder.wait_line("all open", timeout=150)
    return holder


async def none_open(pair: Pair) -> bool:
    return sum([await counted(sidecar, "isthmus_connections_open") for sidecar in pair.both]) == 0


async def test_an_idle_proxy_is_small(pair: Pair) -> None:
    await trio.sleep(0.5)
    sizes = [process.rss() for process in proxies(pair)]
    print("idle:", ", ".join(map(mib, sizes)))
    assert max(sizes) < IDLE


async def test_a_thousand_idle_connections_by_mutual_tls_cost_less_than_64_kib_each(
    pair: Pair,
) -> None:
    first = await hold(pair, 20)
    await first.aclose()
    await eventually(lambda: none_open(pair), "all connections are closed")
    before = [process.rss() for process in proxies(pair)]
    holder = await hold(pair, CONNECTIONS)
    assert (
        await counted(
            pair.far, "isthmus_connections_open", direction="inbound", peer="src", tls="mutual"
        )
        == CONNECTIONS
    )
    assert (
        await counted(
            pair.near, "isthmus_connections_open", direction="outbound", peer="dst", tls="mutual"
        )
        == CONNECTIONS
    )
    await trio.sleep(0.5)
    cost = [
        (process.rss() - old) / CONNECTIONS
        for process, old in zip(proxies(pair), before, strict=True)
    ]
    print("a connection:", ", ".join(f"{each / 1024:.1f} KiB" for each in cost))
    assert max(cost) < PER_CONNECTION
    await holder.aclose()
    await eventually(lambda: none_open(pair), "all connections are closed")


async def grown(pair: Pair, *arguments: str) -> list[int]:
    """The maximum growth of the proxies' memory while curl does this. Prints how long it took."""
    before = [process.rss() for process in proxies(pair)]
    highest = Highest(proxies(pair))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(highest.watch)
        seen = await curl(pair.web, *arguments, timeout=200)
        nursery.cancel_scope.cancel()
    assert (seen.exit, seen.status) == (0, 200), (seen.errors, seen.body[:300])
    moved = seen.info["size_download"] + seen.info["size_upload"]
    growth = [most - old for most, old in zip(highest.rss, before, strict=True)]
    print(f"{mib(moved)} in {seen.info['time_total']:.1f} s, grown by", ", ".join(map(mib, growth)))
    assert moved >= GIBIBYTE
    return growth


async def test_a_gibibyte_down_leaves_the_proxies_as_small_as_they_were(pair: Pair) -> None:
    assert (
        await curl(pair.web, "-o", "/dev/null", f"http://shop:{WEB}/small", timeout=60)
    ).status == 200
    growth = await grown(pair, "-o", "/dev/null", f"http://shop:{WEB}/large")
    assert max(growth) < GROWTH


async def test_a_gibibyte_on_one_stream_of_http2_leaves_them_so_too(pair: Pair) -> None:
    prior = "--http2-prior-knowledge"
    seen = await curl(
        pair.web, prior, "-o", "/dev/null", f"http://shop:{STREAMS}/small", timeout=60
    )
    assert (seen.status, seen.info["http_version"]) == (200, "2")
    growth = await grown(pair, prior, "-o", "/dev/null", f"http://shop:{STREAMS}/large")
    assert max(growth) < GROWTH


async def test_a_gibibyte_up_leaves_the_proxies_as_small_as_they_were(pair: Pair) -> None:
    assert (
        await curl(pair.web, "-H", "Expect:", "-T", "small", f"http://shop:{UPLOADS}/", timeout=60)
    ).status == 200
    growth = await grown(pair, "-H", "Expect:", "-T", "large", f"http://shop:{UPLOADS}/")
    assert max(growth) < GROWTH


async def test_a_client_that_does_not_read_holds_nothing_but_buffers(pair: Pair) -> None:
    """Back-pressure: the proxy does not read more from the server than the client reads."""
    before = [process.rss() for process in proxies(pair)]
    stream = await pair.web.connect(pair.service.ipv4, WEB)
    async with stream:
        await stream.send_all(b"GET /large HTTP/1.1\r\nHost: shop\r\n\r\n")
        await trio.sleep(2)
        growth = [process.rss() - old for process, old in zip(proxies(pair), before, strict=True)]
    print("grown by", ", ".join(map(mib, growth)))
    assert max(growth) < GROWTH
