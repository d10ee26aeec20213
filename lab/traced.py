"""The demonstration's step about traces: one request, what its sidecars have exported of it, and the tree that this makes."""

import secrets

from lab.process import LabError
from lab.stage import HTTP, Stage
from lab.traces import hand_over, tree

_REQUEST = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"traceparent": sys.argv[2]})
print(urllib.request.urlopen(request, timeout=20).status)
"""


async def traced(stage: Stage) -> None:
    """Send a request with a context as an application would, and show what became of it."""
    report, collector = stage.report, stage.collector
    report.section = "One request as a trace, from the spans that the sidecars exported (OTLP)"
    if collector is None:
        return
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    url = f"http://shop:{HTTP}/shelf?token={(secret := secrets.token_hex(8))}"
    done = await stage.web.run_python(_REQUEST, url, f"00-{trace_id}-{caller}-01", timeout=30)
    try:
        spans = await collector.trace(trace_id, 2)
    except LabError as error:
        report.prove("trace", f"{error}; the client saw {done.text[:100]}", held=False)
        return
    near, far = spans[0], spans[-1]
    held = (near.parent_id, far.parent_id, len(spans)) == (caller, near.span_id, 2)
    report.prove("one trace", f"{len(spans)} spans, each under the one that called it, the first under the application's", held)
    held = (near.pod, far.pod, near.cluster) == ("web", "shop", "west")
    report.prove("which pod", f"{near.pod} ({near.kind}) and {far.pod} ({far.kind}) in {near.cluster}", held)
    identities = [str(span.attributes.get("isthmus.peer.identity")) for span in (near, far)]
    expected = [str(stage.sidecars[name].identity) for name in ("shop", "web")]
    report.prove("who was there", "each span names the verified identity of the other end", identities == expected)
    report.prove("nothing secret", "the query of the request is in no span", secret not in str(spans))
    report.show(["", *tree(spans)])
    if hand_over(collector.raw()):
        report.show(["", f"In Jaeger: search for the trace {trace_id}"])
