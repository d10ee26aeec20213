"""The cost of calling another cluster, with redirection, NAT and tunnels. (perf/gateway.py: on
loopback, with CPU.)

    python -m lab.sandbox -- python -m perf.clusters [--requests N]

Two lab clusters, connected by a gateway behind NAT, all on this machine. The network itself takes
almost no time, so the proxies are measured. One client in a pod asks the same server program in
turn, request by request: in its own cluster (two sidecars: the baseline) and in the other one (two
sidecars and the gateway). The requests are HTTP/1.1 on kept-alive connections, and bytes echoed
over opaque TCP, which is a tunnel in the second case. All connections are already open.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import trio

from lab.cluster import Lab
from lab.clusters import Clusters
from lab.console import print_table
from lab.pod import ROOT, Pod
from lab.report import percentile
from lab.sandbox import inside

HTTP, ECHO = 8080, 7000
WARM = 200  # requests of each kind that are not counted

_ECHO = """
import socket, socketserver, sys
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, address_family = True, socket.AF_INET6
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.setsockopt(6, 1, 1)
        while data := self.request.recv(65536):
            self.request.sendall(data)
Server(("::", int(sys.argv[1])), Handler).serve_forever()
"""

_CLIENT = """
import http.client, json, socket, sys, time
requests, warm, http_port, echo_port = map(int, sys.argv[1:5])
hosts = sys.argv[5:]
connections = {host: http.client.HTTPConnection(host, http_port, timeout=30) for host in hosts}
streams = {host: socket.create_connection((host, echo_port), timeout=30) for host in hosts}
for stream in streams.values():
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
def ask(host):
    connections[host].request("GET", "/")
    response = connections[host].getresponse()
    assert response.status == 200, response.status
    response.read()
def echo(host):
    streams[host].sendall(b"x" * 64)
    assert len(streams[host].recv(64, socket.MSG_WAITALL)) == 64
found = {}
for name, call in (("HTTP/1.1", ask), ("opaque TCP", echo)):
    times = {host: [] for host in hosts}
    for number in range(requests + warm):
        for host in hosts:
            began = time.perf_counter()
            call(host)
            if number >= warm:
                times[host].append((time.perf_counter() - began) * 1e6)
    found[name] = {host: sorted(values) for host, values in times.items()}
print(json.dumps(found))
"""


async def measure(requests: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds of each request, sorted: kind -> host -> times."""
    async with Lab() as lab:
        clusters = Clusters(lab)
        west, east = clusters.add("west"), clusters.add("east", nat=True)
        web = west.cluster.pod("web")
        west.join(web, dns={}, log={"access": False})
        async with trio.open_nursery() as nursery:
            for mesh in (west, east):
                pod = mesh.cluster.pod("c")
                mesh.join(pod, log={"access": False})
                mesh.service("c", [pod], {HTTP: "http1", ECHO: "opaque"}, export=True)
                nursery.start_soon(serve, pod)
            for mesh in (west, east):
                mesh.sidecars["gateway"].settings["log"] = {"access": False}
            clusters.link()
            nursery.start_soon(clusters.start)
        arguments = [str(number) for number in (requests, WARM, HTTP, ECHO)]
        done = await web.run_python(_CLIENT, *arguments, "c", "c.east", timeout=300)
        if not done.ok:
            raise SystemExit(done.stderr.decode())
        found: dict[str, Any] = json.loads(done.stdout)
        return found


async def serve(pod: Pod) -> None:
    """Start both servers of a pod."""
    await pod.start(
        "web",
        [sys.executable, "-m", "lab.apps.web", "::", str(HTTP)],
        port=HTTP,
        env={"PYTHONPATH": str(ROOT)},
    )
    await pod.python("echo", _ECHO, str(ECHO), port=ECHO)


def main() -> None:
    """Measure, and print baseline, result and ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=3000,
        help="requests of each kind on each path (default: 3000)",
    )
    arguments = parser.parse_args()
    if not inside():
        raise SystemExit(
            "perf.clusters runs in the lab's sandbox: python -m lab.sandbox -- python -m"
            " perf.clusters"
        )
    found = trio.run(measure, arguments.requests)
    rows = []
    for kind, hosts in found.items():
        for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            own, remote = (percentile(hosts[host], share) / 1000 for host in ("c", "c.east"))
            rows.append(
                [
                    f"{kind} {label}",
                    *(f"{figure:.3f}" for figure in (own, remote, remote - own)),
                    f"{remote / own:.2f}",
                ]
            )
    print_table(["milliseconds", "own cluster", "by gateway", "added", "ratio"], rows)


if __name__ == "__main__":
    main()
