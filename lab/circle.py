"""The loop part of the demonstration: two clusters forward to each other, and the loop guard stops
the request.
"""

import json

from lab.mesh import Mesh
from lab.pod import Pod
from lab.stage import Stage, error_type

ROUND = 8085

_REQUEST = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1], timeout=30)
connection.request("GET", sys.argv[2])
answer = connection.getresponse()
print(json.dumps([answer.status, answer.getheader("Proxy-Status", ""), answer.read().decode()]))
"""


async def circle(stage: Stage) -> None:
    """Send a request that would loop between two clusters forever, and show where it was
    stopped."""
    report = stage.report
    report.section = (
        "A loop across clusters: `ping` in north and `pong` in south forward to each other"
    )
    area = stage.lab.wide_area()
    north = Mesh(stage.lab.cluster("north"), stage.mesh.authority)
    south = Mesh(stage.lab.cluster("south"), stage.mesh.authority)
    pods: list[Pod] = []
    for mesh, mine, theirs, other in (
        (north, "ping", "pong", "south"),
        (south, "pong", "ping", "north"),
    ):
        area.border(mesh.cluster)
        gateway, pod = mesh.cluster.pod("gateway"), mesh.cluster.pod(mine)
        mesh.gateway(gateway, area.attach(gateway))
        mesh.join(pod)
        mesh.service(mine, [pod], {ROUND: "http1"}, export=True)
        mesh.service(
            "away",
            [pod],
            {ROUND: "http1"},
            split=[{"service": theirs, "cluster": other, "weight": 1}],
        )
        await stage.server(pod, "forward", str(ROUND), f"away:{ROUND}", port=ROUND)
        pods.append(pod)
    north.link(south)
    south.link(north)
    await north.start()
    await south.start()
    done = await pods[0].run_python(_REQUEST, f"away:{ROUND}", "/for/ever")
    try:
        status, said, body = json.loads(done.stdout)
    except ValueError:
        report.prove("loop", done.stderr.decode(errors="replace").strip()[-200:], held=False)
        return
    report.prove(
        "cut",
        f"{status} {error_type(said)}",
        (status, error_type(said)) == (508, "proxy_loop_detected"),
    )
    report.prove(
        "the cycle",
        body.strip().partition(": ")[2],
        "south/gateway -> south/pong -> north/gateway -> north/ping" in body,
    )
    answers = [
        (await pod.run_python(_REQUEST, f"127.0.0.1:{ROUND}", "/asked")).stdout for pod in pods
    ]
    counts = [json.loads(answer)[2] for answer in answers]
    report.prove(
        "what it cost",
        f"for one request, ping received {counts[0]} and pong {counts[1]}",
        counts == ["1", "1"],
    )
