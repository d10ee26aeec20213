"""Loops through applications, with real software in them: each is ended, the cost is bounded, and
the error names the true cycle.

`web` calls `shop`, whose programs forward what they get: to their own service, to a service of
`annex` that forwards it back, or to themselves under another path. Rules: for each request sent,
the programs see at most as many as configured. The proxies' CPU time is far below what a loop would
take. The response (or the log, if the client may not see it) names the cycle. All other traffic
continues."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from lab.pod import exemption_flags
from lab.sidecar import Sidecar
from tests.e2e.calls import calling
from tests.e2e.conftest import Laboratory
from tests.e2e.ingress import haproxy, has_answered, nginx, relay, requests
from tests.e2e.stage import (
    ECHO,
    LAST_GET,
    WEB,
    Pair,
    counted,
    curl,
    echo_server,
    eventually,
    exchange_raw,
    logged,
    prepare,
    web_server,
)

pytestmark = [pytest.mark.lab, pytest.mark.real]

HELLO = b"hello from the shop"
ITSELF, TWO, GROWING, GRPC, TWO_GRPC = 8081, 8083, 8085, 8087, 8089
HAPROXY, HAPROXY2, HAPROXY_TWO = 8091, 8092, 8093
RELAY, FORGETFUL_PORT = 7100, 8095
RETURNS, HOPS, SELF_CALLS = 4, 64, 80  # the first two are the defaults
# seconds of CPU time, of one proxy in one test; most take less than a tenth of it, and a loop takes
# all there is
BUSY = 4.0


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        detected = (
            WEB,
            ITSELF,
            TWO,
            GROWING,
            GRPC,
            TWO_GRPC,
            HAPROXY,
            HAPROXY2,
            HAPROXY_TWO,
            FORGETFUL_PORT,
        )
        ports = {**dict.fromkeys(detected, "detect"), ECHO: "opaque", RELAY: "opaque"}
        pair = prepare(laboratory.lab, ports, shop={"loops": {"max_self_calls": SELF_CALLS}})
        annex, astray = pair.cluster.pod("annex"), pair.cluster.pod("astray")
        pair.cluster.pod("stranger")
        pair.mesh.join(annex)
        pair.mesh.join(astray, workers=3)  # its connections come back to any of them
        pair.mesh.service("annex", [annex], dict.fromkeys((TWO, TWO_GRPC, HAPROXY_TWO), "detect"))
        await web_server(pair.shop)
        await echo_server(pair.shop)
        await nginx(
            pair.shop,
            {
                ITSELF: f"proxy_pass http://shop:{ITSELF};",
                TWO: f"proxy_pass http://annex:{TWO};",
                GROWING: f"rewrite ^(.*)$ /again$1 break; proxy_pass http://shop:{GROWING};",
                GRPC: f"http2 grpc_pass grpc://shop:{GRPC};",
                TWO_GRPC: f"http2 grpc_pass grpc://annex:{TWO_GRPC};",
            },
        )
        await nginx(
            annex,
            {
                TWO: f"proxy_pass http://shop:{TWO};",
                TWO_GRPC: f"http2 grpc_pass grpc://shop:{TWO_GRPC};",
            },
        )
        await haproxy(
            pair.shop,
            {
                HAPROXY: f"shop:{HAPROXY}",
                HAPROXY2: f"shop:{HAPROXY2} proto h2",
                HAPROXY_TWO: f"annex:{HAPROXY_TWO}",
            },
        )
        await haproxy(annex, {HAPROXY_TWO: f"shop:{HAPROXY_TWO}"})
        await relay(pair.shop, RELAY, "shop", RELAY)
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


@pytest.fixture(autouse=True)
def no_storm(laboratory: Laboratory, pair: Pair) -> Iterator[None]:
    """After each test, no request is left in progress."""
    yield
    for each in pair.mesh.sidecars.values():
        laboratory.run(
            eventually,
            lambda each=each: quiet(each),
            f"nothing is in progress in {each.pod.name}",
        )


@asynccontextmanager
async def bounded(pair: Pair, kind: str, *, at_least: int = 1) -> AsyncIterator[None]:
    """The block's traffic is ended with a verdict of this kind, takes little CPU time, and leaves
    nothing behind."""
    sidecars = list(pair.mesh.sidecars.values())
    before = sum([await counted(sidecar, "isthmus_loops_total", kind=kind) for sidecar in sidecars])
    cpu = [sidecar.running().cpu_seconds() for sidecar in sidecars]
    yield
    after = sum([await counted(sidecar, "isthmus_loops_total", kind=kind) for sidecar in sidecars])
    assert after >= before + at_least
    for sidecar, old in zip(sidecars, cpu, strict=True):
        assert sidecar.running().cpu_seconds() - old < BUSY
        assert await counted(sidecar, "isthmus_errors_total", reason="internal") == 0
    assert HELLO in (await curl(pair.web, f"http://shop:{WEB}/")).body


def name(pair: Pair, *pods: str) -> str:
    return " -> ".join(f"{pair.cluster.name}/{pod}" for pod in pods)


def sidecar(pair: Pair, pod: str) -> Sidecar:
    return pair.mesh.sidecars[pod]


# Requests...

# port -> (the pods of the loop, options of curl)
ROUNDS = {
    "nginx to itself": (ITSELF, ("shop", "shop"), ()),
    "nginx to nginx": (TWO, ("shop", "annex", "shop"), ()),
    "HAProxy to itself": (HAPROXY, ("shop", "shop"), ()),
    "HAProxy to itself, HTTP/2": (HAPROXY2, ("shop", "shop"), ("--http2-prior-knowledge",)),
    "HAProxy to HAProxy": (HAPROXY_TWO, ("shop", "annex", "shop"), ()),
}


@pytest.mark.parametrize("case", ROUNDS)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_request_that_loops_through_applications_is_answered_508(
    pair: Pair, case: str, method: str
) -> None:
    port, way, options = ROUNDS[case]
    body = ("-d", "x" * 5000) if method == "POST" else ()
    async with bounded(pair, "request"):
        seen = await curl(pair.web, f"http://shop:{port}/a?b=c", *options, *body)
    assert (seen.status, seen.error) == (508, "proxy_loop_detected")
    assert name(pair, *way).encode() + b"\n" in seen.body
    await logged(pair.far, name(pair, *way), reason="loop")


@pytest.mark.parametrize(("port", "pods"), [(ITSELF, ("shop",)), (TWO, ("shop", "annex"))])
async def test_applications_see_each_request_as_often_as_configured_and_no_more(
    pair: Pair, port: int, pods: tuple[str, ...]
) -> None:
    before = [requests(pair.cluster.pods[pod], port) for pod in pods]
    async with bounded(pair, "request", at_least=10):
        for _ in range(10):
            assert (await curl(pair.web, f"http://shop:{port}/")).status == 508
    # With one pod, nginx gets it once by its inbound side, then from itself: the first time, and as
    # often as it may return. With two pods, the first one's inbound side counts: the first time,
    # and as often as it may return.
    each = 1 + 1 + RETURNS if len(pods) == 1 else 1 + RETURNS
    for pod, old in zip(pods, before, strict=True):
        await eventually(
            partial(has_answered, pair.cluster.pods[pod], port, old + 10 * each),
            f"{pod} has logged them",
        )
        assert requests(pair.cluster.pods[pod], port) == old + 10 * each


async def test_a_request_whose_path_changes_in_each_round_ends_at_the_hop_limit(pair: Pair) -> None:
    before = requests(pair.shop, GROWING)
    async with bounded(pair, "hops"):
        seen = await curl(pair.web, f"http://shop:{GROWING}/")
    assert (seen.status, seen.error) == (508, "proxy_loop_detected")
    assert b"loops.max_hops" in seen.body
    await logged(
        pair.far,
        "a loop was stopped (hops, outbound): the request has passed 64 proxies",
        logger="isthmus.loopguard",
    )
    assert name(pair, "web", "shop").encode() in seen.body
    await eventually(lambda: requests(pair.shop, GROWING) > before, "they are logged")
    assert requests(pair.shop, GROWING) - before <= HOPS


@pytest.mark.parametrize(
    ("port", "way"), [(GRPC, ("shop", "shop")), (TWO_GRPC, ("shop", "annex", "shop"))]
)
async def test_a_grpc_call_that_loops_is_aborted(
    pair: Pair, port: int, way: tuple[str, ...]
) -> None:
    code = """
