"""Endpoints that are slow, that fail and recover; requests that are retried, with their bodies; and
the response when no endpoint is left.

Two pods serve: `shop` and `annex`. Requests select the fault of a server: `x-bad: shop` makes that
server answer 503, `x-slow: shop` makes it slow. A server answers 418 to what only the proxy should
see.

A busy machine may suspend a server for a moment. Then it is slow too, and gets fewer requests for
some seconds (with the `decay` set here). So tests that need requests to both servers wait for
that."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from lab.pod import Pod
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import Pair, counted, curl, eventually, logged, prepare, python

pytestmark = [pytest.mark.lab]

WEB, CALLS, NOBODY, LATE, RAW = 8080, 50051, 8081, 8082, 9000
PATIENT: dict[str, Any] = {"tcp": {"connect_timeout": "30s", "handshake_timeout": "30s"}}
FORGETFUL = {"balancing": {"decay": "1s"}}

SERVER = """
import hashlib, http.server, sys, time
name = sys.argv[1]
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("x-slow") == name:
            time.sleep(float(self.headers.get("x-for", "0.3")))
        said = f"{name} {hashlib.sha256(body).hexdigest()}".encode()
        seen = {field.lower() for field in self.headers if field.lower().startswith(("isthmus-retry", "isthmus-timeout"))}
        self.send_response(418 if seen else 503 if self.headers.get("x-bad") == name else 200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    do_GET = do_PUT
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
Server(("0.0.0.0", int(sys.argv[2])), Handler).serve_forever()
"""

ASK = """
import hashlib, http.client, json, sys
host, times, fields, size = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
body, seen = bytes(range(256)) * (size // 256) + bytes(size % 256), {}
connection = http.client.HTTPConnection(host, 8080, timeout=60)
for _ in range(times):
    connection.request("PUT" if size else "GET", "/", body or None, fields)
    answer = connection.getresponse()
    said = answer.read().decode()
    name, _, digest = said.partition(" ")
    if answer.getheader("proxy-status") is None:
        assert digest == hashlib.sha256(body).hexdigest(), said
    key = f"{answer.status} {name}"
    seen[key] = seen.get(key, 0) + 1
print(json.dumps(seen))
"""

RAW_SERVER = """
import socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(sys.argv[1].encode() + b"\\n")
        for line in self.rfile:
            self.wfile.write(line)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128
Server(("0.0.0.0", 9000), Handler).serve_forever()
"""

# Opens that many connections, in sequence, and then sends something on each. If a file is named, it
# waits for the file before it sends.
RAW_ASK = """
import collections, json, os, socket, sys, time
seen, kept = collections.Counter(), []
for _ in range(int(sys.argv[2])):
    connection = socket.create_connection((sys.argv[1], 9000), timeout=60)
    file = connection.makefile("rwb")
    name = file.readline().strip().decode()
    seen[name] += 1
    kept.append((name, file))
print("CONNECTED", flush=True)
while sys.argv[3] and not os.path.exists(sys.argv[3]):
    time.sleep(0.02)
through = collections.Counter()
for name, file in kept:
    try:
        file.write(b"still there\\n")
        file.flush()
        through[name] += file.readline() == b"still there\\n"
    except OSError:
        pass
print(json.dumps([seen, through]))
"""

GRPC_SERVER = """
import grpc, sys
from concurrent import futures
def echo(request, context):
    if dict(context.invocation_metadata()).get("x-bad") == sys.argv[1]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
    return sys.argv[1].encode() + b" " + request
server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"Echo": grpc.unary_unary_rpc_method_handler(echo)}),))
server.add_insecure_port("0.0.0.0:50051")
server.start()
server.wait_for_termination()
"""

GRPC_ASK = """
import grpc, json, sys
host, times = sys.argv[1], int(sys.argv[2])
channel = grpc.insecure_channel(f"{host}:50051", [("grpc.enable_retries", 0)])
call, seen = channel.unary_unary("/t.T/Echo"), {}
for _ in range(times):
    try:
        said = call(b"message", timeout=60, metadata=[("x-bad", "shop")], wait_for_ready=True)
        key = "OK " + said.decode()
    except grpc.RpcError as error:
        key = error.code().name
    seen[key] = seen.get(key, 0) + 1
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        pair = prepare(laboratory.lab, {WEB: "detect"}, web=PATIENT, shop=PATIENT)
        annex = pair.cluster.pod("annex")
        pair.mesh.join(annex, **PATIENT)
        both, fast = [pair.shop, annex], {"min_penalty": "2s", "max_penalty": "2s", "jitter": 0}
        unbroken: dict[str, Any] = {"breaker": {"failures": 0}, **FORGETFUL}
        fused = {"breaker": {"failures": 3, **fast}, **FORGETFUL}
        pair.mesh.service("plain", both, {WEB: "http1"}, policy=unbroken)
        pair.mesh.service(
            "again", both, {WEB: "http1"}, policy={"retries": {"statuses": [503]}, **unbroken}
        )
        pair.mesh.service("fuse", both, {WEB: "http1"}, policy={"retries": {"limit": 0}, **fused})
        pair.mesh.service(
            "calls",
            both,
            {CALLS: "http2"},
            policy={"retries": {"grpc": ["unavailable"]}, **unbroken},
        )
        broken = {"failures": 1, "min_penalty": "1m", "connect_penalty": "1m"}
        pair.mesh.service("gone", [pair.shop], {NOBODY: "http1"}, policy={"breaker": broken})
        pair.mesh.service("limits", both, {WEB: "http1"}, policy={"overrides": True, **unbroken})
        late = {"min_penalty": "300ms", "connect_penalty": "300ms", "jitter": 0}
        pair.mesh.service("late", [annex], {LATE: "http1"}, policy={"breaker": late})
        pair.mesh.service("raw", both, {RAW: "opaque"}, policy=FORGETFUL)
        full = {"size": 0, "timeout": "2m"}
        pair.mesh.service(
            "full",
            [annex],
            {NOBODY: "http1"},
            policy={"breaker": {**broken, "jitter": 0}, "queue": full},
        )
        await pair.mesh.start()
        for pod in both:
            await pod.python("web", SERVER, pod.name, str(WEB), port=WEB)
            await pod.python("raw", RAW_SERVER, pod.name, port=RAW)
            await pod.python("calls", GRPC_SERVER, pod.name, port=CALLS)
        return pair

    return laboratory.run(build)


