"""Two sidecars have one connection for the calls of many clients. What some of these do does not
affect the others: many deadlines of a few milliseconds, and trailers that are too large. Clients
and servers are grpcio."""

from __future__ import annotations

import pytest

from tests.e2e.calls import Calls, build, calling, start
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import Pair, counted

pytestmark = pytest.mark.lab

# Ten clients, each with its own connection, make 28 calls a second with a deadline of 30 ms. The
# server would answer after 0.1 s.
_IMPATIENT = """
outcomes, lock = {}, threading.Lock()
ends = time.monotonic() + float(sys.argv[3])
def client():
    channel = grpc.insecure_channel(f"{host}:{port}", options=[*OPTIONS, ("grpc.use_local_subchannel_pool", 1)])
    grpc.channel_ready_future(channel).result(timeout=10)
    sleep = channel.unary_unary(f"/{SERVICE}/Sleep")
    step = time.monotonic()
    while step < ends:
        step += 1 / 28
        try:
            sleep(b"0.1", timeout=0.03)
            outcome = "OK"
        except grpc.RpcError as error:
            outcome = error.code().name
        with lock:
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        time.sleep(max(0, step - time.monotonic()))
    channel.close()
clients = [threading.Thread(target=client) for _ in range(10)]
for thread in clients:
    thread.start()
for thread in clients:
    thread.join()
print(json.dumps(outcomes))
"""

_TRAILS = """
outcomes = {}
for _ in range(int(sys.argv[3])):
    try:
        shop.unary_unary("Trail")(sys.argv[4].encode(), timeout=10)
        outcome = "OK"
    except grpc.RpcError as error:
        outcome = error.code().name
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "ordinary"])
def pair(laboratory: Laboratory, request: pytest.FixtureRequest) -> Pair:
    async def prepare() -> Pair:
        settings = {"fast_path": request.param, "log": {"access": False}}
        pair = build(laboratory.lab, web=settings, shop=settings)
        await start(pair)
        return pair

    return laboratory.run(prepare)


async def trouble(pair: Pair) -> dict[str, float]:
    """What must not change: connections between the sidecars, and changes of breakers."""
    return {
        "connections": await counted(
            pair.near, "isthmus_connections_opened_total", direction="outbound", peer="dst"
        ),
        "opened": await counted(pair.near, "isthmus_breaker_changes_total"),
    }


def test_ten_clients_that_give_up_after_30_ms_cost_a_patient_one_nothing(
    laboratory: Laboratory, pair: Pair
) -> None:
    async def run() -> None:
        async with Calls(
            pair.web, "shop", pause=0.1
        ) as load:  # calls that end well make up for those that do not: here there are few of them
            await load.more(50)
            before = await trouble(pair)
            outcomes = await calling(pair.web, _IMPATIENT, "8")
            await load.more(50)
            after = await trouble(pair)
        assert outcomes.get("DEADLINE_EXCEEDED", 0) > 1000
        assert set(outcomes) <= {"DEADLINE_EXCEEDED"}, outcomes
        assert load.bad == {}
        assert after == before

    laboratory.run(run)


@pytest.mark.parametrize("size", ["20000", "70000"])
def test_trailers_that_are_too_large_cost_the_other_calls_nothing(
    laboratory: Laboratory, pair: Pair, size: str
) -> None:
    async def run() -> None:
        async with Calls(pair.web, "shop") as load:
            await load.more(20)
            before = await trouble(pair)
            outcomes = await calling(pair.web, _TRAILS, "100", size)
            await load.more(20)
            after = await trouble(pair)
        assert sum(outcomes.values()) == 100
        assert "OK" not in outcomes
        assert load.bad == {}
        assert after == before

    laboratory.run(run)
