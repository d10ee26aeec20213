"""gRPC under load, while servers and proxies crash, restart and stop, and while certificates and
the directory change.

Rules: every call of a load has an outcome, and an error of a proxy has Proxy-Status. Where nothing
fails for the caller (new certificates, another endpoint, connections that are replaced because of
their age) not one call may fail."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio

from lab.faults import link_cut, paused
from lab.process import Process
from lab.sidecar import Authority, Sidecar
from tests.e2e.calls import THREADS, Calls, build, calling, grpc_server, server, speaking, start
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import Pair, counted, eventually

pytestmark = pytest.mark.lab

QUIET = {
    "log": {"access": False},
    "shutdown": {"grace": "60s"},
    "tcp": {"connect_timeout": "30s", "handshake_timeout": "30s"},
}
HASTY = {"shutdown": {"grace": "4s"}}
PINGS = {"http2": {"ping_interval": "1s", "ping_timeout": "4s"}}
YOUNG = {"pool": {"max_age": "1s"}}
REFUSED = "UNAVAILABLE connection_refused"
# while the only endpoint gets trial requests only
BROKEN = "UNAVAILABLE destination_unavailable"
CUT = {"UNAVAILABLE connection_terminated", "UNAVAILABLE http_response_incomplete"}


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def prepare() -> Pair:
        pair = build(laboratory.lab, web=QUIET, shop=QUIET)
        await start(pair)
        return pair

    return laboratory.run(prepare)


@pytest.fixture(scope="module")
def young(laboratory: Laboratory) -> Pair:
    """A pair whose proxies replace their connections every second."""

    async def prepare() -> Pair:
        pair = build(laboratory.lab, web=QUIET | YOUNG, shop=QUIET | YOUNG)
        await start(pair)
        return pair

    return laboratory.run(prepare)


@pytest.fixture
def fresh(laboratory: Laboratory, request: pytest.FixtureRequest) -> Pair:
    """A pair for one test, with settings of its own if necessary."""
    settings = QUIET | getattr(request, "param", {})

    async def prepare() -> Pair:
        pair = build(laboratory.lab, web=settings, shop=settings)
        await start(pair)
        return pair

    return laboratory.run(prepare)


async def well(pair: Pair) -> None:
    """All calls succeed again, and the proxies had no unexpected error."""
    code = """
try:
    print(json.dumps(shop.unary_unary("Name")(b"", timeout=30).decode()))
except grpc.RpcError as error:
    print(json.dumps(status(error)))
