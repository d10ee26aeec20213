"""The gRPC part of the demonstration: `web` calls the service `stock`, which two pods of the shop
serve.
"""

from typing import Any

import trio

from lab.pod import Pod
from lab.stage import GRPC, SECRET, Stage, error_type, why

CALLS = 600  # over one connection of the client
FAIR = 0.35  # minimum share of each of two pods: by chance missed once in 10**13 runs
DEADLINE = 2.5  # seconds: the call must reach the server within this time
PATIENCE = 30.0  # maximum wait in seconds for what happens without our action
# A pod that paused gets fewer requests for a while. Here that time is short.
FORGETFUL: dict[str, Any] = {"balancing": {"decay": "1s"}}

KINDS = {
    "unary": ("unary call", "one request, one response"),
    "server": ("server streaming", "1 request, 100 responses"),
    "client": ("client streaming", "200 requests, one response with their digest"),
    "both": ("bidirectional", "50 requests and 50 responses in turn, on one stream"),
}


async def calls(stage: Stage) -> None:
    """All kinds of calls, one connection over two pods, a deadline, a cancellation, and calls
    without a server.
    """
    stage.report.section = (
        "gRPC, grpcio to grpcio: `web` calls `stock`, which the pods `shop` and `annex` serve"
    )
    answer = await stage.client(stage.web, "grpc-kinds", "stock", GRPC, SECRET)
    for key, (label, detail) in KINDS.items():
        held = answer.get(key) is True
        stage.report.prove(label, f"{detail} {why(answer, held)}", held)
    await spread(stage)
    await patience(stage)
    await unavailable(stage)


async def grpc_server(stage: Stage, pod: Pod) -> None:
    """Start the server of one pod."""
    await stage.server(pod, "grpc_service", str(GRPC), pod.name, port=GRPC)


async def spread(stage: Stage) -> None:
    """The requests of one connection go to both pods, unless one of them was slow just before. The
    sidecar of `web` counts the client's connections.
    """
    until = trio.current_time() + PATIENCE
    held, detail = await spread_once(stage)
    while not held and trio.current_time() < until:
        held, detail = await spread_once(stage)
    stage.report.prove("balanced by call", detail, held)


async def spread_once(stage: Stage) -> tuple[bool, str]:
    """One attempt: whether it held, and its description."""
    before = await connections(stage)
    answer = await stage.client(stage.web, "grpc-spread", "stock", GRPC, str(CALLS))
    opened = await connections(stage) - before
    answered = answer.get("answered", {})
    shares = [answered.get(pod.name, 0) for pod in (stage.shop, stage.annex)]
    held = opened == 1 and sum(shares) == CALLS and min(shares) >= FAIR * CALLS
    detail = (
        f"{CALLS} calls, of which `shop` answered {shares[0]} and `annex` {shares[1]}; the client"
        f" had {opened:.0f} TCP connection"
    )
    return held, f"{detail} {why(answer, held)}"


async def connections(stage: Stage) -> float:
    """How many connections the programs in `web` have opened, as its sidecar counted."""
    counted = await stage.sidecars["web"].metrics()
    wanted = ("isthmus_connections_opened_total{", 'direction="outbound"', 'peer="src"')
    return sum(value for name, value in counted.items() if all(part in name for part in wanted))


async def patience(stage: Stage) -> None:
    """The server sees the caller's deadline, and a cancelled call ends there too."""
    answer = await stage.client(stage.web, "grpc-impatient", "stock", GRPC, str(DEADLINE))
    left, over = await await_lines(stage, "deadline: ", "deadline: over")
    late = answer.get("deadline", {})
    held = (
        late.get("code") == "DEADLINE_EXCEEDED"
        and "s left" in left
        and 0 < float(left.split()[1]) <= DEADLINE
        and bool(over)
    )
    detail = (
        f"DEADLINE_EXCEEDED after {late.get('seconds', 0):.2f} s; the server received it:"
        f" {left.partition(': ')[2]}"
    )
    stage.report.prove("deadline", f"{detail} {why(answer, held)}", held)
    _, over = await await_lines(stage, "cancelled: ", "cancelled: over")
    held = answer.get("cancelled") == "CANCELLED" and "active: False" in over
    stage.report.prove(
        "cancellation",
        f"the server noticed: its call was {over.partition(': ')[2]} {why(answer, held)}",
        held,
    )


async def await_lines(stage: Stage, *prefixes: str) -> list[str]:
    """For each prefix, the first line of the servers' output that contains it, or "" if none
    comes."""
    outputs = [pod.processes["grpc_service"].output for pod in (stage.shop, stage.annex)]

    def find(prefix: str) -> str:
        return next(
            (line for output in outputs for line in output.lines if line.startswith(prefix)), ""
        )

    with trio.move_on_after(PATIENCE):
        while not all(map(find, prefixes)):  # noqa: ASYNC110  # two programs may write it, and a small delay is harmless
            await trio.sleep(0.02)
    return [find(prefix) for prefix in prefixes]


async def unavailable(stage: Stage) -> None:
    """Without a server, the proxy that notices it answers with a gRPC status. Calls work again when
    the servers are back.
    """
    pods = (stage.shop, stage.annex)
    async with trio.open_nursery() as nursery:
        for pod in pods:
            nursery.start_soon(pod.processes["grpc_service"].aclose)
    answer = await stage.client(stage.web, "grpc-gone", "stock", GRPC)
    status = answer.get("proxy-status", "")
    held = (
        answer.get("code") == "UNAVAILABLE"
        and error_type(status) == "connection_refused"
        and status.startswith(_inbound_names(pods))
    )
    detail = (
        f"{answer.get('code')}, Proxy-Status: {status.partition(';')[0]};error={error_type(status)}"
    )
    stage.report.prove("servers stopped", f"{detail} {why(answer, held)}", held)
    async with trio.open_nursery() as nursery:
        for pod in pods:
            nursery.start_soon(grpc_server, stage, pod)
    answer = await stage.client(stage.web, "grpc-gone", "stock", GRPC)
    held = answer.get("code") == "OK"
    stage.report.prove(
        "servers back", f"{answer.get('code')}, with no sidecar restarted {why(answer, held)}", held
    )


def _inbound_names(pods: tuple[Pod, ...]) -> tuple[str, ...]:
    return tuple(f"{pod.name}.default.inbound;" for pod in pods)
