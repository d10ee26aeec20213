"""gRPC through two sidecars: grpcio at both ends, unmodified.

Rules: the client runs in one pod, servers in two others, all behind real interception. The server's
output shows what the server got, the client's output what the client got, and the proxies' metrics
how many connections there were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.calls import GRPC, build, calling, server, speaking, start
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import Health, Pair, client, counted, eventually

pytestmark = pytest.mark.lab

MANY = 2000


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def prepare() -> Pair:
        pair = build(
            laboratory.lab, web={"log": {"access": False}}, shop={"log": {"access": False}}
        )
        pair.cluster.pod("stranger")
        await start(pair)
        return pair

    return laboratory.run(prepare)


@pytest.fixture(autouse=True)
def healthy(laboratory: Laboratory, pair: Pair) -> Iterator[None]:
    """After each test: nothing is left open, without an error or a warning."""
    health = laboratory.run(Health.of, pair)
    yield
    laboratory.run(health.nothing_wrong, "error", "warning")


@pytest.mark.parametrize("version", [4, 6])
async def test_all_four_kinds_of_calls(pair: Pair, version: int) -> None:
    seen = await client(
        pair.web, "grpc-kinds", pair.service.address(version), str(GRPC), "tangerine"
    )
    assert {key: seen[key] for key in ("unary", "server", "client", "both")} == dict.fromkeys(
        ("unary", "server", "client", "both"), True
    )


async def test_two_thousand_calls_of_one_channel_are_spread_over_two_endpoints(pair: Pair) -> None:
    async def answered(name: str) -> float:
        return await counted(
            pair.mesh.sidecars[name],
            "isthmus_responses_total",
            direction="inbound",
            classification="success",
        )

    async def opened(peer: str) -> float:
        return await counted(
            pair.near, "isthmus_connections_opened_total", direction="outbound", peer=peer
        )

    async def evenly() -> bool:
        before = await answered("shop"), await answered("annex"), await opened("src")
        seen = await client(
            pair.web, "grpc-spread", pair.mesh.services["stock"].ipv4, str(GRPC), str(MANY)
        )
        shares = {name: seen["answered"].get(name, 0) for name in ("shop", "annex")}
        assert sum(shares.values()) == MANY
        assert (await answered("shop") - before[0], await answered("annex") - before[1]) == (
            shares["shop"],
            shares["annex"],
        )
        assert await opened("src") - before[2] == 1
        # One half each, within nine standard deviations of a fair coin.
        return bool(800 <= shares["shop"] <= 1200)

    await eventually(
        evenly, "both pods get their half, unless one was slow just before", timeout=120
    )


async def test_five_hundred_calls_at_once_are_more_than_the_proxy_takes_and_all_are_answered(
    pair: Pair,
) -> None:
    code = """
calls = [shop.unary_unary("Echo").future(b"%d" % number, timeout=20) for number in range(500)]
print(json.dumps(sum(call.result() == b"%d" % number for number, call in enumerate(calls))))
"""
    assert await calling(pair.web, code) == 500


async def test_messages_of_4_mib_in_every_direction(pair: Pair) -> None:
    code = """
size = 4 * 1024 * 1024
word = os.urandom(size)
echoed = shop.unary_unary("Echo")(word, timeout=20) == word
flood = [len(message) for message in shop.unary_stream("Flood")(b"8 %d" % size, timeout=30)]
summed = json.loads(shop.stream_unary("Sum")(iter([word] * 8), timeout=30))
chat = [message == word for message in shop.stream_stream("Chat")(iter([word] * 4), timeout=30)]
digest = hashlib.sha256(word * 8).hexdigest()
print(json.dumps([echoed, flood == [size] * 8, summed == {"messages": 8, "bytes": 8 * size, "sha256": digest}, chat == [True] * 4]))
"""
    assert await calling(pair.web, code) == [True] * 4


async def test_compressed_messages(pair: Pair) -> None:
    code = """
channel = grpc.insecure_channel(f"{host}:{port}", options=OPTIONS, compression=grpc.Compression.Gzip)
word = b"tangerine" * 100_000
print(json.dumps(channel.unary_unary(f"/{SERVICE}/Echo")(word, timeout=10) == word))
"""
    assert await calling(pair.web, code) is True


async def test_the_deadline_reaches_the_server(pair: Pair) -> None:
    code = """
began = time.monotonic()
try:
    list(shop.unary_stream("Wait")(b"late", timeout=3))
except grpc.RpcError as error:
    print(json.dumps([error.code().name, time.monotonic() - began]))
"""
    status, seconds = await calling(pair.web, code)
    assert status == "DEADLINE_EXCEEDED"
    assert seconds > 2.9
    left = float((await server(pair).wait_line("late: ")).split()[1])
    assert 0 < left <= 3
    assert "active: False" in await server(pair).wait_line("late: over")


CANCELLED = {
    "call.cancel": "call.cancel()",
    "the channel is closed": "shop.channel.close()",
    "the client dies": "sys.stdout.flush(); os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("how", CANCELLED)
async def test_a_cancellation_reaches_the_server(pair: Pair, how: str) -> None:
    word = how.replace(" ", "-")
    code = f"""
call = shop.unary_stream("Wait")(b"{word}")
next(call)
time.sleep(0.1)
{CANCELLED[how]}
time.sleep(20)
"""
    process = await speaking(pair.web, word, code)
    assert "no deadline" in await server(pair).wait_line(f"{word}: ")
    over = await server(pair).wait_line(f"{word}: over", timeout=40)
    assert "active: False" in over
    await process.aclose()


async def test_one_cancelled_call_of_a_channel_leaves_the_others_alone(pair: Pair) -> None:
    code = """
