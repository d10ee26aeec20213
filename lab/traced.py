"""The trace part of the demonstration: one request from west to east, and the tree of the spans
that the proxies exported.
"""

import secrets

from lab.process import LabError
from lab.stage import HTTP, Stage
from lab.traces import gathered, hand_over, tree

_REQUEST = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"traceparent": sys.argv[2]})
print(urllib.request.urlopen(request, timeout=20).status)
"""
# The caller's sidecar, the gateway's two sides, the server's sidecar.
_WAY = [
    ("west", "web", "client"),
    ("east", "gateway", "server"),
    ("east", "gateway", "client"),
    ("east", "c", "server"),
]


async def traced(stage: Stage) -> None:
    """Send a request with a trace context, as an application would, and show its spans."""
    report = stage.report
    report.section = (
        "One request across both clusters as a trace, from the spans that the proxies exported"
        " (OTLP)"
    )
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    url = f"http://c.east:{HTTP}/shelf?token={(secret := secrets.token_hex(8))}"
    done = await stage.web.run_python(_REQUEST, url, f"00-{trace_id}-{caller}-01", timeout=30)
    try:
        spans = await gathered(stage.collectors, trace_id, len(_WAY))
    except LabError as error:
        report.prove("trace", f"{error}; the client saw {done.text[:100]}", held=False)
        return
    parents = [caller, *(span.span_id for span in spans[:-1])]
    held = len(spans) == len(_WAY) and [span.parent_id for span in spans] == parents
    report.prove(
        "one trace",
        f"{len(spans)} spans, each a child of its caller's span, the first a child of the"
        " application's",
        held,
    )
    seen = [(span.cluster, span.pod, span.kind) for span in spans]
    detail = ", ".join(f"{pod} of {cluster} ({kind})" for cluster, pod, kind in seen)
    report.prove("which pod", detail, seen == _WAY)
    near, _, leaves, far = (
        [str(span.attributes.get("isthmus.peer.identity")) for span in spans]
        if len(spans) == len(_WAY)
        else [""] * 4
    )
    held = near == far != leaves and all("spiffe://" in each for each in (near, far, leaves))
    report.prove("who was there", "each span names the verified identity of the other end", held)
    report.prove(
        "nothing secret", "the query of the request is in no span", secret not in str(spans)
    )
    report.show(["", *tree(spans)])
    if hand_over(body for collector in stage.collectors for body in collector.raw()):
        report.show(["", f"In Jaeger: search for the trace {trace_id}"])
