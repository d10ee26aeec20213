"""How much processor time does one hop take for one unary call in the manner of gRPC, beside Envoy and nghttpx? And for a GiB?

HTTP/2 over mutual TLS, 16 connections with 8 streams each, 100 bytes up and down, trailers. Rounds of all are interleaved. All processes
share the cores there are, so calls per second compare only within one run; the processor time of the proxies is what counts.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from perf.pair import HOST, Pair, await_port, free_port, isthmus_pair, make_identities, running
from perf.peers import envoy_pair, nghttpx_pair

ROUNDS, CALLS, CONNECTIONS, STREAMS = 5, 10_000, 16, 8
BULK = 1 << 30


def calls(port: int, body: Path) -> float:
    """Make the calls; returns how many a second were answered. Ends the run if any failed."""
    command = [
        "h2load", "-n", str(CALLS), "-c", str(CONNECTIONS), "-m", str(STREAMS), "-d", str(body),
        "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{HOST}:{port}/perf.Echo/Call",
    ]  # fmt: skip
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    if f"{CALLS} succeeded" not in text:
        raise SystemExit(text)
    line = next(line for line in text.splitlines() if line.startswith("finished in"))
    return float(line.split(",")[1].split()[0])


def check(port: int) -> None:
    """A proxy may answer a call with an error that looks like success to a load generator; this one has to bring the server's bytes."""
    command = ["curl", "-sS", "--http2-prior-knowledge", f"http://{HOST}:{port}/perf.Echo/Call"]
    answer = subprocess.run(command, check=True, capture_output=True, timeout=30).stdout
    if answer != b"y" * 100:
        raise SystemExit(f"not the server's answer: {answer[:200]!r}")


def bulk(port: int) -> float:
    """Fetch one large body over one stream; returns GiB a second."""
    command = ["curl", "-sS", "--http2-prior-knowledge", "-o", "/dev/null", "-w", "%{size_download} %{time_total}", f"http://{HOST}:{port}/bulk"]
    size, seconds = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()
    if int(size) != BULK:
        raise SystemExit(f"{size} bytes of {BULK} came")
    return BULK / 2**30 / float(seconds)


def measure(pairs: dict[str, Pair], body: Path) -> None:
    hop: dict[str, list[float]] = {name: [] for name in pairs}
    rate: dict[str, list[float]] = {name: [] for name in pairs}
    for name, running_pair in pairs.items():
        check(running_pair.outbound.port)
        calls(running_pair.outbound.port, body)  # warm
        print(f"  {name} is there")
    for _ in range(ROUNDS):
        for name, running_pair in pairs.items():
            before = sum(proxy.cpu() for proxy in running_pair.proxies)
            rate[name].append(calls(running_pair.outbound.port, body))
            hop[name].append((sum(proxy.cpu() for proxy in running_pair.proxies) - before) / 2 / CALLS * 1e6)
    print(f"{CONNECTIONS} connections x {STREAMS} streams, {ROUNDS} rounds of {CALLS} calls")
    print("us of CPU per call and hop, median (lowest - highest)")
    ours = statistics.median(hop["isthmus"])
    for name, values in hop.items():
        middle = statistics.median(values)
        ratio = "" if name == "isthmus" else f"   isthmus takes {ours / middle:.2f} times as much"
        print(f"  {name:8} {middle:6.0f} ({min(values):.0f} - {max(values):.0f}), {statistics.median(rate[name]):6.0f} calls/s{ratio}")
    print("one stream of 1 GiB: CPU seconds of both hops, and GiB/s")
    for name, running_pair in pairs.items():
        before = sum(proxy.cpu() for proxy in running_pair.proxies)
        speed = bulk(running_pair.outbound.port)
        print(f"  {name:8} {sum(proxy.cpu() for proxy in running_pair.proxies) - before:6.2f} s, {speed:.2f} GiB/s")


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-perf-")))
        make_identities(folder)
        (folder / "www").mkdir()
        with (folder / "www" / "bulk").open("wb") as file:
            file.truncate(BULK)
        (folder / "body").write_bytes(b"x" * 100)
        (folder / "www" / "perf.Echo").mkdir()
        (folder / "www" / "perf.Echo" / "Call").write_bytes(b"y" * 100)
        port, log = free_port(), folder / "nghttpd.log"
        server = ["nghttpd", "--no-tls", "--trailer=grpc-status: 0", "-d", str(folder / "www"), "-a", HOST, str(port)]
        await_port(port, stack.enter_context(running(server, log)), log)
        pairs: dict[str, Pair] = {"isthmus": stack.enter_context(isthmus_pair(folder, port))}
        for name, peer in (("envoy", envoy_pair(folder, port)), ("nghttpx", nghttpx_pair(folder, port))):
            found = stack.enter_context(peer)
            if found is None:
                print(f"  {name} is not installed, and left out")
            else:
                pairs[name] = found
        measure(pairs, folder / "body")


if __name__ == "__main__":
    main()