async def asked(
    pair: Pair, service: str, times: int, fields: dict[str, str], size: int = 0
) -> dict[str, int]:
    """The number of responses by status and server."""
    host = pair.mesh.services[service].ipv4
    found: dict[str, int] = json.loads(
        await python(pair.web, ASK, host, str(times), json.dumps(fields), str(size))
    )
    return found


async def test_a_slow_endpoint_gets_few_requests(pair: Pair) -> None:
    async def little() -> bool:
        seen = await asked(pair, "plain", 100, {"x-slow": "shop"})
        assert set(seen) <= {"200 shop", "200 annex"}
        return 0 < seen.get("200 shop", 0) <= 15

    async def a_part_each() -> bool:
        seen = await asked(pair, "again", 200, {})
        return min(seen.get("200 shop", 0), seen.get("200 annex", 0)) >= 20

    await eventually(little, "the slow one gets few requests", 120)
    await eventually(a_part_each, "without a difference both get a share", 120)


async def test_a_request_is_sent_again_with_its_body(pair: Pair) -> None:
    before = await counted(pair.near, "isthmus_retries_total", cause="status")

    async def sent_again() -> bool:
        for size in (0, 1000, 65536):
            seen = await asked(pair, "again", 40, {"x-bad": "shop"}, size)
            assert seen == {"200 annex": 40}, f"{size} bytes"
        return await counted(pair.near, "isthmus_retries_total", cause="status") >= before + 10

    await eventually(
        sent_again, "the bad one is asked too: not at once, if it was slow just before"
    )
    failed = 0
    refused = await counted(pair.near, "isthmus_retries_refused_total", reason="body")
    for bad, good in (("shop", "annex"), ("annex", "shop")):
        seen = await asked(pair, "again", 40, {"x-bad": bad}, 65537)
        assert set(seen) <= {f"503 {bad}", f"200 {good}"}
        failed += seen.get(f"503 {bad}", 0)
    assert failed, "a body that is longer is not kept"
    now = await counted(pair.near, "isthmus_retries_refused_total", reason="body")
    assert now - refused == failed


async def test_an_endpoint_that_fails_is_left_alone_and_used_again_when_it_has_recovered(
    pair: Pair,
) -> None:
    opened = f"{pair.shop.ipv4}:{WEB} of default/fuse: circuit breaker opened for 2.0 s: status 503"

    async def left_alone() -> bool:
        seen = await asked(pair, "fuse", 100, {"x-bad": "shop"})
        assert seen.get("503 shop", 0) <= 30, seen
        return any(opened in json.dumps(line) for line in pair.near.logged())

    await eventually(left_alone, "it has failed three times", 120)
    assert await counted(pair.near, "isthmus_breaker_changes_total", state="open") >= 1

    async def recovered() -> bool:
        return "200 shop" in await asked(pair, "fuse", 20, {})

    await eventually(recovered, "the endpoint is used again")
    await logged(pair.near, f"{pair.shop.ipv4}:{WEB} of default/fuse: circuit breaker closed")
    assert await counted(pair.near, "isthmus_endpoint_breaker_state", service="default/fuse") == 0


async def test_a_grpc_call_is_sent_again(pair: Pair) -> None:
    host = pair.mesh.services["calls"].ipv4

    async def sent_again() -> bool:
        seen: dict[str, Any] = json.loads(await python(pair.web, GRPC_ASK, host, "40"))
        assert seen == {"OK annex message": 40}
        return await counted(pair.near, "isthmus_retries_total", cause="grpc_status") >= 5

    await eventually(sent_again, "the bad one gets requests too", 120)


