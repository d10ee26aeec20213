"""Traffic that looks like a loop and is not one: no request is refused.

An application that calls itself, also with the request that it is answering; one that calls back
its caller; one that has many concurrent calls to itself; a client that repeats a request ten
thousand times; a reverse proxy that retries. All of them copy every field that they get."""

from __future__ import annotations

import pytest
import trio

from lab.pod import Pod
from tests.e2e.conftest import Laboratory
from tests.e2e.ingress import nginx
from tests.e2e.stage import ECHO, Pair, counted, curl, echo_server, eventually, prepare

pytestmark = [pytest.mark.lab, pytest.mark.real]

APP, INGRESS, RETRYING, QUICK, NOBODY = 8080, 8081, 8082, 8083, 8099
TOGETHER = 100  # concurrent calls of a pod to itself
SAME = 10_000

# A program that does what its path says, and copies all fields of the request to its own: /down/N
# requests /down/N-1 of itself; /again requests the same of itself until the field Left is used up;
# /call/HOST requests /back/<itself> of HOST, which requests /leaf of the caller; /wait/S responds
# after S seconds.
PROGRAM = """
import http.client, http.server, socket, sys, time
ME, PORT = sys.argv[1], int(sys.argv[2])
class Program(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        what, _, rest = self.path[1:].partition("/")
        status, body = 200, b"leaf"
        if what == "down" and int(rest):
            status, body = self.ask(ME, f"/down/{int(rest) - 1}")
        elif what == "again" and int(self.headers["Left"]):
            status, body = self.ask(ME, self.path, Left=str(int(self.headers["Left"]) - 1))
        elif what == "call":
            status, body = self.ask(rest, f"/back/{ME}")
        elif what == "back":
            status, body = self.ask(rest, "/leaf")
        elif what == "wait":
            time.sleep(float(rest))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def ask(self, host, path, **more):
        fields = {name: value for name, value in self.headers.items() if name not in ("Host", "Connection")}
        connection = http.client.HTTPConnection(host, PORT, timeout=60)
        try:
            connection.request("GET", path, headers={**fields, **more})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family, request_queue_size, daemon_threads = socket.AF_INET6, 512, True
Server(("::", PORT), Program).serve_forever()
"""

# Opens that many connections to a host and port at once, sends a line on each and reads it back,
# three times.
MANY = """
import asyncio, sys
async def main(host, port, count):
    pairs = await asyncio.gather(*[asyncio.open_connection(host, port) for _ in range(count)])
    for turn in range(3):
        for number, (_, writer) in enumerate(pairs):
            writer.write(b"%d of turn %d\\n" % (number, turn))
        for number, (reader, _) in enumerate(pairs):
            assert await asyncio.wait_for(reader.readline(), 30) == b"%d of turn %d\\n" % (number, turn)
    for _, writer in pairs:
        writer.close()
    print(len(pairs))
asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        ports = {
            APP: "detect",
            INGRESS: "detect",
            RETRYING: "detect",
            QUICK: "detect",
            NOBODY: "detect",
            ECHO: "opaque",
        }
        pair = prepare(laboratory.lab, ports)
        pair.mesh.service("web", [pair.web], {APP: "detect"})
        for pod in (pair.web, pair.shop):
            await pod.python("program", PROGRAM, pod.name, str(APP), port=APP)
        await echo_server(pair.shop)
        # An ingress in front of a service that calls itself, and one whose first choice does not
        # exist.
        await nginx(
            pair.shop,
            {
                INGRESS: f"proxy_pass http://shop:{APP};",
                RETRYING: "proxy_next_upstream error http_502 http_503; proxy_pass http://two;",
                QUICK: "return 200 leaf;",
            },
            upstreams=(
                f"upstream two {{ server shop:{NOBODY} max_fails=0; server shop:{APP}"
                " max_fails=0; }"
            ),
        )
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


async def refusals(pair: Pair) -> float:
    return sum([await counted(sidecar, "isthmus_loops_total") for sidecar in pair.both])


async def answered(pair: Pair, pod: Pod, url: str, *options: str) -> None:
    seen = await curl(pod, url, *options)
    assert (seen.status, seen.body) == (200, b"leaf")
    assert await refusals(pair) == 0


@pytest.mark.parametrize("depth", [1, 15])
async def test_an_application_that_calls_itself_further_and_further_down(
    pair: Pair, depth: int
) -> None:
    await answered(pair, pair.web, f"http://shop:{APP}/down/{depth}")


@pytest.mark.parametrize("left", [0, 1, 4])
async def test_an_application_that_calls_itself_with_the_very_request_that_it_answers(
    pair: Pair, left: int
) -> None:
    await answered(pair, pair.web, f"http://shop:{APP}/again", "-H", f"Left: {left}")


async def test_an_application_that_calls_back_its_caller(pair: Pair) -> None:
    await answered(pair, pair.web, f"http://web:{APP}/call/shop")
    await answered(pair, pair.web, f"http://shop:{APP}/call/web")


async def test_an_ingress_in_front_of_an_application_that_calls_itself(pair: Pair) -> None:
    await answered(pair, pair.web, f"http://shop:{INGRESS}/down/5")


async def test_a_reverse_proxy_that_tries_again_elsewhere(pair: Pair) -> None:
    for _ in range(10):
        await answered(pair, pair.web, f"http://shop:{RETRYING}/leaf")


async def test_a_client_that_repeats_itself(pair: Pair) -> None:
    for _ in range(3):
        await answered(pair, pair.web, f"http://shop:{APP}/leaf", "--retry", "3")


async def test_the_same_request_ten_thousand_times(pair: Pair) -> None:
    command = ["h2load", "--h1", "-n", str(SAME), "-c", "8", f"http://shop:{QUICK}/leaf"]
    done = await pair.web.run(command, timeout=200)
    assert f"{SAME} 2xx, 0 3xx, 0 4xx, 0 5xx" in done.text, done.text + done.stderr.decode()
    assert await refusals(pair) == 0


async def test_a_pod_with_many_concurrent_requests_to_itself(pair: Pair) -> None:
    before = await counted(pair.far, "isthmus_self_calls_total")
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            urls = [f"http://shop:{APP}/wait/1"] * (TOGETHER // 5)
            nursery.start_soon(parallel, pair.shop, urls)
    assert await counted(pair.far, "isthmus_self_calls_total") - before == TOGETHER
    assert await refusals(pair) == 0
    await eventually(lambda: nothing_waits(pair), "no call waits")


async def parallel(pod: Pod, urls: list[str]) -> None:
    done = await pod.run(
        ["curl", "-sS", "-Z", "--parallel-max", str(len(urls)), "-f", *urls], timeout=60
    )
    assert done.stdout == b"leaf" * len(urls), done.stderr


async def nothing_waits(pair: Pair) -> bool:
    return await counted(pair.far, "isthmus_self_calls_waiting") == 0


async def test_a_pod_that_has_many_opaque_connections_to_itself(pair: Pair) -> None:
    done = await pair.shop.run_python(MANY, "shop", str(ECHO), str(TOGETHER * 2), timeout=80)
    assert done.text.strip() == str(TOGETHER * 2), done.stderr.decode()
    assert await refusals(pair) == 0
    await eventually(lambda: nothing_waits(pair), "no call waits")