try:
    shop.unary_unary("Name")(b"", timeout=20)
except grpc.RpcError as error:
    print(json.dumps([status(error), error.details()]))
"""
    async with bounded(pair, "request"):
        status, details = await calling(pair.web, code, port=port)
    assert status == "ABORTED proxy_loop_detected"
    assert details.endswith(name(pair, *way))


async def test_a_client_without_an_identity_gets_508_without_the_names_of_the_cycle(
    pair: Pair,
) -> None:
    stranger = pair.cluster.pods["stranger"]
    for port, way in ((ITSELF, ("shop", "shop")), (TWO, ("shop", "annex", "shop"))):
        async with bounded(pair, "request"):
            seen = await curl(stranger, f"http://{pair.shop.ipv4}:{port}/from-outside")
        assert (seen.status, seen.error) == (508, "proxy_loop_detected")
        for told in (seen.body, str(seen.headers).encode()):
            assert b"annex" not in told
            assert f"{pair.cluster.name}/".encode() not in told
        await logged(pair.far, name(pair, *way), reason="loop", target="/from-outside")


# Connections...


async def test_a_relay_that_dials_itself_is_bounded(pair: Pair) -> None:
    opened = await counted(
        pair.far, "isthmus_connections_opened_total", direction="outbound", peer="src"
    )
    async with bounded(pair, "self_calls", at_least=3):
        for data in (b"", b"\x00bytes"):
            assert await exchange_raw(pair.web, pair.service.ipv4, RELAY, data, patience=30) == b""
        answer = await exchange_raw(pair.web, pair.service.ipv4, RELAY, LAST_GET, patience=30)
        assert answer.startswith(b"HTTP/1.1 502 "), "what turns out to be HTTP is answered in HTTP"
    rounds = (
        await counted(
            pair.far, "isthmus_connections_opened_total", direction="outbound", peer="src"
        )
        - opened
    )
    assert rounds <= 3 * (SELF_CALLS + 1)
    await logged(
        pair.far,
        f"{SELF_CALLS} connections or requests of this pod to its own port {RELAY} wait",
        reason="loop",
    )
    await eventually(lambda: quiet(pair.far), "the whole chain is closed")


async def quiet(sidecar: Sidecar) -> bool:
    return await counted(sidecar, "isthmus_self_calls_waiting") == 0 and await counted(
        sidecar, "isthmus_connections_open", direction="outbound"
    ) <= await counted(sidecar, "isthmus_pool_connections")


FORGETFUL = """
import http.server, socket, sys, urllib.error, urllib.request
class Forgetful(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        try:
            status = urllib.request.urlopen(f"http://shop:{sys.argv[1]}/", timeout=30).status
        except urllib.error.HTTPError as error:
            status = error.code
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family, request_queue_size, daemon_threads = socket.AF_INET6, 512, True
Server(("", int(sys.argv[1])), Forgetful).serve_forever()
"""


async def test_a_program_that_calls_itself_and_copies_no_field_is_bounded_as_a_relay_is(
    pair: Pair,
) -> None:
    await pair.shop.python("forgetful", FORGETFUL, str(FORGETFUL_PORT), port=FORGETFUL_PORT)
    before = await counted(pair.far, "isthmus_self_calls_total")
    async with bounded(pair, "self_calls"):
        seen = await curl(pair.shop, f"http://shop:{FORGETFUL_PORT}/")
    assert seen.status in (200, 508)
    assert await counted(pair.far, "isthmus_self_calls_total") - before <= SELF_CALLS + 1


@pytest.mark.parametrize("version", [4, 6])
async def test_a_proxy_that_its_own_redirection_does_not_exempt_stops_itself(
    pair: Pair, version: int
) -> None:
    """The most common misconfiguration: the proxy runs as a user that the rules do not exempt."""
    astray = pair.cluster.pods["astray"]
    its = sidecar(pair, "astray")
    assert HELLO in (await curl(astray, f"http://shop:{WEB}/")).body
    wrong = ("--no-uid", "--mark", "0x1") if "--no-uid" in exemption_flags() else ("--uid", "4242")
    await astray.intercept("--config", str(its.config_file), *wrong)
    try:
        # A service that this pod has not called yet: kept connections are not affected.
        host = pair.mesh.services["annex"].address(version)
        opened = await counted(
            its, "isthmus_connections_opened_total", direction="outbound", peer="src"
        )
        async with bounded(pair, "own_connection"):
            seen = await curl(astray, f"http://{f'[{host}]' if version == 6 else host}:{TWO}/")
        assert seen.status >= 500
        assert (
            await counted(its, "isthmus_connections_opened_total", direction="outbound", peer="src")
            - opened
            < 20
        )
        await logged(its, "this proxy's own connection to", reason="loop")
    finally:
        with trio.move_on_after(20, shield=True):
            await astray.intercept("--config", str(its.config_file))
    assert HELLO in (await curl(astray, f"http://shop:{WEB}/")).body
