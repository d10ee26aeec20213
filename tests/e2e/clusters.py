"""Two clusters that share only the reachability of their gateways. The tests of test_clusters*.py
use them.

West has clients (`web`) and a service `c`; east has `c` too, and services that only east has.
East's gateway is behind NAT, west's has an address of its own in the wide area."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from lab.cluster import Lab
from lab.clusters import Clusters
from lab.load import Load
from lab.pod import Pod
from lab.process import Process
from lab.sidecar import merge
from tests.e2e.stage import WEB, Curled, curl, eventually, serve

GRPC, MAIL = 50051, 2525
HTTP = {WEB: "http1"}
GATEWAY = "spiffe://cluster.local/ns/isthmus/sa/gateway"
# A service returns home when an endpoint there has been usable for one second: tests do not want to
# wait for ten. And a gateway must not be marked as failed because a busy machine delays its
# answers.
SETTINGS: dict[str, Any] = {
    "clusters": {"settle": "1s", "probe_timeout": "20s"},
    "dns": {},
    "inbound": {"trusted_gateways": [GATEWAY]},
}


def clusters(lab: Lab, *names: str, nat: str = "east") -> Clusters:
    """Linked clusters with a gateway each; the gateway of `nat` is behind NAT. Nothing is
    started."""
    made = Clusters(lab)
    for name in names:
        made.add(name, nat=name == nat)
    made.link()
    return made


def member(made: Clusters, cluster: str, name: str, **settings: Any) -> Pod:
    """A new pod with a sidecar."""
    mesh = made.meshes[cluster]
    pod = mesh.cluster.pod(name)
    merged: dict[str, Any] = {}
    for layer in (SETTINGS, settings):
        merge(merged, layer)
    mesh.join(pod, **merged)
    return pod


async def web_server(made: Clusters, cluster: str, pod: str = "c", port: int = WEB) -> Process:
    """A web server in a pod, which identifies itself as `pod of cluster`."""
    return await serve(
        made.pod(cluster, pod), "web", "::", str(port), f"{pod} of {cluster}", port=port, name="web"
    )


async def ask(pod: Pod, url: str, *arguments: str) -> dict[str, Any]:
    """The response of a server of lab/apps/web.py to a request for /head. It must be 200."""
    answer = await curl(pod, *arguments, url)
    assert answer.status == 200, (
        f"{answer.status} {answer.headers.get('proxy-status')} {answer.errors} {answer.body[:300]!r}"
    )
    response: dict[str, Any] = json.loads(answer.body)
    return response


def header(response: dict[str, Any], name: str) -> list[str]:
    """The values of a header field as the server got it."""
    return [value for key, value in response["headers"] if key.lower() == name]


async def resolved(pod: Pod, name: str, version: int = 4) -> str:
    """The address that a name has for the programs of a pod."""
    family = {4: "AF_INET", 6: "AF_INET6"}[version]
    code = (
        f"import socket, sys; print(socket.getaddrinfo(sys.argv[1], 80, socket.{family})[0][4][0])"
    )
    done = await pod.run_python(code, name)
    assert done.ok, done.stderr.decode()
    return done.text.strip()


async def shares(load: Load, number: int) -> Counter[str]:
    """The servers of the next requests of a load, at least `number` of them."""
    before = Counter(load.answered)
    await load.more(number)
    return load.answered - before


async def answers_again(pod: Pod, url: str, name: str, timeout: float = 60.0) -> Curled:
    """Wait until this server answers a URL with 200."""

    async def probe() -> Curled | None:
        answer = await curl(pod, url)
        return (
            answer if answer.status == 200 and json.loads(answer.body).get("name") == name else None
        )

    found: Curled = await eventually(probe, f"{url} is answered by {name}", timeout)
    return found