waiting = [shop.unary_stream("Wait")(b"one of twenty", timeout=20) for _ in range(20)]
for call in waiting:
    next(call)
words = queue.SimpleQueue()
chat = shop.stream_stream("Chat")(iter(words.get, None), timeout=20)
said = []
for number, call in enumerate(waiting):
    call.cancel()
    words.put(b"%d" % number)
    said.append(next(chat) == b"%d" % number)
words.put(None)
print(json.dumps([all(said), next(chat, None) is None]))
"""
    assert await calling(pair.web, code) == [True, True]


async def test_metadata_and_trailers_arrive_intact_binary_ones_too(pair: Pair) -> None:
    code = """
sent = [("x-one", "tangerine"), ("x-many", "a"), ("x-many", "b, c"), ("x-empty", ""), ("x-spaces", "a  b"),
        ("x-bin", bytes(range(256))), ("x-none-bin", b""), ("x-large", "v" * 4000)]
answer, call = shop.unary_unary("Tell").with_call(b"", metadata=sent, timeout=10)
def plain(metadata):
    return sorted([key, value.hex() if isinstance(value, bytes) else value] for key, value in metadata if key.startswith("x-"))
told = [pair for pair in json.loads(answer) if pair[0].startswith("x-")]
print(json.dumps([plain(sent), sorted(told), plain(call.initial_metadata()), plain(call.trailing_metadata())]))
"""
    sent, told, initial, trailing = await calling(pair.web, code)
    assert len(sent) == 8
    assert told == sent
    assert initial == sent
    assert trailing == sent


async def test_errors_of_the_server_arrive_with_their_message_and_details(pair: Pair) -> None:
    words = "100% wrong: ä €\n, naïve \u4e16\u754c"
    code = """
seen = []
for number in range(1, 17):
    try:
        shop.unary_unary("Fail")(f"{number} {sys.argv[3]}".encode(), timeout=10)
    except grpc.RpcError as error:
        metadata = dict(error.trailing_metadata())
        right = metadata["x-details-bin"] == bytes(range(256)) and metadata["x-kind"] == "a test" and "proxy-status" not in metadata
        seen.append([error.code().value[0], error.details(), right])
print(json.dumps(seen))
"""
    assert await calling(pair.web, code, words) == [
        [number, words, True] for number in range(1, 17)
    ]


async def test_an_unknown_method_is_the_servers_to_refuse(pair: Pair) -> None:
    code = """
try:
    shop.unary_unary("Nothing")(b"", timeout=10)
except grpc.RpcError as error:
    print(json.dumps(status(error)))
"""
    assert await calling(pair.web, code) == "UNIMPLEMENTED"


async def test_a_slow_consumer_of_one_stream_delays_no_other_call_of_the_channel(
    pair: Pair,
) -> None:
    """The stream is far larger than all windows between, so it stops until it is read."""
    code = """
size, count = 64 * 1024, 1000
flood = shop.unary_stream("Flood")(b"%d %d" % (count, size), timeout=200)
first = next(flood)
time.sleep(0.5)
times = []
for number in range(300):
    began = time.monotonic()
    shop.unary_unary("Echo")(b"quick", timeout=30)
    times.append(time.monotonic() - began)
rest = sum(map(len, flood))
print(json.dumps([sorted(times), len(first) + rest]))
"""
    before = pair.near.running().peak_rss(), pair.far.running().peak_rss()
    times, total = await calling(pair.web, code)
    assert total == 1000 * 64 * 1024
    print(f"p50 {times[150] * 1000:.1f} ms, longest {times[-1] * 1000:.0f} ms")
    assert times[150] < 1
    for sidecar, old in zip(pair.both, before, strict=True):
        assert sidecar.running().peak_rss() - old < 16 * 1024 * 1024


async def test_a_slow_server_does_not_make_the_proxies_swallow_a_clients_stream(pair: Pair) -> None:
    """Wait reads only the first request. The client's stream must stop, and other calls
    continue."""
    code = """
sent = 0
def flood():
    global sent
    while True:
        sent += 1
        yield b"x" * 65536
stuck = shop.channel.stream_stream(f"/{SERVICE}/Wait")(flood(), timeout=40)
next(stuck)
first, since = sent, time.monotonic()
while time.monotonic() - since < 3:  # it stands still
    time.sleep(0.1)
    if sent != first:
        first, since = sent, time.monotonic()
answers = [shop.unary_unary("Name")(b"", timeout=10) for _ in range(20)]
print(json.dumps([sent - first, first, len(answers)]))
stuck.cancel()
"""
    more, sent, answers = await calling(pair.web, code)
    print(f"{sent} messages of 64 KiB until the client stopped")
    assert more == 0
    assert sent < 200
    assert answers == 20


async def test_a_caller_without_a_sidecar_is_served_too(pair: Pair) -> None:
    """Clear text, HTTP/2 with prior knowledge, recognised by its preface."""
    seen = await client(
        pair.cluster.pods["stranger"], "grpc-kinds", pair.shop.ipv4, str(GRPC), "tangerine"
    )
    assert (seen["unary"], seen["both"]) == (True, True)
    assert (
        await counted(pair.far, "isthmus_detections_total", direction="inbound", result="http2")
        >= 1
    )


async def test_between_the_sidecars_a_call_is_http_2_in_mutual_tls(pair: Pair) -> None:
    health = await Health.of(pair)
    code = "print(json.dumps(shop.unary_unary('Name')(b'', timeout=10).decode()))"
    await calling(pair.web, code)
    mutual = await counted(
        pair.far,
        "isthmus_connections_opened_total",
        direction="inbound",
        peer="src",
        tls="mutual",
    )
    assert mutual >= 1
    await health.only_mutual_tls()
