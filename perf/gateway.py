"""The cost of the path through a gateway, against the path from pod to pod in one cluster.

    direct    client -> sidecar ---------------- mutual TLS --------------- sidecar -> nginx
    gateway   client -> sidecar -- mutual TLS -- gateway -- mutual TLS -- sidecar -> nginx

Same sidecars and server, all on loopback. Requests of 1 KiB on one keep-alive connection, one after
the other; the two paths take turns, so a disturbance affects both. The CPU time is the gateway's
own.
"""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lab.console import print_table
from perf.pair import BODY, HOST, Proxy, await_port, free_port, make_identities, running, server

ROUNDS, REQUESTS = 10, 500
_WHO = "spiffe://perf.test/ns/perf/sa"
_NOWHERE = "192.0.2.1:80"  # RFC 5737: an address of no service, so the authority selects it


def _identity(folder: Path, name: str) -> dict[str, Any]:
    paths = {key: str(folder / name / f"{key}.pem") for key in ("certificate", "key")}
    return {
        "trust_domain": "perf.test",
        "log": {"level": "warning"},
        "identity": {**paths, "roots": [str(folder / name / "roots.pem")]},
    }


def _services(port: int, **more: object) -> dict[str, Any]:
    endpoint = {"address": HOST, "identity": f"{_WHO}/server", "ports": {"80": port}}
    return {
        "services": [
            {
                "name": "c",
                "ports": [{"port": 80, "protocol": "http1"}],
                "endpoints": [endpoint],
                **more,
            }
        ]
    }


@contextmanager
def _proxy(
    folder: Path,
    name: str,
    port: int,
    document: dict[str, Any],
    directory: dict[str, Any] | None = None,
) -> Iterator[Proxy]:
    if directory is not None:
        (folder / f"{name}-directory.yaml").write_text(json.dumps(directory))
        document["directory"] = {"file": str(folder / f"{name}-directory.yaml")}
    (folder / f"{name}.yaml").write_text(json.dumps({"admin": {"listen": []}, **document}))
    log = folder / f"{name}.log"
    with running(
        [sys.executable, "-m", "proxy.cli", "run", "--config", str(folder / f"{name}.yaml")], log
    ) as process:
        await_port(port, process, log)
        yield Proxy(name, process.pid, port)


@contextmanager
def three(folder: Path) -> Iterator[tuple[Proxy, Proxy]]:
    """(the client's sidecar, the gateway), with the server's sidecar and the server behind them."""
    make_identities(folder, "client", "gateway", "server")
    last, gate, first = free_port(), free_port(), free_port()
    way = {"address": HOST, "port": gate, "identity": f"{_WHO}/gateway"}
    east = {"name": "east", "gateways": [way], "services": [{"name": "c", "ports": [{"port": 80}]}]}
    with ExitStack() as stack:
        back = stack.enter_context(server(folder))
        inbound = {
            "listen": [f"{HOST}:{last}"],
            "fixed_destination": f"{HOST}:{back}",
            "trusted_gateways": [f"{_WHO}/gateway"],
        }
        document = {**_identity(folder, "server"), "outbound": {"listen": []}, "inbound": inbound}
        stack.enter_context(_proxy(folder, "last", last, document))
        document = {
            **_identity(folder, "gateway"),
            "gateway": {"enabled": True, "listen": [f"{HOST}:{gate}"]},
        }
        gateway = stack.enter_context(
            _proxy(folder, "gateway", gate, document, _services(last, export=True))
        )
        outbound = {
            "listen": [f"{HOST}:{first}"],
            "fixed_destination": _NOWHERE,
            "authority_networks": ["192.0.2.0/24"],
        }
        document = {**_identity(folder, "client"), "outbound": outbound, "inbound": {"listen": []}}
        yield (
            stack.enter_context(
                _proxy(folder, "first", first, document, {**_services(last), "clusters": [east]})
            ),
            gateway,
        )


def times(connection: http.client.HTTPConnection, host: str) -> list[float]:
    """Seconds of each request."""
    found = []
    for _ in range(REQUESTS):
        started = time.perf_counter()
        connection.request("GET", "/", headers={"Host": host})
        body = connection.getresponse().read()
        found.append(time.perf_counter() - started)
        assert body == BODY, body[:200]
    return found


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="isthmus-perf-") as name,
        three(Path(name)) as (first, gateway),
    ):
        connection = http.client.HTTPConnection(HOST, first.port, timeout=10)
        seen: dict[str, list[float]] = {"c": [], "c.east": []}
        for host in seen:
            times(connection, host)  # opens connections and sessions
        before = gateway.cpu()
        for _ in range(ROUNDS):
            for host in seen:
                seen[host] += times(connection, host)
        cpu = (gateway.cpu() - before) / (ROUNDS * REQUESTS) * 1e6
    rows = []
    for host, what in (("c", "direct"), ("c.east", "gateway")):
        cuts = statistics.quantiles(seen[host], n=100)
        rows.append([what, *(f"{cuts[place] * 1e3:.2f}" for place in (49, 89, 98))])
    print_table(["ms a request", "p50", "p90", "p99"], rows)
    print(f"the gateway takes {cpu:.0f} µs of CPU time per request")


if __name__ == "__main__":
    main()
