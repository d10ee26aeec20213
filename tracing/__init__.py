"""Tracing: trace contexts in headers, spans, and their export. Uses OpenTelemetry, not proxy/.

In the data path:

context.py       the trace context of a request, independent of the header format
propagation.py   reads the context from any of the header formats, and writes ours in its place
w3c.py           `traceparent` and `tracestate`
b3.py            Zipkin's headers
jaeger.py        `uber-trace-id`
grpc_bin.py      `grpc-trace-bin`
sampling.py      whether a trace is recorded, and new ids
queue.py         the queue between the data path and the exporter's thread

In the exporter's thread:

spans.py         records of requests -> spans
attributes.py    the names of span attributes
export.py        converts records to OpenTelemetry spans, and exports them
otlp.py          the client that posts them to a collector
resource.py      the attributes that all spans of a proxy share
pod.py           the pod's metadata, as such attributes
workload.py      the workload of the pod, and the name of its service
"""