"""

    async def answered() -> bool:
        return bool(await calling(pair.web, code) == "shop")

    await eventually(answered, "calls are answered again")
    for sidecar in pair.both:
        assert await counted(sidecar, "isthmus_errors_total", reason="internal") == 0
        assert [line for line in sidecar.logged() if "exception" in line] == []
        await eventually(
            partial(_nothing_active, sidecar),
            f"nothing is active in {sidecar.pod.name}",
        )


async def _nothing_active(sidecar: Sidecar) -> bool:
    return await counted(sidecar, "isthmus_pool_connections", state="active") == 0


# Crashes...


async def test_a_server_that_is_killed_under_load_and_comes_back(pair: Pair) -> None:
    pids = [sidecar.running().pid for sidecar in pair.both]
    async with Calls(pair.web, "shop") as load:
        await load.more(100)
        server(pair).kill()
        await server(pair).wait()
        await load.more(50, BROKEN)
        await grpc_server(pair.shop)
        await load.more(200)
    print(dict(load.outcomes))
    assert set(load.bad) <= {REFUSED, BROKEN, *CUT}
    assert (
        sum(load.bad[outcome] for outcome in CUT & set(load.bad)) <= 6
    )  # those that were with the server when it died
    assert [sidecar.running().pid for sidecar in pair.both] == pids
    await well(pair)


async def test_the_servers_sidecar_is_killed_under_load_and_comes_back(pair: Pair) -> None:
    async with Calls(pair.web, "shop") as load:
        await load.more(100)
        pair.far.running().kill()
        await pair.far.running().wait()
        await load.more(50, BROKEN)
        await pair.far.start(intercept=False)
        await load.more(200)
    print(dict(load.outcomes))
    assert set(load.bad) <= {REFUSED, BROKEN, *CUT}
    await well(pair)


async def test_the_servers_sidecar_is_restarted_politely_under_load(pair: Pair) -> None:
    """Its pod stays in the directory, so calls fail while it is down. None of those in progress at
    its start fails."""
    async with Calls(pair.web, "shop") as load:
        await load.more(100)
        await pair.far.restart()
        await load.more(200)
    print(dict(load.outcomes))
    # A call that crosses GOAWAY is refused. grpcio sends it again by itself, and may meet the
    # closed listener.
    refused = {outcome for outcome in load.bad if "RST_STREAM with error code 7" in outcome}
    assert set(load.bad) <= {REFUSED, BROKEN, *refused}
    assert sum(load.bad[outcome] for outcome in refused) <= 6
    await well(pair)


async def test_one_of_two_pods_dies_under_load_and_the_other_serves(pair: Pair) -> None:
    """The proxy of a dead pod refuses connections at once, so each new call uses the other pod.
    Calls in progress are lost."""
    annex = pair.mesh.sidecars["annex"]
    async with Calls(pair.web, "stock") as load:
        await load.more(100)
        annex.running().kill()
        await annex.running().wait()
        await load.more(THREADS)  # the earlier outcomes are known
        before = load.answered["shop"]
        await load.more(300)
        assert load.answered["shop"] - before >= 290
        await annex.start(intercept=False)
        before = load.answered["annex"]
        await eventually(
            lambda: load.answered["annex"] > before + 20, "the pod that is back has its share"
        )
    print(dict(load.outcomes))
    assert set(load.bad) <= CUT
    assert sum(load.bad.values()) <= 6
    await well(pair)


HALF = """
call = shop.unary_stream("Flood")(b"1000000 1000", timeout=60)
print(json.dumps({"first": len(next(call))}), flush=True)
try:
    count = 1 + sum(1 for message in call if len(message) == 1000)
    print(json.dumps({"end": "OK", "count": count}), flush=True)
except grpc.RpcError as error:
    print(json.dumps({"end": error.code().name, "details": error.details()}), flush=True)
print(json.dumps({"after": shop.unary_unary("Name")(b"", timeout=60, wait_for_ready=True).decode()}), flush=True)
"""


@pytest.mark.parametrize("who", ["the server", "the server's sidecar"])
async def test_a_stream_whose_server_dies_ends_with_a_status_and_the_channel_stays_usable(
    pair: Pair, who: str
) -> None:
    reader = await speaking(pair.web, f"half-{who[-6:]}", HALF)
    assert (await reader.wait_line("first")) == '{"first": 1000}'
    victim = server(pair) if who == "the server" else pair.far.running()
    victim.kill()
    await victim.wait()
    end = json.loads(await reader.wait_line("end"))
    print(end)
    assert end["end"] == "UNAVAILABLE"
    # The proxy that detected it sends the status, as trailers. Without them grpcio would make one
    # up.
    assert end["details"].startswith(("connection_terminated", "http_response_incomplete"))
    await (grpc_server(pair.shop) if who == "the server" else pair.far.start(intercept=False))
    # The first call after it may still meet the fault; the channel is the same.
    await reader.wait_until(lambda: reader.output.ended, "end", timeout=90)
    assert reader.output.tail().count("after") == 1 or "UNAVAILABLE" in reader.output.tail()
    await well(pair)


async def test_a_server_that_hangs_is_ended_by_the_deadline_and_leaves_nothing_in_the_proxies(
    young: Pair,
) -> None:
    code = """
def one():
    try:
        shop.unary_unary("Name")(b"", timeout=0.5)
    except grpc.RpcError as error:
        return error.code().name