async def test_limits_that_a_request_sets_hold_where_the_policy_allows_them_and_are_not_forwarded(
    pair: Pair,
) -> None:
    again = {"x-bad": "shop", "isthmus-retry-statuses": "503"}
    assert await asked(pair, "limits", 40, again) == {"200 annex": 40}
    assert await asked(pair, "limits", 10, again, 1000) == {"200 annex": 10}, "with a body"

    async def not_repeated() -> bool:
        # After some bad responses, also of earlier tests, the circuit of `shop` is open for a
        # while.
        seen = await asked(pair, "plain", 20, again)
        assert set(seen) <= {"503 shop", "200 annex"}
        return "503 shop" in seen

    await eventually(not_repeated, "the settings have no effect where they are not allowed")

    async def in_time() -> bool:
        seen = await asked(
            pair, "limits", 60, {"x-slow": "shop", "x-for": "10", "isthmus-timeout": "2500ms"}
        )
        assert set(seen) <= {"504 http_response_timeout:", "200 annex"}, seen
        assert seen["200 annex"] >= 40, f"one response in time is noticed: {seen}"
        return len(seen) == 2

    await eventually(in_time, "the slow one gets requests too", 120)
    late = {"x-slow": "shop", "isthmus-timeout": "1ms"}
    assert set(await asked(pair, "plain", 20, late)) <= {"200 shop", "200 annex"}
    wrong = await curl(pair.web, "-4", "-H", "isthmus-timeout: soon", f"http://limits:{WEB}/")
    assert wrong.status == 400
    assert "isthmus-timeout: expected a duration" in wrong.headers["proxy-status"][0]


async def test_the_only_endpoint_is_used_again_soon_after_it_is_back_however_long_it_was_away(
    pair: Pair,
) -> None:
    url = f"http://late:{LATE}/"

    async def status() -> int:
        return (await curl(pair.web, "-4", url)).status

    async def long_away() -> bool:
        assert await status() in (502, 503)
        return any(
            "default/late: circuit breaker opened for 9.6 s" in json.dumps(line)
            for line in pair.near.logged()
        )

    await eventually(long_away, "the open time is long", 120)
    await pair.cluster.pods["annex"].python("late", SERVER, "annex", str(LATE), port=LATE)

    async def served() -> bool:
        return await status() == 200

    with trio.fail_after(10):  # 0.3 s, and what curl takes; the open time is 9.6 s
        await eventually(served, "the endpoint is used again")


async def refused(pod: Pod, service: str) -> str:
    """The error of the second request; the first one met a pod without a listener."""
    url = f"http://{service}:{NOBODY}/"
    first = await curl(pod, "-4", url)
    assert (first.status, first.error) == (502, "connection_refused")
    second = await curl(pod, "-4", url)
    assert second.status == 503
    return second.headers["proxy-status"][0]


async def test_if_there_is_nothing_to_wait_for_the_client_gets_the_reason(pair: Pair) -> None:
    before = await counted(
        pair.near, "isthmus_errors_total", direction="outbound", reason="circuit_open"
    )
    words = await refused(pair.web, "gone")
    assert "error=destination_unavailable" in words
    assert (
        "the circuit breaker of the only endpoint of default/gone is open (last failure:"
        " connect_refused); the next trial is in" in words
    )
    assert (
        await counted(
            pair.near, "isthmus_errors_total", direction="outbound", reason="circuit_open"
        )
        == before + 1
    )


async def test_if_too_many_wait_the_client_gets_the_reason(pair: Pair) -> None:
    words = await refused(pair.web, "full")
    assert "error=connection_limit_reached" in words
    assert "requests already wait for an endpoint of default/full" in words


async def connected(pair: Pair, times: int) -> list[dict[str, int]]:
    """Which server these connections reached, and how many of them carried data in both
    directions."""
    lines = (
        await python(pair.web, RAW_ASK, pair.mesh.services["raw"].ipv4, str(times), "")
    ).splitlines()
    found: list[dict[str, int]] = json.loads(lines[-1])
    return found


async def test_connections_go_to_the_endpoint_that_is_left_when_the_other_pod_dies(
    pair: Pair,
) -> None:
    go, sidecar = pair.web.directory / "go", pair.mesh.sidecars["annex"]

    async def to_both() -> bool:
        seen, through = await connected(pair, 40)
        assert seen == through
        return set(seen) == {"shop", "annex"}

    async def to_one() -> bool:
        assert await connected(pair, 40) == [{"shop": 40}] * 2, "no client noticed"
        return (
            await counted(pair.near, "isthmus_endpoint_breaker_state", service="default/raw") == 1
        )

    await eventually(to_both, "connections go to both", 120)
    held = await pair.web.python("held", RAW_ASK, pair.mesh.services["raw"].ipv4, "20", str(go))
    await held.wait_line("CONNECTED")
    sidecar.running().kill()
    try:
        await eventually(to_one, "the dead one was tried", 120)
        go.touch()
        seen, through = json.loads(await held.wait_line("[{"))
    finally:
        with trio.fail_after(60, shield=True):
            await sidecar.restart()
    assert sum(seen.values()) == 20
    assert through.get("shop", 0) == seen["shop"], "connections to the other one are unchanged"
    assert not through.get("annex")
