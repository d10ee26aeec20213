"""How much processor time does one hop take for one request? HTTP/1.1, 1 KiB, mutual TLS, connections kept alive.

Baseline: what wrk and nginx take without the proxies, as requests per second. Rounds with and without are interleaved.
"""

from __future__ import annotations

import statistics
import sys

from perf.pair import Pair, pair, wrk

ROUNDS, SECONDS, CONNECTIONS = 3, 4, 16


def measure(running: Pair, connections: int) -> None:
    costs: dict[str, list[float]] = {proxy.name: [] for proxy in running.proxies}
    rates: list[float] = []
    direct: list[float] = []
    wrk(running.outbound.port, connections, 1)  # connections, sessions and caches are warm behind this
    for _ in range(ROUNDS):
        direct.append(wrk(running.server, connections, 1))
        before = {proxy.name: proxy.cpu() for proxy in running.proxies}
        requests = wrk(running.outbound.port, connections, SECONDS)
        rates.append(requests / SECONDS)
        for proxy in running.proxies:
            costs[proxy.name].append((proxy.cpu() - before[proxy.name]) / requests * 1e6)
    print(f"{connections} connections, {ROUNDS} rounds of {SECONDS} s, median (lowest - highest)")
    print(f"  baseline    {statistics.median(direct):8.0f} requests/s without the proxies")
    print(f"  two hops    {statistics.median(rates):8.0f} requests/s ({min(rates):.0f} - {max(rates):.0f})")
    for name, values in costs.items():
        print(f"  {name:10}  {statistics.median(values):8.0f} us of CPU per request ({min(values):.0f} - {max(values):.0f})")
    print(f"  ratio       {statistics.median(direct) / statistics.median(rates):8.1f} times fewer requests/s on the same cores")


def main() -> None:
    with pair() as running:
        idle = {proxy.name: proxy.resident() / 2**20 for proxy in running.proxies}
        print("resident memory after the first request: " + ", ".join(f"{name} {size:.1f} MiB" for name, size in idle.items()))
        for connections in [int(word) for word in sys.argv[1:]] or [1, CONNECTIONS]:
            measure(running, connections)


if __name__ == "__main__":
    main()