print(json.dumps([one() for _ in range(5)]))
"""
    with paused(server(young)):
        assert await calling(young.web, code) == ["DEADLINE_EXCEEDED"] * 5
    await well(young)


@pytest.mark.parametrize("fresh", [PINGS], indirect=True, ids=[""])
async def test_a_cut_link_is_found_by_ping_and_reported(fresh: Pair) -> None:
    code = """
began = time.monotonic()
call = shop.unary_stream("Wait")(b"cut", timeout=200)
print(json.dumps({"first": next(call).decode()}), flush=True)
try:
    next(call)
except grpc.RpcError as error:
    print(json.dumps({"end": error.code().name, "details": error.details()}), flush=True)
"""
    reader = await speaking(fresh.web, "cut", code)
    await reader.wait_line("first")
    with link_cut(fresh.shop):
        end = json.loads(await reader.wait_line("end"))
    assert end["end"] == "UNAVAILABLE"
    assert "PING" in end["details"]
    await well(fresh)


# Changes...


async def reloads(sidecar: Sidecar, family: str) -> float:
    return await counted(sidecar, f"isthmus_{family}_reloads_total", result="ok")


async def change(sidecar: Sidecar, family: str, write: Callable[[], None]) -> None:
    before = await reloads(sidecar, family)
    write()

    async def seen() -> bool:
        return await reloads(sidecar, family) > before

    await eventually(seen, f"the proxy of {sidecar.pod.name} has counted a reload")


def leaf(sidecar: Sidecar, authority: Authority) -> Callable[[], Awaitable[None]]:
    assert sidecar.identity is not None
    issued = authority.issue(sidecar.identity)
    return lambda: change(sidecar, "identity", lambda: sidecar.write_certificate(issued))


def roots(sidecar: Sidecar, *authorities: Authority) -> Callable[[], Awaitable[None]]:
    return lambda: change(sidecar, "identity", lambda: sidecar.write_roots(*authorities))


async def test_connections_that_are_replaced_every_second_cost_no_call(young: Pair) -> None:
    async def opened() -> float:
        return await counted(
            young.near, "isthmus_connections_opened_total", direction="outbound", peer="dst"
        )

    before = await opened()
    async with Calls(young.web, "stock") as load:
        while await opened() - before < 6:
            await load.more(100)
    print(dict(load.outcomes), dict(load.answered), f"longest {load.longest * 1000:.0f} ms")
    assert load.bad == {}
    await well(young)


async def test_new_certificates_and_a_new_root_under_load_without_a_failed_call(
    young: Pair,
) -> None:
    old, new = young.mesh.authority, Authority()
    sidecars = list(young.mesh.sidecars.values())
    handshakes = await counted(young.far, "isthmus_tls_handshakes_total", result="ok")
    steps = [
        *(leaf(sidecar, old) for sidecar in sidecars),
        *(roots(sidecar, old, new) for sidecar in sidecars),
        *(leaf(sidecar, new) for sidecar in sidecars),
        *(roots(sidecar, new) for sidecar in sidecars),
    ]
    reader = await speaking(young.web, "old", LONG, host="stock")
    async with Calls(young.web, "stock") as load:
        await load.more(100)
        for step in steps:
            await step()
            await load.more(60)
    print(dict(load.outcomes), f"longest {load.longest * 1000:.0f} ms")
    assert load.bad == {}
    assert await counted(young.far, "isthmus_tls_handshakes_total", result="ok") > handshakes
    for sidecar in sidecars:
        assert await counted(sidecar, "isthmus_tls_failures_total") == 0
        sidecar.authority = new
    young.mesh.authority = new
    await finish(young, reader)  # a stream from before all this
    await well(young)


async def test_endpoints_move_under_load_without_a_failed_call(young: Pair) -> None:
    def document(*names: str) -> dict[str, Any]:
        made = young.mesh.document()
        pods = [young.cluster.pods[name] for name in names]
        hosts = [
            (host, str(young.mesh.sidecars[pod.name].identity))
            for pod in pods
            for host in (pod.ipv4, pod.ipv6)
        ]
        made["services"][1]["endpoints"] = [
            {"address": host, "identity": identity} for host, identity in hosts
        ]
        return made

    async def take(*names: str) -> None:
        await change(young.near, "directory", lambda: young.near.write_directory(document(*names)))

    async with Calls(young.web, "stock") as load:
        await load.more(200)
        for here, away in (("shop", "annex"), ("annex", "shop")):
            await take(here)
            await load.more(20)  # earlier messages are old by now
            before = load.answered[away]
            await load.more(200)
            assert load.answered[away] - before <= THREADS  # those in progress
        await take("shop", "annex")

        async def shared() -> bool:
            before = load.answered
            await load.more(300)
            return min(load.answered[name] - before[name] for name in ("shop", "annex")) > 30

        await eventually(shared, "both have their share, unless one was slow just before")
    print(dict(load.outcomes), f"longest {load.longest * 1000:.0f} ms")
    assert load.bad == {}
    await well(young)


# The end of a proxy...

LONG = """
words = queue.SimpleQueue()
chat = shop.stream_stream("Chat")(iter(words.get, None), timeout=60)
said, count = True, 0
while not os.path.exists("finish"):
    words.put(b"%d" % count)
    said = said and next(chat) == b"%d" % count
    count += 1
    if count == 1:
        print("begun", flush=True)
    time.sleep(0.05)
words.put(None)
print(json.dumps({"said": said, "rest": len(list(chat)), "count": count, "code": chat.code().name}), flush=True)
os.unlink("finish")
"""


async def finish(pair: Pair, reader: Process) -> None:
    """A conversation ends by itself, and successfully."""
    (pair.web.directory / "finish").touch()
    end = json.loads(await reader.wait_line("said"))
    assert (end["said"], end["rest"], end["code"]) == (True, 0, "OK")
    await reader.wait_until(lambda: reader.output.ended, "end")


@pytest.mark.parametrize("side", ["near", "far"])
async def test_a_proxy_that_shuts_down_lets_an_open_stream_finish(fresh: Pair, side: str) -> None:
    sidecar: Sidecar = getattr(fresh, side)
    reader = await speaking(fresh.web, "long", LONG)
    await reader.wait_line("begun")
    sidecar.running().signal(signal.SIGTERM)
    await trio.sleep(2)
    assert sidecar.running().alive
    await finish(fresh, reader)
    with trio.fail_after(30):
        assert await sidecar.running().wait() == 0


@pytest.mark.parametrize("fresh", [HASTY], indirect=True, ids=[""])
async def test_a_stream_that_does_not_end_is_cut_at_the_grace_with_a_status(fresh: Pair) -> None:
    code = """
call = shop.unary_stream("Wait")(b"endless", timeout=200)
print(json.dumps({"first": next(call).decode()}), flush=True)
try:
    next(call)
except grpc.RpcError as error:
    print(json.dumps({"end": error.code().name, "details": error.details()}), flush=True)
"""
    reader = await speaking(fresh.web, "endless", code)
    await reader.wait_line("first")
    began = time.monotonic()
    fresh.far.running().signal(signal.SIGTERM)
    end = json.loads(await reader.wait_line("end"))
    print(end)
    assert end["end"] == "UNAVAILABLE"
    assert time.monotonic() - began > 3.5
    with trio.fail_after(30):
        assert await fresh.far.running().wait() == 0


async def test_the_clients_proxy_shuts_down_under_load_and_no_call_is_lost(
    fresh: Pair,
) -> None:
    """GOAWAY makes the application open a new connection. The proxy serves that too, until the
    application is idle. During a conversation it is never idle, however busy the machine is."""
    reader = await speaking(fresh.web, "long", LONG)
    await reader.wait_line("begun")
    async with Calls(fresh.web, "shop") as load:
        await load.more(100)
        fresh.near.running().signal(signal.SIGTERM)
        await load.more(200)
    print(dict(load.outcomes))
    assert load.bad == {}
    await finish(fresh, reader)
    with trio.fail_after(30):
        assert await fresh.near.running().wait() == 0
